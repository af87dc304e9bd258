"""Chat with a trained model in the terminal.

python API_DEMO_CHAT.py [MODEL]                    the newest weights under out/, or MODEL
python API_DEMO_CHAT.py [MODEL] --prompt "Hello"   print one answer and exit
echo "Hello" | python API_DEMO_CHAT.py [MODEL]     one turn per line
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from src.errors import UserError
from src.inference.adaptation import model_name
from src.inference.answer_stream import AnswerPiece
from src.inference.answer_text import AnswerText
from src.inference.arguments import (
    adaptation_from,
    add_chat_template_argument,
    add_media_arguments,
    add_model_arguments,
    add_sampling_arguments,
    add_special_tokens_argument,
    add_think_argument,
    media_from,
    parse_special_from,
    sampling_from,
)
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.generate import exit_on_closed_pipe
from src.inference.load import find_model, find_tokenizer, latest_trained_weights, load_model, pretrained_only
from src.inference.switching import ModelSwitch
from src.inference.template_choice import find_template
from src.terminal import prepare_output, show

HELP = """\
  /reset              start a new conversation
  /retry              generate another answer to the last question
  /save FILE          save the conversation and its state
  /load FILE          continue a saved conversation
  /set [NAME VALUE]   show the settings, or change one: /set temperature 0.8
  /adapter [FOLDER]   list adapters, or use another one (none: the base alone); starts a new conversation
  /state [FILE]       the same for tuned initial states
  /image FILE         put a picture before the next question; /sound FILE: a sound
  /exit               or Ctrl-D
