"""The states of the sequences that are decoded together: they join and leave between any two steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.inference.decoder import Decoder
from src.inference.step import CudaGraphStep
from src.model import RWKV7, LayerState, State
from src.ops.decode import MOST_SEQUENCES, decode_step

FIRST_CAPACITY = 4  # rows of memory; doubled when they are full


class Slots:
    """Rows of states: `add(state)` appends one, `step(tokens)` advances all, `remove(row)` frees one.

    Rows are numbered from 0 to `count` - 1 without gaps: what is removed is replaced by the last row. Memory is
    that of the largest number so far, rounded up to a power of two. No gradients.
    """

    def __init__(self, model: RWKV7) -> None:
        self.model = model
        # `pack` compresses for steps of a single sequence, and would slow down those of several.
        self._decoder = Decoder(model, pack=False)
        self.count = 0
        self._allocate(FIRST_CAPACITY)

    def _allocate(self, capacity: int) -> None:
        config, device, dtype = self.model.config, self._decoder.device, self._decoder.dtype
        empty = State.zeros(config, capacity, device, dtype)
        stacked = tuple(torch.stack(kind) for kind in zip(*empty.layers, strict=True))
        if self.count:
            for new, old in zip(stacked, self._stacked, strict=True):
                new[:, : self.count] = old[:, : self.count]
        self.capacity = capacity
        self._stacked: tuple[Tensor, ...] = stacked  # att_shift, wkv, ffn_shift: [L, capacity, ...]
        self._graphs: dict[int, CudaGraphStep] = {}  # by number of rows, for these addresses

    def add(self, state: State) -> int:
        """Append the state of one sequence (B = 1), which is copied; its row."""
        if self.count == self.capacity:
            self._allocate(2 * self.capacity)
        row = self.count
        for stacked, kind in zip(self._stacked, zip(*state.layers, strict=True), strict=True):
            for layer, values in enumerate(kind):
                stacked[layer, row] = values[0]
        self.count += 1
        return row

    def remove(self, row: int) -> None:
        """Free a row; the last row takes its number."""
        self.count -= 1
        if row != self.count:
            for stacked in self._stacked:
                stacked[:, row] = stacked[:, self.count]

    def state(self, row: int) -> State:
        """A copy of a row's state, B = 1."""
        kinds = (stacked[:, row : row + 1].clone() for stacked in self._stacked)
        return State([LayerState(*layer) for layer in zip(*kinds, strict=True)])

    def _rows(self, count: int) -> State:
        """The first rows, as views."""
        return State([LayerState(*(t[:count] for t in layer)) for layer in zip(*self._stacked, strict=True)])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Process one token for each row; logits fp32 [count, V]. On a GPU the next step overwrites them."""
        assert len(tokens) == self.count, f"{len(tokens)} tokens for {self.count} rows"
        if self._decoder.device.type == "cuda":
            return self._graph_step(tokens)
        if self.count <= MOST_SEQUENCES and self._decoder.native:
            rows = (stacked[:, : self.count] for stacked in self._stacked)
            return decode_step(torch.tensor(tokens), self._decoder.native_weights, *rows)
        return self._decoder.torch_step(torch.tensor(tokens, device=self._decoder.device), self._rows(self.count))

    def _graph_step(self, tokens: Sequence[int]) -> Tensor:
        # A graph for each power of two: the rows between the number of sequences and that are computed and ignored.
        rows = 1 << (self.count - 1).bit_length()
        if rows not in self._graphs:
            self._graphs[rows] = CudaGraphStep(self._decoder.torch_step, self._rows(rows))
        return self._graphs[rows]([*tokens, *[0] * (rows - self.count)])[: self.count]
