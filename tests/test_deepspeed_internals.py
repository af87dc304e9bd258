"""DeepSpeed's insides, which no interface promises, are those that deepspeed_internals.py was written for."""

import ast
import hashlib
import importlib
import inspect
from pathlib import Path

import pytest
from test_distributed import needs_deepspeed

from src.training.distributed import deepspeed_internals, zero

SOURCES = Path(__file__).parents[1] / "src"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3."
STAGES_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
INIT = "deepspeed.runtime.zero.partition_parameters:Init."
# What is called, or decides where values lie, with the first digits of the SHA-256 of its source.
READ = {
    STAGE_3 + "set_grad_positions": "b6a16f474a21",
    STAGE_3 + "get_param_id": "a6dc96bd483c",
    STAGE_3 + "_create_fp32_partitions": "2d22754c23f5",
    STAGE_3 + "_reassign_or_swap_out_partitioned_parameters": "af7b449bee87",
    STAGE_3 + "_unflatten_partitioned_parameters": "00cc8a3f65af",
    STAGES_1_AND_2 + "update_lp_params": "3cdce069e3c6",
    STAGES_1_AND_2 + "_link_all_hp_params": "e91c2f7e8f29",
    INIT + "_partition_param": "0a3cc348590e",
    INIT + "_aligned_size": "ae68aa791bb3",
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload.mark_persistent_parameters": "c01f8b416681",
    "deepspeed.utils.tensor_fragment:get_hp_fragment_mapping": "46260f9494e6",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler.update_scale": "0aa6d6d66570",
    "deepspeed.runtime.utils:is_invalid_grad_norm": "6afd483e2c88",
}


@needs_deepspeed
@pytest.mark.parametrize("name", READ)
def test_the_source_that_was_read_is_the_one_installed(name):
    zero.import_deepspeed("cpu")
    module, _, path = name.partition(":")
    thing = importlib.import_module(module)
    advice = (
        f"DeepSpeed {zero.version()} has another {name} than {deepspeed_internals.READ_FROM}: read it, adapt "
        "src/training/distributed/deepspeed_internals.py, run the slow tests of test_distributed.py and "
        "test_state_ranks.py, then write the digest below and the version there"
    )
    for part in path.split("."):
        thing = getattr(thing, part, None)
        assert thing is not None, advice
    if thing.__name__ == "wrapped_fn":  # of a decorator that records the time
        (thing,) = [cell.cell_contents for cell in thing.__closure__ if inspect.isfunction(cell.cell_contents)]
    digest = hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()[:12]
    assert digest == READ[name], f"{advice}: {digest}"


def test_no_other_file_reaches_into_an_engine():
    """Attributes that only DeepSpeed has."""
    inside = {
        *("ds_id", "ds_shape", "ds_numel", "ds_tensor", "_hp_mapping", "grad_position", "fp16_groups", "loss_scaler"),
        *("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "cur_scale"),
        *("persistent_parameters", "update_lp_params", "_global_grad_norm", "__compatible_ops__"),
        "is_invalid_grad_norm",
    }
    for path in SOURCES.rglob("*.py"):
        if path.name == "deepspeed_internals.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not used & inside, (path, used & inside)
