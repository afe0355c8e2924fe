"""The sampling that a model's makers recommend, under the names of `SamplingParams`."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.sampling_params import SamplingParams

GENERATION_CONFIG = "generation_config.json"

SamplingDefaults = dict[str, float]
"""Values for some of temperature, top_p, top_k (an integer) and min_p."""

log = logging.getLogger(__name__)


class Vocabulary(NamedTuple):
    """What a format calls things."""

    names: Mapping[str, str]
    """Its name of each parameter that we have -> ours."""
    neutral: Mapping[str, Any]
    """Its name of others -> the value that asks for nothing, where that is not zero, false, empty or null."""
    silent: re.Pattern[str]
    """Its names of what recommends no sampling at all, or only in company of another."""


JSON = Vocabulary(
    names={name: name for name in ("temperature", "top_p", "top_k", "min_p")},
    neutral={
        "do_sample": True,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "guidance_scale": 1.0,
        "typical_p": 1.0,
        "num_beams": 1,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "max_length": 20,
    },
    silent=re.compile(
        r"_.*|(?!forced_).*_token_id|transformers_version|return_dict_in_generate|output_.*"
        r"|use_cache|cache_.*|max_cache_len|prefill_chunk_size|low_memory|(disable_)?compile.*"
        r"|use_mtp|speculation_type|prompt_lookup_num_tokens|max_matching_ngram_size"
        r"|(is_|num_)?assistant.*|target_lookbehind"
    ),
)
"""`neutral` as transformers has them; the last two lines of `silent`, on speculation, change no text."""
GGUF_SAMPLING = "general.sampling."
GGUF = Vocabulary(
    names={
        f"{GGUF_SAMPLING}temp": "temperature",
        f"{GGUF_SAMPLING}top_p": "top_p",
        f"{GGUF_SAMPLING}top_k": "top_k",
        f"{GGUF_SAMPLING}min_p": "min_p",
    },
    neutral={f"{GGUF_SAMPLING}penalty_repeat": 1.0},
    silent=re.compile(r".*\.(penalty_last_n|xtc_threshold|mirostat_.*)"),
)
IDENTITY = ("general.organization", "general.basename", "general.finetune")
OURS: Mapping[tuple[Any, ...], SamplingDefaults] = {
    # the card has 0.2, at which this size in 4 bits answers every fifth plain question without end
    ("HuggingFaceTB", "smollm2", "8k-lc100k-mix1-ep2"): {"temperature": 0.0},
}
"""Our own recommendations, for GGUF files without one, by what they say of themselves (IDENTITY)."""


class Ends(msgspec.Struct):
    """What a `generation_config.json` says of the ends of a sequence."""

    eos_token_id: int | list[int] | None = None


def from_generation_config(content: Mapping[str, Any], path: Path) -> SamplingDefaults:
    """From a model's own `generation_config.json`, which `path` names in the log."""
    return _read(JSON, content, path)


def from_gguf(metadata: Mapping[str, Any], path: Path) -> SamplingDefaults:
    """From a file's `general.sampling.*`, or else ours."""
    ours = OURS.get(tuple(metadata.get(key) for key in IDENTITY), {})
    sampling = {key: value for key, value in metadata.items() if key.startswith(GGUF_SAMPLING)}
    return _read(GGUF, sampling, path) or dict(ours)


def from_file(place: Path) -> tuple[SamplingDefaults, list[int]]:
    """From a `generation_config.json` that a user named, or its directory; also its end-of-sequence tokens.

    Raises ModelError, for a wrong value too.
    """
    path = place / GENERATION_CONFIG if place.is_dir() else place
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        eos = msgspec.convert(content, Ends).eos_token_id
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"generation_config must be auto, none, or a directory with a {GENERATION_CONFIG}; "
            f"{path} cannot be read: {error}"
        ) from None
    return _read(JSON, content, path, strict=True), [eos] if isinstance(eos, int) else eos or []


def _read(
    vocabulary: Vocabulary, values: Mapping[str, Any], path: Path, strict: bool = False
) -> SamplingDefaults:
    """Logs what is not used: a parameter that we don't have, or a wrong value where not `strict`."""
    found = {}
    for key, value in values.items():
        if value is None:
            continue
        if (name := vocabulary.names.get(key)) is None:
            if not vocabulary.silent.fullmatch(key) and not _asks_for_nothing(vocabulary, key, value):
                log.warning("%s recommends %s %s, which is not used", path, key, value)
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            SamplingParams(**{name: value})
        except InvalidRequest as error:
            wrong = f"{key} in {path}: {error}"
            if strict:
                raise ModelError(f"{wrong} (generation_config none does without it)") from None
            log.warning("%s; it is left out", wrong)
        else:
            found[name] = value
    return found


def _asks_for_nothing(vocabulary: Vocabulary, key: str, value: Any) -> bool:
    return bool(value == vocabulary.neutral[key] if key in vocabulary.neutral else not value)
