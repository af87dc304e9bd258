"""A program of this project on a device of PyTorch's that is the CPU under the name `fake`, with the rules of mps.

    python tests/fake_device.py train.py --accelerator fake ...
    python tests/fake_device.py src.inference.generate FOLDER --device fake ...

A tensor on it has no float64 and no pinned memory, and meets no tensor of the CPU in an operation but numbers.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))

NAME = "fake"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DeviceModule:
    """What PyTorch and this project ask torch.fake."""

    def is_available(self):
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self):
        return False

    def nothing(self, *args):
        pass

    _lazy_init = synchronize = manual_seed_all = nothing

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


class FakeTensor(torch.Tensor):
    """A tensor of the device, with its values in a tensor of the CPU."""

    @staticmethod
    def __new__(cls, values):
        if values.dtype in (torch.float64, torch.complex128):
            raise TypeError("the device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, values):
        self.values_on_cpu = values

    def __repr__(self):
        return f"FakeTensor({self.values_on_cpu})"

    def tolist(self):
        return self.values_on_cpu.tolist()

    # PyTorch makes the index of a list below its dispatcher.
    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index, device=self.device) if isinstance(index, list) else index)

    def __setitem__(self, index, value):
        super().__setitem__(torch.tensor(index, device=self.device) if isinstance(index, list) else index, value)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, *args, **(kwargs or {}))


def on_cpu(x):
    return x.values_on_cpu if isinstance(x, FakeTensor) else x


def compute(operator, *args, **kwargs):
    """`operator` of tensors of the device, or one that makes them."""
    if kwargs.get("pin_memory"):
        raise TypeError("the device has no pinned memory")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(on_cpu(x)): x for x in tensors if isinstance(x, FakeTensor)}
    if operator not in COPIES and any(x.dim() for x in tensors if not isinstance(x, FakeTensor)):
        raise RuntimeError(f"{operator} of tensors on two devices")
    if operator is COPIES[1]:
        on_cpu(args[0]).copy_(on_cpu(args[1]))
        return args[0]
    to = kwargs.get("device")
    if to is not None and torch.device(to).type == NAME:
        kwargs["device"] = "cpu"
    results = operator(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    if to is not None and torch.device(to).type == "cpu":
        return results
    # what an in-place operation returns is its argument
    return tree_map(lambda x: ours.get(id(x), FakeTensor(x)) if isinstance(x, torch.Tensor) else x, results)


def register():
    backend_registration._setup_privateuseone_for_python_backend(NAME, DeviceModule())
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    torch.inference_mode = torch.no_grad  # tensors of a device written in Python can't be inference tensors
    for name in ("tensor", "as_tensor"):  # which PyTorch doesn't dispatch to a device written in Python
        setattr(torch, name, made_on_cpu(getattr(torch, name)))
    return library


def made_on_cpu(make):
    def to_device(*args, device=None, **kwargs):
        return make(*args, **kwargs).to(device) if device is not None else make(*args, **kwargs)

    return to_device


if __name__ == "__main__":
    library = register()  # its rules end with it
    from src.ops import devices

    devices.sum_dtype = lambda device: torch.float64 if device.type == "cpu" else torch.float32
    program, *_ = sys.argv = sys.argv[1:]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
