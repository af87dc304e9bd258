"""README, CONTRIBUTING and docs/ agree with the code: tables, files, flags, links, Python examples, learning rates."""

import dataclasses
import math
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from documentation import ALL, FENCED, LINK, PAGES, ROOT, TWINS, name_of, read

from src.cli import COMPATIBILITY_FLAGS
from src.config import GROUPS, ModelConfig, RunConfig
from src.config.rwkv_peft import FLAGS as RWKV_PEFT_FLAGS
from src.model import RWKV7, ChannelMix, TimeMix
from src.model.attention import Attention
from src.ops.recurrence import wkv7
from src.training.schedule import learning_rate
from tools import docs_chinese, docs_tables, docs_tree

MAX_README_BYTES = 18_000  # README is a front page: more belongs on the other pages
README = read(ROOT / "README.md")
EVERYTHING = "\n".join(map(read, ALL))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(ROOT / page), re.DOTALL)


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_readme_is_a_front_page():
    assert len(README.encode()) < MAX_README_BYTES


def test_every_page_has_a_chinese_twin():
    chinese = {page.name for page in (ROOT / "docs").glob("*_CN.md")}
    assert chinese == {docs_tables.twin(page).name for page in TWINS if page.parent != ROOT}
    assert all(page.is_file() for page in ALL)


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_page_links_to_readme_and_to_its_twin(page):
    links = LINK.findall(read(page).split("\n\n")[1])
    is_chinese = page.stem.endswith("_CN")
    if page.parent != ROOT:
        assert f"../README{'_CN' * is_chinese}.md" in links
    if is_chinese:
        assert page.name.replace("_CN", "") in links
    elif page in TWINS:
        assert docs_tables.twin(page).name in links


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_targets_of_links_exist(page):
    for link in LINK.findall(FENCED.sub("", read(page))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", read(target)), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


def test_readme_links_to_every_page():
    for readme, pages in ((README, PAGES), (read(ROOT / "README_CN.md"), list(map(docs_tables.twin, TWINS)))):
        linked = {Path(link.split("#")[0]).name for link in LINK.findall(readme)}
        assert {page.name for page in pages if page.parent != ROOT} <= linked


# ---- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "page", "chinese"),
    docs_tables.places(),
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_tables_are_those_that_the_code_gives(name, page, chinese):
    (match,) = docs_tables.section(name).finditer(read(page))
    assert match[1] == docs_tables.TABLES[name][1](chinese) + "\n", "run: python tools/docs_tables.py"


def test_topics_of_the_flags_have_chinese_titles():
    assert list(docs_chinese.GROUPS) == list(GROUPS)


def test_chinese_meanings_are_kept_and_missing_ones_are_marked(tmp_path):
    """A translation in the page is kept, without the generated choices; a flag without one has its English meaning."""
    page = tmp_path / "flags_CN.md"
    page.write_text(
        "| `--kernel` | `auto` | 用哪个内核（CPU \\| GPU）（`auto`、`chunked`） |\n"
        "| `--wandb` |  | project <!-- not translated yet --> |\n",
        encoding="utf-8",
    )
    meanings = docs_chinese.flag_meanings(page)
    assert meanings == {"kernel": "用哪个内核（CPU | GPU）"}
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    assert docs_tables.flag_row(fields["kernel"], meanings)[2].startswith("用哪个内核（CPU | GPU）（`auto`、")
    assert docs_tables.flag_row(fields["wandb"], meanings)[2] == (
        f"{fields['wandb'].metadata['help']} {docs_chinese.NOT_TRANSLATED}"
    )


def test_every_flag_is_in_both_languages():
    flags = {field.name for field in dataclasses.fields(RunConfig)}
    for page in ("docs/flags.md", "docs/flags_CN.md"):
        assert set(re.findall(r"^\| `--(\w+)`", read(ROOT / page), re.MULTILINE)) == flags


def test_tree_of_readme_has_every_folder():
    assert [name for folder in docs_tree.folders() if (name := docs_tree.name_of(folder)) not in docs_tree.TREE] == []


def test_every_source_file_starts_with_a_description():
    paths = [path for folder in docs_tree.folders() for path in docs_tree.source_files(folder)]
    assert len(paths) > 100
    assert [path for path in paths if path.stat().st_size and not docs_tree.first_sentence(path)] == []


def test_files_that_the_pages_name_exist():
    named = set(re.findall(r"(?:sh|python) ((?:[\w.-]+/)*[\w-]+\.(?:sh|py))", EVERYTHING))
    modules = {name.replace(".", "/") for name in re.findall(r"python -m (src(?:\.\w+)+)", EVERYTHING)}
    named |= {f"{name}/__main__.py" if (ROOT / name).is_dir() else f"{name}.py" for name in modules}
    named |= set(re.findall(r"\b((?:src|tests|cuda|tools)/[\w/.-]+\.(?:py|cuh?|cpp|h|sh)\b)", EVERYTHING))
    assert len(named) >= 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


# Flags of other programs.
FOREIGN_FLAGS = {
    *("dataset", "local_dir", "repo-type", "local-dir"),  # modelscope, hf
    *("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "nodes", "ntasks-per-node", "gpus-per-node"),
    *("time", "requeue", "kill-on-bad-exit"),  # sbatch, srun
    *("hostfile", "tool", "help", "version"),
    "include",  # huggingface-cli
    *("lora", "no-repack"),  # llama.cpp
    *("all", "durations"),  # tests/run.sh, pytest
    "add-host",  # docker
    "all-files",  # pre-commit
}
# Flags of RWKV-LM that docs/from-rwkv-lm.md lists as missing here.
MISSING_FLAGS = {"my_pile_stage", "head_size_a", "layerwise_lr", "pre_ffn"}


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_flags_that_a_page_names_exist(page):
    """In commands of train.py and of the scripts that call it: its flags; in other code: those of any program here."""
    train_flags = (
        {field.name for field in dataclasses.fields(RunConfig)} | set(COMPATIBILITY_FLAGS) | set(RWKV_PEFT_FLAGS)
    )
    programs = [
        *(ROOT / "src").rglob("*.py"),
        *ROOT.glob("*/*.py"),
        *ROOT.glob("*.py"),
        *(ROOT / "tests/bench").glob("*.py"),
    ]
    tool_flags = {flag for path in programs for flag in re.findall(r'add_argument\(\s*"--([\w-]+)"', read(path))}
    text = read(page)
    code = [*FENCED.findall(text), *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))]
    used = {flag for span in code for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)}
    known = (
        train_flags | tool_flags | FOREIGN_FLAGS | (MISSING_FLAGS if page.stem.startswith("from-rwkv-lm") else set())
    )
    assert used <= known
    for line in text.splitlines():
        for command in re.findall(r"(?:train\.py|demo-training-run(?:-sft)?\.sh)([^`|#]*)", line):
            flags = set(re.findall(r"(?<![\w-])--(\w+)", command)) - {"help", "version"}
            assert flags <= train_flags, line


