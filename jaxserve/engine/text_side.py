"""What the text side of an engine needs of a model: tokenizer, ends of a sequence, sampling defaults."""

import logging
from pathlib import Path
from typing import NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.errors import ModelError
from jaxserve.loading import sampling_defaults
from jaxserve.loading.checkpoint import Checkpoint, open_checkpoint
from jaxserve.loading.sampling_defaults import SamplingDefaults
from jaxserve.text.reading import Formats, load_plugin
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


class TextSide(NamedTuple):
    tokenizer: Tokenizer | None
    """None for a model without one."""
    eos_token_ids: list[int]
    """Every end-of-sequence token."""
    sampling_defaults: SamplingDefaults
    """Instead of those of `SamplingParams`, where a request says nothing."""
    formats: Formats
    """In which it writes reasoning and tool calls."""


def load_text_side(config: EngineConfig, path: Path | str, chat_template: str | None) -> TextSide:
    """Raises ModelError, also when `config` names a place without a tokenizer or generation config, and
    ConfigError for a parser that is not there."""
    tokenizer = load_tokenizer(config.tokenizer or path, chat_template)
    if config.tokenizer and tokenizer is None:
        raise ModelError(f"{config.tokenizer} has no tokenizer")
    checkpoint = open_checkpoint(Path(path), tensors=config.load_format != "dummy")
    defaults, ends = _generation_config(config.generation_config, checkpoint)
    eos = [*checkpoint.eos_token_ids, *ends, *(tokenizer.eos_ids if tokenizer is not None else ())]
    if config.tool_parser_plugin:
        load_plugin(Path(config.tool_parser_plugin).expanduser())
    formats = Formats.choose(
        config.tool_call_parser,
        config.reasoning_parser,
        checkpoint.config.get("model_type", ""),
        tokenizer.chat_template if tokenizer is not None else None,
    )
    return TextSide(tokenizer, list(dict.fromkeys(eos)), defaults, formats)


def _generation_config(wanted: str, checkpoint: Checkpoint) -> tuple[SamplingDefaults, list[int]]:
    """The sampling defaults, and ends of a sequence besides the checkpoint's."""
    if wanted == "none":
        return {}, []
    ends: list[int] = []
    if wanted == "auto":
        found = checkpoint.sampling_defaults()
    else:
        found, ends = sampling_defaults.from_file(Path(wanted).expanduser())
    if found:
        shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
        log.info("sampling defaults: %s (--generation-config none: OpenAI's)", shown)
    return found, ends
