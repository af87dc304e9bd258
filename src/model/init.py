"""One table: parameter name -> initial value, learning-rate scale, weight decay.

The optimizer's groups, the weight table in docs/model.md and every constructor read it, so each parameter's fate stands in one row.
Notation: layer i of L, channel c of C, head width N; p = i / (L-1), q = 1 - i / L, d = c / C, lin = c / (C-1) - 0.5,
z = ((c mod N) - (N-1)/2) / ((N-1)/2), zz = z |z|.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """Where a parameter sits: what its initial value may depend on."""

    config: ModelConfig
    layer: int
    shape: torch.Size

    @property
    def channel(self) -> Tensor:
        return torch.arange(self.config.n_embd, dtype=torch.float64)

    @property
    def p(self) -> float:
        return self.layer / (self.config.n_layer - 1) if self.config.n_layer > 1 else 0.0

    @property
    def q(self) -> float:
        return 1 - self.layer / self.config.n_layer

    @property
    def d(self) -> Tensor:
        return self.channel / self.config.n_embd

    @property
    def along(self) -> Tensor:
        """c / (C-1), from 0 at the first channel to 1 at the last."""
        return self.channel / max(1, self.config.n_embd - 1)

    @property
    def lin(self) -> Tensor:
        return self.along - 0.5

    @property
    def zz(self) -> Tensor:
        half = (self.config.head_size - 1) / 2
        z = (self.channel % self.config.head_size - half) / half
        return z * z.abs()


Value = Callable[[Place], "Tensor | float"]


@dataclass(frozen=True)
class Row:
    """One kind of parameter. `value` gives a scalar, the C channel values, or a whole tensor; `text` is its formula for people."""

    pattern: str
    text: str
    value: Value
    lr_scale: float = 1.0
    decay: bool = False

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def orthogonal(gain: Callable[[Place], float]) -> Value:
    """A random matrix with orthonormal rows or columns (whichever are fewer), times `gain`."""

    def draw(place: Place) -> Tensor:
        return nn.init.orthogonal_(torch.empty(place.shape), gain=gain(place))

    return draw


def _head_gain(s: Place) -> float:
    vocab, width = s.shape
    return 0.5 * math.sqrt(vocab / width) if vocab > width else 0.5


def _low_rank_gain(s: Place) -> float:
    return 0.1 * max(1.0, math.sqrt(s.shape[0] / s.shape[1]))


TABLE: tuple[Row, ...] = (
    Row(r"emb\.weight", "uniform(-1e-4, 1e-4)", lambda s: torch.empty(s.shape).uniform_(-1e-4, 1e-4), decay=True),
    Row(r".*\bln[012]\.weight", "1", lambda s: 1.0),
    Row(r".*\bln[012]\.bias", "0", lambda s: 0.0),
    Row(r".*\batt\.x_[rg]", "1 - d^(0.2 q)", lambda s: 1 - s.d ** (0.2 * s.q)),
    Row(r".*\batt\.x_[wa]", "1 - d^(0.9 q)", lambda s: 1 - s.d ** (0.9 * s.q)),
    Row(r".*\batt\.x_[kv]", "1 - d^(0.7 q)", lambda s: 1 - s.d ** (0.7 * s.q)),
    Row(
        r".*\batt\.w0",
        "-6 + 6 (c/(C-1))^(1 + p^0.3) + 0.5 + 2.5 zz",
        lambda s: -6 + 6 * s.along ** (1 + s.p**0.3) + 0.5 + 2.5 * s.zz,
        lr_scale=2.0,
    ),
    Row(r".*\batt\.a0", "-0.19 + 0.3 zz + 0.4 lin", lambda s: -0.19 + 0.3 * s.zz + 0.4 * s.lin),
    Row(r".*\batt\.v0", "0.73 - 0.4 lin", lambda s: 0.73 - 0.4 * s.lin),
    Row(r".*\batt\.[wavg]1", "0", lambda s: 0.0),
    Row(r".*\batt\.[wavg]2", "orthogonal, gain 0.1 max(1, sqrt(rows/cols))", orthogonal(_low_rank_gain)),
    Row(r".*\batt\.k_k", "0.71 - 0.1 lin", lambda s: 0.71 - 0.1 * s.lin),
    Row(r".*\batt\.k_a", "1.02", lambda s: 1.02),
    Row(r".*\batt\.r_k", "-0.04", lambda s: -0.04),
    Row(r".*\batt\.(receptance|value)\.weight", "orthogonal, gain 1", orthogonal(lambda s: 1.0), decay=True),
    Row(r".*\batt\.key\.weight", "orthogonal, gain 0.1", orthogonal(lambda s: 0.1), decay=True),
    Row(r".*\batt\.output\.weight", "0", lambda s: 0.0, decay=True),
    Row(
        r".*\batt\.ln_x\.weight",
        "((1+i)/L)^0.7",
        lambda s: ((1 + s.layer) / s.config.n_layer) ** 0.7,
    ),
    Row(r".*\batt\.ln_x\.bias", "0", lambda s: 0.0),
    Row(r".*\bffn\.x_k", "1 - d^(q^4)", lambda s: 1 - s.d ** (s.q**4)),
    Row(r".*\bffn\.key\.weight", "orthogonal, gain 1", orthogonal(lambda s: 1.0), decay=True),
    Row(r".*\bffn\.value\.weight", "0", lambda s: 0.0, decay=True),
    Row(r"ln_out\.weight", "1", lambda s: 1.0),
    Row(r"ln_out\.bias", "0", lambda s: 0.0),
    Row(r"head\.weight", "orthogonal, gain 0.5 sqrt(V/C), 0.5 when V <= C", orthogonal(_head_gain), decay=True),
)


def row_of(name: str) -> Row:
    """The table's row for a parameter of the model, by its state-dict name. An unknown name is a mistake of ours."""
    rows = [row for row in TABLE if row.matches(name)]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows of the init table, expected exactly one"
    return rows[0]


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, layer: int = 0, prefix: str = "") -> None:
    """Give every parameter of `module` its initial value; `prefix` completes the names to those of the table ("att.").

    Values are worked out in fp32 or finer on the CPU and cast, so that they don't depend on dtype and device. Nothing is drawn for
    tensors on the meta device: they get their values from a file.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        found = re.match(r"blocks\.(\d+)\.", prefix + name)
        place = Place(config, int(found.group(1)) if found else layer, parameter.shape)
        with torch.device("cpu"):
            value = row_of(prefix + name).value(place)
        if isinstance(value, Tensor):
            parameter.copy_(value.reshape(parameter.shape))
        else:
            parameter.fill_(value)
