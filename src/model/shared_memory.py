"""Parameters of a weights file that are the same bytes of it: refused, or copied where it is known why."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from src.errors import UserError

# Unused by the model; official files contain them, some other files don't.
IDLE_IN_LAYER_0 = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
# Files of some programs hold these twice as the same bytes: unused values stand for a0 or v0, and transformers writes a
# tied head so. Training and export treat them as two.
COPIED_IF_SHARED = (*IDLE_IN_LAYER_0, "lm_head.weight")


def _span(tensor: Tensor) -> int | None:
    """The bytes from a tensor's first to its last value; None where two of its elements are one value in memory."""
    reach = min(1, tensor.numel())
    # In the order of their strides: a step along a dimension has to leave all that the smaller ones reach.
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return None
            reach += (size - 1) * stride
    return reach * tensor.element_size()


def separate(weights: dict[str, Tensor], path: Path) -> None:
    """Copies parameters of `COPIED_IF_SHARED` that overlap others in memory.

    Raises UserError when others overlap, or when a parameter has fewer values than elements.
    """
    for name, tensor in weights.items():
        if _span(tensor) is None:
            raise _shared_memory(f"elements of {name}", path)
    end, before = 0, ""
    for begin, name in sorted((tensor.data_ptr(), name) for name, tensor in weights.items() if tensor.numel()):
        span = _span(weights[name]) or 0
        if begin < end:
            copied = next((one for one in (name, before) if one in COPIED_IF_SHARED), None)
            if copied is None:
                raise _shared_memory(f"{before} and {name}", path)
            weights[copied] = weights[copied].clone()
            if copied == name:
                continue
        end, before = max(end, begin + span), name


def _shared_memory(subject: str, path: Path) -> UserError:
    return UserError(
        f"{subject} are the same bytes of the file",
        given=path,
        expected="values of its own in each parameter",
        advice="save copies: torch.save({name: tensor.clone() for name, tensor in weights.items()}, ...)",
    )
