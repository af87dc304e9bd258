"""Several processes give the losses and weights of one under every strategy: real processes and engines, on CPUs."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_process
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only

from src.cli import parse
from src.config import RunConfig
from src.errors import UserError
from src.model import RWKV7, ModelConfig
from src.model.weights import IDLE_IN_LAYER_0
from src.training.distributed import zero
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.distributed.ranks import LAUNCHER_VARIABLES, cluster_environment
from src.training.distributed.sharded_init import initial_values
from src.training.hardware import selection
from src.training.preflight.traffic import step_traffic
from src.training.run import run

ROOT = Path(__file__).parents[1]
STAGES = {"deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}
OFFLOADS = {f"{name}_offload": stage for name, stage in STAGES.items()}
needs_deepspeed = pytest.mark.skipif(not zero.is_usable(), reason=f"{zero.REQUIREMENT} is not installed")

SGD = {"optimizer": "sgd", "lr_init": 0.5, "grad_clip": 0.0, "accumulate_grad_batches": 2}


def launch(folder, processes, fits, timeout=300, launcher=()):
    """Run fits in `processes` processes, started as train.py starts them. Returns the saved result of each fit."""
    plan = folder / f"plan-{processes}-{len(list(folder.glob('plan-*')))}.json"
    plan.write_text(json.dumps({"processes": processes, "fits": fits}))
    command = [*(launcher or [sys.executable]), "-m", "tests.distributed_run", str(folder), str(plan)]
    done = warm_process.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=timeout, text=True, capture_output=True,
        ranks=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in fits}


def with_one_process(fit):
    """The same fit in one process: its micro batch holds all processes' samples."""
    return {**fit, "strategy": "auto", "devices": "1", "micro_bsz": fit.get("micro_bsz", 2) * 2}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def tensors_of_kind(state, kind):
    """The tensors of one kind ("master", "exp_avg", "exp_avg_sq", "idle") in a full state, by parameter."""
    return {key.removesuffix(f"/{kind}"): tensor for key, tensor in state.items() if key.endswith(f"/{kind}")}


def assert_same_engine(result, name):
    if name == "ddp":
        return
    assert result["engine"] == "DeepSpeedEngine"
    assert result["stage"] == {**STAGES, **OFFLOADS}[name]


# ---- every strategy against one process ------------------------------------------------------------------------------


FIT = {**SGD, "steps": 5}
PIECES, SHARED = {"chunk_ctx": 4, "kernel": "auto"}, {"context_parallel": 2, "kernel": "auto"}
# Under the other stages as well in the slow tests: an engine, and one that partitions the parameters, are the kinds.
QUICK_PIECES, QUICK_SHARED = ("ddp", "deepspeed_stage_3"), ("ddp", "deepspeed_stage_2")


