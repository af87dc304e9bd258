"""Writes the tables of README.md and docs/ that come from the code.

    python tools/docs_tables.py

A table is between `<!-- NAME: made by tools/docs_tables.py -->` and `<!-- end -->`, on the page that TABLES names and
on its Chinese twin. tests/test_readme.py fails when a page differs from what this program would write.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The project is not installed as a package: a script outside its root has to add it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from src.adapt.config import AdapterConfig
from src.config import GROUPS, ModelConfig, RunConfig, default_text, refusal
from src.config.support import BASES, KINDS, STRATEGIES
from src.model import RWKV7
from src.model.init import row_of
from src.training.figures import published
from src.training.preflight import plan
from src.training.preflight.model_sizes import read_sizes
from src.training.preflight.piece_memory import Cut
from tools import docs_chinese, docs_tree

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_CN")),
]
# Made of docstrings, which are in English.
ENGLISH_ONLY = {"source.md"}
GIB = 1 << 30

# The flags that a first run of one's own needs, in the order of README.
FIRST_FLAGS = (
    *("proj_dir", "data_file", "tokenizer", "val_data_file", "n_layer", "n_embd", "ctx_len", "micro_bsz"),
    *("epochs", "lr_init", "lr_final", "grad_cp"),
)
# Released models: layers, width, low-rank sizes w a v g. Their vocabulary is 65536.
RELEASED = {
    "0.1B": (12, 768, (64, 64, 32, 128)),
    "0.4B": (24, 1024, (64, 64, 32, 128)),
    "1.5B": (24, 2048, (96, 96, 64, 256)),
    "2.9B": (32, 2560, (96, 96, 64, 320)),
    "7.2B": (32, 4096, (128, 128, 96, 480)),
}
# Their files in bf16, of "World" and of a "G1" as people use them in 2026 (newer ones appear every few months).
RELEASED_FILES = {
    "0.1B": ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "rwkv7-g1d-0.1b-20260129-ctx8192.pth"),
    "0.4B": ("RWKV-x070-World-0.4B-v2.9-20250107-ctx4096.pth", "rwkv7-g1d-0.4b-20260210-ctx8192.pth"),
    "1.5B": ("RWKV-x070-World-1.5B-v3-20250127-ctx4096.pth", "rwkv7-g1f-1.5b-20260419-ctx8192.pth"),
    "2.9B": ("RWKV-x070-World-2.9B-v3-20250211-ctx4096.pth", "rwkv7-g1i-2.9b-20260805-ctx16384.pth"),
    "7.2B": ("", "rwkv7-g1f-7.2b-20260414-ctx8192.pth"),
}
KIND_TITLES = {
    "full": "all weights",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "miss": "MiSS",
    "dora": "DoRA",
    "state": "initial states",
    "projector": "projector, encoder",
    "full, encoder": "all weights, with an encoder",
}


def twin(page: Path) -> Path:
    """The Chinese page of an English one."""
    return page.with_stem(f"{page.stem}_CN")


def table(head: list[str], rows: list[list[str]], chinese: bool) -> str:
    """A Markdown table."""
    headings = [docs_chinese.HEADINGS.get(name, name) for name in head] if chinese else head
    lines = [headings, ["---"] * len(head), *rows]
    # A | inside a cell would start the next one, in code spans too.
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def flags(chinese: bool) -> str:
    """Every flag of train.py by topic."""
    # Read before the page is written, from which it comes.
    rows, meanings = [], _meanings(chinese)
    for key, title in GROUPS.items():
        rows.append([f"**{docs_chinese.GROUPS.get(key, title) if chinese else title}**", "", ""])
        fields = [field for field in dataclasses.fields(RunConfig) if field.metadata["group"] == key]
        rows += [flag_row(field, meanings) for field in fields]
    return table(["flag", "default", "meaning"], rows, chinese)


def first_flags(chinese: bool) -> str:
    """The flags that a first run needs."""
    meanings = _meanings(chinese)
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    return table(["flag", "default", "meaning"], [flag_row(fields[name], meanings) for name in FIRST_FLAGS], chinese)


def _meanings(chinese: bool) -> dict[str, str] | None:
    return docs_chinese.flag_meanings(ROOT / "docs/flags_CN.md") if chinese else None


def flag_row(field: dataclasses.Field[Any], meanings: dict[str, str] | None) -> list[str]:
    """Flag, default and meaning: in Chinese if `meanings` are given, marked where they lack this flag."""
    default = f"`{text}`" if (text := default_text(field)) else ""
    meaning = field.metadata["help"]
    choices = [f"`{choice}`" for choice in field.metadata["choices"] if choice]
    if meanings is not None:
        meaning = meanings.get(field.name, f"{meaning} {docs_chinese.NOT_TRANSLATED}")
        meaning += f"（{'、'.join(choices)}）" if choices else ""
    elif choices:
        meaning += f" ({', '.join(choices)})"
    return [f"`--{field.name}`", default, meaning]


def weights(chinese: bool) -> str:
    """The parameters of the released 1.5B model: shape, training and initial value."""
    config = ModelConfig(
        n_layer=24, n_embd=2048, vocab_size=65536, d_decay_lora=96, d_aaa_lora=96, d_mv_lora=64, d_gate_lora=256
    )
    rows = []
    for name, parameter in _meta_model(config).named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        # Every block has the parameters of block 0, which alone has ln0 too: it stands for all of them.
        if block and block[1] != "0":
            continue
        is_unique = block is None or ".ln0." in name
        row = row_of(name)
        training = ["decay"] * row.decay + [f"lr x{row.lr_scale:g}"] * (row.lr_scale != 1)
        rows.append(
            [
                f"`{name if is_unique else name.replace('blocks.0.', 'blocks.i.')}`",
                " x ".join(map(str, parameter.shape)),
                ", ".join(training),
                row.text,
            ]
        )
    return table(["name", "shape", "decay or lr x2", "initial value"], rows, chinese)


def cluster(chinese: bool) -> str:
    """Settings for large models, with the memory that `train.py --plan` computes for them."""
    rows = []
    for name, size in read_sizes().items():
        layers, width, (w, a, v, g) = size.n_layer, size.n_embd, size.low_rank
        config = ModelConfig(
            layers, width, 65536, d_decay_lora=w, d_aaa_lora=a, d_mv_lora=v, d_gate_lora=g, grad_cp=True
        )
        # With --head_chunk 4096: all logits of a micro batch of 4 x 4096 tokens would take 2 GiB.
        strategy, cut = f"deepspeed_stage_{size.stage}", Cut(size.micro_bsz, 4096)
        memory = plan.memory(config, strategy, size.gpus, "bf16", cut, head_chunk=4096, on_gpu=True)
        billions = sum(parameter.numel() for parameter in _meta_model(config).parameters()) / 1e9
        lr, gpus = size.lr_init, size.gpus
        settings = map(str, (layers, width, f"{w} {a} {v} {g}", lr, size.stage, gpus, size.micro_bsz))
        rows.append([f"`{name}`", f"{billions:.1f} B", *settings, f"{memory.total / GIB:.0f}"])
    sizes = ["`SIZE`", "parameters", "`--n_layer`", "`--n_embd`", "low-rank sizes w a v g"]
    return table([*sizes, "`--lr_init`", "ZeRO stage", "GPUs", "`--micro_bsz`", "GiB per GPU"], rows, chinese)


def _released_config(name: str) -> ModelConfig:
    layers, width, (w, a, v, g) = RELEASED[name]
    return ModelConfig(layers, width, 65536, d_decay_lora=w, d_aaa_lora=a, d_mv_lora=v, d_gate_lora=g, grad_cp=True)


def released(chinese: bool) -> str:
    """Files of released models and their size, two bytes for a number."""
    rows = []
    for name, files in RELEASED_FILES.items():
        numbers = sum(p.numel() for p in _meta_model(_released_config(name)).parameters())
        rows.append([name, f"{2 * numbers / 1e9:.2f} GB", *(f"`{file}`" if file else "" for file in files)])
    return table(["model", "size", "`BlinkDL/rwkv-7-world`", "`BlinkDL/rwkv7-g1`"], rows, chinese)


def adapted_memory(chinese: bool) -> str:
    """GiB of one device by model and kind of training: what `train.py --plan` prints as total."""
    adapters: dict[str, tuple[AdapterConfig | None, str]] = {"all weights": (None, "none")}
    for base in ("none", "int8", "nf4"):
        name = "bf16" if base == "none" else base
        adapters[f"LoRA, {name}"] = AdapterConfig("lora"), base
        adapters[f"state, {name}"] = AdapterConfig("state"), base
    rows = []
    for name, (layers, width, (w, a, v, g)) in RELEASED.items():
        config = _released_config(name)
        totals = [
            plan.memory(config, "auto", 1, "bf16", Cut(1, 1024), on_gpu=True, adapter=adapter, quant=quant).total / GIB
            for adapter, quant in adapters.values()
        ]
        rows.append([name, f"{layers}, {width}", f"{w} {a} {v} {g}", *(f"{total:.1f}" for total in totals)])
    sizes = ["model", "`--n_layer`, `--n_embd`", "low-rank sizes w a v g"]
    return table([*sizes, *adapters], rows, chinese)


def supported(chinese: bool) -> str:
    """The bases that each kind of training takes under each strategy, by the table in src/config/support.py."""
    rows = []
    for kind in KINDS:
        cells = [[base for base in BASES if refusal(kind, base, strategy) is None] for strategy in STRATEGIES]
        title = KIND_TITLES[kind]
        rows.append(
            [docs_chinese.HEADINGS.get(title, title) if chinese else title, *(", ".join(bases) for bases in cells)]
        )
    return table(["trained", *STRATEGIES], rows, chinese)


def _meta_model(config: ModelConfig) -> RWKV7:
    # Names and shapes only: the largest model here has more parameters than most machines have memory for.
    with torch.device("meta"):
        return RWKV7(config)


def published_run(chinese: bool) -> str:
    """Loss and learning rate of the run that tools/verify_minipile.py compares with."""
    rows = [[str(n), f"{loss:.6f}", lr] for n, (loss, lr) in enumerate(published.MINI_EPOCHS)]
    return table(["mini-epoch", "mean loss", "lr at its last step"], rows, chinese)


# Name -> (page, function that makes the table in English or Chinese).
TABLES: dict[str, tuple[str, Callable[[bool], str]]] = {
    "published": ("README.md", published_run),
    "tree": ("README.md", docs_tree.tree),
    "first_flags": ("README.md", first_flags),
    "flags": ("docs/flags.md", flags),
    "cluster": ("docs/cluster.md", cluster),
    "adapted_memory": ("docs/adapting.md", adapted_memory),
    "supported": ("docs/adapting.md", supported),
    "released": ("docs/adapting.md", released),
    "weights": ("docs/model.md", weights),
    "source": ("docs/source.md", docs_tree.source),
}


def places() -> list[tuple[str, Path, bool]]:
    """(table, page, whether the page is Chinese) of every table on every page."""
    result = []
    for name, (page, _) in TABLES.items():
        result.append((name, ROOT / page, False))
        if Path(page).name not in ENGLISH_ONLY:
            result.append((name, twin(ROOT / page), True))
    return result


def section(name: str) -> re.Pattern[str]:
    """Matches a table with its markers; group 1 is the table. The program in the marker may be an earlier one."""
    return re.compile(rf"<!-- {name}: made by [\w./]+ -->\n(.*?)<!-- end -->", re.DOTALL)


def main() -> None:
    for name, page, chinese in places():
        text = page.read_text(encoding="utf-8")
        matches = list(section(name).finditer(text))
        # Without the markers, the table would silently stay as it is.
        if len(matches) != 1:
            raise SystemExit(f"{page.relative_to(ROOT)}: expected the table {name} once, found it {len(matches)} times")
        begin, end = matches[0].span()
        content = f"<!-- {name}: made by tools/docs_tables.py -->\n{TABLES[name][1](chinese)}\n<!-- end -->"
        page.write_text(text[:begin] + content + text[end:], encoding="utf-8")
        print(f"wrote {name} of {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
