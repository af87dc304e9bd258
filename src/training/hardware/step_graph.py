"""The whole training step as one CUDA graph: forward, backward and the optimizer's update, captured once and replayed.

A replay starts all of the step's kernels with one call, so that the GPU doesn't wait for the host between small ones.
What changes from step to step stays outside: the batch is copied to where the graph reads it, learning rates are
brought to the device before each replay, and steps that aren't finite are skipped on the device. The first steps run
uncaptured, which compiles, loads and allocates what a capture may not. Before the graph is used, its loss and gradient
norm are compared with those of the same step without it; where they differ, or the capture fails, one warning says so,
and the run goes on without.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.training.optim import MasterAdamW

WARM_UP_STEPS = 3
TOLERANCE = 1e-2  # of the first replay against the step without a graph: sums in bf16 in another order

Batch = tuple[Tensor, ...]
Output = dict[str, Any]  # of a training step: `loss`, and `metrics` by name


def record_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Captures what `step` starts on the device, without executing it; the function that is returned executes it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class StepGraph:
    """step_graph(batch) -> the training step's output: of the step alone, or of a replay, which has done everything.

    `replayed` tells which it was: after a replay neither backward nor the optimizer's step may follow. A batch of other
    shapes is computed without the graph.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Output],
        optimizer: MasterAdamW,
        record: Callable[[Callable[[], None]], Callable[[], None]] = record_cuda_graph,
    ) -> None:
        self.forward, self.optimizer, self.record = forward, optimizer, record
        self.replayed = False
        self._steps_to_warm_up = WARM_UP_STEPS
        self._failed = False
        self._replay: Callable[[], None] | None = None
        self._batch: Batch = ()  # where the graph reads
        self._output: Output = {}  # where it writes

    def __call__(self, batch: Batch) -> Output:
        self.replayed = self.optimizer.is_updated = False
        if self._failed or self._steps_to_warm_up > 0:
            self._steps_to_warm_up -= 1
            return self.forward(batch)
        if self._replay is None and not self._capture(batch):
            return self.forward(batch)
        assert self._replay is not None
        if [x.shape for x in batch] != [x.shape for x in self._batch]:
            return self.forward(batch)
        for to, value in zip(self._batch, batch, strict=True):
            to.copy_(value)
        self.optimizer.set_rates()
        self._replay()
        self.replayed = self.optimizer.is_updated = True
        return self._output

    def _capture(self, batch: Batch) -> bool:
        """Capture the step for batches of these shapes; whether the graph computes what the step does."""
        self._batch = tuple(x.clone() for x in batch)
        loss, norm = self._without_graph(batch)
        try:
            self._replay = self.record(self._whole_step)
            # for comparison: nothing is changed
            with self.optimizer.held():
                self._replay()
            found_loss, found_norm = float(self._output["loss"]), float(self.optimizer.grad_norm)
        # whatever a library raises on a call that a capture forbids, the step itself is sound: it has just been done
        except RuntimeError as error:
            return self._give_up(str(error).split("\n", 1)[0])
        if not (_is_close(found_loss, loss) and _is_close(found_norm, norm)):
            return self._give_up(
                f"loss {found_loss:g} and gradient norm {found_norm:g} instead of {loss:g} and {norm:g}"
            )
        return True

    def _give_up(self, reason: str) -> bool:
        self._failed, self._replay, self._batch, self._output = True, None, (), {}
        self.optimizer.zero_grad()
        warnings.warn(
            f"the training step can't be captured as a CUDA graph ({reason}): it runs without, which can be slower; "
            "--cuda_graph off skips the attempt",
            stacklevel=2,
        )
        return False

    def _without_graph(self, batch: Batch) -> tuple[float, float]:
        """Loss and gradient norm of a batch; the gradients are dropped again."""
        self.optimizer.zero_grad()
        loss = self.forward(batch)["loss"]
        loss.backward()
        found = float(loss.detach()), float(self.optimizer.gradient_norm())
        self.optimizer.zero_grad()  # to None: the captured backward makes its own, at addresses of the graph
        return found

    def _whole_step(self) -> None:
        output = self.forward(self._batch)
        output["loss"].backward()
        self.optimizer.update()
        self._output = {**output, "loss": output["loss"].detach()}


def _is_close(found: float, expected: float) -> bool:
    if math.isfinite(found) and math.isfinite(expected):
        return math.isclose(found, expected, rel_tol=TOLERANCE)
    return math.isfinite(found) == math.isfinite(expected)  # a step that isn't finite is skipped either way