def each_strategy(quick):
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in ("ddp", *STAGES)}
    return [pytest.param(n, marks=[*m, *([] if n == "ddp" else [needs_deepspeed])]) for n, m in marks.items()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A few steps of SGD with accumulation and without clipping under each strategy, and in one process."""
    folder = tmp_path_factory.mktemp("quick")
    fit = FIT
    names = ["ddp", *(STAGES if zero.is_usable() else ())]
    fits = {name: {**fit, "strategy": name} for name in names}
    fits.update({f"stop of rank {rank}": {"strategy": "ddp", "steps": 9, "stop": [rank, 2]} for rank in (0, 1)})
    for name in names:
        fits[f"checkpointed {name}"] = {**fits[name], "grad_cp": 1, "kernel": "auto", "count": True}
    fits.update({f"shared {name}": {**fits[name], **SHARED} for name in names if name in QUICK_SHARED})
    fits.update({f"in pieces {name}": {**fits[name], **PIECES} for name in names if name in QUICK_PIECES})
    if zero.is_usable():
        fits["stage 3, released"] = {
            **fits["checkpointed deepspeed_stage_3"],
            "grad_cp": 0,
            "steps": 3,
            "release": True,
        }
        fits["stage 3, checkpointed and chunked"] = {**fits["deepspeed_stage_3"], "grad_cp": 1, "head_chunk": 5}
        fits["divided twice"] = {**fits["deepspeed_stage_2"], "lightning_backward": True}
        fits["fp16"] = {"strategy": "deepspeed_stage_2", "precision": "fp16", "steps": 3, "poison": 1}
        fits["fp16 overflow"] = {**fits["fp16"], "steps": 19, "poison": "all"}
        fits["adam"] = {"strategy": "deepspeed_stage_2", "steps": 3}
        fits["adam"]["poison"] = 1
        fits["bf16"] = {**fits["adam"], "precision": "bf16"}
    results = launch(folder, 2, fits)
    # of processes that share samples, two see as many of them as one
    return {**results, **launch(folder, 1, {"one": with_one_process(fit), "alone": fit})}


@pytest.fixture(scope="module")
def other_stages(tmp_path_factory):
    fits = {f"shared {name}": {**FIT, **SHARED, "strategy": name} for name in STAGES if name not in QUICK_SHARED}
    fits |= {f"in pieces {name}": {**FIT, **PIECES, "strategy": name} for name in STAGES if name not in QUICK_PIECES}
    return launch(tmp_path_factory.mktemp("others"), 2, fits)


@pytest.mark.parametrize("name", ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in STAGES)])
def test_losses_and_weights_equal_those_of_one_process(quick, name):
    one, other = quick["one"], quick[name]
    assert_same_engine(other, name)
    assert other["losses"][0] == pytest.approx(one["losses"][0], abs=1e-6)
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert other["losses"][-1] < other["losses"][0] - 0.05  # the steps are large enough to reveal a wrong scale
    assert largest_difference(one["weights"], other["weights"]) < 1e-5
    assert other["lrs"] == one["lrs"]
    assert other["lrs"][0][0] == 2 * other["lrs"][0][1] == 1.0  # att.w0's group first


@pytest.mark.parametrize("name", ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in STAGES)])
def test_a_step_communicates_the_bytes_of_the_plan(quick, name):
    """Counted in the last whole step, when DeepSpeed's stage 3 knows the order of its parameters."""
    model = RWKV7(RunConfig(n_layer=2, n_embd=32, head_size=16).model_config(64))
    trained = sum(4 * p.numel() for n, p in model.named_parameters() if n not in IDLE_IN_LAYER_0)
    whole = sum(4 * p.numel() for p in model.parameters())
    small, micro = 200, SGD["accumulate_grad_batches"]  # bytes of flags, losses and norms
    counts = {1: [f"checkpointed {name}"], 2 * 10**9: ["stage 3, released"] if name == "deepspeed_stage_3" else []}
    for count, fits in counts.items():  # of parameters: what is released after use is as in a model of two billion
        for fit in fits:
            before, after = (quick[fit]["traffic"][i] for i in (-1 - micro, -1))
            planned = step_traffic(name, trained, whole, micro, count)
            for kind in ("all_reduce", "reduce_scatter", "all_gather"):
                assert 0 <= after.get(kind, 0) - before.get(kind, 0) - getattr(planned, kind) < small, (fit, kind)


@pytest.mark.parametrize("name", ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in STAGES)])
def test_activation_checkpointing_changes_no_result(quick, name):
    """With the native recurrence, whose outputs are not recomputed."""
    one, other = quick["one"], quick[f"checkpointed {name}"]
    assert_same_engine(other, name)
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert largest_difference(one["weights"], other["weights"]) < 1e-5


@pytest.mark.parametrize("name", each_strategy(QUICK_PIECES))
def test_samples_in_pieces_change_no_result(quick, name, request):
    """The gradients of all pieces reach the strategy once a micro step."""
    results = quick if name in QUICK_PIECES else request.getfixturevalue("other_stages")
    one, other = quick["one"], results[f"in pieces {name}"]
    assert_same_engine(other, name)
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert largest_difference(one["weights"], other["weights"]) < 1e-5


