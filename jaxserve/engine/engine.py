"""Engine: text in, text out, in this process."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

from jaxserve.aliases import translate
from jaxserve.config import DEFAULT_MODEL, EngineConfig, parse_mesh
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import Abort
from jaxserve.engine.plan import Plan
from jaxserve.engine.prompts import Prompt, is_token_ids, parse_prompt
from jaxserve.engine.stats import StepRecord, add_up
from jaxserve.engine.text_side import load_text_side
from jaxserve.errors import InvalidRequest, renamed
from jaxserve.loading.hub import resolve
from jaxserve.options import build
from jaxserve.outputs import BeamSearchOutput, RequestOutput
from jaxserve.sampling_params import BeamSearchParams, SamplingParams
from jaxserve.structs import to_struct
from jaxserve.text.beams import beam_search_output
from jaxserve.text.chat_template import content_text
from jaxserve.text.output import OutputProcessor
from jaxserve.text.reading import MakeParser
from jaxserve.text.tools import ToolUse

Message = Mapping[str, Any]
Conversation = Sequence[Message]


class Tokenized(NamedTuple):
    text: str | None
    token_ids: list[int]
    cache_salt: str = ""
    make_parser: MakeParser | None = None


class Engine:
    """An engine for scripts. Options are the fields of `EngineConfig`.

    Raises ConfigError or ModelError when the model cannot be served as asked. Not thread-safe; for many
    callers at once see `AsyncEngine`.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, chat_template: str | None = None, **options: Any):
        config = build(EngineConfig, {"model": model, **options})
        path = resolve(config.model)
        self.config = build(EngineConfig, {"model": path, **options})
        text_side = load_text_side(config, path, chat_template)
        self.tokenizer, eos, self._sampling_defaults, self._formats = text_side
        with contextlib.ExitStack() as made:  # a replica that cannot start takes the others with it
            self._cores = []
            for i in range(parse_mesh(config.mesh).data):
                self._cores.append(EngineCore(self.config, i))
                made.callback(self._cores[-1].close)
            made.pop_all()
        hello = self._cores[0].hello
        self.max_model_len = hello.max_model_len
        self.vocab_size = hello.vocab_size
        self._processor = OutputProcessor(
            self.tokenizer,
            eos,
            hello.max_model_len,
            hello.max_request_tokens,
            hello.vocab_size,
            config.scheduling_policy == "priority",
            self._formats.tags(self.tokenizer),
        )
        self._core_of: dict[str, EngineCore] = {}
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        """Where a request's outputs go that `generate` or `stream` waits for."""
        self._unread: deque[RequestOutput] = deque()
        """Outputs of all others, for `step`."""
        self._ids = itertools.count()

    def default_params(self, **given: Any) -> SamplingParams:
        """These parameters, and for the rest what the model's makers recommend. Raises InvalidRequest."""
        return SamplingParams(**{**self._sampling_defaults, **given})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts, all in one batch; outputs in the order of the prompts.

        One prompt or a list; one SamplingParams or one per prompt, without them `default_params()`. Raises
        InvalidRequest, before anything runs, for a prompt or parameter that cannot be served.
        """
        one = isinstance(prompts, str | dict) or is_token_ids(prompts)
        many = cast(list[Prompt], [prompts] if one else list(prompts))
        each = _for_each(self.default_params() if params is None else params, len(many))
        return self._complete((self._tokenized(prompt) for prompt in many), each, use_progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress: bool = True,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        documents: Sequence[Message] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Message] | None = None,
        tool_choice: str | Message | None = None,
        parallel_tool_calls: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list; outputs in their order.

        `chat_template` (Jinja text) replaces the model's own; `chat_template_kwargs` are variables of it. The
        output goes on with the last message (`continue_final_message`) or begins a new one
        (`add_generation_prompt`, the default). Without `params` an answer may take the rest of the context.
        Tools are OpenAI's; calls and reasoning are in `outputs[0].message`.
        Raises InvalidRequest, before anything runs.
        """
        one = not messages or isinstance(messages[0], Mapping)
        many = cast(list[Conversation], [messages] if one else list(messages))
        each = _for_each(self.default_params(max_tokens=None) if params is None else params, len(many))
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids to generate", "messages")
        asked = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        use = to_struct(asked, ToolUse)
        render = partial(
            self.tokenizer.template(chat_template).render,
            tools=use.offered,
            chat_template_kwargs=chat_template_kwargs,
            documents=documents,
            add_generation_prompt=(
                not continue_final_message if add_generation_prompt is None else add_generation_prompt
            ),
            continue_final_message=continue_final_message,
        )
        formats = self._formats.of(chat_template)
        prompts, settled = [], []
        for i, (conversation, wanted) in enumerate(zip(many, each, strict=True)):
            with nullcontext() if one else renamed({"messages": f"messages[{i}]"}):
                text = render(conversation)
            continued = content_text(conversation[-1].get("content")) if continue_final_message else None
            make_parser, kept = formats.reading(self.tokenizer, use, text, wanted, continued)
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            prompts.append(Tokenized(text, encoded, "", make_parser))
            settled.append(kept)
        with renamed({"prompt": "messages"}):
            return self._complete(prompts, settled, use_progress)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_progress: bool = True,
    ) -> list[BeamSearchOutput]:
        """The likeliest completions of each prompt, the best first. Raises InvalidRequest before it runs.

        For requests of other kinds beside it: `SamplingParams(use_beam_search=True, n=…)`.
        """
        with renamed({"n": "beam_width"}):
            found = self.generate(prompts, params.sampling_params(), use_progress)
        return [beam_search_output(output, params, self.tokenizer) for output in found]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Yield what each step adds to one prompt's completion. Closing the iterator aborts the request."""
        request_id = self.add_request(prompt, _with_kind(params or self.default_params(), "delta"))
        yield from self._outputs([request_id])

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request for `step`; its id. Raises InvalidRequest."""
        return self._add(self._tokenized(prompt), params or self.default_params(), request_id)

    def step(self) -> list[RequestOutput]:
        """One turn of the engine: outputs of the added requests that have something new."""
        self._turn()
        outputs, self._unread = list(self._unread), deque()
        return outputs

    def abort(self, request_id: str | Sequence[str]) -> None:
        """End requests now and free their blocks. Unknown and finished ones are ignored."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            if core := self._core_of.pop(one, None):
                aborts: list[Abort] = self._processor.abort(one)
                for abort in aborts:
                    core.abort(abort.id, abort.keep)

    def has_unfinished(self) -> bool:
        return bool(self._unread) or any(core.has_unfinished() for core in self._cores)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges since start, added up over the replicas."""
        return add_up(core.stats() for core in self._cores)

    def record_steps(self, record: Callable[[StepRecord], None]) -> None:
        """From now on, call `record` with every step that is done, of any replica."""
        for core in self._cores:
            core.record_steps(record)

    def plan(self) -> Plan:
        """What a replica takes on its devices and holds: known shapes, and the compiler's analysis of the
        programs that are ready."""
        return self._cores[0].plan()

    def reset_prefix_cache(self) -> None:
        """Forget the prompts and outputs that later ones could have begun with."""
        for core in self._cores:
            core.reset_prefix_cache()

    def wait_until_warm(self, timeout: float | None = None) -> bool:
        """Wait until every program is compiled; whether that is so."""
        return all(core.wait_until_warm(timeout) for core in self._cores)

    def close(self) -> None:
        """Free the devices' memory."""
        for core in self._cores:
            core.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tokenized(self, prompt: Prompt) -> Tokenized:
        content, cache_salt = parse_prompt(prompt)
        if isinstance(content, list):
            return Tokenized(None, content, cache_salt)
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids", "prompt")
        return Tokenized(content, self.tokenizer.encode(content), cache_salt)

    def _add(self, prompt: Tokenized, params: SamplingParams, request_id: str | None = None) -> str:
        request_id = request_id if request_id is not None else f"request-{next(self._ids)}"
        core = min(self._cores, key=lambda core: core.unfinished)
        for request in self._processor.add(
            request_id,
            prompt.text,
            prompt.token_ids,
            params,
            prompt.cache_salt,
            make_parser=prompt.make_parser,
        ):
            core.add(request)
        self._core_of[request_id] = core
        return request_id

    def _complete(
        self, prompts: Iterable[Tokenized], params: Sequence[SamplingParams], use_progress: bool
    ) -> list[RequestOutput]:
        """One of `params` for each prompt."""
        ids: list[str] = []
        try:
            for prompt, wanted in zip(prompts, params, strict=True):
                ids.append(self._add(prompt, _with_kind(wanted, "final")))
        except BaseException:
            self.abort(ids)
            raise
        done = self._run(ids, use_progress)
        return [done[request_id] for request_id in ids]

    def _run(self, ids: list[str], use_progress: bool) -> dict[str, RequestOutput]:
        from tqdm import tqdm

        done: dict[str, RequestOutput] = {}
        # a bar only for work that takes a moment, and only for a person
        quiet = None if use_progress else True
        with (
            closing(self._outputs(ids)) as outputs,
            tqdm(total=len(ids), unit="request", delay=1.0, disable=quiet) as bar,
        ):
            for output in outputs:
                done[output.request_id] = output
                bar.update()
        return done

    def _outputs(self, ids: list[str]) -> Generator[RequestOutput, None, None]:
        """What these requests give until they end. Closing it aborts them."""
        inbox: deque[RequestOutput] = deque()
        self._inboxes.update(dict.fromkeys(ids, inbox))
        try:
            while inbox or not self._core_of.keys().isdisjoint(ids):
                if inbox:
                    output = inbox.popleft()
                    output.raise_failure()
                    yield output
                else:
                    self._turn()
        finally:
            self.abort(ids)
            for request_id in ids:
                del self._inboxes[request_id]

    def _turn(self) -> None:
        """Step every replica that has work, and hand its outputs to those who wait for them."""
        for core in self._cores:
            if not core.has_unfinished():
                continue
            outputs, aborts = self._processor.process(core.step())
            for abort in aborts:
                core.abort(abort.id, abort.keep)
            for output in outputs:
                if output.finished:
                    del self._core_of[output.request_id]
                self._inboxes.get(output.request_id, self._unread).append(output)


class LLM(Engine):
    """Engine under the field's best-known name, with vLLM's keyword names accepted as well."""

    def __init__(self, model: str = DEFAULT_MODEL, **keywords: Any):
        chat_template = keywords.pop("chat_template", None)
        super().__init__(chat_template=chat_template, **translate({"model": model, **keywords}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        return super().generate(prompts, sampling_params, use_tqdm)

    def chat(  # type: ignore[override]  # two names are vLLM's
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        return super().chat(messages, sampling_params, use_tqdm, **options)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        return super().beam_search(prompts, params, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        return self.default_params()


def _for_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> Sequence[SamplingParams]:
    many = [params] * count if isinstance(params, SamplingParams) else params
    if len(many) != count:
        raise InvalidRequest(f"{count} prompts but {len(many)} SamplingParams", "params")
    return many


def _with_kind(params: SamplingParams, kind: str) -> SamplingParams:
    import msgspec

    return msgspec.structs.replace(params, output_kind=kind)
