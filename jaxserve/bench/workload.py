"""What is asked and when: prompts, lengths and arrivals, the same for the same seed."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from jaxserve.config import about
from jaxserve.errors import ConfigError

INPUT_LEN, OUTPUT_LEN = 192, 128
SHAREGPT_INPUT, SHAREGPT_OUTPUT = (161.0, 1.1), (338.0, 0.9)
"""Mean tokens and the deviation of their logarithm: assumed, after what is said of ShareGPT's conversations,
not measured on them."""
SHORTEST, LONGEST_INPUT, LONGEST = 4, 1024, 2048
"""Requests of a data set, or drawn like one, have at least 4 tokens each way, and at most 1,024 in and 2,048
in all, as in vLLM's benchmarks."""
CHARS_PER_TOKEN = 4

_COMMON = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home
water room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city community name president
team minute idea body information back parent face level office door health person art war history party
result change reason research girl moment air teacher force education foot boy age policy process music
market sense nation plan interest death experience use class control field development role rate heart
light voice mind price report decision view relationship town road arm difference value building action
season tax director position player record paper space ground form event official matter center couple
site project activity star table need court oil situation cost industry figure street image phone data
picture practice piece land product doctor wall worker news test movie north love step language tree
south fire small large long short early young little great high different local social important public
good new old big next free open full late hard major better best
"""
WORDS = _COMMON.split()
"""Each is one token, with the space before it, to GPT-2, Llama 3, Qwen and their kin."""

Prompt = str | list[int]
Speak = Callable[[Random, int], Prompt]
"""Draws a text, or a list of token ids, of so many tokens; two of them can be joined with `+`."""


class Ask(NamedTuple):
    """One request: `tokens` is how long its prompt is meant to be; the server's usage says what it was."""

    prompt: Prompt
    tokens: int
    output_tokens: int


