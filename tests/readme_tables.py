"""The parts of README and docs/ that come from the code: `python tests/readme_tables.py` writes them, test_readme.py compares.

The list of source files is the first sentence of each, the flags are RunConfig's, the weights the init table's; the Chinese words are in
readme_chinese.py. A part stands between `<!-- NAME: made by tests/readme_tables.py -->` and `<!-- end -->`, on the page that TABLES names.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import readme_chinese
import torch

from src.config import GROUPS, ModelConfig, RunConfig, default_text
from src.model import RWKV7
from src.model.init import row_of
from src.training.figures import published
from src.training.preflight import plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_CN"))]
ENGLISH_ONLY = {"source.md"}


def twin(page: Path) -> Path:
    """The Chinese page beside an English one."""
    return page.with_stem(f"{page.stem}_CN")


def table(head: list[str], rows: list[list[str]], chinese: bool) -> str:
    names = [readme_chinese.HEADS.get(name, name) for name in head] if chinese else head
    lines = [names, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


FIRST_FLAGS = (
    *("proj_dir", "data_file", "tokenizer", "val_data_file", "n_layer", "n_embd", "ctx_len", "micro_bsz"),
    *("epochs", "lr_init", "lr_final", "grad_cp"),
)


def _flag(field: "dataclasses.Field[Any]", chinese: bool) -> list[str]:
    default = f"`{default_text(field)}`" if default_text(field) else ""
    meaning = readme_chinese.FLAGS[field.name] if chinese else field.metadata["help"]
    choices = [f"`{choice}`" for choice in field.metadata["choices"] if choice]
    if choices:
        meaning += f"（{'、'.join(choices)}）" if chinese else f" ({', '.join(choices)})"
    return [f"`--{field.name}`", default, meaning]


def flags(chinese: bool) -> str:
    """Every flag of train.py by topic."""
    rows = []
    for key, title in (readme_chinese.GROUPS if chinese else GROUPS).items():
        rows.append([f"**{title}**", "", ""])
        rows += [_flag(field, chinese) for field in dataclasses.fields(RunConfig) if field.metadata["group"] == key]
    return table(["flag", "default", "meaning"], rows, chinese)


def first_flags(chinese: bool) -> str:
    """The flags that a first run of one's own needs."""
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    return table(["flag", "default", "meaning"], [_flag(fields[name], chinese) for name in FIRST_FLAGS], chinese)


def weights(chinese: bool) -> str:
    """The parameters of the released 1.5B model; blocks 0 and 1 stand for all, as the others are like block 1."""
    config = ModelConfig(
        n_layer=24, n_embd=2048, vocab_size=65536, d_decay_lora=96, d_aaa_lora=96, d_mv_lora=64, d_gate_lora=256
    )
    with torch.device("meta"):
        model = RWKV7(config)
    rows = []
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and block[1] != "0":
            continue  # every block has the parameters of block 0, except ln0
        shown = name if block is None or ".ln0." in name else name.replace("blocks.0.", "blocks.i.")
        row = row_of(name)
        training = ", ".join(
            words for words, so in (("decay", row.decay), (f"lr x{row.lr_scale:g}", row.lr_scale != 1)) if so
        )
        rows.append([f"`{shown}`", " x ".join(map(str, parameter.shape)), training, row.text])
    return table(["name", "shape", "decay or lr x2", "initial value"], rows, chinese)


# layers, width, low-rank sizes w a v g, lr, ZeRO stage, GPUs, micro batch of 4096 tokens
CLUSTER = [
    (32, 2560, (96, 96, 64, 320), "2e-4", 1, 8, 4),
    (32, 4096, (128, 128, 96, 480), "1.5e-4", 2, 16, 2),
    (61, 4096, (192, 192, 128, 384), "1.2e-4", 2, 32, 2),
    (64, 6144, (192, 192, 128, 512), "1e-4", 3, 64, 2),
    (80, 8192, (256, 256, 160, 576), "8e-5", 3, 128, 1),
]


def cluster(chinese: bool) -> str:
    """Settings for large models, with the memory that the formulas of `train.py --plan` give."""
    rows = []
    for layers, width, sizes, lr, stage, gpus, micro_bsz in CLUSTER:
        w, a, v, g = sizes
        config = ModelConfig(
            layers, width, 65536, d_decay_lora=w, d_aaa_lora=a, d_mv_lora=v, d_gate_lora=g, grad_cp=True
        )
        need = plan.memory(
            config, f"deepspeed_stage_{stage}", gpus, "bf16", micro_bsz * 4096, head_chunk=4096, on_gpu=True
        )
        sizes_and_settings = map(str, (layers, width, f"{w} {a} {v} {g}", lr, stage, gpus, micro_bsz))
        rows.append(
            [f"{plan.parameter_count(config) / 1e9:.1f} B", *sizes_and_settings, f"{need.total / plan.GIB:.0f}"]
        )
    head = [
        "parameters",
        "`--n_layer`",
        "`--n_embd`",
        "low-rank sizes w a v g",
        "`--lr_init`",
        "ZeRO stage",
        "GPUs",
        "`--micro_bsz`",
    ]
    return table([*head, "GiB per GPU"], rows, chinese)


def published_run(chinese: bool) -> str:
    """Loss and learning rate of the run that this project is checked against."""
    rows = [[str(n), f"{loss:.6f}", lr] for n, (loss, lr) in enumerate(published.MINI_EPOCHS)]
    return table(["mini-epoch", "mean loss", "lr at its last step"], rows, chinese)


