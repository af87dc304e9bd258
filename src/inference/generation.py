"""Text generation: `generate` yields one token after another, `generate_batch` continues several prompts together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from src.errors import UserError
from src.inference.decoder import PACK_TOKENS, Decoder
from src.inference.sampling import Sampler, Sampling, draw
from src.model import RWKV7

FINISHED = -1


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
    embeds: Tensor | None = None,
) -> Iterator[int]:
    """Yield at most `max_new_tokens` tokens that follow `tokens`, ending before a token of `stop_ids`.

    The settings are those of `Sampling`; `embeds` as for the model, of the prompt.

    A Decoder (of one sequence) continues from its state. It processes a token
    when the next one is requested: all of them once the iterator is exhausted, all but the last one after a break.
    Raises UserError for an empty prompt, ids outside the vocabulary, and settings out of range.
    """
    sampling = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay)
    decoder = model if isinstance(model, Decoder) else Decoder(model, pack=max_new_tokens > PACK_TOKENS)
    prompt = tokens.flatten().tolist() if isinstance(tokens, Tensor) else list(tokens)
    sampler = Sampler(sampling, seed, uncounted_ids)
    # Here and not in the generator below, whose body runs with the first next(): errors are raised by the call itself.
    logits = decoder.prefill([prompt], [embeds])
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
    sampling: Sampling = Sampling(),  # noqa: B008 (a frozen dataclass can be shared)
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    uncounted_ids: Collection[int] = (),
    is_complete: Callable[[list[int]], bool] | None = None,
    embeds: Sequence[Tensor | None] | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, decoded together: a step reads each weight from memory once for all of them.

    Prompts may differ in length. Prompt i draws with seed + i and gets the answer that `generate` gives with this seed.
    `embeds` as for the model, of each prompt.
    `is_complete(answer)` is called after each token, which is the answer's last where it returns True.
    Raises UserError as `generate` does.
    """
    if not prompts:  # a decoder of no sequences would have nothing to prefill
        return []
    decoder = Decoder(model, batch=len(prompts))
    # A sampler per prompt, so that an answer doesn't depend on the other prompts in the batch.
    samplers = [Sampler(sampling, None if seed is None else seed + i, uncounted_ids) for i in range(len(prompts))]
    answers: list[list[int]] = [[] for _ in prompts]
    # For each row of the decoder; FINISHED: decoded along with the others and ignored.
    prompt_of_row = list(range(len(prompts)))
    logits = decoder.prefill(prompts, embeds)
    for count in range(1, max_new_tokens + 1):
        # A finished row is fed token 0 and its logits are ignored.
        next_tokens = [0] * len(prompt_of_row)
        unfinished = [row for row, prompt in enumerate(prompt_of_row) if prompt != FINISHED]
        rows = logits.detach()[unfinished].to("cpu", torch.float32)  # a copy, which `draw` overwrites
        drawn = draw([samplers[prompt_of_row[row]] for row in unfinished], rows)
        for row, token in zip(unfinished, drawn, strict=True):
            if isinstance(token, UserError):
                raise token
            prompt, next_tokens[row] = prompt_of_row[row], token
            if token in stop_ids:
                prompt_of_row[row] = FINISHED
            else:
                answers[prompt].append(token)
                if is_complete is not None and is_complete(answers[prompt]):
                    prompt_of_row[row] = FINISHED
        # The last step isn't computed: its logits wouldn't be used.
        active = [row for row, prompt in enumerate(prompt_of_row) if prompt != FINISHED]
        if not active or count == max_new_tokens:
            break
        # Finished rows are dropped by halves and not one by one: each batch size needs a new CUDA graph.
        if 2 * len(active) <= len(prompt_of_row):
            decoder.keep(active)
            prompt_of_row, next_tokens = [prompt_of_row[row] for row in active], [next_tokens[row] for row in active]
        logits = decoder.step(next_tokens)
    return answers
