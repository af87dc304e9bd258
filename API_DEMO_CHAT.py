"""Chat with a trained model in the terminal.

python API_DEMO_CHAT.py [MODEL]                    the newest weights under out/, or those named
python API_DEMO_CHAT.py [MODEL] --prompt "Hello"   one answer, nothing else
echo "Hello" | python API_DEMO_CHAT.py [MODEL]     a turn per line
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from src.inference.chat import Conversation, find_template
from src.inference.decoder import Decoder
from src.inference.generate import add_sampling_arguments, end_with_the_reader, sampling_of
from src.inference.load import (
    add_model_arguments,
    find_tokenizer,
    find_weights,
    load_model,
    newest_weights,
    pretrained_only,
)

HELP = """\
  /reset              forget everything
  /retry              another answer to the last question
  /save FILE          keep the conversation and its state
  /load FILE          go on where a saved one ended
  /set [NAME VALUE]   show the settings, or change one: /set temperature 0.8
  /exit               or Ctrl-D
Enter sends, Alt-Enter (or Esc, Enter) begins a new line, Ctrl-C stops the answer."""


class Stopped:
    """While it is entered, Ctrl-C sets `now` instead of ending the program; a second one, before anyone has looked, does end it."""

    def __enter__(self) -> "Stopped":
        self.now = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.now:
            raise KeyboardInterrupt
        self.now = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def stream(pieces: Iterator[str]) -> None:
    """Show an answer while it comes; Ctrl-C ends it, and what has been said so far counts."""
    with Stopped() as stopped:
        for piece in pieces:
            show(piece)
            if stopped.now:
                pieces.close()  # type: ignore[attr-defined]
                show(" [stopped]")
                break
    show("\n")


def turn(conversation: Conversation, line: str) -> bool:
    """Carry out a command or show the answer to a question. False: the user wants to leave. ValueError: what went wrong."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    commands: dict[str, Callable[[], object]] = {
        "/help": lambda: show(HELP + "\n"),
        "/reset": conversation.reset,
        "/retry": lambda: stream(conversation.retry()),
        "/save": lambda: conversation.save(_file(command, rest)),
        "/load": lambda: conversation.load(_file(command, rest)),
        "/set": lambda: _set(conversation, rest),
    }
    if command in ("/exit", "/quit"):
        return False
    if command in commands:
        commands[command]()
        if command in ("/reset", "/save", "/load"):
            show({"/reset": "forgotten", "/save": f"saved to {rest}", "/load": f"loaded {rest}"}[command] + "\n")
    elif command.startswith("/") and command[1:].isalpha():
        raise ValueError(f"{command}: no such command; there are {', '.join(commands)}, /exit")
    else:
        stream(conversation.ask(line))
    return True


def _file(command: str, name: str) -> Path:
    if not name:
        raise ValueError(f"{command}: expected a file name, for example {command} talk.state")
    return Path(name).expanduser()


def _set(conversation: Conversation, rest: str) -> None:
    words = rest.split()
    if len(words) == 2:
        conversation.change(*words)
    elif words:
        raise ValueError("/set: expected a name and a value, for example /set temperature 0.8")
    settings = conversation.settings().items()
    show("  " + ", ".join(f"{name} {'none' if value is None else value}" for name, value in settings) + "\n")


def talk(conversation: Conversation, read: Callable[[], str]) -> int:
    """Turn after turn until `read` raises EOFError; a mistake is said and the conversation goes on. 1 when there was one, else 0."""
    failed = 0
    while True:
        try:
            line = read()
        except EOFError:
            return failed
        except KeyboardInterrupt:
            show("(Ctrl-D or /exit to leave)\n")
            continue
        except UnicodeDecodeError as error:
            failed = 1
            print(
                f"a line of the input is left out: it is no {error.encoding} text from its byte {error.start + 1} on",
                file=sys.stderr,
                flush=True,
            )
            continue
        if not line.strip() and conversation.template is not None:
            continue
        try:
            if not turn(conversation, line):
                return failed
        except ValueError as error:
            failed = 1
            print(error, file=sys.stderr, flush=True)


def prompt_reader(history: Path) -> Callable[[], str]:
    """Lines with history, editing and several lines a message, from a terminal."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ImportError as error:
        raise ValueError(
            "chatting in a terminal needs a package: pip install prompt_toolkit (or use --prompt)"
        ) from error
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        key_bindings=keys,
        history=FileHistory(str(history)),
        prompt_continuation="  ",
        reserve_space_for_menu=0,
    )
    return session.prompt


def read_line() -> str:
    line = sys.stdin.buffer.readline()  # bytes: decoding as it reads, a stream can't go on after a line that is no text
    if not line:
        raise EOFError
    return line.decode(sys.stdin.encoding).rstrip("\r\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Chat with a trained model.", epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, optional=True)
    parser.add_argument("--prompt", default=None, help="answer this and end")
    parser.add_argument(
        "--chat_template",
        default="",
        help="none, tokenizer (its own), rwkv (User: ... Assistant: ...) or a Jinja file; default: the tokenizer's, after pretraining none",
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of an answer at most [%(default)s]")
    parser.add_argument(
        "--history",
        type=Path,
        default=Path.home() / ".rwkv7_chat_history",
        help="file that keeps what you type [%(default)s]",
    )
    add_sampling_arguments(parser)
    parser.set_defaults(presence_penalty=0.2, frequency_penalty=0.2)  # as chat programs for RWKV do
    options = parser.parse_args(argv)
    try:
        conversation = build(options)
        if options.prompt is not None:
            stream(conversation.ask(options.prompt))
            return 0
        if sys.stdin is None:
            raise ValueError("standard input is closed; ask with --prompt, or start it in a terminal")
        if not sys.stdin.isatty():
            return talk(conversation, read_line)
        read = prompt_reader(options.history)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    mode = (
        "chat"
        if conversation.template is not None
        else "continues your text (--chat_template rwkv or tokenizer makes it chat, if it has learned to)"
    )
    show(f"{options.weights}, {conversation.decoder.config.title}, {mode}; /help\n")
    talk(conversation, read)
    return 0


def build(options: argparse.Namespace) -> Conversation:
    sampling = sampling_of(options)
    if options.length < 1:
        raise ValueError(f"--length {options.length}: expected at least 1 token")
    options.weights = find_weights(options.model) if options.model else newest_weights(Path("out"))
    model = load_model(options.weights, options.dtype, options.device)
    tokenizer = find_tokenizer(options.weights, model.config.vocab_size, options.tokenizer)
    template = find_template(options.chat_template, tokenizer, pretrained_only(options.weights))
    return Conversation(Decoder(model), tokenizer, template, sampling, options.seed, options.length)


if __name__ == "__main__":
    end_with_the_reader()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