@pytest.mark.parametrize("name", each_strategy(QUICK_SHARED))
def test_processes_that_share_samples_change_no_result(quick, name, request):
    results = quick if name in QUICK_SHARED else request.getfixturevalue("other_stages")
    one, other = quick["alone"], results[f"shared {name}"]
    assert_same_engine(other, name)
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert largest_difference(one["weights"], other["weights"]) < 1e-5


@pytest.fixture(scope="module")
def shared_by_pairs(tmp_path_factory):
    """Four processes, of which two share samples in pieces, and two without sharing."""
    folder = tmp_path_factory.mktemp("pairs")
    names = ["ddp", *(STAGES if zero.is_usable() else ())]
    fit = {**SGD, "steps": 5, "kernel": "auto"}
    pairs = {name: {**fit, "strategy": name, "context_parallel": 2, "chunk_ctx": 8} for name in names}
    return {**launch(folder, 4, pairs), **launch(folder, 1, {"one": with_one_process(fit)})}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in STAGES)])
def test_pairs_that_share_samples_are_data_parallel(shared_by_pairs, name):
    one, other = shared_by_pairs["one"], shared_by_pairs[name]
    assert_same_engine(other, name)
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert largest_difference(one["weights"], other["weights"]) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_requested_by_one_rank_takes_effect_on_both_at_the_same_step(quick, rank):
    """Requested in the third step; the flags travel during the fourth, after which both ranks stop."""
    stopped = quick[f"stop of rank {rank}"]
    assert stopped["steps"] == [4, 4]
    assert len(stopped["losses"]) == 4
    assert quick["ddp"]["steps"] == [5, 5]  # without a request both take all steps


@needs_deepspeed
def test_stage_3_with_activation_checkpointing_and_chunked_loss(quick):
    one, other = quick["one"], quick["stage 3, checkpointed and chunked"]
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert largest_difference(one["weights"], other["weights"]) < 1e-5
    assert other["held"] == 0  # no process holds a whole parameter


@needs_deepspeed
def test_dividing_the_loss_twice_by_the_accumulated_batches_changes_it(quick):
    """Negative control: Lightning's own backward pass, which EnginePrecision replaces, divides a second time."""
    one, other = quick["one"], quick["divided twice"]
    assert other["losses"][0] == pytest.approx(one["losses"][0], abs=1e-6)
    assert other["losses"][-1] > one["losses"][-1] + 0.01


@needs_deepspeed
def test_fp16_lowers_its_loss_scale_and_skips_overflowing_steps(quick):
    other = quick["fp16"]
    assert other["counters"]["skipped_steps"] >= 1
    assert other["counters"]["adam_steps"] == 3 - other["counters"]["skipped_steps"]
    assert other["counters"]["loss_scale"] == 2.0 ** (16 - other["counters"]["skipped_steps"])
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float16 for tensor in other["weights"].values())


@needs_deepspeed
def test_fp16_that_always_overflows_keeps_the_minimum_scale(quick):
    """DeepSpeed would raise an exception; here NonFiniteMonitor decides what to do."""
    other = quick["fp16 overflow"]
    assert other["counters"]["skipped_steps"] == len(other["losses"]) == 19
    assert other["counters"]["loss_scale"] == 1.0


