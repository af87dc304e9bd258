"""Bytes that an optimizer step communicates, by strategy, and how long they take at given bandwidths.

G bytes of gradients and as many of the weights that are trained, W bytes of all weights (both in the run's dtype), A
micro batches a step (tests count these bytes in runs of several processes):

    ddp, auto            all-reduce of G
    deepspeed_stage_1    all-reduce of G, all-gather of G
    deepspeed_stage_2    all-reduce of A G, all-gather of G
    deepspeed_stage_3    reduce-scatter of A G, all-gather of 2 A W: before forward and before backward, or of W where
                         DeepSpeed keeps all weights until the step (up to GATHERED_AT_A_TIME parameters)

A process of P sends 2 (P - 1) / P n bytes in an all-reduce of n, and (P - 1) / P n in the other two: rings, which are
optimal (Patarasuk and Yuan, 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

# Parameters that ZeRO 3 keeps gathered at a time: the default of DeepSpeed's stage3_max_live_parameters.
GATHERED_AT_A_TIME = 1_000_000_000


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors that are reduced or gathered in a step."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0

    def sent(self, processes: int) -> float:
        """Bytes that each process sends."""
        return (processes - 1) / processes * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


def step_traffic(strategy: str, gradients: float, weights: float, micro_batches: int, count: int) -> Traffic:
    """`strategy` is a value of --strategy; `gradients` and `weights` in bytes, `count` of all parameters."""
    if not strategy.startswith("deepspeed"):
        return Traffic(all_reduce=gradients)
    stage = int(strategy.split("_")[2])
    if stage == 3:
        gathered = weights if count <= GATHERED_AT_A_TIME else 2 * micro_batches * weights
        return Traffic(reduce_scatter=micro_batches * gradients, all_gather=gathered)
    return Traffic(all_reduce=(micro_batches if stage == 2 else 1) * gradients, all_gather=gradients)


def seconds(sent: float, devices: int, num_nodes: int, within: float, between: float) -> float:
    """The time that a GPU takes to send these bytes, with `within` bytes/s inside a machine of `devices` GPUs and
    `between` bytes/s of each GPU to other machines.

    Rings pass through each machine once for each of its GPUs' links, so that a machine's links carry what one GPU
    sends.
    """
    if devices * num_nodes == 1:
        return 0.0
    slowest = within if num_nodes == 1 else min(within if devices > 1 else between, devices * between)
    return sent / slowest


def mfu_range(mfu: float, compute: float, communication: float) -> tuple[float, float]:
    """What is left of an MFU: where nothing is communicated while the GPUs compute, and where everything is that can
    be, during backward, two thirds of the computation."""
    hidden = min(communication, compute * 2 / 3)
    return mfu * compute / (compute + communication), mfu * compute / (compute + communication - hidden)