class Workload(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the requests are like."""

    dataset_name: Annotated[
        Literal["random", "sharegpt-like"],
        about("lengths of random prompts: alike, or as long-tailed as people's conversations"),
    ] = "random"
    dataset_path: Annotated[
        str | None, about("prompts from a file: ShareGPT's JSON, or JSON lines with prompt and output_tokens")
    ] = None
    input_len: Annotated[
        int | None, about(f"tokens in a prompt, on average ({INPUT_LEN}; sharegpt-like: 161)")
    ] = None
    output_len: Annotated[
        int | None, about(f"tokens in an output, on average ({OUTPUT_LEN}; sharegpt-like: 338; a file's own)")
    ] = None
    range_ratio: Annotated[
        float, about("lengths are uniform within so much of their average; 0: all the same")
    ] = 0.0
    prefix_len: Annotated[int, about("further tokens that prompts begin with and share")] = 0
    num_prefixes: Annotated[int, about("how many different such beginnings there are")] = 1

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prefixes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.prefix_len < 0:
            raise ConfigError(f"prefix_len must not be negative, not {self.prefix_len}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio must be from 0 to below 1, not {self.range_ratio}")
        if self.range_ratio and (self.dataset_path or self.dataset_name != "random"):
            raise ConfigError("range_ratio is for random prompts: others have lengths of their own")
        if self.dataset_path and (self.dataset_name != "random" or self.input_len or self.prefix_len):
            raise ConfigError("dataset_path brings its prompts: no dataset_name, input_len or prefix_len")
        if self.num_prefixes > 1 and not self.prefix_len:
            raise ConfigError("num_prefixes needs a prefix_len")

    def asks_of_runs(
        self, seed: object, speak: Speak, count_tokens: Callable[[str], int]
    ) -> Callable[[str], Iterator[Ask]]:
        """The requests of a run, by its name: no prefix cache shall know them from another run.

        They are drawn for it; of a file each run takes the next ones. Raises ConfigError for a file that
        will not do.
        """
        if not self.dataset_path:
            return lambda run: self.asks(f"{seed} {run}", speak, count_tokens)
        whole = self.asks(seed, speak, count_tokens)
        first = next(whole)
        rest = itertools.chain([first], whole)
        return lambda run: rest

    def asks(self, seed: object, speak: Speak, count_tokens: Callable[[str], int]) -> Iterator[Ask]:
        """Requests without end. `count_tokens` is asked for the lengths of a file's texts."""
        rng = Random(str(seed))
        if self.dataset_path:
            yield from self._from_file(rng, count_tokens)
        prefixes = [speak(rng, self.prefix_len) for _ in range(self.num_prefixes)]
        while True:
            tokens, output_tokens = self._lengths(rng)
            prompt = rng.choice(prefixes) + speak(rng, tokens)  # type: ignore[operator]
            yield Ask(prompt, self.prefix_len + tokens, output_tokens)

    def _lengths(self, rng: Random) -> tuple[int, int]:
        if self.dataset_name == "sharegpt-like":
            (mean_in, spread_in), (mean_out, spread_out) = SHAREGPT_INPUT, SHAREGPT_OUTPUT
            tokens = _long_tailed(rng, self.input_len or mean_in, spread_in, LONGEST_INPUT)
            return tokens, _long_tailed(rng, self.output_len or mean_out, spread_out, LONGEST - tokens)
        means = (self.input_len or INPUT_LEN, self.output_len or OUTPUT_LEN)
        tokens, output_tokens = (_uniform(rng, mean, self.range_ratio) for mean in means)
        return tokens, output_tokens

    def _from_file(self, rng: Random, count_tokens: Callable[[str], int]) -> Iterator[Ask]:
        pairs = read_dataset(self.dataset_path or "")
        rng.shuffle(pairs)
        asked = []
        for prompt, answer in pairs:
            tokens = count_tokens(prompt)
            output = count_tokens(answer) if isinstance(answer, str) else answer
            output = self.output_len or output or OUTPUT_LEN
            if SHORTEST <= tokens <= LONGEST_INPUT and SHORTEST <= output <= LONGEST - tokens:
                asked.append(Ask(prompt, tokens, output))
                yield asked[-1]
        if not asked:
            told = f"{SHORTEST} to {LONGEST_INPUT} tokens, and {LONGEST} with its answer"
            raise ConfigError(f"{self.dataset_path} has no prompt of {told}")
        told = f"all {len(asked)} prompts of {self.dataset_path} were asked, and are again: caches know them"
        print(f"note: {told}", file=sys.stderr)
        yield from itertools.cycle(asked)


def words(rng: Random, tokens: int) -> str:
    """A text of common words: one token each."""
    return "".join(f" {word}" for word in rng.choices(WORDS, k=tokens))


def token_ids(vocab_size: int) -> Speak:
    """Speaks in token ids below `vocab_size`."""
    return lambda rng, tokens: rng.choices(range(vocab_size), k=tokens)


def estimate_tokens(text: str) -> int:
    """Without a tokenizer: four characters are a token."""
    return math.ceil(len(text) / CHARS_PER_TOKEN)


def arrivals(rate: float, burstiness: float, seed: object) -> Iterator[float]:
    """Seconds from the begin at which requests are due, without end: a Poisson process of `rate` per second.

    With a burstiness other than 1 the times between them are gamma distributed with that shape: below 1
    requests come in bursts, above it they come more evenly.
    """
    rng, now = Random(str(seed)), 0.0
    while True:
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        yield now


def read_dataset(path: str) -> list[tuple[str, str | int | None]]:
    """(prompt, its answer or the answer's tokens): the first two turns of each conversation, or JSON lines.

    Raises ConfigError for a file that is neither, naming the line, or the entry of a list.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the dataset {path}: {error.strerror}") from None
    pairs, place = [], path
    try:
        whole = data.lstrip().startswith(b"[")
        rows = msgspec.json.decode(data, type=list[msgspec.Raw]) if whole else data.splitlines()
        for number, row in enumerate(rows, 1):
            place = f"{path}, {'entry' if whole else 'line'} {number},"
            if (pair := _pair(_decode_row(row))) is not None:
                pairs.append(pair)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is neither ShareGPT's JSON nor JSON lines: {error}") from None
    if not pairs:
        raise ConfigError(f"{path} has no prompts")
    return pairs


class _Turn(msgspec.Struct):
    value: Any = None
    content: Any = None
    """Of what is not text nothing is asked."""


class _Row(msgspec.Struct):
    prompt: str | None = None
    output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    conversations: list[_Turn] | None = None
    messages: list[_Turn] | None = None


_decode_row = msgspec.json.Decoder(_Row).decode


def _pair(row: _Row) -> tuple[str, str | int | None] | None:
    turns = row.conversations or row.messages
    if turns is None and row.prompt is None:
        raise msgspec.ValidationError("it has no prompt, conversations or messages")
    if turns is None:
        return row.prompt, row.output_tokens
    if len(turns) < 2:
        return None
    prompt, answer = (turn.content if turn.value is None else turn.value for turn in turns[:2])
    return (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


def _uniform(rng: Random, mean: float, ratio: float) -> int:
    return max(1, round(rng.uniform(mean * (1 - ratio), mean * (1 + ratio))))


def _long_tailed(rng: Random, mean: float, spread: float, longest: int) -> int:
    drawn = rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)
    return max(SHORTEST, min(round(drawn), longest))