Enter sends, Alt-Enter (or Esc, Enter) starts a new line, Ctrl-C stops the answer."""


class InterruptFlag:
    """Within the block, the first Ctrl-C sets `is_set`, and a second one raises KeyboardInterrupt."""

    def __enter__(self) -> "InterruptFlag":
        self.is_set = False
        self._previous_handler = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:  # the flag isn't polled while a long prompt is processed: the user must be able to leave
            raise KeyboardInterrupt
        self.is_set = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()  # a terminal would show text only at the end of a line


def stream(pieces: Iterator[AnswerPiece]) -> None:
    """Print an answer as it is generated; Ctrl-C stops it, and its beginning stays in the conversation."""
    text = AnswerText(sys.stdout.isatty())
    try:
        with InterruptFlag() as interrupt:
            for piece in pieces:
                write(text.add(piece))
                # Polled between tokens: raised within a step, KeyboardInterrupt would leave the state half-updated.
                if interrupt.is_set:
                    pieces.close()  # type: ignore[attr-defined]
                    write(" [stopped]")
                    break
    finally:
        write(text.finish())
    write("\n")


def run_turn(conversation: Conversation, line: str, models: ModelSwitch) -> bool:
    """Execute a command, or print the answer to a question; False for /exit. Raises UserError."""
    command, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    commands: dict[str, Callable[[], object]] = {
        "/help": lambda: write(HELP + "\n"),
        "/reset": conversation.reset,
        "/retry": lambda: stream(conversation.retry()),
        "/save": lambda: conversation.save(_file(command, argument)),
        "/load": lambda: conversation.load(_file(command, argument)),
        "/set": lambda: _set(conversation, argument),
        "/adapter": lambda: write(models.switch("adapter", argument) + "\n"),
        "/state": lambda: write(models.switch("state", argument) + "\n"),
        "/image": lambda: conversation.attach("image", _file(command, argument, "x.png")),
        "/sound": lambda: conversation.attach("sound", _file(command, argument, "x.wav")),
    }
    # Printed after the command, as it may raise.
    confirmations = {"/reset": "new conversation", "/save": f"saved to {argument}", "/load": f"loaded {argument}"}
    confirmations |= {name: f"{argument} goes with the next question" for name in ("/image", "/sound")}
    if command in ("/exit", "/quit"):
        return False
    if command in commands:
        commands[command]()
        if command in confirmations:
            show(confirmations[command])
    # A misspelt command isn't a question, but a path such as /usr/bin, which has more than letters, may begin one.
    elif command.startswith("/") and command[1:].isalpha():
        raise UserError("no such command", given=command, expected=f"one of {', '.join(commands)}, /exit")
    else:
        stream(conversation.ask(line))
    return True


def _file(command: str, name: str, example: str = "chat.state") -> Path:
    if not name:
        raise UserError(given=command, expected=f"a file name, for example {command} {example}")
    return Path(name).expanduser()


def _set(conversation: Conversation, argument: str) -> None:
    parts = argument.split()
    if len(parts) == 2:
        conversation.change(*parts)
    elif parts:
        raise UserError(given="/set", expected="a name and a value, for example /set temperature 0.8")
    settings = conversation.settings().items()
    write("  " + ", ".join(f"{name} {'none' if value is None else value}" for name, value in settings) + "\n")


def run_turns(conversation: Conversation, read: Callable[[], str], models: ModelSwitch) -> int:
    """Run turns until `read` raises EOFError; errors are printed. Returns 1 if there was one, else 0."""
    exit_code = 0
    while True:
        try:
            line = read()
        except EOFError:
            return exit_code
        except KeyboardInterrupt:  # at the prompt, where there is no answer to stop
            write("(Ctrl-D or /exit to leave)\n")
            continue
        except UnicodeDecodeError as error:
            exit_code = 1
            _print_error(f"skipped a line that isn't valid {error.encoding} from byte {error.start + 1} on")
            continue
        # An empty line isn't a question. Without a template it continues the text.
        if not line.strip() and conversation.template is not None:
            continue
        try:
            if not run_turn(conversation, line, models):
                return exit_code
        except UserError as error:
            exit_code = 1
            _print_error(str(error))


def _print_error(message: str) -> None:
    show(message, file=sys.stderr)


def prompt_reader(history: Path) -> Callable[[], str]:
    """A function that reads a message from the terminal, with history, editing and several lines. Raises UserError."""
    # Imported here: a pipe and --prompt need neither the package nor the 0.2 s that it takes to import.
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ImportError as error:
        raise UserError(
            "the package prompt_toolkit is missing", advice="pip install prompt_toolkit, or use --prompt"
        ) from error
    keys = KeyBindings()

    # Multi-line input has Enter for a new line by default; in a chat Enter sends.
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
        reserve_space_for_menu=0,  # there are no completions: without this, eight empty lines
    )
    return session.prompt


def read_line() -> str:
    """The next line of standard input. Raises EOFError, and UnicodeDecodeError for a line that can be skipped."""
    # Bytes, decoded line by line: a text stream can't continue after a decoding error.
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(sys.stdin.encoding).rstrip("\r\n")


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description="Chat with a trained model.", epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, optional=True)
    parser.add_argument("--prompt", default=None, help="print the answer to this and exit")
    add_media_arguments(parser)
    add_chat_template_argument(parser, "the tokenizer's, for a pretraining run none")
    add_special_tokens_argument(parser)
    add_think_argument(parser)
    parser.add_argument("--length", type=int, default=1024, help="most tokens of an answer [%(default)s]")
    parser.add_argument(
        "--history",
        type=Path,
        default=Path.home() / ".rwkv7_chat_history",
        help="file for the history of your messages [%(default)s]",
    )
    add_sampling_arguments(parser)
    # In a chat, repetition is more of a nuisance than elsewhere; the values of other chat programs for RWKV.
    parser.set_defaults(presence_penalty=0.2, frequency_penalty=0.2)
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    prepare_output()
    parser, options = parse(argv)
    try:
        conversation = build(options)
        models = ModelSwitch(conversation, options.weights, options.adaptation, options.dtype, options.device)
        if options.prompt is not None:
            stream(conversation.ask(options.prompt))
            return 0
        if sys.stdin is None:  # closed by the parent process (python API_DEMO_CHAT.py <&-)
            raise UserError("standard input is closed", advice="use --prompt, or start the program in a terminal")
        if not sys.stdin.isatty():
            return run_turns(conversation, read_line, models)
        read = prompt_reader(options.history)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    mode = (
        "chat"
        if conversation.template is not None
        else "continues your text (--chat_template rwkv or tokenizer to chat, if the model has learned to)"
    )
    show(f"{model_name(options.weights, options.adaptation)}, {conversation.decoder.config.title}, {mode}; /help")
    run_turns(conversation, read, models)
    return 0  # in a terminal the user has seen the errors; only a script needs them as an exit code


def build(options: argparse.Namespace) -> Conversation:
    """The conversation that `options` describe; sets `options.weights` to their path, and `options.adaptation`.

    Raises UserError.
    """
    sampling = sampling_from(options)
    if options.length < 1:
        raise UserError(flag="length", given=options.length, expected="at least 1 token")
    weights, adaptation = find_model(options.model or latest_trained_weights(Path("out")), adaptation_from(options))
    options.weights, options.adaptation = weights, adaptation
    model = load_model(weights, options.dtype, options.device, adaptation)
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    template = find_template(options.chat_template, tokenizer, pretrained_only(weights, adaptation), options.think)
    parse_special = parse_special_from(options)
    conversation = Conversation(
        Decoder(model), tokenizer, template, sampling, options.seed, options.length, parse_special
    )
    for kind, file in media_from(options):
        conversation.attach(kind, file)
    return conversation


if __name__ == "__main__":
    exit_on_closed_pipe()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
