"""The trees of README.md (one line per folder) and of docs/source.md (one line per file)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}
DESCRIPTION_COLUMN = 28  # wide enough for the longest names, indented ones included

# Name -> (description, its Chinese). Names that are not there are left out.
TREE = {
    "demo-training-prepare.sh": (
        "what a run needs: Python environment, data, initial weights",
        "准备训练所需：Python 环境、数据、初始权重",
    ),
    "demo-training-run.sh": ("pretrains, and shows what was learned", "预训练，并展示学到了什么"),
    "demo-training-run-sft.sh": (
        "fine-tunes on conversations, so that the model answers",
        "用对话微调，使模型会回答",
    ),
    "demo-training-shared.sh": (
        "what the three share: model sizes, the environment",
        "三个脚本共用的部分：模型尺寸、环境",
    ),
    "train.py": ("trains: flags -> settings -> fit", "训练：参数 -> 设置 -> fit"),
    "API_DEMO_CHAT.py": ("chat in the terminal", "在终端里与模型聊天"),
    "requirements.txt": ("the required packages", "所需的包"),
    "constraints.txt": ("the versions of them that were tested together", "一起测试过的版本"),
    "src/": (
        "the library; config has every setting",
        "程序库；config 有全部设置",
    ),
    "src/config/": ("every setting: type, default, meaning, check", "全部设置：类型、默认值、含义、检查"),
    "src/ops/": (
        "wkv7, loss, elementwise operations, each with a PyTorch reference",
        "wkv7、损失、逐元素运算，各有一份纯 PyTorch 参考实现",
    ),
    "src/model/": ("RWKV-7 and its parts", "RWKV-7 模型及其模块"),
    "src/adapt/": (
        "adapters, initial states, a quantised base",
        "只微调一部分：适配器、初始状态、量化底模",
    ),
    "src/multimodal/": ("pictures and sounds in the place of tokens", "图像和声音，占据 token 的位置"),
    "src/dataset/": (
        "from files to samples: binidx, sample order, conversations, tokenizers",
        "从文件到样本：binidx、采样顺序、对话、分词器",
    ),
    "src/dataset/corpus/": (
        "text files to documents and tokens",
        "从文本文件到文档和 token",
    ),
    "src/training/": ("the training run: trainer, optimizer, schedule, data", "训练：trainer、优化器、学习率、数据"),
    "src/training/checkpoint/": ("saving the full state, resuming from it", "保存完整状态，从中恢复"),
    "src/training/distributed/": ("several processes: launch, process group, ZeRO", "多进程：启动、进程组、ZeRO"),
    "src/training/figures/": ("loss.png and report.html", "loss.png 和 report.html"),
    "src/training/hardware/": ("device, strategy and precision", "设备、并行策略和精度"),
    "src/training/objectives/": ("from a batch to a loss", "从 batch 到损失"),
    "src/training/preflight/": ("before a run: --plan, --check, --dry_run", "训练之前：--plan、--check、--dry_run"),
    "src/training/reporting/": ("during a run: metrics, logs, warnings", "训练途中：指标、日志、警告"),
    "src/inference/": ("decoding, chat, evaluation, export", "解码、聊天、评测、导出"),
    "src/inference/serve/": ("the HTTP server and its page", "HTTP 服务器及其页面"),
    "src/inference/formats/": ("reading and writing other programs' files", "读写其他程序的文件"),
    "src/inference/formats/hf_model/": ("code of exported Hugging Face folders", "导出的 Hugging Face 目录所带的代码"),
    "cuda/": ("CUDA kernels, and the C++ that binds them", "CUDA 内核，以及绑定它们的 C++"),
    "cuda/cpu/": ("C++ kernels for the CPU", "CPU 的 C++ 内核"),
    "data/": ("tools that make data, and the data (not tracked)", "制作数据的工具，以及数据（不纳入版本控制）"),
    "docs/": ("the documentation", "文档"),
    "tests/": (
        "a test file per module; host_cuda/ runs the .cu files on a CPU, bench/ has benchmarks, faults/ breaks runs",
        "每个模块一个测试文件；host_cuda/ 在 CPU 上运行 .cu，bench/ 是基准测试，faults/ 破坏运行",
    ),
    "tests/run.sh": ("lint, types and tests", "lint、类型检查和测试"),
    "tools/": (
        "checks of a run or a machine; the tables of the documentation",
        "检查训练或机器的工具；生成文档里的表格",
    ),
    "CONTRIBUTING.md": ("how to change the code", "怎样修改代码"),
    "CHANGELOG.md": ("what changed, by version", "各版本的变化"),
}


def folders() -> list[Path]:
    """Every folder with source files, tests excepted, in the order of TREE."""
    roots = [ROOT / name for name in ("src", "cuda", "data", "tools")]
    # Found on the disk and not listed here, where a new package would be forgotten. __pycache__ has no source files.
    paths = [path for root in roots for path in (root, *root.rglob("*")) if path.is_dir() and source_files(path)]
    # As a reader should meet them, the model before the training; what TREE lacks comes last until it is added there.
    order = list(TREE)
    return sorted(paths, key=lambda path: order.index(name_of(path)) if name_of(path) in order else len(order))


def source_files(folder: Path) -> list[Path]:
    """The source files directly in a folder."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SOURCE_SUFFIXES)


