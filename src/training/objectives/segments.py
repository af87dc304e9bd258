"""A long sample trained in pieces: the memory of one piece, the gradient of the whole.

    1.  the pieces from first to last but one, without a graph and without the head; the state at each border between
        two is kept
    2.  the pieces from last to first: piece i is computed from the state at its beginning, and of
            loss_i + <dS_i, S_i>           S_i: the state at its end (token-shift rows too)
        the gradient is taken: for the parameters, which are summed over the pieces, and for the state at its
        beginning, which is dS_{i-1}. There is none behind the last piece.

    loss_i = (mean loss of the piece) * (its tokens that count) / (those of the sample)

so that sums, L2Wrap and its scale are those of one pass. A state is fp32 at a border, as inside of a piece.

Both happen in forward, and backward multiplies the gradients by that of the loss: otherwise the head, a large part of a
small model, would be computed once for the loss and again for its gradient.

Rows in the place of tokens are computed before, of all pieces at once, and their gradient is handed back to what made
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from src.config import PLACEHOLDER
from src.model import RWKV7, State
from src.model.state import LayerState
from src.ops.devices import sum_dtype
from src.training.distributed.context_parallel import ContextParallel
from src.training.distributed.deepspeed_internals import is_partitioned
from src.training.objectives.head_loss import HeadLoss
from src.training.objectives.pieces import Piece, whole

ALL = -1


@dataclass(frozen=True)
class Segments:
    """How samples are cut: in pieces of `chunk_ctx` positions of their `ctx_len` (0: not at all).

    `bptt`: gradients cross the bptt - 1 borders between so many pieces at a sample's end, ALL: every border. A piece
    before them, or with bptt 1 every piece, has the gradient of its own loss only.

    With `context`, each of several processes computes its part of every piece.
    """

    chunk_ctx: int = 0
    ctx_len: int = 0
    bptt: int = ALL
    context: ContextParallel | None = None

    def split(self, batch: tuple[Tensor, ...]) -> list[Piece]:
        """A batch (tokens, targets, and of a packed row cu_seqlens) in pieces."""
        tokens, targets, *packed = batch
        piece = whole(tokens, targets, packed[0] if packed else None)
        # the rows of a micro batch follow one another in a packed row: as many pieces, of as many tokens
        rows = tokens.shape[1] // self.ctx_len if packed else 1
        size = self.chunk_ctx * max(1, rows) or tokens.shape[1]
        if self.context is None:
            return piece.split(size)
        return [one.part(self.context.rank, self.context.size) for one in piece.split(size)]

    def cuts(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether the batch isn't computed as it is."""
        return 0 < self.chunk_ctx < batch[0].shape[1] or self.context is not None

    def loss(
        self, model: RWKV7, head_loss: HeadLoss, batch: tuple[Tensor, ...], embeds: Tensor | None = None
    ) -> Tensor:
        """The mean loss of a batch over its tokens that count, with the gradient of the whole. `embeds` [K, C]: of the
        places of a packed row.

        A parameter's gradient is accumulated once, when it is complete, so that what DDP and ZeRO do then happens once.
        With `context` it is P times the share of this process: the mean over
        the processes is the loss, as the mean that a strategy takes of their gradients is its gradient.
        """
        run = _Run(model, head_loss, self, batch, embeds)
        if len(run.pieces) == 1:
            return run.compute(0, None)[0]
        if not torch.is_grad_enabled():
            return run.measure(keep=False)
        anchor = torch.ones((), device=batch[0].device, requires_grad=True)  # gives the loss a place in a graph
        return _Segmented.apply(anchor, run, embeds, *run.inputs)  # type: ignore[no-any-return]


WHOLE_SAMPLES = Segments()


