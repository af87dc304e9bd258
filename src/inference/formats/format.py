"""What a file format is to the export: a writer, a reader, and the values that it stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.config import ModelConfig
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.model.weights import IDLE_IN_LAYER_0

FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Export:
    """What a writer gets.

    weights    the model's state dict, of which each tensor is asked for once; in formats without `types` already in
               the dtype to write
    title      name of the model, for formats that store one
    tokenizer  the one of the model; None only in formats that do without
    type       one of the format's `types`, or ""
    run        the folder of the run that trained the model, where there is one
    """

    weights: Mapping[str, Tensor]
    config: ModelConfig
    title: str
    tokenizer: Tokenizer | None = None
    type: str = ""
    run: Path | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end generation."""
        return self.tokenizer.eos_ids if self.tokenizer else (0,)

    @property
    def eos_id(self) -> int:
        """The tokenizer's own end token if it has one besides 0, the end of a document."""
        return max(self.eos_ids)


class VerificationError(RuntimeError):
    """What was read back isn't what was written."""


@dataclass(frozen=True)
class Program:
    """A program that reads a format, and the command that runs OUT with it."""

    name: str
    command: str


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises UserError naming it when it has values that fp16 can't hold."""
    # layer 0's unused parameters may hold uninitialised memory
    if dtype == torch.float16 and tensor.numel() and name not in IDLE_IN_LAYER_0:
        # in its own dtype, without a copy; infinity is found here, too
        largest = max(abs(float(bound)) for bound in tensor.aminmax())
        if largest > FP16_MAX:
            raise UserError(
                f"{name} has values up to {largest:.6g}; fp16 holds at most {FP16_MAX:g}",
                advice="use a format or --dtype with bf16 or fp32",
            )
    return tensor.to(dtype)


def unchanged(name: str, tensor: Tensor, type: str) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Format:
    """How a model is stored.

    summary          a clause for `--list`
    suffix           ending of the file, or "" for a folder
    write            creates `path`. Raises UserError before it does so where the format can't express the model
    read             the tensors in `path` under the names of `RWKV7`, to be compared with what was to be written
    programs         which read it
    types            choices of `--type`, the default first; () where `--dtype` decides, as all tensors have one dtype
    stored           stored(name, tensor, type): the values that the file holds for `tensor`, for formats with `types`
    files            names of the weights in a folder, which an export may replace
    needs_tokenizer  the format is of no use without one
    holds_states     tuned initial states have a place in it, blocks.N.att.time_state beside the weights
    next_command     next_command(title, out): what the user does with it, printed at the end
    """

    summary: str
    suffix: str
    write: Callable[[Export, Path], None]
    read: Callable[[Path], Mapping[str, Tensor]]
    programs: tuple[Program, ...] = ()
    types: tuple[str, ...] = ()
    stored: Callable[[str, Tensor, str], Tensor] = unchanged
    files: tuple[str, ...] = ()
    needs_tokenizer: bool = False
    holds_states: bool = False
    next_command: Callable[[str, Path], str] | None = None

    @property
    def is_folder(self) -> bool:
        return not self.suffix