@needs_deepspeed
@pytest.mark.parametrize("name", ["adam", "bf16"])
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(quick, name):
    assert quick[name]["counters"]["skipped_steps"] == 1
    assert quick[name]["counters"]["adam_steps"] == 2
    assert all(tensor.isfinite().all() for tensor in quick[name]["weights"].values())


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    names = ["ddp", *STAGES, *OFFLOADS]
    kinds = {
        "sgd": {**SGD, "steps": 50, "lr_init": 0.2},
        "adam": {"steps": 20, "lr_init": 1e-3, "weight_decay": 0.01},
        "bf16": {"steps": 20, "precision": "bf16", "lr_init": 1e-3, "accumulate_grad_batches": 2},
        "poison": {"steps": 6, "poison": 3},
    }
    fits = {f"{kind} {name}": {**fit, "strategy": name} for kind, fit in kinds.items() for name in names}
    results = launch(folder, 2, fits, timeout=900)
    return {**results, **launch(folder, 1, {f"{kind} one": with_one_process(fit) for kind, fit in kinds.items()})}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    fit = {**SGD, "steps": 3, "kernel": "auto", "grad_cp": 1}
    fits = {name: {**fit, "strategy": name, "compile": "1"} for name in ("ddp", *STAGES)}
    return {**launch(folder, 2, fits, timeout=900), **launch(folder, 1, {"one": with_one_process(fit)})}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ddp", *STAGES])
def test_compiled_and_checkpointed_blocks_under_each_strategy(compiled, name):
    one, other = compiled["one"], compiled[name]
    assert_same_engine(other, name)
    assert other["graphs"] >= 2
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert largest_difference(one["weights"], other["weights"]) < 2e-5


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ddp", *STAGES, *OFFLOADS])
def test_many_steps_equal_those_of_one_process(long, name):
    for kind, tolerance in (("sgd", 1e-5), ("adam", 1e-3)):
        one, other = long[f"{kind} one"], long[f"{kind} {name}"]
        assert_same_engine(other, name)
        assert other["losses"][0] == pytest.approx(one["losses"][0], abs=1e-6)
        assert other["losses"] == pytest.approx(one["losses"], abs=tolerance)
        assert largest_difference(one["weights"], other["weights"]) < tolerance
    assert long[f"adam {name}"]["norms"] == pytest.approx(long["adam one"]["norms"], rel=1e-3)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ddp", *STAGES, *OFFLOADS])
def test_bf16_keeps_fp32_masters(long, name):
    one, other = long["bf16 one"], long[f"bf16 {name}"]
    assert other["losses"] == pytest.approx(one["losses"], abs=0.03)
    assert all(tensor.dtype == torch.float32 for key, tensor in other["state"].items() if not key.endswith("/idle"))
    masters = tensors_of_kind(other["state"], "master")
    assert masters.keys() == {name for name in other["weights"] if f"{name}/idle" not in other["state"]}
    for parameter, master in masters.items():
        weight = other["weights"][parameter]
        assert weight.dtype == torch.bfloat16
        assert torch.equal(master.to(torch.bfloat16), weight), parameter
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ddp", *STAGES, *OFFLOADS])
def test_a_poisoned_step_is_skipped_in_every_group(long, name):
    other = long[f"poison {name}"]
    assert other["counters"] == {"adam_steps": 5.0, "skipped_steps": 1.0, "loss_scale": 1.0, "good_steps": 0.0}
    assert all(tensor.isfinite().all() for tensor in other["weights"].values())
    norms = torch.tensor(other["norms"])
    assert norms.isfinite().tolist() == [True, True, True, False, True, True]


