"""Settings for large models, from the file that the scripts read, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import UserError

FILE = Path(__file__).with_suffix(".txt")
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Size:
    """A row of the file; `low_rank`: w, a, v, g; `gpus`: for which stage and micro batch are chosen."""

    name: str
    n_layer: int
    n_embd: int
    low_rank: tuple[int, int, int, int]
    lr_init: str
    stage: int
    gpus: int
    micro_bsz: int

    @property
    def settings(self) -> dict[str, Any]:
        """The flags of train.py."""
        ranks = zip(("decay", "aaa", "mv", "gate"), self.low_rank, strict=True)
        return {
            **{"n_layer": self.n_layer, "n_embd": self.n_embd, "vocab_size": 65536, "ctx_len": 4096},
            **{f"d_{name}_lora": rank for name, rank in ranks},
            **{"micro_bsz": self.micro_bsz, "lr_init": float(self.lr_init), "grad_cp": True, "head_chunk": 4096},
            **{"strategy": f"deepspeed_stage_{self.stage}", "devices": str(min(self.gpus, GPUS_PER_MACHINE))},
            "num_nodes": str(max(1, self.gpus // GPUS_PER_MACHINE)),
        }


def read_sizes() -> dict[str, Size]:
    """The rows of the file by name."""
    sizes = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        name, n_layer, n_embd, w, a, v, g, lr_init, stage, gpus, micro_bsz = line.split()
        ranks = int(w), int(a), int(v), int(g)
        sizes[name] = Size(name, int(n_layer), int(n_embd), ranks, lr_init, int(stage), int(gpus), int(micro_bsz))
    return sizes


def settings_of_size(name: str) -> dict[str, Any]:
    """Raises UserError for a size that the file lacks."""
    sizes = read_sizes()
    if name not in sizes:
        raise UserError(flag="size", given=name, expected=f"one of {', '.join(sizes)}")
    return sizes[name].settings
