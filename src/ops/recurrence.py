"""RWKV-7's recurrence as one op with several makers: CUDA, native CPU, and the plain reference.

The native ops live in `torch.ops.rwkv7` (cuda/wkv7.cpp has their schemas), chosen by PyTorch's dispatcher from the tensors' device. Here: checks, the choice
of the maker, autograd and shapes for torch.compile.
"""

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.config import KERNELS
from src.ops import build
from src.ops.reference import wkv7_reference

CPU_SEGMENT = 32  # tokens between two kept states; kSegment in cuda/wkv7_cpu.h
CUDA_HEAD_SIZES = (32, 64, 128)
CUDA_WINDOW = {32: 16, 64: 16, 128: 8}  # tokens between two kept states; Shape::window in cuda/wkv7_recurrent.cu
CHUNKED_SEGMENT, CHUNKED_SLOT = 48, 8704 // 4  # the same, and floats a kept state takes, in cuda/wkv7_chunked.cu

_warned: set[str] = set()


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, final_state) of the recurrence, per head, S [N value, N key]:

        S_t = S_{t-1} diag(decay_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,     decay_t = exp(-exp(-1/2) sigmoid(w_t))
        y_t = S_t r_t

    r, w, k, v, a, b: [B, T, H, N] of one dtype, any T >= 1; w is the raw decay. state and final_state: fp32 [B, H, N, N]; None: zeros.
    With cu_seqlens (int32 [D+1], B = 1) the row holds D documents, each with a state of its own: [D, H, N, N] in and out.
    Gradients reach all seven. Without need of a gradient nothing is kept for backward.

    kernel: 'auto' takes the fastest that can be had and falls back to the reference with one warning; 'recurrent' (exact),
    'chunked' (tensor cores) and 'reference' are taken at their word.

    Raises ValueError for impossible shapes, dtypes or kernel names, `build.BuildError` when a kernel asked by name can't be built.
    """
    _check(r, w, k, v, a, b, state, cu_seqlens, kernel)
    if kernel == "reference":
        return wkv7_reference(r, w, k, v, a, b, state, cu_seqlens)
    reason = _why_not_native(r.device.type, r.dtype, r.shape[-1], kernel)
    if reason:
        if kernel != "auto":
            raise build.BuildError(f"wkv7 kernel {kernel!r} can't be had: {reason}")
        _warn_once(reason)
        return wkv7_reference(r, w, k, v, a, b, state, cu_seqlens)
    chunked = _takes_chunked(r.device.type, r.dtype, r.shape[-1], kernel)
    inputs = [x for x in (r, w, k, v, a, b, state) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    memory = None if torch.compiler.is_compiling() else _memory.current
    if memory is not None and memory.again:
        y, final_state, _, _ = _Known.apply(r, w, k, v, a, b, state, cu_seqlens, save, chunked, next(memory.again))
        return y, final_state
    outputs = torch.ops.rwkv7.wkv7_forward(r, w, k, v, a, b, state, cu_seqlens, save, chunked)
    if memory is not None:
        memory.outputs.append(tuple(x.detach() for x in outputs))
    y, final_state, _, _ = outputs
    return y, final_state


class Remember:
    """A context in which what `wkv7` gives is kept in `outputs`; with `again` a context in which that is given once more.

    The second one computes nothing, and its gradients are the op's own: for recomputation in backward, where the inputs are the
    same ones. Only calls that reach the native op in eager mode are seen. In backward the context is entered in a thread of autograd's.
    """

    def __init__(self, outputs: list[tuple[Tensor, ...]], again: bool) -> None:
        self.outputs, self.repeats = outputs, again
        self.again: Iterator[tuple[Tensor, ...]] | None = None

    def __enter__(self) -> None:
        self.before = _memory.current
        self.again = iter(self.outputs) if self.repeats else None
        _memory.current = self

    def __exit__(self, *_: object) -> None:
        _memory.current = self.before


class _Memory(threading.local):
    current: Remember | None = None


_memory = _Memory()


class _Known(torch.autograd.Function):
    """wkv7_forward where its outputs are known already: only its place in the graph."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in inputs[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_backward(ctx, *grads), None)  # type: ignore[arg-type]


def _check(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"--kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"wkv7 inputs must be [B, T, H, N] with T >= 1, got r {tuple(r.shape)}")
    for name, x in (("w", w), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise ValueError(
                f"wkv7 inputs must be alike: r is {tuple(r.shape)} {r.dtype} on {r.device}, {name} is {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    B, _, H, N = r.shape
    sequences = B
    if cu_seqlens is not None:
        if B != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens must be int32 [documents + 1] with B = 1, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} with B = {B}"
            )
        if cu_seqlens.device != r.device:
            raise ValueError(f"cu_seqlens must be on {r.device} as the inputs are, got {cu_seqlens.device}")
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        if state.shape != (sequences, H, N, N) or state.dtype != dtype or state.device != r.device:
            raise ValueError(
                f"state must be {dtype} {(sequences, H, N, N)} on {r.device}, got {state.dtype} {tuple(state.shape)} on {state.device}"
            )


def _why_not_native(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> str:
    """Why the native op can't serve ('' when it can). Builds and loads it on the first call."""
    if device not in ("cpu", "cuda"):
        return f"there is no native kernel for device {device!r}"
    if device == "cpu" and kernel == "chunked":
        return "a CPU has no tensor cores; use --kernel auto or recurrent"
    if device == "cuda":
        if kernel == "chunked" and (unfit := _why_not_chunked(dtype, head_size)):
            return unfit
        if head_size not in CUDA_HEAD_SIZES:
            return f"the CUDA kernels take head sizes {', '.join(map(str, CUDA_HEAD_SIZES))}, not {head_size}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the native kernel takes float32, bfloat16 and float16, not {dtype}"
    if head_size % 16:
        return f"the native kernel takes head sizes that are a multiple of 16, not {head_size}"
    try:
        build.load_native(_register)
    except build.BuildError as error:
        return str(error)
    return build.why_no_cuda() if device == "cuda" else ""


def _why_not_chunked(dtype: torch.dtype, head_size: int) -> str:
    if dtype != torch.bfloat16:
        return f"the chunked kernel takes bfloat16, not {dtype}; use --kernel recurrent or --precision bf16"
    if head_size != 64:
        return f"the chunked kernel takes head size 64, not {head_size}; use --kernel recurrent"
    if torch.version.hip:
        return "the chunked kernel needs an NVIDIA GPU; use --kernel recurrent"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the chunked kernel needs a GPU of capability 8.0 or later; use --kernel recurrent"
    return ""


def _takes_chunked(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> bool:
    """Chunked or recurrent: on a GPU 'auto' is chunked where it holds."""
    return kernel == "chunked" or (device == "cuda" and kernel == "auto" and not _why_not_chunked(dtype, head_size))


# As for _why_not_native below: the choice is a constant of a compiled graph.
_takes_chunked._dynamo_marked_constant = True  # type: ignore[attr-defined]


# What torch.compiler.assume_constant_result does, without importing the compiler (seconds) where nobody compiles.
_why_not_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"wkv7 runs on the slow plain-PyTorch reference (--kernel auto): {reason}", stacklevel=3)


def _register() -> None:
    torch.library.register_fake("rwkv7::wkv7_forward", _forward_shapes)
    torch.library.register_fake("rwkv7::wkv7_backward", _backward_shapes)
    torch.library.register_autograd("rwkv7::wkv7_forward", _backward, setup_context=_setup_context)
    torch.library.register_autograd("rwkv7::wkv7_backward", _no_double_backward)


def _sequences(r: Tensor, cu_seqlens: Tensor | None) -> Any:
    return r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_shapes(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    chunked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, N = r.shape
    y = r.new_empty(B, T, H, N)
    final_state = r.new_empty(_sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)
    if not save:
        return y, final_state, r.new_empty(0, dtype=torch.float32), r.new_empty(0, dtype=torch.float32)
    if r.device.type == "cuda":
        slots, floats = (CHUNKED_SEGMENT, CHUNKED_SLOT) if chunked else (CUDA_WINDOW[N], N * N)
        states = (B * T // slots + _sequences(r, cu_seqlens)) * H * floats
        sums = 0 if chunked else B * T * H * N
        return y, final_state, r.new_empty(states, dtype=torch.float32), r.new_empty(sums, dtype=torch.float32)
    kept = B * ((T - 1) // CPU_SEGMENT) if cu_seqlens is None else T // CPU_SEGMENT
    return y, final_state, r.new_empty(kept, H, N, N, dtype=torch.float32), r.new_empty(B, T, H, N, dtype=torch.float32)


def _backward_shapes(
    dy: Tensor,
    dfinal_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved_state: Tensor,
    saved_sa: Tensor,
    chunked: bool,
) -> tuple[Tensor, ...]:
    dstate = r.new_empty(0, dtype=torch.float32) if state is None else r.new_empty(state.shape, dtype=torch.float32)
    return (*(r.new_empty(r.shape) for _ in range(6)), dstate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, w, k, v, a, b, state, cu_seqlens, save, chunked = inputs
    _, _, saved_state, saved_sa = output
    ctx.mark_non_differentiable(saved_state, saved_sa)
    ctx.set_materialize_grads(False)
    ctx.save = save
    ctx.chunked = chunked
    if save:
        ctx.save_for_backward(r, w, k, v, a, b, state, cu_seqlens, saved_state, saved_sa)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError("wkv7_forward was called with save=False: nothing was kept for backward")
    r, w, k, v, a, b, state, cu_seqlens, saved_state, saved_sa = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(r)
    *grads, dstate = torch.ops.rwkv7.wkv7_backward(
        dy, dfinal_state, r, w, k, v, a, b, state, cu_seqlens, saved_state, saved_sa, ctx.chunked
    )
    return (*grads, None if state is None else dstate, None, None, None)


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError("wkv7 has no second derivative in its native kernels; use kernel='reference' for it")


def describe_kernel(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> str:
    """Which maker serves these inputs, in words; builds it if need be.

    Raises BuildError when only the reference could, but for kernel='reference': a run that takes many times as long is worth a question.
    """
    if kernel == "reference":
        return "plain PyTorch reference (slow), as asked for"
    reason = _why_not_native(device, dtype, head_size, kernel)
    if not reason:
        if device != "cuda":
            return "native kernel, exact recurrence"
        unfit = _why_not_chunked(dtype, head_size)
        if _takes_chunked(device, dtype, head_size, kernel):
            return "CUDA kernel, chunked on tensor cores"
        return "CUDA kernel, exact recurrence" + (f" ({unfit})" if kernel == "auto" else ", as asked for")
    raise build.BuildError(
        reason
        if "--kernel" in reason
        else f"{reason}\nWithout the native kernel, many times slower: --kernel reference"
    )
