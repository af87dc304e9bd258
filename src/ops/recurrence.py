"""RWKV-7's recurrence as one op with several implementations: CUDA, native CPU, portable, and the reference.

The native ops are `torch.ops.rwkv7.wkv7_forward` and `wkv7_backward`, chosen by PyTorch's dispatcher from the
tensors' device. Here: the checks of the arguments, and the choice of the implementation.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from src.config import KERNELS, PLAIN_KERNELS
from src.ops import build
from src.ops.portable import wkv7_portable
from src.ops.recurrence_op import CUDA_WINDOW, KERNEL_NUMBERS, run_native
from src.ops.recurrence_op import register_op as _register
from src.ops.reference import wkv7_reference
from src.ops.toolchain import BuildError

__all__ = ["describe_kernel", "has_warpgroups", "wkv7"]

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_warned: set[str] = set()  # reasons for the portable kernel that were reported


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

    r, w, k, v, a, b: [B, T, H, N] of one dtype, any T >= 1; w is the raw decay.
    state and final_state: fp32 [B, H, N, N]; None: zeros. All seven have gradients; where none is required nothing is
    kept for backward. With cu_seqlens (int32 [D+1], B = 1) the row holds D documents, each with a state of its own:
    [D, H, N, N] in and out.

    kernel: 'auto' takes the fastest available implementation and falls back to 'portable' with one warning;
    'recurrent' (exact) and 'chunked' (tensor cores) take that native kernel or raise; 'portable' (in chunks) and
    'reference' (token by token) are plain PyTorch.

    Raises ValueError for wrong shapes, dtypes, devices or kernel names, `build.BuildError` when a kernel asked by
    name is not available, RuntimeError on a CPU for cu_seqlens that decrease or don't run from 0 to T (a GPU clamps
    them: their values are not on the host).
    """
    _check(r, w, k, v, a, b, state, cu_seqlens, kernel)
    # With the device's index: a machine may have GPUs of different generations, and another one may be current.
    implementation = _choose(r.device.type, r.device.index, r.dtype, r.shape[-1], kernel)
    if implementation == "reference":  # differentiable by autograd as it is, twice too
        return wkv7_reference(r, w, k, v, a, b, state, cu_seqlens)
    if implementation == "portable":
        return wkv7_portable(r, w, k, v, a, b, state, cu_seqlens)
    return run_native((r, w, k, v, a, b), state, cu_seqlens, KERNEL_NUMBERS[implementation])


