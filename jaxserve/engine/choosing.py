"""A step's tokens: its logits are shaped where a row asks for it, then sampled."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxserve.engine.guide import Guide
from jaxserve.engine.programs import Programs
from jaxserve.engine.request import Request
from jaxserve.engine.sampling import Variant
from jaxserve.engine.scheduler import Chunk
from jaxserve.engine.shaping import ShapeVariant, Shaping, is_shaped
from jaxserve.engine.step import Slots
from jaxserve.errors import InvalidRequest

Refuse = Callable[[Request, InvalidRequest], None]
"""Ends a request that cannot go on; its row's token is dropped."""


class Chooser:
    """One core's. `shaping` is the device's state, made anew with the slots."""

    def __init__(self, programs: Programs, refuse: Refuse, on_host: bool):
        self.shaping: Shaping
        self._programs = programs
        self._refuse = refuse
        self._on_host = on_host
        self._guide = Guide(refuse)

    def enter(self, request: Request) -> None:
        """Tell the device about a request that has got a slot, or tokens that it has not sampled."""
        if is_shaped(request.spec):
            assert request.slot is not None
            packed = self._programs.enter_layout.pack(request.slot, request.spec, request.output)
            self.shaping = self._programs.enter(self.shaping, packed)

    def choose(
        self, slots: Slots, chunks: Sequence[Chunk], raw: jax.Array, targets: jax.Array
    ) -> tuple[Slots, jax.Array | None]:
        """Dispatch it, for logits float32 [seqs, vocab] and targets [seqs, 2] as `forward` gives them.

        What was chosen is as `Sampled.pack` has it; None where no chunk reaches the end of its sequence.
        """
        variant = variant_of(chunks)
        if variant is None:
            return slots, None
        seqs = raw.shape[0]
        logits: jax.Array | np.ndarray = self._processed(chunks, raw)
        own: jax.Array | np.ndarray = raw
        rows = self._rows(chunks, seqs)
        if rows is not None:
            shape = self._programs.shape(seqs, shape_variant_of(chunks, variant))
            self.shaping, logits = shape(self.shaping, slots, logits, targets, rows)
            if variant != "full":  # nobody asks for the model's own, which may be gone
                own = logits
        slots, sampled = self._programs.sample(seqs, variant)(slots, logits, own, targets)
        if not self._on_host:
            sampled.copy_to_host_async()
        return slots, sampled

    def _rows(self, chunks: Sequence[Chunk], seqs: int) -> np.ndarray | None:
        """What shapes each row (see RowsLayout); None where no row asks for it."""
        asking = [
            (row, chunk.request)
            for row, chunk in enumerate(chunks)
            if chunk.samples and not chunk.request.finish_reason and _asks(chunk.request)
        ]
        if not asking:
            return None
        packed, here, masks = self._programs.rows_layout(seqs).empty()
        self._guide.fill(asking, masks)
        for row, request in asking:
            here[row] = is_shaped(request.spec)
            for rule in request.rules:
                rule.narrow(masks[row], request.output, request.generated - 1)
            if not masks[row].any():
                masks[row] = 2**32 - 1
                told = "allowed_token_ids, bad_words, min_tokens and the output's form leave no token"
                asked = "allowed_token_ids" if request.spec.allowed_token_ids else "bad_words"
                self._refuse(request, InvalidRequest(told, asked))
        return packed

    def _processed(self, chunks: Sequence[Chunk], raw: jax.Array) -> jax.Array | np.ndarray:
        """The logits after the functions that requests brought with them."""
        asking = [
            (row, chunk.request)
            for row, chunk in enumerate(chunks)
            if chunk.samples and chunk.request.spec.logits_processors and not chunk.request.finish_reason
        ]
        if not asking:
            return raw
        logits = np.array(raw)
        for row, request in asking:
            try:
                for process in request.spec.logits_processors:
                    changed = process(list(request.output), logits[row].copy())
                    if changed is None:
                        raise TypeError("it returned None, not logits")
                    logits[row] = changed
            except Exception as error:
                told = f"logits_processors failed with {type(error).__name__}: {error}"
                self._refuse(request, InvalidRequest(told, "logits_processors"))
                logits[row] = 0.0
        return logits


def variant_of(chunks: Sequence[Chunk]) -> Variant | None:
    """The cheapest sample program that serves every row that samples; None without one."""
    specs = [chunk.request.spec for chunk in chunks if chunk.samples]
    if not specs:
        return None
    if any(spec.logprobs is not None for spec in specs):
        return "full"
    return "random" if any(spec.temperature > 0 for spec in specs) else "greedy"


def shape_variant_of(chunks: Sequence[Chunk], variant: Variant) -> ShapeVariant:
    """The cheapest shape program for rows that are sampled by `variant`."""
    specs = [chunk.request.spec for chunk in chunks if chunk.samples]
    if variant == "full" or any(spec.typical_p < 1.0 for spec in specs):
        return "typical"
    return "plain" if any(map(is_shaped, specs)) else "masks"


def _asks(request: Request) -> bool:
    """Whether its logits are shaped."""
    return bool(request.rules or request.matcher) or is_shaped(request.spec)
