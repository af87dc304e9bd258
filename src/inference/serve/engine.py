"""Continuous batching: requests join and leave the batch between any two tokens.

One thread owns the model. Its turn is a piece of the prompts that wait (so that a long one delays nobody for long), and
one token for every answer that is being written. A prompt begins at its longest known prefix (PrefixCache).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque

import torch
from torch import Tensor

from src.config import PLACEHOLDER
from src.dataset.tokenizer import Tokenizer
from src.inference.decoder import check_tokens, initial_state
from src.inference.serve.fair_lock import FairLock
from src.inference.serve.prefix_cache import KnownText, PrefixCache
from src.inference.serve.request import (
    CANCELLED,
    FAILED,
    STOP,
    Consumer,
    Processed,
    QueueFullError,
    Request,
    ShuttingDownError,
    Statistics,
)
from src.inference.serve.sequence import Ending, Sequence, Ticket, next_tokens
from src.inference.serve.slots import Slots
from src.model import RWKV7, LayerState, State

PIECE_TOKENS = 128  # of prompts between two decoding steps


def _embeds_of(pieces: list[tuple[Sequence, int]]) -> Tensor | None:
    """The rows in the places of media within the next tokens of some prompts; None where there are none."""
    rows = []
    for sequence, count in pieces:
        prompt, processed = sequence.request.prompt, sequence.processed
        if sequence.request.embeds is not None:
            first = prompt[:processed].count(PLACEHOLDER)
            rows.append(
                sequence.request.embeds[first : first + prompt[processed : processed + count].count(PLACEHOLDER)]
            )
    return torch.cat(rows) if rows else None


class Engine:
    """Generates for many clients at once. `submit` from any thread; `close` waits for what is being written.

    max_batch    answers that are written at the same time
    max_waiting  requests that may wait for a place; more are refused (QueueFullError)
    cache_bytes  memory of the states that are kept
    device_lock  held while the model computes; shared by the engines of one device
    """

    def __init__(
        self,
        model: RWKV7,
        tokenizer: Tokenizer,
        max_batch: int = 32,
        max_waiting: int = 256,
        cache_bytes: int = 1 << 30,
        piece_tokens: int = PIECE_TOKENS,
        device_lock: FairLock | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_waiting, self.piece_tokens = max_batch, max_waiting, piece_tokens
        self._cache = PrefixCache(cache_bytes)
        self._slots = Slots(model)
        self._waiting: deque[Ticket] = deque()
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []  # by row of the slots
        self._statistics = Statistics()
        self._wake = threading.Condition()  # guards _waiting, _closing
        self._closing = self._aborting = False
        self.device_lock = device_lock or FairLock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from any thread -------------------------------------------------------------------------------------

    def submit(self, request: Request, consumer: Consumer) -> Ticket:
        """Accept a request, whose answer `consumer` receives.

        Raises UserError for an unfit prompt, QueueFullError when too many requests wait.
        """
        text: list[int] = request.prompt
        if request.embeds is not None:
            text = [token for token in request.prompt if token != PLACEHOLDER] or [0]
        check_tokens(text, self.model.config.vocab_size, "the prompt")
        ticket = Ticket(request, consumer, self.tokenizer)
        with self._wake:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already", advice="try again later")
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def statistics(self) -> Statistics:
        """A snapshot."""
        s = self._statistics
        s.waiting, s.running = len(self._waiting), len(self._prefilling) + len(self._decoding)
        s.cached_states, s.cache_bytes = len(self._cache), self._cache.nbytes
        return Statistics(**vars(s))

    def close(self, drain_seconds: float = 0.0) -> None:
        """Accept nothing more, let what has been accepted end within `drain_seconds`, cancel the rest."""
        deadline = time.monotonic() + drain_seconds
        with self._wake:
            self._closing = True
            self._wake.notify()
        remaining = max(0.0, deadline - time.monotonic())
        self._thread.join(None if math.isinf(remaining) else remaining)
        self._aborting = True
        self._thread.join()

    # ---- in the engine's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._prefilling or self._decoding):
                    if self._closing:
                        return
                    self._wake.wait()
            with self.device_lock:
                self._turn()

    def _turn(self) -> None:
        try:
            self._leave_cancelled()
            self._admit()
            if self._prefilling:
                self._prefill()
            if self._decoding:
                self._decode()
        except Exception as error:  # out of memory, for example: of this turn, and the next may be smaller
            self._fail_all(error)

    def _leave_cancelled(self) -> None:
        if self._aborting:
            for ticket in [*self._waiting, *(s.ticket for s in [*self._prefilling, *self._decoding])]:
                ticket.cancel()
        for sequence in [s for s in self._prefilling if s.ticket.cancelled]:
            self._prefilling.remove(sequence)
            self._report_end(sequence, CANCELLED)
        for row in reversed(range(len(self._decoding))):
            if self._decoding[row].ticket.cancelled:
                self._leave(row, CANCELLED)

    def _admit(self) -> None:
        """Move requests that wait to places that are free."""
        while len(self._prefilling) + len(self._decoding) < self.max_batch:
            with self._wake:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            self._statistics.requests += 1
            if ticket.cancelled:
                self._statistics.cancellations += 1
                ticket.consumer.ended(CANCELLED)
                continue
            self._begin(ticket)

    def _begin(self, ticket: Ticket) -> None:
        request = ticket.request
        try:
            state = request.start.state if request.start is not None else initial_state(self.model, 1)
            sequence = Sequence(ticket, state)
        except Exception as error:
            self._statistics.failures += 1
            ticket.consumer.ended(FAILED, error)
            return
        self._prefilling.append(sequence)

    def _prefill(self) -> None:
        """Process a piece of the prompts, in the order in which they came."""
        budget = self.piece_tokens
        # Several times where a state is kept within a prompt.
        while budget > 0 and (pieces := self._next_pieces(budget)):
            budget -= sum(count for _, count in pieces)
            hidden = self._advance(pieces)
            for (sequence, count), last in zip(pieces, hidden, strict=True):
                sequence.processed += count
                if sequence.processed in sequence.keep_after and sequence.request.use_cache:
                    digest = sequence.prompt_digests[sequence.processed - 1]
                    self._cache.store(digest, KnownText(sequence.state, last))
                if sequence.processed == len(sequence.request.prompt):
                    self._prefilling.remove(sequence)
                    self._join(sequence, last)

    def _next_pieces(self, budget: int) -> list[tuple[Sequence, int]]:
        """Prompts that are processed next, together, and how many tokens of each; at most `budget` of all."""
        pieces: list[tuple[Sequence, int]] = []
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            # Looked up when it is its turn and not before: a prompt that is processed at the moment may be its prefix.
            if sequence.processed == 0 and not self._look_up(sequence):
                continue
            count = sequence.next_piece(budget)
            pieces.append((sequence, count))
            budget -= count
        return pieces

    def _look_up(self, sequence: Sequence) -> bool:
        """Begin at the longest known prefix; False where that is the whole prompt, and nothing is left to process."""
        length, known = self._cache.longest(sequence.prompt_digests) if sequence.request.use_cache else (0, None)
        self._statistics.prompt_tokens += len(sequence.request.prompt)
        self._statistics.cached_tokens += length
        if known is not None:
            sequence.processed, sequence.state = length, known.state
            sequence.known = length
        sequence.ticket.consumer.started(length)
        if known is None or length < len(sequence.request.prompt):
            return True
        assert known.hidden is not None
        self._prefilling.remove(sequence)
        self._join(sequence, known.hidden)
        return False

    @torch.no_grad()
    def _advance(self, pieces: list[tuple[Sequence, int]]) -> Tensor:
        """Process the next tokens of some prompts, packed into one row; their last hidden vectors [len(pieces), C]."""
        device = self.model.emb.weight.device
        chunks = [s.request.prompt[s.processed : s.processed + count] for s, count in pieces]
        packed = torch.tensor([[token for chunk in chunks for token in chunk]], device=device)
        bounds = torch.tensor([0, *map(len, chunks)]).cumsum(0).to(device)
        layers = zip(*(sequence.state.layers for sequence, _ in pieces), strict=True)
        state = State([LayerState(*(torch.cat(kind) for kind in zip(*layer, strict=True))) for layer in layers])
        hidden, state = self.model.hidden(packed, state, bounds.int() if len(pieces) > 1 else None, _embeds_of(pieces))
        begins = bounds.tolist()
        for row, (sequence, _) in enumerate(pieces):
            if sequence.hidden_sum is not None:
                sequence.hidden_sum = (
                    sequence.hidden_sum + hidden[0, begins[row] : begins[row + 1]].float().sum(0).cpu()
                )
            # copies, since a slice would keep the states of all of them in memory
            sequence.state = State([LayerState(*(t[row : row + 1].clone() for t in layer)) for layer in state.layers])
        return hidden[0, bounds[1:] - 1]

    @torch.no_grad()
    def _join(self, sequence: Sequence, hidden: Tensor) -> None:
        """Draw the first token of an answer, and take a slot for the others."""
        if (report := sequence.request.on_processed) is not None:
            assert sequence.hidden_sum is not None
            mean = sequence.hidden_sum / max(1, len(sequence.request.prompt) - sequence.known)
            report(Processed(mean, hidden.float().cpu(), sequence.state))
            self._report_end(sequence, STOP)
            return
        [ending] = self._draw([sequence], self.model.head(hidden).float().unsqueeze(0))
        if ending is not None:
            self._report_end(sequence, *ending)
            return
        self._slots.add(sequence.state)
        self._decoding.append(sequence)
        sequence.state = State([])  # it is in the slot now

    def _decode(self) -> None:
        """One token for every answer."""
        tokens = [sequence.generated[-1] for sequence in self._decoding]
        logits = self._slots.step(tokens)
        self._statistics.decode_steps += 1
        for sequence, token in zip(self._decoding, tokens, strict=True):
            sequence.text_digest = sequence.digest.add(token)
        endings = self._draw(self._decoding, logits)
        for row in reversed(range(len(endings))):  # the last row takes the place of one that leaves
            if (ending := endings[row]) is not None:
                self._leave(row, *ending)

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[Ending | None]:
        before = sum(len(sequence.generated) for sequence in sequences)
        endings = next_tokens(sequences, logits)
        self._statistics.generated_tokens += sum(len(sequence.generated) for sequence in sequences) - before
        return endings

    def _leave(self, row: int, reason: str, error: Exception | None = None) -> None:
        """End the answer in a slot, and keep its state: the conversation may go on."""
        sequence = self._decoding[row]
        self._cache.store(sequence.text_digest, KnownText(self._slots.state(row)))
        self._slots.remove(row)
        last = self._decoding.pop()
        if row < len(self._decoding):
            self._decoding[row] = last
        self._report_end(sequence, reason, error)

    def _report_end(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        self._statistics.failures += reason == FAILED
        self._statistics.cancellations += reason == CANCELLED
        sequence.ticket.consumer.ended(reason, error)

    def _fail_all(self, error: Exception) -> None:
        for sequence in [*self._prefilling, *self._decoding]:
            self._report_end(sequence, FAILED, error)
        self._prefilling, self._decoding = [], []
        self._slots = Slots(self.model)
