"""The forms a prompt may have."""

from typing import Any, TypeGuard

from jaxserve.errors import InvalidRequest

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, `{"prompt": …}` or `{"prompt_token_ids": […]}`."""


def parse_prompt(prompt: Prompt) -> str | list[int]:
    """The text or the token ids of a prompt. Raises InvalidRequest for anything else."""
    if isinstance(prompt, dict):
        if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
            raise InvalidRequest('a prompt is {"prompt": …} or {"prompt_token_ids": […]}', "prompt")
        (prompt,) = prompt.values()
    if not isinstance(prompt, str | list):
        raise InvalidRequest(f"a prompt is text or token ids, not {type(prompt).__name__}", "prompt")
    return prompt


def is_token_ids(prompt: object) -> TypeGuard[list[int]]:
    """Whether a list is one prompt of token ids rather than a list of prompts."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