class _Segmented(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: _Run, embeds: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.run = run
        if run.in_backward:
            return run.measure(keep=True)
        run.keep_states()
        return run.differentiate(torch.ones_like(anchor))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.run
        scale = grad_loss
        if run.in_backward:
            run.differentiate(grad_loss)
            scale = torch.ones_like(grad_loss)  # what there is has it already
        return torch.zeros_like(grad_loss), None, run.gradient_of_embeds(scale), *run.gradients(scale)


class _Run:
    """Both passes over the pieces of one batch."""

    def __init__(
        self,
        model: RWKV7,
        head_loss: HeadLoss,
        segments: Segments,
        batch: tuple[Tensor, ...],
        embeds: Tensor | None,
    ) -> None:
        self.model, self.head_loss = model, head_loss
        self.bptt, self.context = segments.bptt, segments.context
        self.pieces = segments.split(batch)
        self.counted = (batch[1] >= 0).sum().clamp(min=1)
        self.borders: list[Tensor] = []  # of each tensor of a state, those at the end of each piece but the last
        # those of a front end get their gradients from that of `embeds`
        of_media = set(model.media.parameters()) if model.media is not None else set()
        self.parameters = [p for p in model.parameters() if p.requires_grad and p not in of_media]
        self.embeds = self._divided(embeds)
        self.gradients_of_embeds: list[Tensor] = []  # of the pieces from the last to the first
        # ZeRO's stage 3 takes the gradient of a parameter that it has gathered for backward: in that of a piece. So
        # these are taken in backward, after a forward pass that measures the loss.
        self.is_partitioned = any(map(is_partitioned, self.parameters))
        # Stage 3 expects its gradients in backward; fp16 needs the loss scale before anything is rounded.
        self.in_backward = self.is_partitioned or any(p.dtype == torch.float16 for p in model.parameters())
        self.is_taken = False
        self.sums: dict[nn.Parameter, Tensor] = {}  # of the gradients of the pieces
        # dropout has to drop the same numbers again
        self.random = any(block.draws_random_numbers for block in model.blocks)
        self.generators: list[Any] = []

    def _divided(self, embeds: Tensor | None) -> list[Tensor] | None:
        """The rows of each piece."""
        if embeds is None:
            return None
        assert len(self.pieces[0].tokens) == 1, "rows of a batch that isn't packed follow another order"
        counts = torch.stack([(piece.tokens == PLACEHOLDER).sum() for piece in self.pieces])
        return list(embeds.split(counts.tolist()))

    @property
    def inputs(self) -> list[nn.Parameter]:
        """The parameters whose gradients the function returns: all but those of partitioned ones."""
        return [] if self.is_partitioned else self.parameters

    def gradients(self, grad_loss: Tensor) -> list[Tensor | None]:
        """After `differentiate`: those of `inputs`, None where the loss doesn't depend on one."""
        assert not self.is_taken, "gradients of the same pieces a second time"
        self.is_taken = True
        return [(self.sums.pop(p) * grad_loss).to(p.dtype) if p in self.sums else None for p in self.inputs]

    def gradient_of_embeds(self, grad_loss: Tensor) -> Tensor | None:
        """After `differentiate`: that of all rows, None where they need none."""
        parts = self.gradients_of_embeds[::-1]
        return torch.cat(parts) * grad_loss if parts else None

    @torch.no_grad()
    def measure(self, keep: bool) -> Tensor:
        """The loss; with `keep` what `differentiate` needs is kept."""
        losses, state = [], None
        for i in range(len(self.pieces)):
            if keep:
                self._keep_generators(i)
            loss, state = self.compute(i, state)
            losses.append(loss)
            if keep and i + 1 < len(self.pieces):
                self._keep(i, state)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def keep_states(self) -> None:
        """Keep what `differentiate` needs, without the loss."""
        state = None
        for i in range(len(self.pieces) - 1):
            self._keep_generators(i)
            _, state = self._hidden(i, state)
            self._keep(i, state)

    def _keep_generators(self, i: int) -> None:
        if self.random:
            self.generators.append((torch.get_rng_state(), get_device_states(self.pieces[i].tokens)))

    def _keep(self, i: int, state: State) -> None:
        # In one block for all pieces: small tensors that stay, allocated between large ones that don't, would split the
        # gaps which the activations of the next piece need, and the heap would grow by a multiple of the states.
        if i == 0:
            self.borders = [tensor.new_empty(len(self.pieces) - 1, *tensor.shape) for tensor in state.tensors()]
        for kept, tensor in zip(self.borders, state.tensors(), strict=True):
            kept[i] = tensor

    def differentiate(self, grad_loss: Tensor) -> Tensor:
        """The loss. `sums` gets its gradients times `grad_loss`; those of partitioned parameters are accumulated."""
        assert self.borders, "gradients of the same pieces a second time"
        borders, self.borders = self.borders, []
        losses: list[Tensor] = []
        handed_back: list[Tensor | None] = []
        for i in reversed(range(len(self.pieces))):
            state = State.of([kept[i - 1] for kept in borders]) if i > 0 else None
            # of several processes all take part in what crosses a border
            continues = self.pieces[i].continues or self.context is not None
            crosses = continues and (self.bptt == ALL or len(self.pieces) - i < self.bptt)
            leaves = [] if state is None or not crosses else [t.requires_grad_() for t in state.tensors()]
            rows = self._leaf_of_rows(i)
            with torch.enable_grad(), self._same_random_numbers(i):
                loss, end = self.compute(i, state, rows)
            losses.append(loss.detach())
            outputs = [loss, *(end.tensors() if handed_back else [])]
            grads = [grad_loss.to(loss.dtype), *handed_back]
            # a state may depend on nothing that is trained, and what is handed back may be of a state that isn't used
            used = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad and g is not None]
            outputs, grads = [x for x, _ in used], [g for _, g in used]
            del loss, end, state, used
            if i == 0 and self.is_partitioned:
                with _added(self.sums):
                    torch.autograd.backward(outputs, grads)
                break
            if not outputs:  # with cut borders: nothing that is trained is in this piece
                handed_back = []
                continue
            inputs = [*self.parameters, *leaves, *([] if rows is None else [rows])]
            gradients = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
            _add(self.sums, self.parameters, gradients)
            handed_back = list(gradients[len(self.parameters) :][: len(leaves)])
            if rows is not None:
                self.gradients_of_embeds.append(gradients[-1])
            del outputs, grads, gradients, leaves, inputs, rows  # not beside those of the next piece
        return torch.stack(losses[::-1]).sum()

    def _leaf_of_rows(self, i: int) -> Tensor | None:
        """The rows of piece i as an input of a graph of its own; None where they need no gradient."""
        if self.embeds is None or not self.embeds[i].requires_grad:
            return None
        assert not self.is_partitioned, "ZeRO's stage 3 with rows in the place of tokens"
        return self.embeds[i].detach().requires_grad_()

    def compute(self, i: int, state: State | None, rows: Tensor | None = None) -> tuple[Tensor, State]:
        """The share of piece i in the loss, and the state at its end: [B] of rows, [1] of the last document.

        `rows`: those of the piece in the place of tokens, if not the ones that were given.
        """
        piece = self.pieces[i]
        hidden, end = self._hidden(i, state, rows)
        share = (piece.targets >= 0).sum() / self.counted.to(sum_dtype(self.counted.device))
        mean = self.head_loss(hidden, piece.targets)
        return mean * share.to(mean.dtype) * (1 if self.context is None else self.context.size), end

    def _hidden(self, i: int, state: State | None, rows: Tensor | None = None) -> tuple[Tensor, State]:
        """What the head gets of piece i, and the state at its end."""
        piece = self.pieces[i]
        if rows is None and self.embeds is not None:
            rows = self.embeds[i]
        hidden, end = self.model.hidden(piece.tokens, self._start(piece, state), piece.cu_seqlens, rows)
        return hidden, end if piece.bounds is None or self.context is not None else end.last()

    def _start(self, piece: Piece, state: State | None) -> State:
        """What the sequences of a piece begin from: `state` those that continue, the others from initial states."""
        if piece.bounds is None:
            start = state or self.model.initial_state(piece.documents)
            if self.context is not None and state is None:
                start = State([LayerState(*map(self.context.counted_once, layer)) for layer in start.layers])
            return start
        beginning = self.model.initial_state(piece.documents - piece.continues)
        if self.context is not None:  # the state before the piece comes first, whether this part begins with it or not
            return (state or self.model.initial_state(1)).followed_by(beginning)
        return state.followed_by(beginning) if piece.continues and state is not None else beginning

    @contextmanager
    def _same_random_numbers(self, i: int) -> Iterator[None]:
        if i >= len(self.generators):  # nothing is random, or the piece is computed for the first time
            yield
            return
        on_cpu, (devices, states) = self.generators[i]
        device_type = self.pieces[i].tokens.device.type
        with torch.random.fork_rng(devices, device_type=device_type if devices else "cuda"):
            torch.set_rng_state(on_cpu)
            set_device_states(devices, states, device_type=device_type)
            yield


def _add(
    sums: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter], gradients: tuple[Tensor | None, ...]
) -> None:
    """Add the gradients of a piece, the first of which are those of `parameters`."""
    for parameter, gradient in zip(parameters, gradients, strict=False):
        if gradient is None:  # no document begins in the piece, so its initial states aren't used
            continue
        if parameter in sums:
            sums[parameter] += gradient
        else:  # in fp32: a bf16 sum over many pieces would drop the small ones
            sums[parameter] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))


@contextmanager
def _added(sums: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within it, gradients that reach a parameter grow by its sum before they are accumulated."""

    def adding(parameter: nn.Parameter) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            return (sums.pop(parameter) + gradient).to(gradient.dtype)

        return parameter.register_hook(hook)

    handles = [adding(parameter) for parameter in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not sums, "a parameter that the first piece doesn't use"