def test_environment_variables_that_the_code_reads_are_documented():
    for page in (ROOT / "docs/flags.md", ROOT / "docs/flags_CN.md"):
        named = read(page)
        for path in (ROOT / "src").rglob("*.py"):
            for name in re.findall(r"os\.(?:environ\.get\(|environ\[|getenv\()\"(\w+)\"(?!\] =)", read(path)):
                assert f"`{name}`" in named, f"{path.relative_to(ROOT)} reads {name}"


def test_environment_variables_of_the_scripts_are_documented():
    """In the table of docs/flags.md each variable is read by the script that it names, and none is missing."""
    page = read(ROOT / "docs/flags.md")
    shared, prepare, run, fine_tuning = (
        read(ROOT / f"demo-training-{name}.sh") for name in ("shared", "prepare", "run", "run-sft")
    )
    scripts = {"pretraining": [shared + prepare + run], "fine-tuning": [shared + fine_tuning]}
    scripts["both"] = scripts["pretraining"] + scripts["fine-tuning"]
    named = set()
    for names, script in re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| ([\w-]+) \|", page, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert all(f"${{{name}:-" in text for text in scripts[script]), name
            named.add(name)
    variables = set(re.findall(r"\$\{([A-Z_]+):-", shared + prepare + run + fine_tuning))
    in_prose = {"CXX", "CUDA_HOME"}
    assert all(f"`{name}`" in page for name in in_prose)
    assert variables - named == in_prose | {"VIRTUAL_ENV", "CONDA_PREFIX"}


def test_low_rank_sizes_of_the_releases():
    """With the flags in the table of docs/from-rwkv-lm.md, a model has the sizes w, a, v, g of the release."""
    expected = {
        "0.1B": (64, 64, 32, 128), "0.4B": (64, 64, 32, 128), "1.5B": (96, 96, 64, 256), "2.9B": (96, 96, 64, 320),
        "7.2B": (128, 128, 96, 480), "13.3B": (192, 192, 128, 384),
    }  # fmt: skip
    rows = re.findall(r"^\| ([\d.]+B) \| (\d+), (\d+) \|(.*)\|", read(ROOT / "docs/from-rwkv-lm.md"), re.MULTILINE)
    actual = {}
    for name, layers, width, flags in rows:
        sizes = {flag: int(size) for flag, size in re.findall(r"--(d_\w+) (\d+)", flags)}
        formula = ModelConfig(int(layers), int(width), 65536)
        assert all(getattr(formula, flag) != size for flag, size in sizes.items()), "a flag that changes nothing"
        c = ModelConfig(int(layers), int(width), 65536, **sizes)
        actual[name] = (c.d_decay_lora, c.d_aaa_lora, c.d_mv_lora, c.d_gate_lora)
    assert actual == expected


def test_published_learning_rates():
    """README's table has the learning rates that the schedule gives for the published settings."""
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| (0\.000\d{5}) \|", README, re.MULTILINE)
    assert len(rows) == 12
    for mini_epoch, lr in rows:
        last_step = (int(mini_epoch) + 1) * 40320 // 16 - 1
        ours = learning_rate(
            last_step, lr_init=6e-4, lr_final=6e-5, warmup_steps=10, exit_tokens=1498226207, tokens_per_step=16 * 512
        )
        assert f"{ours:.8f}" == lr


def test_recurrence_of_readme_equals_wkv7():
    """README's five lines, executed, give the output and the state of `wkv7`."""
    (lines,) = python_blocks("README.md")
    assert len(lines.strip().splitlines()) == 5
    torch.manual_seed(0)
    r, w, k, v, a, b = (0.3 * torch.randn(7, 16) for _ in range(6))
    names = {"torch": torch, "math": math, "T": 7, "S": torch.zeros(16, 16), "y": torch.zeros(7, 16)}
    names |= {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    exec(lines, names)
    y, state = wkv7(*(x[None, :, None] for x in (r, w, k, v, a, b)), kernel="reference")
    torch.testing.assert_close(names["y"], y[0, :, 0])
    torch.testing.assert_close(names["S"], state[0, 0])


@pytest.mark.parametrize(("number", "what", "least"), [
    (0, "new sequences", 95), (1, "new waves", 95),
    (2, "repeated tokens", 85),  # by guessing: 12.5
])  # fmt: skip
def test_networks_of_other_kinds_learn(number, what, least, capsys, monkeypatch):
    """The examples of docs/layers.md, executed, build networks from the layers and train them."""
    monkeypatch.syspath_prepend(str(ROOT))
    example = python_blocks("docs/layers.md")[number]
    threads = torch.get_num_threads()
    exec(compile(example, "layers.md", "exec"), {"__name__": "readme"})
    torch.set_num_threads(threads)
    assert float(re.search(rf"([\d.]+)% of {what}", capsys.readouterr().out)[1]) > least


def test_layers_page_has_the_names_of_the_state_dicts():
    page = (ROOT / "docs/layers.md").read_text(encoding="utf-8")
    config = ModelConfig(n_layer=1, n_embd=32, vocab_size=8, head_size=16)
    *_, time_mix, channel_mix, attention = re.split(r"^\| name \|.*$", page, flags=re.MULTILINE)
    tables = ((time_mix, TimeMix(config)), (channel_mix, ChannelMix(config)), (attention, Attention(config)))
    for table, module in tables:
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(module.state_dict())


def test_example_of_the_harness_runs(capsys, monkeypatch, tmp_path):
    """The example of docs/using.md, with a small model and a harness that requests one likelihood."""
    (example,) = python_blocks("docs/using.md")
    request = types.SimpleNamespace(args=("The capital of France", " is Paris"))
    harness, api, models = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    harness.simple_evaluate = lambda model, tasks: {"results": (tasks, model.loglikelihood([request]))}
    models.LM = type("LM", (), {})
    for module in (harness, api, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    folder = Path("out/L12-D768-x070")
    folder.mkdir(parents=True)
    torch.save(RWKV7(ModelConfig(n_layer=1, n_embd=64, vocab_size=65536)).state_dict(), folder / "rwkv-final.pth")
    exec(compile(example, "using.md", "exec"), {"__name__": "readme"})
    shutil.rmtree(folder)
    assert re.match(r"\(\['lambada_openai'\], \[\(-\d+\.\d+, (True|False)\)\]\)", capsys.readouterr().out)


def test_every_python_example_is_executed_here():
    assert {page.name: len(python_blocks(name_of(page))) for page in PAGES if python_blocks(name_of(page))} == {
        "README.md": 1,
        "layers.md": 3,
        "serving.md": 1,  # by test_serve_clients.py
        "using.md": 1,
    }
