"""Full states written and read by several ranks, under every strategy: each holds its part, and all agree."""

import itertools
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_distributed import launch, needs_deepspeed

from src.model import RWKV7, ModelConfig
from src.model.weights import read_weights, save_weights

# name: processes, strategy
PLACES = {
    "one process": (1, "auto"),
    "DDP 2": (2, "ddp"),
    "ZeRO-1 2": (2, "deepspeed_stage_1"),
    "ZeRO-2 3": (3, "deepspeed_stage_2"),
    "ZeRO-3 4": (4, "deepspeed_stage_3"),
}
FIT = {"steps": 2, "precision": "bf16"}
# large enough that headers and blocks of 1 MiB are small beside a rank's share
LARGE = {"n_layer": 4, "n_embd": 384, "head_size": 64, "steps": 1, "micro_bsz": 1}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def by_processes(fits):
    """{number of processes: {name: fit}}."""
    groups = {}
    for name, (processes, fit) in fits.items():
        groups.setdefault(processes, {})[name] = fit
    return groups


def launch_all(folder, fits):
    results = {}
    for processes, group in by_processes(fits).items():
        results.update(launch(folder, processes, group, timeout=900))
    return results


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchanged")
    fits = {name: (count, {**FIT, "strategy": strategy}) for name, (count, strategy) in PLACES.items()}
    saved = launch_all(folder, fits)
    loads = {
        f"{source} -> {target}": (count, {**FIT, "steps": 1, "strategy": strategy, "load": source, "init_seed": 8})
        for source, (target, (count, strategy)) in itertools.product(PLACES, PLACES.items())
    }
    return saved, launch_all(folder, loads)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("source", PLACES)
def test_a_state_is_loaded_by_every_strategy_and_number_of_processes(exchanged, source, target):
    saved, loaded = exchanged
    assert_equal(saved[source]["state"], loaded[f"{source} -> {target}"]["loaded"])
    weights = loaded[f"{source} -> {target}"]["loaded weights"]  # rounded, idle ones and small ones of stage 3 too
    assert_equal(saved[source]["weights"], weights)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_process_writes_or_reads_more_than_its_share(tmp_path, stage):
    fit = {**LARGE, "strategy": f"deepspeed_stage_{stage}"}
    result = launch(tmp_path, 4, {"saved": fit, "loaded": {**fit, "load": "saved", "init_seed": 8}}, timeout=900)
    size = sum(tensor.numel() * tensor.element_size() for tensor in result["saved"]["state"].values())
    for counted in (result["saved"]["written"], result["loaded"]["read"]):
        assert sum(counted) == pytest.approx(size, rel=0.01)  # headers beside it
        assert max(counted) <= 1.1 * size / 4, [4 * count / size for count in counted]
    assert_equal(result["saved"]["state"], result["loaded"]["loaded"])


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_partitioned_model_is_read_and_written_a_layer_at_a_time(tmp_path, suffix):
    """Memory that a rank takes while the model is built from a file, and while its weights are written: nowhere that of
    the whole. Counted in pages, of which the allocator keeps some."""
    sizes = {"n_layer": 12, "n_embd": 512, "head_size": 64}
    model = RWKV7(ModelConfig(12, 512, 64, head_size=64)).state_dict()
    whole = sum(tensor.numel() for tensor in model.values()) * 4
    layer = sum(tensor.numel() for name, tensor in model.items() if name.startswith("blocks.1.")) * 4
    file = tmp_path / f"start{suffix}"
    (save_weights if suffix == ".pth" else save_file)(model, file)
    fit = {**sizes, "strategy": "deepspeed_stage_3", "steps": 1, "micro_bsz": 1, "weights_file": file.name}
    result = launch(tmp_path, 4, {"zero": {**fit, "lr_init": 0.0, "weight_decay": 0.0}}, timeout=900)["zero"]
    assert whole > 8 * layer
    assert max(result["memory"]["build"]) < 0.75 * whole
    assert max(result["memory"]["weights"]) < 2 * layer
    assert_equal(model, result["weights"])
    assert_equal(model, read_weights(tmp_path / "zero.pth"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """States of two ranks of DDP; a later one that is damaged in what rank 1 wrote."""
    folder = tmp_path_factory.mktemp("two")
    saved = launch(folder, 2, {"ddp": {**FIT, "strategy": "ddp", "full_disk": 1}})["ddp"]
    before = sorted(path.name for path in (folder / "ddp" / "resume").iterdir())
    newest = shutil.copytree(folder / "ddp" / "resume" / "step-00000001", folder / "ddp" / "resume" / "step-00000002")
    (path,) = newest.glob("rank1-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    load = {**FIT, "load": "ddp", "init_seed": 8, "steps": 1}
    loads = {"ddp": {**load, "strategy": "ddp"}}
    loaded = launch(folder, 2, {f"by {name}": fit for name, fit in loads.items()})
    return saved, before, loaded["by ddp"]


def test_each_rank_writes_half_of_a_replicated_state(two):
    written = two[0]["written"]
    assert max(written) <= 0.55 * sum(written)


def test_a_rank_that_cannot_write_fails_the_save_on_all(two):
    """A disk that is full on one machine of two."""
    saved, before, _ = two
    assert len(saved["save_error"]) == 2
    for rank, error in enumerate(saved["save_error"]):
        assert "No space left on device" in error
        assert ("rank 1: " in error) == (rank == 0)
    assert before == ["step-00000001"]  # no part of the other is left


def test_what_one_rank_finds_damaged_is_damaged_for_all(two):
    saved, _, loaded = two
    (damage,) = set(loaded["damage"])
    assert damage == "rank1-0000.safetensors is not what was written (its SHA-256 differs)"
    assert len(loaded["damage"]) == 2
    assert_equal(saved["state"], loaded["loaded"])
