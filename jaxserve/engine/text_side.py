"""What the text side of an engine needs of a model: its tokenizer and the tokens that end a sequence."""

from pathlib import Path

from jaxserve.config import EngineConfig
from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer


def load_text_side(
    config: EngineConfig, path: Path | str, chat_template: str | None
) -> tuple[Tokenizer | None, list[int]]:
    """The tokenizer (None for a model without one) and every end-of-sequence token.

    Raises ModelError, also when `config.tokenizer` names a place without a tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer or path, chat_template)
    if config.tokenizer and tokenizer is None:
        raise ModelError(f"{config.tokenizer} has no tokenizer")
    eos = list(open_checkpoint(Path(path), tensors=config.load_format != "dummy").eos_token_ids)
    if tokenizer is not None:
        eos += tokenizer.eos_ids
    return tokenizer, list(dict.fromkeys(eos))
