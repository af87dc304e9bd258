"""Weights of this project in the PyPI package `rwkv`, the reference that users compare with: equal logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_adapter import random_adapter
from random_model import random_model

from src.adapt.adapter_files import write_adapter
from src.adapt.config import AdapterConfig
from src.inference import export
from src.inference.adaptation import Adaptation
from src.inference.formats.convert import unmerged_model
from src.inference.load import find_weights, load_model
from src.model import RWKV7

pytest.importorskip("rwkv")

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 96, 0, 0, 11]
PACKAGE = """
import sys, torch
from rwkv.model import RWKV
weights, out, tokens = sys.argv[1], sys.argv[2], list(map(int, sys.argv[3].split()))
model = RWKV(model=weights.removesuffix(".pth"), strategy="cpu fp32")
whole, state = model.forward(tokens, None, full_output=True)
one, _ = model.forward([tokens[0]], state)
torch.save({"whole": whole, "one": one}, out)
"""


def package_logits(weights: Path, out: Path) -> dict[str, torch.Tensor]:
    """Of TOKENS as one sequence ("whole"), and of their first token processed again after them ("one")."""
    environment = os.environ | {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PACKAGE, str(weights), str(out), " ".join(map(str, TOKENS))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def model_logits(model: RWKV7) -> dict[str, torch.Tensor]:
    whole, state = model(torch.tensor([TOKENS]))
    one, _ = model(torch.tensor([TOKENS[:1]]), state)
    return {"whole": whole[0], "one": one[0, 0]}


@pytest.mark.parametrize(
    "config", [AdapterConfig("lora", r=4, lora_alpha=6.0), AdapterConfig("miss", r=20)], ids=lambda config: config.kind
)
def test_a_merged_adapter_runs_in_the_package(tmp_path: Path, config: AdapterConfig) -> None:
    model = random_model(seed=1, n_layer=2, n_embd=128, vocab_size=97)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    write_adapter(tmp_path / "adapter", random_adapter(model, config))
    merged = tmp_path / "merged.pth"
    assert export.main([str(tmp_path / "base.pth"), str(merged), "--adapter", str(tmp_path / "adapter")]) == 0
    expected = package_logits(merged, tmp_path / "logits.pt")
    actual = model_logits(unmerged_model(tmp_path / "base.pth", Adaptation(adapter=str(tmp_path / "adapter"))))
    assert (model_logits(model)["whole"] - actual["whole"]).abs().max() > 0.1
    for name in ("whole", "one"):
        torch.testing.assert_close(actual[name], expected[name].view_as(actual[name]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer_0_residual", [True, False], ids=["as-written", "without-layer-0-v0-v1-v2"])
def test_logits_equal_those_of_the_package(tmp_path: Path, layer_0_residual: bool) -> None:
    model = random_model(seed=1, n_layer=3, n_embd=192, vocab_size=97, d_decay_lora=64, d_mv_lora=32, d_gate_lora=128)
    weights = tmp_path / "rwkv-final.pth"
    torch.save(model.state_dict(), weights)
    expected = package_logits(weights, tmp_path / "logits.pt")
    if not layer_0_residual:  # the package requires them; this project doesn't
        idle = [f"blocks.0.att.v{i}" for i in range(3)]
        torch.save({name: tensor for name, tensor in model.state_dict().items() if name not in idle}, weights)
    actual = model_logits(load_model(find_weights(tmp_path), "fp32", "cpu"))
    for name in ("whole", "one"):
        assert expected[name].isfinite().all()
        assert expected[name].std() > 0.3, "logits close to 0 would be equal for any model"
        torch.testing.assert_close(actual[name], expected[name].view_as(actual[name]), rtol=0, atol=1e-4)