TOP = [
    "demo-training-prepare.sh",
    "demo-training-run.sh",
    "demo-training-run-sft.sh",
    "demo-training-shared.sh",
    "train.py",
    "API_DEMO_CHAT.py",
    "requirements.txt",
    "constraints.txt",
]
FOLDERS = [
    "src",
    "src/config",
    "src/ops",
    "src/model",
    "src/dataset",
    "src/training",
    "src/training/preflight",
    "src/training/reporting",
    "src/inference",
    "cuda",
    "data",
]
ABOUT = {
    "src/": "the library",
    "cuda/": "native sources, flat",
    "data/": "tools that make data, and the data (not tracked)",
}
REST = {
    "tests/": "a test file per module, host_cuda/ (runs the .cu files on a CPU), bench/ (measurements)",
    "tests/run.sh": "Lint, types and tests; sets up what it needs",
    ".ci/run": "the same on a new machine",
}
TREE = {  # README's, in a clause each
    "demo-training-prepare.sh": "what a run needs: Python environment, data, initial weights",
    "demo-training-run.sh": "pretrains, and shows what was learned",
    "demo-training-run-sft.sh": "fine-tunes on conversations, so that the model answers",
    "demo-training-shared.sh": "what the three share: model sizes, the environment",
    "train.py": "trains: flags -> settings -> fit",
    "API_DEMO_CHAT.py": "chat in the terminal",
    "requirements.txt": "the packages that it needs",
    "constraints.txt": "their versions that were tested together",
    "src/": "the library; cli.py is the command line",
    "src/config/": "every setting: default, meaning, check",
    "src/ops/": "what must be fast: wkv7, loss, elementwise work, each with a plain PyTorch form beside it",
    "src/model/": "RWKV-7 and its parts",
    "src/dataset/": "from files to samples: binidx, the order, conversations, tokenizers",
    "src/training/": "the run: optimizer, weights and full states, processes",
    "src/training/preflight/": "before a run: --plan, --check, --dry_run",
    "src/training/reporting/": "what a run tells: logs, curves, warnings",
    "src/inference/": "decoding, chat, evaluation, export",
    "cuda/": "C++ and CUDA sources",
    "data/": "tools that make data, and the data (not tracked)",
    "docs/": "more than this page tells",
    "tests/": "a test file per module; host_cuda/ runs the .cu files on a CPU, bench/ measures",
    "tests/run.sh": "lint, types and tests",
}


def first_sentence(path: Path) -> str:
    """What a file says of itself before anything else: the first sentence of its docstring or first comment."""
    text = path.read_text(encoding="utf-8")
    found = re.match(r'(?:#![^\n]*\n)?(?:"""(?P<doc>.*?)"""|(?P<comment>(?:(?:#|//)[^\n]*\n)+))', text, re.DOTALL)
    if found is None:
        return ""
    words = found["doc"] if found["doc"] is not None else re.sub(r"(?m)^(#|//) ?", "", found["comment"])
    paragraph = " ".join(words.strip().split("\n\n")[0].split())
    return re.split(r"[.](?:\s|$)|: (?=python |sh )", paragraph, maxsplit=1)[0]


def tree(chinese: bool) -> str:
    """Folders and top-level files."""
    return _block((readme_chinese.TREE if chinese else TREE).items())


def source(chinese: bool) -> str:
    """Every source file with what it says of itself; English only."""
    lines = [(name, first_sentence(ROOT / name)) for name in TOP]
    for folder in FOLDERS:
        package = ROOT / folder / "__init__.py"
        lines.append(
            (f"{folder}/", (first_sentence(package) if package.exists() else "") or ABOUT.get(f"{folder}/", ""))
        )
        files = [path for path in (ROOT / folder).iterdir() if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}]
        lines += [(f"{folder}/{path.name}", first_sentence(path)) for path in sorted(files) if path != package]
    return _block([*lines, *REST.items()])


def _block(lines: Iterable[tuple[str, str]]) -> str:
    return "```\n" + "\n".join(_indented(name, words) for name, words in lines) + "\n```"


def _indented(name: str, words: str) -> str:
    depth = name.rstrip("/").count("/")
    own = name if name.startswith(".") else "  " * depth + name.rstrip("/").split("/")[-1] + "/" * name.endswith("/")
    return f"{own:<28}{words}".rstrip()


# name -> (page, what makes it)
TABLES: dict[str, tuple[str, Callable[[bool], str]]] = {
    "published": ("README.md", published_run),
    "tree": ("README.md", tree),
    "first_flags": ("README.md", first_flags),
    "flags": ("docs/flags.md", flags),
    "cluster": ("docs/cluster.md", cluster),
    "weights": ("docs/model.md", weights),
    "source": ("docs/source.md", source),
}


def places() -> list[tuple[str, Path, bool]]:
    """(table, the page that has it, whether that page is Chinese): each once in every language of its page."""
    found = []
    for name, (page, _) in TABLES.items():
        found.append((name, ROOT / page, False))
        if Path(page).name not in ENGLISH_ONLY:
            found.append((name, twin(ROOT / page), True))
    return found


def section(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: made by tests/readme_tables.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    for name, page, chinese in places():
        made = TABLES[name][1](chinese) + "\n"
        text = page.read_text(encoding="utf-8")
        text, count = section(name).subn(lambda found, made=made: found[1] + made + found[3], text)
        if count != 1:
            raise SystemExit(f"{page.relative_to(ROOT)}: expected the section {name} once, found it {count} times")
        page.write_text(text, encoding="utf-8")
        print(f"wrote {name} of {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
