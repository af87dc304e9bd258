"""What several GPUs add to `train.py --plan`: communication, the MFU that is left, states, goodput."""

from __future__ import annotations

from collections.abc import Iterator

from src.adapt.config import adapter_of
from src.config import STRATEGIES, ModelConfig, RunConfig, number_pair
from src.model.cost import parameter_count, training_flops_per_token
from src.training.preflight import goodput, traffic
from src.training.preflight.adapter_memory import trained_part

GB = 1e9


def trained_count(config: RunConfig, model: ModelConfig) -> int:
    """The number of parameters that are trained."""
    adapter = adapter_of(config)
    if adapter is None:
        return parameter_count(model)
    part = trained_part(model, adapter)
    return part.adapter + part.whole


def compute_seconds(config: RunConfig, model: ModelConfig) -> float:
    """The time that a GPU computes in a step, at the MFU of --plan_gpu."""
    peak, mfu = number_pair(config.plan_gpu)
    tokens = config.micro_bsz * config.ctx_len * config.accumulate_grad_batches
    return tokens * training_flops_per_token(model) / (peak * 1e12 * mfu / 100)


def sent_bytes(config: RunConfig, model: ModelConfig, strategy: str, processes: int, dtype_bytes: int) -> float:
    """The bytes that a GPU sends in a step under `strategy`."""
    adapter, count = adapter_of(config), parameter_count(model)
    # adapters are fp32 beside a base of any dtype
    gradients = trained_count(config, model) * (dtype_bytes if adapter is None or adapter.train else 4)
    moved = traffic.step_traffic(strategy, gradients, count * dtype_bytes, config.accumulate_grad_batches, count)
    return moved.sent(processes)


def describe_communication(config: RunConfig, model: ModelConfig, processes: int, dtype_bytes: int) -> Iterator[str]:
    """Lines: for each strategy the bytes that a GPU sends in a step, their time, and the MFU that is left."""
    within, between = (GB * value for value in number_pair(config.plan_bandwidth))
    peak, mfu = number_pair(config.plan_gpu)
    devices, num_nodes = processes // config.most_nodes, config.most_nodes
    compute = compute_seconds(config, model)
    links = f"{within / GB:g} GB/s" + (f" within and {between / GB:g} between machines" if num_nodes > 1 else "")
    yield (
        f"Communication of a GPU in one step at {links}, beside {compute:.3g} s of computation at {mfu:g} % of "
        f"{peak:g} TFLOP/s (MFU: nothing of it during the computation, to everything that can be during backward):"
    )
    yield ""
    yield f"{'--strategy':>28}  GB sent  seconds  MFU in %"
    for name in STRATEGIES:
        if name == "auto" or name.endswith("_offload") or (name.endswith("3") and adapter_of(config) is not None):
            continue
        sent = sent_bytes(config, model, name, processes, dtype_bytes)
        duration = traffic.seconds(sent, devices, num_nodes, within, between)
        least, most = traffic.mfu_range(mfu, compute, duration)
        mark = ">" if name == config.strategy or (name == "ddp" and config.strategy == "auto") else " "
        yield f"{mark}{name:>27}  {sent / GB:7.3g}  {duration:7.3g}  {least:.1f} to {most:.1f}"


def describe_states(config: RunConfig, model: ModelConfig, processes: int) -> Iterator[str]:
    """Lines: size and seconds of a state, and the goodput."""
    disks, rate = number_pair(config.plan_disks)
    trained = trained_count(config, model)
    saved = goodput.saving(trained, processes, disks, rate * GB)
    yield (
        f"       state  {goodput.STATE_BYTES * trained / GB:,.1f} GB: a save stops training for {saved.stop:.2g} s and "
        f"is whole after {saved.write:,.3g} s on {disks:g} disks of {rate:g} GB/s; a restart takes "
        f"{saved.restart:,.0f} s"
    )
    failures = goodput.failures_per_second(config.most_nodes, config.plan_mtbf)
    if failures and config.save_minutes:
        share = goodput.goodput(saved, config.save_minutes * 60, failures)
        best = goodput.best_interval(saved, failures)
        yield (
            f"     goodput  {share:.2%} with --save_minutes {config.save_minutes:g} and a failure every "
            f"{1 / failures / 3600:,.0f} hours; {goodput.goodput(saved, best, failures):.2%} with {best / 60:.1f}"
        )
