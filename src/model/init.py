"""One table: parameter name -> initial value, learning-rate scale, weight decay.

Every constructor, the optimizer's parameter groups and the weight table in docs/model.md read it, so there is one row
to change. The values are those of the official RWKV-7 ("x070") training code.

Notation: layer i of L, channel c of C, head size N; p = i / (L-1), q = 1 - i / L, d = c / C, lin = c / (C-1) - 0.5,
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
class ParameterInfo:
    """What an initial value may depend on: the model's sizes, the parameter's layer and its shape."""

    config: ModelConfig
    layer: int
    shape: torch.Size

    @property
    def channel(self) -> Tensor:
        """c, from 0 to C - 1; [C]."""
        # float64: powers such as d^(0.2 q) are rounded once, when they are copied to the parameter
        return torch.arange(self.config.n_embd, dtype=torch.float64)

    @property
    def p(self) -> float:
        """Depth from 0 in the first layer to 1 in the last."""
        return self.layer / (self.config.n_layer - 1) if self.config.n_layer > 1 else 0.0

    @property
    def q(self) -> float:
        """From 1 in the first layer down to 1 / L in the last: never 0, unlike 1 - p."""
        return 1 - self.layer / self.config.n_layer

    @property
    def d(self) -> Tensor:
        """c / C, from 0 to just below 1; [C]."""
        return self.channel / self.config.n_embd

    @property
    def ramp(self) -> Tensor:
        """c / (C-1), from 0 in the first channel to 1 in the last; [C]."""
        return self.channel / max(1, self.config.n_embd - 1)

    @property
    def lin(self) -> Tensor:
        """The ramp centred on 0; [C]."""
        return self.ramp - 0.5

    @property
    def zz(self) -> Tensor:
        """A signed square from -1 to 1 across the channels of each head; [C]."""
        half = (self.config.head_size - 1) / 2
        z = (self.channel % self.config.head_size - half) / half
        return z * z.abs()


# An initial value: one number for all elements, a value per channel [C], or the whole tensor.
Value = Callable[[ParameterInfo], "Tensor | float"]


@dataclass(frozen=True)
class Row:
    """One kind of parameter: `pattern` matches its names, `text` is the formula of `value` for the documentation."""

    pattern: str
    text: str
    value: Value
    lr_scale: float = 1.0
    decay: bool = False

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def orthogonal(gain: Callable[[ParameterInfo], float]) -> Value:
    """A random matrix with orthonormal rows or columns (whichever are fewer), times `gain`."""

    def draw(info: ParameterInfo) -> Tensor:
        return nn.init.orthogonal_(torch.empty(info.shape), gain=gain(info))

    return draw


def _head_gain(s: ParameterInfo) -> float:
    vocab, width = s.shape
    # With V > C only the columns are orthonormal; the factor gives each row the norm 0.5 on average.
    return 0.5 * math.sqrt(vocab / width) if vocab > width else 0.5


def _low_rank_gain(s: ParameterInfo) -> float:
    # The matrices are [D, C] with D < C in all released models, so that the gain is 0.1.
    return 0.1 * max(1.0, math.sqrt(s.shape[0] / s.shape[1]))


TABLE: tuple[Row, ...] = (
    # Tiny, as ln0 normalises the embedding: a small weight learns its direction in a few steps.
    Row(r"emb\.weight", "uniform(-1e-4, 1e-4)", lambda s: torch.empty(s.shape).uniform_(-1e-4, 1e-4), decay=True),
    Row(r".*\bln[012]\.weight", "1", lambda s: 1.0),
    Row(r".*\bln[012]\.bias", "0", lambda s: 0.0),
    # Token shift. The mix is 0 for the current token and 1 for the previous one: it falls along the channels, and
    # deeper layers (small q) look at the previous token in fewer channels.
    Row(r".*\batt\.x_[rg]", "1 - d^(0.2 q)", lambda s: 1 - s.d ** (0.2 * s.q)),
    Row(r".*\batt\.x_[wa]", "1 - d^(0.9 q)", lambda s: 1 - s.d ** (0.9 * s.q)),
    Row(r".*\batt\.x_[kv]", "1 - d^(0.7 q)", lambda s: 1 - s.d ** (0.7 * s.q)),
    # The decay's bias: from long memory in the first channels to short memory in the last; zz varies it per head.
    Row(
        r".*\batt\.w0",
        "-6 + 6 (c/(C-1))^(1 + p^0.3) + 0.5 + 2.5 zz",
        lambda s: -6 + 6 * s.ramp ** (1 + s.p**0.3) + 0.5 + 2.5 * s.zz,
        lr_scale=2.0,
    ),
    Row(r".*\batt\.a0", "-0.19 + 0.3 zz + 0.4 lin", lambda s: -0.19 + 0.3 * s.zz + 0.4 * s.lin),
    Row(r".*\batt\.v0", "0.73 - 0.4 lin", lambda s: 0.73 - 0.4 * s.lin),
    # The first of each low-rank pair is 0 and the second is not: it adds nothing at step 0 but receives a gradient.
    Row(r".*\batt\.[wavg]1", "0", lambda s: 0.0),
    Row(r".*\batt\.[wavg]2", "orthogonal, gain 0.1 max(1, sqrt(rows/cols))", orthogonal(_low_rank_gain)),
    Row(r".*\batt\.k_k", "0.71 - 0.1 lin", lambda s: 0.71 - 0.1 * s.lin),
    Row(r".*\batt\.k_a", "1.02", lambda s: 1.02),
    Row(r".*\batt\.r_k", "-0.04", lambda s: -0.04),
    # query: of an attention block
    Row(r".*\batt\.(receptance|query|value)\.weight", "orthogonal, gain 1", orthogonal(lambda s: 1.0), decay=True),
    Row(r".*\batt\.key\.weight", "orthogonal, gain 0.1", orthogonal(lambda s: 0.1), decay=True),
    # Both branches of a block end in a zero matrix: at step 0 a block is the identity, however deep the model is.
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

# Of parameters that src/adapt adds to a model; a model without adapters has none of them.
ADAPTER_TABLE: tuple[Row, ...] = (
    # Kaiming-uniform with a = sqrt(5), as LoRA's reference implementation and PEFT
    Row(r".*\.lora_A", "uniform(-1/sqrt(in), 1/sqrt(in))", lambda s: _uniform(s.shape), decay=True),
    # the product starts at 0: at step 0 the adapted model is the base
    Row(r".*\.lora_B", "0", lambda s: 0.0, decay=True),
    Row(r".*\.lora_[AB]_init", "PiSSA: A and B at the start, frozen", lambda s: 0.0),
    Row(r".*\.lora_magnitude", "DoRA: the norms of W's rows", lambda s: 1.0),
    Row(r".*\.miss_block", "0", lambda s: 0.0, decay=True),
    Row(r".*\batt\.time_state", "0", lambda s: 0.0),
)

# Of what src/multimodal attaches to a model.
MEDIA_TABLE: tuple[Row, ...] = (
    # as the matrices of a block that begin at a scale of 1: ln0 takes the rows that come out as it takes embeddings
    Row(r"media\.projector\..*\bweight", "orthogonal, gain 1; of norms 1", lambda s: _matrix_or_norm(s), decay=True),
    Row(r"media\.projector\..*\bbias", "0", lambda s: 0.0),
    Row(r"media\.encoder\..*", "as PyTorch draws the layer, or from its folder", lambda s: 0.0),
)


def _matrix_or_norm(info: ParameterInfo) -> Tensor | float:
    return orthogonal(lambda s: 1.0)(info) if len(info.shape) > 1 else 1.0


def _uniform(shape: torch.Size) -> Tensor:
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


def row_of(name: str) -> Row:
    """The table's row for a parameter, by its state-dict name. Asserts that there is exactly one."""
    rows = [row for row in (*TABLE, *ADAPTER_TABLE, *MEDIA_TABLE) if row.matches(name)]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows of the init table, expected exactly one"
    return rows[0]


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, layer: int = 0, prefix: str = "") -> None:
    """Set every parameter of `module` to its initial value; `prefix` ("att.") completes its names.

    Values are computed on the CPU in fp32 or float64 and cast, independently of the parameters' dtype and device.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:  # gets its values from a file: drawing them would only take time
            continue
        block = re.match(r"blocks\.(\d+)\.", prefix + name)
        info = ParameterInfo(config, int(block.group(1)) if block else layer, parameter.shape)
        with torch.device("cpu"):  # whatever device context the caller constructs the model under
            value = row_of(prefix + name).value(info)
        if isinstance(value, Tensor):
            parameter.copy_(value.reshape(parameter.shape))
        else:
            parameter.fill_(value)
