"""Request fields that are known but not served: refused by name, unless they ask for nothing.

OpenAI's SDKs and LangChain send defaults such as `presence_penalty: 0`; a value listed here changes nothing
and is let through, as null is. Any other is a 400.
"""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import InvalidRequest

NoOps = Mapping[str, tuple[Any, ...]]

SAMPLING: NoOps = {
    "logits_processors": ([],),
    "guided_decoding_backend": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "store": (False,),
    "prompt_cache_retention": (),
}
CHAT: NoOps = {
    **SAMPLING,
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "mm_processor_kwargs": ({},),
}
COMPLETION: NoOps = {**SAMPLING, "suffix": (), "prompt_embeds": ()}
STREAM_OPTIONS: NoOps = {"include_obfuscation": (False,)}
MESSAGE: NoOps = {"audio": (), "annotations": ([],)}


def drop_no_ops(fields: dict[str, Any], unsupported: NoOps, path: str = "") -> None:
    """Take the fields that ask for nothing out of `fields`. Raises InvalidRequest for one that asks."""
    for name in [name for name in fields if name in unsupported]:
        if not any(_same(fields[name], value) for value in (None, *unsupported[name])):
            raise InvalidRequest(
                f"{path}{name} is not supported by this server", f"{path}{name}", "unsupported_field"
            )
        del fields[name]


def _same(a: Any, b: Any) -> bool:
    """Equal, with exact types: true is not 1, but 0.0 is 0."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)
