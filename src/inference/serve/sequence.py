"""A request on its way through the engine: what of its prompt is left, and how its tokens are drawn and reported."""

from __future__ import annotations

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from src.dataset.tokenizer import Tokenizer
from src.inference.sampling import Sampler, draw
from src.inference.serve.prefix_cache import TextDigest
from src.inference.serve.request import FAILED, LENGTH, STOP, Consumer, Request, TokenLogprobs
from src.model import State

# Tokens of a prompt between two states that are kept within it, besides those at boundaries; more where these would be
# more than so many: a single long text should not displace all others.
KEEP_EVERY, MOST_KEPT = 512, 8
LEAST_APART = 16  # tokens between two states that are kept within a prompt
Ending = tuple[str, Exception | None]  # why an answer ends, and the error where it failed


class Ticket:
    """A request that was accepted; `cancel()` from any thread ends it before its next token."""

    def __init__(self, request: Request, consumer: Consumer, tokenizer: Tokenizer) -> None:
        self.request, self.consumer = request, consumer
        # Here, in the client's thread: of a long text it takes a moment, in which the engine can go on.
        self.digest = TextDigest(tokenizer, request.start.name if request.start is not None else "")
        self.prompt_digests = self.digest.add_all(request.prompt, request.media)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Sequence:
    """A request on its way: what of its prompt is left, how its tokens are drawn."""

    def __init__(self, ticket: Ticket, state: State) -> None:
        request = self.request = ticket.request
        self.ticket, self.state = ticket, state
        self.digest, self.prompt_digests = ticket.digest, ticket.prompt_digests
        self.processed = self.known = 0  # tokens of the prompt
        self.hidden_sum = torch.zeros(()) if request.on_processed is not None else None  # [C] with the first piece
        self.sampler = Sampler(request.sampling, request.seed, request.uncounted_ids)
        self.bias: tuple[Tensor, Tensor] | None = None  # ids, and what is added to their logits
        if request.logit_bias:
            ids, values = zip(*request.logit_bias.items(), strict=True)
            self.bias = torch.tensor(ids), torch.tensor(values)
        self.generated: list[int] = []
        # the digest of the text that the state in the slot has processed
        self.text_digest = self.prompt_digests[-1]
        length = len(request.prompt)
        every = max(KEEP_EVERY, -(-length // MOST_KEPT))
        kept = {*request.boundaries, *range(every, length, every)} if request.use_cache else set()
        self.keep_after = [length]
        # Each ends a pass over all weights, so those close before another one aren't worth theirs.
        for n in sorted((n for n in kept if 0 < n < length), reverse=True):
            if self.keep_after[0] - n >= LEAST_APART:
                self.keep_after.insert(0, n)

    def next_piece(self, budget: int) -> int:
        """The number of tokens of the prompt to process next: up to where a state is kept, or as many as there may
        be."""
        until = next(n for n in self.keep_after if n > self.processed)
        return min(budget, until - self.processed)

    def change(self, logits: Tensor) -> None:
        """Overwrite logits [V] by those that the request asks for."""
        if self.bias is not None:
            logits.index_add_(0, *self.bias)
        if (constraint := self.request.constraint) is not None:
            logits.copy_(constraint.restrict(logits))

    def take(self, token: int, logits: Tensor) -> Ending | None:
        """Report a token that was drawn from logits [V]; None where the answer goes on."""
        request, constraint = self.request, self.request.constraint
        if token in request.stop_ids:
            return STOP, None
        self.generated.append(token)
        is_complete = self.ticket.consumer.token(token, _logprobs(logits, token, request.top_logprobs))
        if is_complete or (constraint is not None and constraint.accept(token)):
            return STOP, None
        return (LENGTH, None) if len(self.generated) >= request.max_new_tokens else None


def next_tokens(sequences: Several[Sequence], logits: Tensor) -> list[Ending | None]:
    """Draw a token for each sequence from logits fp32 [B, V] and report it; why an answer ends, None where it goes on.

    An error, such as logits that are not finite, ends the answer that it is of.
    """
    changed = logits.detach().to("cpu", copy=True)
    endings: list[Ending | None] = [None] * len(sequences)
    for i, sequence in enumerate(sequences):
        try:
            sequence.change(changed[i])
        except Exception as error:
            endings[i] = FAILED, error
    tokens = draw([sequence.sampler for sequence in sequences], changed)
    for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
        if endings[i] is not None:
            continue
        try:
            endings[i] = (FAILED, token) if isinstance(token, Exception) else sequence.take(token, logits[i])
        except Exception as error:
            endings[i] = FAILED, error
    return endings


def _logprobs(logits: Tensor, token: int, top: int | None) -> TokenLogprobs | None:
    if top is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(top, logprobs.numel()))
    return TokenLogprobs(float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
