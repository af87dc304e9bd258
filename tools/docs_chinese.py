"""Chinese for the generated tables: headings are here, the meaning of a flag is in docs/flags_CN.md itself.

Writing the tables again keeps the meanings that stand in the Chinese page: it is the only place where they are edited.
"""

from __future__ import annotations

import re
from pathlib import Path

# Marks what a Chinese page has in English, or lacks, until someone translates it: tests/test_twins.py lists the marks.
NOT_TRANSLATED = "<!-- not translated yet -->"

# Column headings; one that is not here is the same in both languages.
HEADINGS = {
    "flag": "参数",
    "default": "默认值",
    "meaning": "含义",
    "mean loss": "平均损失",
    "lr at its last step": "最后一步的学习率",
    "name": "名称",
    "shape": "形状",
    "size": "大小",
    "decay or lr x2": "decay 或 lr x2",
    "initial value": "初始值",
    "parameters": "参数量",
    "low-rank sizes w a v g": "低秩维度 w a v g",
    "GPUs": "GPU 数",
    "GiB per GPU": "每个 GPU 的 GiB",
    "model": "模型",
    "trained": "训练什么",
    "all weights": "全部权重",
    "initial states": "初始状态",
    "projector, encoder": "投影层、编码器",
    "all weights, with an encoder": "全部权重，带编码器",
    "one process": "单进程",
    "state, bf16": "状态，bf16",
    "state, int8": "状态，int8",
    "state, nf4": "状态，nf4",
    "LoRA, bf16": "LoRA，bf16",
    "LoRA, int8": "LoRA，int8",
    "LoRA, nf4": "LoRA，nf4",
}

# Topics of the flags, by their key in src.config.GROUPS.
GROUPS = {
    "run": "训练本身：放在哪里，从什么开始",
    "data": "数据",
    "model": "模型",
    "adapt": "只微调一部分：适配器、状态",
    "media": "图片和声音",
    "length": "长度、batch 和学习率",
    "optimizer": "优化器",
    "speed": "内存与速度",
    "hardware": "硬件",
    "logging": "显示与记录",
}


def flag_meanings(page: Path) -> dict[str, str]:
    """{flag: Chinese meaning} of the table in docs/flags_CN.md, without the choices, which are generated."""
    rows = re.findall(r"^\| `--(\w+)` \|(?:\\\||[^|])*\| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    meanings = {}
    for flag, cell in rows:
        # The choices at the end, in full-width parentheses, come from the code: the table appends them again.
        meaning = re.sub(r"（`[^（）]*`）$", "", cell.replace("\\|", "|"))
        if NOT_TRANSLATED not in meaning:
            meanings[flag] = meaning
    return meanings
