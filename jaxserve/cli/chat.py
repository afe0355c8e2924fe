"""`jaxserve chat`: a conversation in the terminal, with a model here or a server anywhere."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from jaxserve.cli.flags import Parser, add_options, given_flags, read_options
from jaxserve.cli.talk import LocalModel, Message, RemoteModel, Talk
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, JaxserveError

HELP = """\
/system TEXT  begin anew with this system message
/reset        forget the conversation
/stats        tokens and times of the last answer
/help         this list
/exit         leave (or Ctrl-D); Ctrl-C stops an answer"""


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve chat",
        usage="jaxserve chat [MODEL] [OPTIONS]",
        description="Chat with a model in the terminal. Without MODEL: the built-in default model.",
        epilog=f"commands in the chat:\n{HELP}",
    )
    parser.add_argument("--url", help="talk to this OpenAI-compatible server instead")
    parser.add_argument("--api-key", metavar="KEY", help="key for --url (default: $OPENAI_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, metavar="X", help="(default: the model's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: no limit)")
    add_options(parser, EngineConfig)
    return parser


def run(args: argparse.Namespace) -> int:
    with closing(_talk(args)) as talk:
        conversation = Conversation(talk, args.system)
        if sys.stdin.isatty():
            _at_terminal(conversation)
        else:
            _from_pipe(conversation)
    return 0


class Conversation:
    """Messages so far, and what the user's lines do to them."""

    def __init__(self, talk: Talk, system: str | None):
        self.talk = talk
        self.restart(system)

    def restart(self, system: str | None) -> None:
        self.system = system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, line: str) -> bool:
        """Answer a line or obey a command; False: leave."""
        command, _, text = line.partition(" ")
        if not command.startswith("/"):
            if line:
                self._answer(line)
        elif command in ("/exit", "/quit"):
            return False
        elif command == "/system":
            self.restart(text.strip() or None)
            _note("system message set" if self.system else "no system message")
        elif command == "/reset":
            self.restart(self.system)
            _note("conversation forgotten")
        elif command == "/stats":
            for name, value in self.talk.stats().items():
                _note(f"{name}: {value}")
        else:
            _note(HELP if command == "/help" else f"unknown command {command}\n{HELP}")
        return True

    def _answer(self, line: str) -> None:
        """Stream the answer; what failed before its first word is as if never asked."""
        self.messages.append({"role": "user", "content": line})
        text = ""
        try:
            with _interruptible() as interrupted, closing(self.talk.answer(self.messages)) as pieces:
                for piece in pieces:
                    text += piece
                    print(piece, end="", flush=True)
                    if interrupted():
                        break
        except KeyboardInterrupt:  # pressed twice: nothing came in between
            pass
        finally:
            print(flush=True)
            if text:
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.pop()


def _talk(args: argparse.Namespace) -> Talk:
    wanted = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    options = {name: value for name, value in wanted.items() if value is not None}
    if args.url is None:
        if args.api_key is not None:
            raise ConfigError("--api-key needs --url")
        config = read_options(args, EngineConfig)
        _note(f"loading {config.model}")
        return LocalModel(config, options)
    flags = [flag for flag in given_flags(args, EngineConfig) if flag != "--model"]
    if flags or args.config:
        flag = flags[0] if flags else "--config"
        raise ConfigError(f"{flag} has no meaning with --url: the server has the engine")
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    model = args.positional_model or getattr(args, "model", None)
    return RemoteModel(args.url, model, key, options)


def _from_pipe(conversation: Conversation) -> None:
    for line in sys.stdin.buffer:
        if not conversation.say(line.decode(errors="replace").strip()):
            return


def _at_terminal(conversation: Conversation) -> None:
    import readline  # noqa: F401  arrow keys and recall in input()

    _note(f"talking to {conversation.talk.name}; /help lists commands")
    while True:
        try:
            if not conversation.say(input("> ").strip()):
                return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _note("\n(/exit or Ctrl-D leaves)")
        except JaxserveError as error:
            _note(f"jaxserve: {error}")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the yielded function true; a second one interrupts."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