# ---- the full state: resumed under every strategy, on any number of processes ----------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    names = ["ddp", *STAGES, "deepspeed_stage_2_offload"]
    straight = {f"{name} 8": {"strategy": name, "steps": 8, "precision": "bf16"} for name in names}
    half = {f"{name} 4": {"strategy": name, "steps": 4, "precision": "bf16"} for name in names}
    rest = {
        f"{name} 4+4": {
            "strategy": name,
            "steps": 4,
            "first_step": 4,
            "load": f"{name} 4",
            "init_seed": 6,
            "precision": "bf16",
        }
        for name in names
    }
    results = launch(folder, 2, {**straight, **half, **rest}, timeout=900)
    # what three processes hold after loading, since a step with a learning rate of 0 changes no master
    unchanged = {
        f"{name} loaded": {
            "strategy": name, "steps": 1, "load": "deepspeed_stage_3 4", "init_seed": 6, "precision": "bf16",
            "lr_init": 0.0, "weight_decay": 0.0, "micro_bsz": 1,
        }
        for name in names
    }  # fmt: skip
    results.update(launch(folder, 3, unchanged, timeout=900))
    return results


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ddp", *STAGES, "deepspeed_stage_2_offload"])
def test_resuming_is_bit_exact(resumed, name):
    straight, rest = resumed[f"{name} 8"], resumed[f"{name} 4+4"]
    assert rest["losses"] == straight["losses"][4:]
    assert rest["counters"] == straight["counters"]
    assert rest["state"].keys() == straight["state"].keys()
    for key, tensor in straight["state"].items():
        assert torch.equal(tensor, rest["state"][key]), key


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ddp", *STAGES, "deepspeed_stage_2_offload"])
def test_another_number_of_processes_loads_every_master_and_moment(resumed, name):
    before, after = resumed["deepspeed_stage_3 4"], resumed[f"{name} loaded"]
    assert after["counters"]["adam_steps"] == before["counters"]["adam_steps"] + 1
    assert after["state"].keys() == before["state"].keys()
    for parameter, master in tensors_of_kind(before["state"], "master").items():
        assert torch.equal(master, after["state"][f"{parameter}/master"]), parameter  # lr was 0
        key = f"{parameter}/exp_avg"
        change = after["state"][key] - 0.9 * before["state"][key]  # 0.1 of the new, clipped gradient
        assert change.norm() <= 0.1 + 1e-5


# ---- a partitioned model ---------------------------------------------------------------------------------------------


def test_initial_values_drawn_block_by_block_equal_those_of_the_whole_model():
    config = ModelConfig(3, 64, 50, head_size=32)
    torch.manual_seed(3)
    whole = RWKV7(config).state_dict()
    torch.manual_seed(3)
    drawn = dict(initial_values(config))
    assert drawn.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(drawn[name], tensor), name


# ---- cores of a CPU --------------------------------------------------------------------------------------------------

THREADS = """
import os, sys, torch
from tests.ranks import join_ranks
rank = int(os.environ.get("RANK", 0))
os.sched_getaffinity = lambda pid: set(range(6)) if sys.argv[1] == "shared" else set(range(3 * rank, 3 * rank + 3))
process_group = join_ranks(2)
os.write(1, f"{torch.get_num_threads()} threads\\n".encode())
process_group.shutdown()
"""


@pytest.mark.parametrize("cores", ["shared", "pinned"])
def test_processes_divide_the_cores_that_they_share(cores):
    """Six cores for two processes: both may use all, or a launcher has pinned each to three."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = warm_process.run(
        [sys.executable, "-c", THREADS, cores],
        cwd=ROOT, env=environment, timeout=100, text=True, capture_output=True, ranks=True,
    )  # fmt: skip
    assert done.stdout == "3 threads\n" * 2, done.stderr


def test_more_processes_than_cores_give_a_note(monkeypatch):
    monkeypatch.setattr(selection, "usable_cores", lambda: 3)
    assert selection.choose_hardware(RunConfig(accelerator="cpu", devices="3")).notes == ()
    (note,) = selection.choose_hardware(RunConfig(accelerator="cpu", devices="4")).notes
    assert note.startswith("--devices 4: only 3 cores can be used")


# ---- ranks -----------------------------------------------------------------------------------------------------------

RANKS = {"MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
LAUNCHERS = {
    "torchrun": {**RANKS, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    "deepspeed": {**RANKS, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},
    "mpirun": {
        **RANKS, "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    },
    "srun": {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_JOB_ID": "901234",
    },
}  # fmt: skip


@pytest.fixture
def launched_by(monkeypatch):
    """Sets what a launcher sets, and nothing that another one would."""
    ours = {name for names in LAUNCHER_VARIABLES for name in names}
    for name in (*ours, "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "removed at the end of the test")
        monkeypatch.delenv(name)

    def set_variables(launcher, **changed):
        for name, value in {**LAUNCHERS[launcher], **changed}.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_lightning_reads_the_ranks_of_every_launcher(launched_by, launcher):
    """From torchrun's variables, which are set for all of them; the second time from those alone."""
    launched_by(launcher)
    for _ in range(2):
        environment = cluster_environment()
        assert (environment.global_rank(), environment.world_size(), environment.local_rank()) == (5, 8, 1)
        assert (environment.node_rank(), environment.main_address) == (1, "node0")
        assert environment.main_port == (16234 if launcher == "srun" else 1234)
        assert os.environ["LOCAL_WORLD_SIZE"] == "4"
        environment.validate_settings(num_devices=4, num_nodes=2)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("flag", ["train_stage", "check"])
