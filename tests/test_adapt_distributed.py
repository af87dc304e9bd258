"""Adapters in two processes under DDP, ZeRO 1 and 2, compiled, over quantised bases: the steps of one process."""

import pytest
import torch
from test_distributed import launch, needs_deepspeed, tensors_of_kind, with_one_process

KINDS = {
    "lora": {"peft": "lora", "lora_r": 4, "lora_train": "ln,vectors"},
    "pissa": {"peft": "pissa", "lora_r": 4},
    "miss": {"peft": "miss", "lora_r": 4},
    "dora": {"peft": "dora", "lora_r": 4},
    "state": {"train_type": "state"},
}
STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2")
TOLERANCE = 1e-4  # of relative_difference; rounding alone gives up to 3e-5 after four steps of Adam with lr 0.01
pytestmark = [pytest.mark.slow, needs_deepspeed]


def relative_difference(one, other, kinds=("master", "exp_avg", "exp_avg_sq")):
    """The largest of all trained tensors and their moments: the norm of the difference, in norms of the tensor.

    Not of single numbers: where a gradient is nearly 0, Adam follows the sign of its rounding. The moments tell a wrong
    scale of the gradient, which Adam's steps don't.
    """
    differences = {}
    for kind in kinds:
        expected, found = tensors_of_kind(one["state"], kind), tensors_of_kind(other["state"], kind)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            differences[f"{name}/{kind}"] = (found[name] - tensor).norm() / tensor.norm()
    return float(torch.stack(list(differences.values())).max())  # NaN where one is


def largest_difference(one, other):
    """Of single numbers of the trained tensors."""
    one, other = tensors_of_kind(one["state"], "master"), tensors_of_kind(other["state"], "master")
    assert one.keys() == other.keys()
    return float(torch.stack([(other[name] - tensor).abs().max() for name, tensor in one.items()]).max())


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_two_processes_take_the_steps_of_one(quant, tmp_path):
    fits = {}
    for kind, flags in KINDS.items():
        # the recurrence of kernel auto takes an fp32 state beside bf16 inputs, the engine's case
        flags = {**flags, "quant": quant, "adam_eps": 1e-8, "kernel": "auto", "grad_cp": quant == "int8"}
        fits |= {f"{kind} {strategy}": {**flags, "strategy": strategy} for strategy in STRATEGIES}
    several = launch(tmp_path, 2, fits, timeout=1200)
    singles = {kind: with_one_process(fits[f"{kind} ddp"]) for kind in KINDS}
    singles |= {f"{kind} of one": {**fit, "micro_bsz": 2} for kind, fit in singles.items()}  # its part, not averaged
    alone = launch(tmp_path, 1, singles, timeout=1200)
    for name, result in several.items():
        assert ("DeepSpeed" in result["engine"]) == ("deepspeed" in name)
        assert not any(key.rsplit("/", 1)[0] in result["frozen"] for key in result["state"])
        kind = name.split()[0]
        assert relative_difference(alone[kind], result) < TOLERANCE, name
        assert relative_difference(alone[f"{kind} of one"], result) > 1000 * TOLERANCE, name  # what it would notice


def test_engines_train_adapters_of_bfloat16_bases_in_fp32(tmp_path):
    """Every kind takes DDP's steps. Where norms are trained beside it the engine has one dtype for all, the base's: the
    fp32 masters then follow gradients of rounded adapters, and only the lengths of the ways agree."""
    kinds = {**KINDS, "lora": {"peft": "lora", "lora_r": 4}, "norms": KINDS["lora"]}
    fits = {}
    for kind, flags in kinds.items():
        flags = {**flags, "precision": "bf16", "adam_eps": 1e-8, "kernel": "auto"}
        fits |= {f"{kind} {strategy}": {**flags, "strategy": strategy} for strategy in ("ddp", "deepspeed_stage_2")}
    several = launch(tmp_path, 2, fits, timeout=1200)
    for kind in kinds:
        one, other = several[f"{kind} ddp"], several[f"{kind} deepspeed_stage_2"]
        if kind != "norms":
            assert largest_difference(one, other) < 1e-2
            continue
        assert relative_difference(one, other, ["master"]) < 0.1


def test_fp16_in_two_processes(tmp_path):
    """The loss scale is found and steps are skipped as in one process. Under ZeRO only all weights are trained."""
    common = {"precision": "fp16", "adam_eps": 1e-8, "steps": 6}
    fits = {kind: {**flags, **common, "strategy": "ddp"} for kind, flags in KINDS.items()}
    fits |= {f"all {strategy}": {**common, "strategy": strategy} for strategy in (*STRATEGIES, "deepspeed_stage_3")}
    several = launch(tmp_path, 2, fits, timeout=1200)
    alone = launch(tmp_path, 1, {kind: with_one_process(fit) for kind, fit in fits.items()}, timeout=1200)
    for name, result in several.items():
        assert relative_difference(alone[name], result) < 0.1, name


@pytest.mark.parametrize(("quant", "kinds"), [("none", tuple(KINDS)), ("nf4", ("lora", "state"))])
def test_compiled_blocks_take_the_same_steps(quant, kinds, tmp_path):
    """With checkpointing, whose recomputation is a part of the compiled graph: without, the graph is simpler."""
    fits = {}
    for kind in kinds:
        own = {**KINDS[kind], "quant": quant, "adam_eps": 1e-8, "grad_cp": 1}
        fits |= {f"{kind} {compiled}": {**own, "compile": str(compiled)} for compiled in (0, 1)}
    results = launch(tmp_path, 1, fits, timeout=2400)
    for kind in kinds:
        assert results[f"{kind} 1"]["graphs"] > 0
        assert relative_difference(results[f"{kind} 0"], results[f"{kind} 1"]) < 10 * TOLERANCE  # other sums
