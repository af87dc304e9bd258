"""Loss by position in the context: what a model gains from each doubling of what it has read.

Positions are counted from 1, the first token that is predicted from one before it. They are grouped by doubling:
1 .. 15, 16 .. 31, 32 .. 63, ... up to the length of the windows. A model that was trained with a short context often
gets worse beyond it; one that uses a long context gets better to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from src.errors import UserError
from src.files import atomic_write
from src.inference.scoring import LOGIT_ROWS
from src.inference.windows import Tokens, stack_windows, windows
from src.model import RWKV7, State
from src.ops.devices import sum_dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_EDGE = 16
TOKENS_PER_PASS = 4096  # bounds the memory of activations
COLOURS = ("#1f4e8c", "#c77d2e", "#2e8b57", "#c0392b", "#7d3c98", "#117a8b")


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats of the positions from `begins[i]` up to `ends[i]`, each measured on `counts[i]` tokens."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    losses: tuple[float, ...]
    counts: tuple[int, ...]


def loss_by_position(
    model: RWKV7, tokens: Tokens, ctx_len: int, max_windows: int | None = None, micro_bsz: int = 8
) -> PositionLoss:
    """The loss by position over windows of `ctx_len` + 1 tokens, as many and where `windows` says.

    A window is read in passes of at most TOKENS_PER_PASS tokens with the state carried over, so memory doesn't grow
    with `ctx_len`. Raises UserError for ids outside the model's vocabulary.
    """
    selected = list(windows(len(tokens), ctx_len, max_windows))
    length = min(ctx_len, len(tokens) - 1)
    sums = np.zeros(length)
    for first in range(0, len(selected), micro_bsz):
        batch = stack_windows(tokens, selected[first : first + micro_bsz], model.config.vocab_size)
        sums += _summed_losses(model, batch)
    edges = [1, *(edge for k in range(40) if (edge := FIRST_EDGE << k) < length), length + 1]
    pairs = list(pairwise(edges))
    means = tuple(float(sums[b - 1 : e - 1].mean()) / len(selected) for b, e in pairs)
    counts = tuple((e - b) * len(selected) for b, e in pairs)
    return PositionLoss(tuple(b for b, _ in pairs), tuple(e - 1 for _, e in pairs), means, counts)


@torch.no_grad()
def _summed_losses(model: RWKV7, batch: Tensor) -> npt.NDArray[np.float64]:
    """The loss of each position, summed over the rows of batch int64 [B, T + 1]: float64 [T]."""
    batch = batch.to(model.emb.weight.device)
    rows, length = batch.shape[0], batch.shape[1] - 1
    step = max(1, TOKENS_PER_PASS // rows)
    state: State | None = None
    parts = []
    for begin in range(0, length, step):
        inputs, targets = batch[:, begin : begin + step][:, : length - begin], batch[:, begin + 1 : begin + step + 1]
        hidden, state = model.hidden(inputs, state)
        pieces = zip(hidden.flatten(0, 1).split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
        losses = [F.cross_entropy(model.head(x).float(), y, reduction="none") for x, y in pieces]
        parts.append(torch.cat(losses).view(targets.shape).to(sum_dtype(batch.device)).sum(0))
    return torch.cat(parts).cpu().double().numpy()


def position_table(results: Sequence[tuple[str, PositionLoss]]) -> str:
    """One line for each range of positions, one column for each model. UserError where their positions differ."""
    first = results[0][1]
    if any(result.ends != first.ends for _, result in results):
        raise UserError(
            "the tokenizers make texts of different lengths of --data",
            flag="compare",
            advice="use a --ctx_len that is below both",
        )
    names = [name for name, _ in results]
    widths = [max(8, len(name)) for name in names]
    head = f"{'positions':>21}  " + "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
    lines = [head + "  tokens"]
    for i, (begin, end) in enumerate(zip(first.begins, first.ends, strict=True)):
        cells = (f"{result.losses[i]:{width}.4f}" for (_, result), width in zip(results, widths, strict=True))
        lines.append(f"{f'{begin:,} - {end:,}':>21}  {'  '.join(cells)}  {first.counts[i]:,}")
    return "\n".join(lines)


def draw_by_position(results: Sequence[tuple[str, PositionLoss]]) -> Figure:
    """Loss against position, with a logarithmic axis: a line for each (name, result)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, result) in enumerate(results):
        edges = [*result.begins, result.ends[-1] + 1]
        axes.stairs(result.losses, edges, baseline=None, color=COLOURS[i % len(COLOURS)], label=name, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the context (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def write_by_position(results: Sequence[tuple[str, PositionLoss]], path: Path) -> None:
    """Write the figure in the format of the suffix of `path` (PNG where it has none)."""
    with atomic_write(path) as file:
        draw_by_position(results).savefig(file, format=path.suffix[1:].lower() or "png")