def test_only_rank_zero_writes_initial_weights_and_checks(tmp_path, monkeypatch, launched_by, capfd, launcher, flag):
    """The other ranks exit at once and print nothing; no process group is set up."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # what Lightning assumes under a launcher that it doesn't know
    launched_by(launcher)
    sizes = ["--n_layer", "1", "--n_embd", "32", "--head_size", "16", "--vocab_size", "64", "--ctx_len", "16"]
    where = ["--proj_dir", str(tmp_path / "run"), "--data_file", str(tmp_path / "none"), "--accelerator", "cpu"]
    assert run(*parse([*where, *sizes, f"--{flag}", "1"])) == 0
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_ranks_without_a_launcher(launched_by, monkeypatch):
    assert cluster_environment() is None
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script, which Lightning takes for one of eight
    assert cluster_environment() is None
    assert SLURMEnvironment.detect()
    assert "RANK" not in os.environ
    assert selection.meeting_point(RANKS, 2) == "node0:1234"
    assert selection.meeting_point({"MASTER_ADDR": "fd00::1", "MASTER_PORT": "1234"}, 2) == "[fd00::1]:1234"
    for port in ("", "x", "70000"):
        with pytest.raises(UserError, match="MASTER_ADDR is 'node0' and MASTER_PORT '") as error:
            selection.meeting_point({"MASTER_ADDR": "node0", "MASTER_PORT": port}, 2)
        assert (error.value.flag, error.value.given) == ("num_nodes", 2)


@pytest.mark.parametrize(
    ("launcher", "changed", "sentence"),
    [
        ("torchrun", {"RANK": "two"}, "the environment variable RANK is 'two'; expected a whole number from 0"),
        ("torchrun", {"RANK": "8"}, "RANK is 8, WORLD_SIZE is 8, LOCAL_RANK is 1"),
        ("torchrun", {"RANK": "-1"}, "the environment variable RANK is '-1'; expected a whole number from 0"),
        ("torchrun", {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, LOCAL_WORLD_SIZE is 4"),
        ("deepspeed", {"WORLD_SIZE": "9"}, "WORLD_SIZE is 9, LOCAL_RANK is 1, LOCAL_SIZE is 4"),
        ("torchrun", {"MASTER_PORT": "0"}, "MASTER_PORT is '0'; expected a whole number from 1 to 65535"),
        ("torchrun", {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; expected a whole number from 1 to 65535"),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is ''"),
        ("srun", {"SLURM_STEP_TASKS_PER_NODE": "4,2"}, "variable SLURM_STEP_TASKS_PER_NODE is '4,2'"),
        ("srun", {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, "SLURM_STEP_TASKS_PER_NODE is 3(x2)"),
        ("srun", {"SLURM_PROCID": "8"}, "SLURM_PROCID is 8, SLURM_STEP_NUM_TASKS is 8"),
        ("srun", {"SLURM_JOB_ID": "4_1"}, "the environment variable SLURM_JOB_ID is '4_1'"),
        ("srun", {"SLURM_LOCALID": "x"}, "the environment variable SLURM_LOCALID is 'x'"),
    ],
)
def test_variables_of_a_launcher_that_make_no_sense_are_named(launched_by, launcher, changed, sentence):
    launched_by(launcher, **changed)
    with pytest.raises(UserError) as error:
        cluster_environment()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_recommended_deepspeed_is_the_tested_one():
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert zero.REQUIREMENT in [line.partition(";")[0] for line in requirements]
    assert f"pip install '{zero.REQUIREMENT}'" in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")


def test_one_process_needs_no_deepspeed():
    hardware = selection.choose_hardware(RunConfig(accelerator="cpu", strategy="deepspeed_stage_3"))
    assert (hardware.strategy, hardware.is_partitioned) == ("plain", False)
    assert "deepspeed_stage_3" in hardware.notes[0]


@pytest.mark.parametrize("version", ["", "0.19.0", "0.19.7", "0.20.0"])
def test_a_missing_or_untested_deepspeed_is_refused(monkeypatch, version):
    monkeypatch.setattr(zero, "version", lambda: version)
    with pytest.raises(UserError) as error:
        selection.choose_hardware(RunConfig(accelerator="cpu", strategy="deepspeed_stage_3", devices="2"))
    sentence = str(error.value)
    assert sentence.startswith("--strategy deepspeed_stage_3: ")
    assert f"pip install '{zero.REQUIREMENT}'" in sentence
    assert version in sentence


@pytest.mark.parametrize(
    ("flags", "launched", "processes"),
    [
        ({"devices": "2", "num_nodes": "3"}, {}, 6),
        ({"devices": "4", "context_parallel": 2}, {}, 2),
        ({"devices": "auto"}, {}, 1),
        ({"devices": "auto"}, {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({"plan": 0, "devices": "8", "accelerator": "gpu"}, {}, 8),
    ],
)
def test_a_length_in_batches_counts_those_of_all_processes(flags, launched, processes, launched_by, monkeypatch):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    config = RunConfig(**{"accelerator": "cpu", "ctx_len": 64, "micro_bsz": 4, **flags})
    assert selection.with_length(config, 600).my_exit_tokens == 600 * 64 * 4 * processes
    assert selection.with_length(config, 0).my_exit_tokens == 0


def test_fp16_is_refused_where_deepspeed_does_not_compute_in_it(monkeypatch):
    monkeypatch.setattr(zero, "version", lambda: "0.19.8")
    monkeypatch.setattr(zero, "takes_fp16", lambda accelerator: False)
    config = RunConfig(accelerator="cpu", strategy="deepspeed_stage_3", devices="2")
    assert selection.choose_hardware(config).is_partitioned
    with pytest.raises(UserError, match=r"^--precision fp16: "):
        selection.choose_hardware(replace(config, precision="fp16"))


def test_the_launcher_decides_how_many_processes_there_are(launched_by):
    launched_by("torchrun")
    hardware = selection.choose_hardware(RunConfig(accelerator="cpu"))
    assert (hardware.devices, hardware.num_nodes, hardware.strategy) == (4, 2, "ddp")
    with pytest.raises(UserError, match=r"^--devices 3: .*4"):
        selection.choose_hardware(RunConfig(accelerator="cpu", devices="3"))


def test_the_loss_scale_of_an_engine_is_resumed():
    """DeepSpeed's scaler counts from its last overflow, not the good steps."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = EngineAdamW([{"params": [weight]}], lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=0.0)
    scaler = SimpleNamespace(cur_scale=2.0**16, cur_iter=50, last_overflow_iter=-1)
    zero_optimizer = SimpleNamespace(loss_scaler=scaler, single_partition_of_fp32_groups=[weight])
    optimizer.attach(SimpleNamespace(optimizer=zero_optimizer, skipped_steps=0))
    counters = {"adam_steps": 7.0, "skipped_steps": 2.0, "loss_scale": 256.0, "good_steps": 5.0}
    optimizer.load_counters(counters)
    assert scaler.cur_iter - scaler.last_overflow_iter == 5
    assert optimizer.counters() == counters
