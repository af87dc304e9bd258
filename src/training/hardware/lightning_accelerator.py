"""Lightning's Accelerator and strategy for one device that Lightning itself has no class for, such as xpu."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy


class TorchAccelerator(Accelerator):
    """A device that torch.get_device_module knows: the first of its kind. It has no streams and no pinned memory."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing: the first device is the current one."""

    def teardown(self) -> None:
        """Nothing: the process ends."""

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """Lightning's `devices` as a number."""
        return int(devices) if isinstance(devices, int | str) else len(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """As many of PyTorch's accelerator. Lightning only counts them: the strategy has the device."""
        return [torch.accelerator.current_accelerator() or torch.device("cpu")] * devices

    @staticmethod
    def auto_device_count() -> int:
        """One: more than one process is refused earlier."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Whether the device is there was found out by `find_device`."""
        return True

    @staticmethod
    def name() -> str:
        """What Lightning calls the accelerator in its messages."""
        return "torch"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None: the run's own log has the memory."""
        return {}


def single_device(device_type: str) -> SingleDeviceStrategy:
    """The strategy of a run of one process on such a device."""
    return SingleDeviceStrategy(torch.device(device_type, 0), accelerator=TorchAccelerator())
