"""Continue a text: `generate` gives token after token, `generate_batch` continues many prompts at once.

python -m src.inference.generate MODEL --prompt "def "
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, fields

from torch import Tensor

from src.errors import UserError
from src.inference.characters import CharacterStream
from src.inference.decoder import PACK_TOKENS, Decoder
from src.inference.load import add_model_arguments, find_tokenizer, find_weights, load_model
from src.inference.sampling import Sampler, Sampling
from src.model import RWKV7


def generate(
    model: RWKV7 | Decoder,
    tokens: Sequence[int] | Tensor,
    max_new_tokens: int,
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    top_k: int = Sampling.top_k,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    presence_penalty: float = Sampling.presence_penalty,
    frequency_penalty: float = Sampling.frequency_penalty,
    penalty_decay: float = Sampling.penalty_decay,
    uncounted_ids: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that follow `tokens`, one after another, at most `max_new_tokens`; ends before a token of `stop_ids`.

    A Decoder (of one sequence) is continued from where it is: each token is fed to it when the next one is asked for, so after the
    last one all have been, and after a break all but the one in hand. The settings are those of `Sampling`.
    ValueError for an empty prompt, ids outside the vocabulary, and settings out of range.
    """
    sampling = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay)
    decoder = model if isinstance(model, Decoder) else Decoder(model, pack=max_new_tokens > PACK_TOKENS)
    prompt = tokens.flatten().tolist() if isinstance(tokens, Tensor) else list(tokens)
    sampler = Sampler(sampling, seed, uncounted_ids)
    logits = decoder.prefill([prompt])
    return _continue(decoder, logits, sampler, max_new_tokens, frozenset(stop_ids))


def _continue(
    decoder: Decoder, logits: Tensor, sampler: Sampler, max_new_tokens: int, stop_ids: frozenset[int]
) -> Iterator[int]:
    for _ in range(max_new_tokens):
        token = sampler(logits[0])
        if token in stop_ids:
            return
        yield token
        logits = decoder.step([token])


def generate_batch(
    model: RWKV7,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    uncounted_ids: Collection[int] = (),
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """What follows each prompt, of whatever lengths, decoded together: every weight is read once for all of them.

    Prompt i draws with seed + i, so its answer is that of `generate` with this seed. `ended(answer)`, asked after each token,
    ends an answer with that token. ValueError as there.
    """
    if not prompts:
        return []
    decoder = Decoder(model, batch=len(prompts))
    samplers = [Sampler(sampling, None if seed is None else seed + i, uncounted_ids) for i in range(len(prompts))]
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(
        range(len(prompts))
    )  # running[row]: the prompt in that row of the decoder; -1: ended, its row runs along idle
    logits = decoder.prefill(prompts)
    for count in range(1, max_new_tokens + 1):
        fed = [0] * len(running)
        for row, prompt in enumerate(running):
            if prompt < 0:
                continue
            fed[row] = samplers[prompt](logits[row])
            if fed[row] in stop_ids:
                running[row] = -1
            else:
                answers[prompt].append(fed[row])
                if ended is not None and ended(answers[prompt]):
                    running[row] = -1
        alive = [row for row, prompt in enumerate(running) if prompt >= 0]
        if not alive or count == max_new_tokens:
            break
        if 2 * len(alive) <= len(running):  # not at every end: a captured graph is made anew for each size
            decoder.keep(alive)
            running, fed = [running[row] for row in alive], [fed[row] for row in alive]
        logits = decoder.step(fed)
    return answers


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=float, default=Sampling.temperature, help="0: always the likeliest [%(default)s]"
    )
    parser.add_argument("--top_p", type=float, default=Sampling.top_p, help="1: off [%(default)s]")
    parser.add_argument("--top_k", type=int, default=Sampling.top_k, help="0: off [%(default)s]")
    for name, help in (
        ("presence_penalty", "taken from the logit of every token that has been written"),
        ("frequency_penalty", "taken from it once more for each time that it has been written"),
        ("penalty_decay", "each of these times counts this much less with every further token"),
    ):
        parser.add_argument(f"--{name}", type=float, default=getattr(Sampling, name), help=f"{help} [%(default)s]")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """What the flags of `add_sampling_arguments` say. ValueError that names the flag."""
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: expected a whole number from 0 to 2^63 - 1")
    try:
        return Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
    except ValueError as error:
        raise UserError(f"--{error}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.generate", description="Continue a text with a trained model."
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument("--length", type=int, default=200, help="tokens to write at most [%(default)s]")
    add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    try:
        sampling = sampling_of(options)
        if options.length < 0:
            raise UserError(f"--length {options.length}: expected at least 0 tokens")
        weights = find_weights(options.model)
        model = load_model(weights, options.dtype, options.device)
        tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer)
        prompt = tokenizer.encode(options.prompt) or [0]
        tokens = generate(
            model, prompt, options.length, **asdict(sampling), seed=options.seed, stop_ids=tokenizer.eos_ids
        )
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    stream = CharacterStream(tokenizer)
    _show(options.prompt)
    try:
        for token in tokens:
            _show(stream.feed(token))
        _show(stream.finish() + "\n")
    except KeyboardInterrupt:
        _show("\n")
        return 130
    except ValueError as error:  # weights that give no numbers show only now
        _show("\n")
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def end_with_the_reader() -> None:
    """Lets `| head` end the program as it ends other tools, without a traceback."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    end_with_the_reader()
    sys.exit(main())
