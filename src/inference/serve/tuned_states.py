"""Tuned initial states as places where texts begin."""

from __future__ import annotations

from src.adapt.adapter_files import TIME_STATE
from src.adapt.merge import check_adapter
from src.inference.adaptation import Adaptation
from src.inference.decoder import initial_state
from src.inference.serve.request import Start
from src.model import RWKV7
from src.model.weights import Weights


def read_start(name: str, adaptation: Adaptation, weights: Weights, model: RWKV7) -> Start:
    """The states that `adaptation` names, for `model`, whose file holds `weights`.

    Raises UserError when they can't be read or don't fit.
    """
    [(path, adapter)] = adaptation.read()
    check_adapter(adapter, weights, path, adaptation.other_base)
    state = initial_state(model, 1)
    for i, layer in enumerate(state.layers):
        layer.wkv.copy_(adapter.tensors[f"blocks.{i}.{TIME_STATE}"])
    return Start(name, state)
