"""Reads the .st files of web-rwkv and Ai00: safetensors with RWKV-7's names, and the low-rank matrices transposed."""

from __future__ import annotations

import re

from src.model.weights import Weights

# w1 ... g2, which their converter transposes.
LOW_RANK = re.compile(r"\.att\.[wavg][12]$")


def is_web_rwkv(weights: Weights) -> bool:
    """Whether `weights` are in this layout, by the shapes of w1, a1 and g1: [D, C] instead of [C, D].

    Nothing else in such a file says so. Where all three D equal C both readings are possible, and the answer is False;
    no released model is that narrow.
    """
    if "emb.weight" not in weights or weights["emb.weight"].dim() != 2:
        return False
    n_embd = weights["emb.weight"].shape[1]
    # v1 is left out: layer 0's may be missing or a placeholder of another shape
    low_rank = [weights[name] for kind in "wag" if (name := f"blocks.0.att.{kind}1") in weights]
    shapes = {tuple(tensor.shape) for tensor in low_rank if tuple(tensor.shape) != (n_embd, n_embd)}
    return bool(shapes) and all(len(shape) == 2 and shape[0] != n_embd and shape[1] == n_embd for shape in shapes)


def from_web_rwkv(weights: Weights) -> Weights:
    """`weights` in the shapes of `RWKV7`."""
    return {
        # contiguous, as torch.save would store the transposition as such, and other programs may not expect one
        name: tensor.t().contiguous() if LOW_RANK.search(name) and tensor.dim() == 2 else tensor
        for name, tensor in weights.items()
    }
