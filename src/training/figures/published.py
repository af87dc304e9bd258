"""The published run that this project is compared with: L12-D768 on minipile, loss and learning rate by mini-epoch.

Source: the log of this setting in the RWKV-7 training demo of github.com/BlinkDL/RWKV-LM (RWKV-v7/train_temp).
"""

from __future__ import annotations

from typing import Any

# What the losses depend on, and no more: a run on other devices or with another kernel is still comparable.
SETTINGS = {
    "n_layer": 12,
    "n_embd": 768,
    "vocab_size": 65536,
    "ctx_len": 512,
    "global_batch": 16,
    "magic_prime": 2926181,
    "my_exit_tokens": 1498226207,
    "lr_init": 6e-4,
    "lr_final": 6e-5,
    "warmup_steps": 10,
    "weight_decay": 0.001,
}
# By mini-epoch of 40320 samples: mean loss, learning rate at the last step. The rate stays a string, as it must
# agree to the last printed digit, whereas losses are compared with a tolerance.
MINI_EPOCHS: tuple[tuple[float, str], ...] = (
    (4.875856, "0.00059975"),
    (4.028621, "0.00059899"),
    (3.801625, "0.00059773"),
    (3.663070, "0.00059597"),
    (3.578974, "0.00059371"),
    (3.510906, "0.00059096"),
    (3.462345, "0.00058771"),
    (3.412196, "0.00058399"),
    (3.376724, "0.00057978"),
    (3.336911, "0.00057511"),
    (3.313411, "0.00056999"),
    (3.295895, "0.00056441"),
)
# Kernels and devices round differently, so that losses agree only approximately.
LOSS_TOLERANCE = 0.01


def differences(settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (published value, given value)} of each setting that differs or is missing; {} for the same run."""
    return {name: (value, settings.get(name)) for name, value in SETTINGS.items() if settings.get(name) != value}
