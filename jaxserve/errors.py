"""Errors that a user can act on. Everything else is a bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class JaxserveError(Exception):
    """Base of every error this package raises on purpose; its text is one line for a person."""


class InvalidRequest(JaxserveError, ValueError):
    """A request (or an argument) that cannot be served as it is.

    `param` is the full path of the offending field, as the user wrote it (`messages[0].content`).
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class ModelError(JaxserveError):
    """A model that cannot be found, fetched or loaded."""


class ConfigError(JaxserveError, ValueError):
    """An engine or server option with a wrong value."""


class QueueFull(JaxserveError):
    """As many requests wait as may: the same one can be served later."""


class EngineDied(JaxserveError, RuntimeError):
    """The engine process ended while the request was in it."""


@contextmanager
def renamed(written: dict[str, str]) -> Iterator[None]:
    """Errors about a parameter name the field that the client wrote."""
    try:
        yield
    except InvalidRequest as error:
        head = (error.param or "").partition("[")[0]
        if head not in written:
            raise
        text, param = str(error), error.param or ""
        if text.startswith(head):
            text = written[head] + text.removeprefix(head)
        raise InvalidRequest(text, written[head] + param.removeprefix(head), error.code) from None
