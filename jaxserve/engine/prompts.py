"""The forms a prompt may have."""

from typing import Any, NamedTuple, TypeGuard

from jaxserve.errors import InvalidRequest

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, `{"prompt": …}` or `{"prompt_token_ids": […]}`, these perhaps with a `"cache_salt"`."""


class GivenPrompt(NamedTuple):
    content: str | list[int]
    cache_salt: str
    """Prompts share the prefix cache with those of the same salt."""


def parse_prompt(prompt: Prompt) -> GivenPrompt:
    """Raises InvalidRequest for what is no prompt."""
    salt: Any = ""
    if isinstance(prompt, dict):
        fields = dict(prompt)
        salt = fields.pop("cache_salt", "")
        if not isinstance(salt, str):
            raise InvalidRequest(f"cache_salt must be text, not {type(salt).__name__}", "cache_salt")
        if len(fields) != 1 or not fields.keys() <= {"prompt", "prompt_token_ids"}:
            raise InvalidRequest('a prompt is {"prompt": …} or {"prompt_token_ids": […]}', "prompt")
        (prompt,) = fields.values()
    if not isinstance(prompt, str | list):
        raise InvalidRequest(f"a prompt is text or token ids, not {type(prompt).__name__}", "prompt")
    return GivenPrompt(prompt, salt)


def is_token_ids(prompt: object) -> TypeGuard[list[int]]:
    """Whether a list is one prompt of token ids rather than a list of prompts."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