def name_of(path: Path) -> str:
    """A path as TREE names it: relative to the repository, folders with a slash at the end."""
    return path.relative_to(ROOT).as_posix() + "/" * path.is_dir()


def tree(chinese: bool) -> str:
    """README's tree: top-level files and folders."""
    return _block((name, texts[chinese]) for name, texts in TREE.items() if (ROOT / name).exists())


def source(chinese: bool) -> str:
    """The tree of docs/source.md: every source file with the first sentence of its docstring; in English only."""
    top_level = [ROOT / name for name in TREE if "/" not in name and (ROOT / name).suffix != ".md"]
    lines = [(path.name, first_sentence(path)) for path in top_level if path.exists()]
    for folder in folders():
        package = folder / "__init__.py"
        summary = first_sentence(package) if package.exists() else ""
        lines.append((name_of(folder), summary or TREE.get(name_of(folder), ("",))[0]))
        lines += [(name_of(path), first_sentence(path)) for path in source_files(folder) if path != package]
    # Of tests/ only the entry points: its file names repeat those of the modules that they test.
    lines.append(("tests/", TREE["tests/"][0]))
    lines += [(name_of(path), first_sentence(path)) for path in (ROOT / "tests/run.sh", ROOT / ".ci/run")]
    return _block(lines)


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring or, outside Python, of its first comment; "" where it has none."""
    text = path.read_text(encoding="utf-8")
    match = re.match(r'(?:#![^\n]*\n)?(?:"""(?P<doc>.*?)"""|(?P<comment>(?:(?:#|//)[^\n]*\n)+))', text, re.DOTALL)
    if match is None:  # an empty __init__.py
        return ""
    summary = match["doc"] if match["doc"] is not None else re.sub(r"(?m)^(#|//) ?", "", match["comment"])
    paragraph = " ".join(summary.strip().split("\n\n")[0].split())
    # Up to a full stop, or to the colon that introduces the command line of a script.
    return re.split(r"[.](?:\s|$)|: (?=python |sh )", paragraph, maxsplit=1)[0]


def _block(lines: Iterable[tuple[str, str]]) -> str:
    return "```\n" + "\n".join(_line(name, description) for name, description in lines) + "\n```"


def _line(name: str, description: str) -> str:
    depth = name.rstrip("/").count("/")
    # A hidden folder has no line of its own, so its file keeps the whole path.
    label = name if name.startswith(".") else "  " * depth + name.rstrip("/").split("/")[-1] + "/" * name.endswith("/")
    return f"{label:<{DESCRIPTION_COLUMN - 1}} {description}".rstrip()