def describe_kernel(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> str:
    """The implementation that serves these inputs, as text; builds it if need be. `device`: "cuda:1", "cuda", "cpu".

    Where 'auto' falls back, the text has the reason, and wkv7 warns of it no more. Raises BuildError when a kernel
    asked by name is not available.
    """
    if kernel == "reference":
        return "plain PyTorch reference (slow), as requested"
    if kernel == "portable":
        return "portable kernel, plain PyTorch in chunks, as requested"
    where = torch.device(device)
    error = _unavailable(where.type, where.index, dtype, head_size, kernel)
    if error is not None:
        if kernel != "auto":
            raise error
        _warned.add(str(error))
        return _fallback(error)
    if where.type != "cuda":
        return "native kernel, exact recurrence"
    unfit = _why_not_chunked(where.index, dtype, head_size)
    if kernel == "chunked" or (kernel == "auto" and unfit is None):
        return f"CUDA kernel, chunked on tensor cores{' by warpgroups' if has_warpgroups(where.index) else ''}"
    return "CUDA kernel, exact recurrence" + (f" ({unfit.problem})" if kernel == "auto" and unfit else ", as requested")


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
    """The only check of shapes, dtypes and devices: the native code reads the tensors as described here."""
    if kernel not in KERNELS:
        raise ValueError(f"--kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"wkv7 inputs must be [B, T, H, N] with T >= 1, got r {tuple(r.shape)}")
    for name, x in (("w", w), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise ValueError(
                f"wkv7 inputs must have one shape, dtype and device: r is {tuple(r.shape)} {r.dtype} on {r.device}, "
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    B, _, H, N = r.shape
    sequences = B  # that have a state of their own
    if cu_seqlens is not None:
        if B != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                "cu_seqlens must be int32 [documents + 1] with B = 1, "
                f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} with B = {B}"
            )
        if cu_seqlens.device != r.device:
            raise ValueError(f"cu_seqlens must be on the inputs' device {r.device}, got {cu_seqlens.device}")
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        # float64 is the reference's alone, for tests of gradients.
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        if state.shape != (sequences, H, N, N) or state.dtype != dtype or state.device != r.device:
            raise ValueError(
                f"state must be {dtype} {(sequences, H, N, N)} on {r.device}, "
                f"got {state.dtype} {tuple(state.shape)} on {state.device}"
            )


def _choose(device: str, index: int | None, dtype: torch.dtype, head_size: int, kernel: str) -> str:
    """'recurrent', 'chunked', 'wgmma' (chunked, by warpgroups), 'portable' or 'reference'.

    Builds and loads the native library on the first call.

    Raises BuildError when a kernel asked by name is not available; warns once where 'auto' falls back to 'portable'.
    """
    if kernel in PLAIN_KERNELS:
        return kernel
    error = _unavailable(device, index, dtype, head_size, kernel)
    if error is None:
        if kernel == "auto":
            fits = device == "cuda" and _why_not_chunked(index, dtype, head_size) is None
            kernel = "chunked" if fits else "recurrent"
        return "wgmma" if kernel == "chunked" and has_warpgroups(index) else kernel
    if kernel != "auto":
        raise error
    # Once for each reason: wkv7 is called in every layer of every step.
    if str(error) not in _warned:
        _warned.add(str(error))
        warnings.warn(f"wkv7 runs on the {_fallback(error)}", stacklevel=3)
    return "portable"


def _fallback(error: BuildError) -> str:
    """The kernel that 'auto' falls back to, and why, in one line."""
    advice = f"; {error.advice}" if error.advice else ""
    output = " (--kernel recurrent shows the compiler's output)" if error.output else ""
    return f"portable kernel, plain PyTorch in chunks, slower: {error.problem}{advice}{output}"


# The choice is a constant of a compiled graph. The attribute is what torch.compiler.assume_constant_result sets;
# importing the compiler for it would take seconds in programs that compile nothing.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unavailable(device: str, index: int | None, dtype: torch.dtype, head_size: int, kernel: str) -> BuildError | None:
    """Why the native op can't serve (None when it can). Builds and loads it on the first call."""
    # What no build would change comes first: then nothing is compiled in vain.
    error = _why_not_native(device, dtype, head_size)
    if error is None and kernel == "chunked":
        error = _why_not_chunked(index, dtype, head_size) if device == "cuda" else _NO_CHUNKED_ON_A_CPU
    if error is None:
        error = _why_not_built(device)  # seconds, on the first call
    if error is None:
        return None
    if kernel == "auto":
        problem = f"the native kernel is not available: {error.problem}"
        return BuildError(problem, advice="" if error.advice == _PORTABLE else error.advice, output=error.output)
    advice = error.advice
    if "--kernel" not in advice:
        advice = f"{advice}, or {_PORTABLE}" if advice else _PORTABLE
    problem = f"kernel {kernel!r} is not available: {error.problem}"
    return BuildError(problem, advice=advice, output=error.output, kernel=kernel)


_PORTABLE = "use --kernel portable"
# The chunked form of the CPU kernel is exact: it is called recurrent there, and needs no second name.
_NO_CHUNKED_ON_A_CPU = BuildError("a CPU has no tensor cores", advice="use --kernel recurrent")


def _why_not_native(device: str, dtype: torch.dtype, head_size: int) -> BuildError | None:
    if device not in ("cpu", "cuda"):
        return BuildError(f"there is no native kernel for device {device!r}", advice=_PORTABLE)
    if dtype not in NATIVE_DTYPES:
        return BuildError(f"the native kernels take float32, bfloat16 and float16, got {dtype}", advice=_PORTABLE)
    if device == "cuda" and head_size not in CUDA_WINDOW:
        return BuildError(
            f"the CUDA kernels take head sizes {', '.join(map(str, CUDA_WINDOW))}, got {head_size}",
            advice=_PORTABLE,
        )
    if head_size % 16:  # a row is read in vectors of 16 lanes
        return BuildError(
            f"the native kernel takes head sizes that are a multiple of 16, got {head_size}",
            advice=_PORTABLE,
        )
    return None


def _why_not_built(device: str) -> BuildError | None:
    try:
        build.load_native(_register)
        return build.why_no_cuda() if device == "cuda" else None
    except BuildError as failure:
        return failure


def has_warpgroups(index: int | None) -> bool:
    """Whether the chunked kernel of that GPU is the one for warpgroups: sm_90, which no other GPU's code has.

    It has run on no GPU yet, only on its host twins (tests/host_cuda): until it has, it is chosen only with
    RWKV7_WGMMA=1 in the environment. Backward must see what forward saw.
    """
    if torch.version.hip or not torch.cuda.is_available() or os.environ.get("RWKV7_WGMMA") != "1":
        return False
    return torch.cuda.get_device_capability(index) == (9, 0)


def _why_not_chunked(index: int | None, dtype: torch.dtype, head_size: int) -> BuildError | None:
    """Of the GPU of that index (None: the current one)."""
    if dtype != torch.bfloat16:
        return BuildError(
            f"the chunked kernel takes bfloat16, got {dtype}", advice="use --kernel recurrent, or bf16 precision"
        )
    if head_size != 64:
        return BuildError(f"the chunked kernel takes head size 64, got {head_size}", advice="use --kernel recurrent")
    if torch.version.hip:
        return BuildError("the chunked kernel needs an NVIDIA GPU", advice="use --kernel recurrent")
    # bf16 matrix instructions and asynchronous copies begin with Ampere. Without a GPU the caller plans for one.
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(index)) < (8, 0):
        return BuildError(
            f"the chunked kernel needs a GPU of capability 8.0 or later, got {capability[0]}.{capability[1]}",
            advice="use --kernel recurrent",
        )
    return None
