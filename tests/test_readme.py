"""README and docs/ say the truth: their tables are the code's, what they name exists, their Python runs, the learning rates come out.

Each page has a Chinese twin that says the same: whatever both languages write alike (code, headings' levels, tables' cells, numbers) is
compared.
"""

import dataclasses
import math
import re
import shutil
import sys
import types
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest
import readme_chinese
import readme_tables
import torch

from src.cli import COMPATIBILITY_FLAGS
from src.config import GROUPS, ModelConfig, RunConfig
from src.model import RWKV7
from src.ops.recurrence import wkv7
from src.training.schedule import learning_rate

ROOT = Path(__file__).parents[1]
PAGES = readme_tables.PAGES
TWINS = [page for page in PAGES if page.name not in readme_tables.ENGLISH_ONLY]
ALL = [*PAGES, *(readme_tables.twin(page) for page in TWINS)]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
README_BYTES = 18_000  # a front page: more belongs on the other pages


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


README = read(ROOT / "README.md")
EVERYTHING = "\n".join(map(read, ALL))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(ROOT / page), re.DOTALL)


# ---- pages ------------------------------------------------------------------------------------------------------------------


def test_readme_is_a_front_page():
    assert len(README.encode()) < README_BYTES


def test_every_page_has_its_twin():
    chinese = {page.name for page in (ROOT / "docs").glob("*_CN.md")}
    assert chinese == {readme_tables.twin(page).name for page in TWINS if page.parent != ROOT}
    assert all(page.is_file() for page in ALL)


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_a_page_leads_to_readme_and_to_its_twin(page):
    links = LINK.findall(read(page).split("\n\n")[1])
    is_chinese = page.stem.endswith("_CN")
    if page.parent != ROOT:
        assert f"../README{'_CN' * is_chinese}.md" in links
    if is_chinese:
        assert page.name.replace("_CN", "") in links
    elif page in TWINS:
        assert readme_tables.twin(page).name in links


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_and_pictures_are_there(page):
    for link in LINK.findall(FENCED.sub("", read(page))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", read(target)), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


def test_readme_leads_to_every_page():
    for readme, pages in ((README, PAGES), (read(ROOT / "README_CN.md"), list(map(readme_tables.twin, TWINS)))):
        linked = {Path(link.split("#")[0]).name for link in LINK.findall(readme)}
        assert {page.name for page in pages if page.parent != ROOT} <= linked


# ---- what they say ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "page", "chinese"),
    readme_tables.places(),
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_tables_are_those_of_the_code(name, page, chinese):
    (found,) = readme_tables.section(name).finditer(read(page))
    assert found[2] == readme_tables.TABLES[name][1](chinese) + "\n", "run: python tests/readme_tables.py"


def test_every_flag_has_chinese_words():
    assert list(readme_chinese.FLAGS) == [field.name for field in dataclasses.fields(RunConfig)]
    assert list(readme_chinese.GROUPS) == list(GROUPS)


def test_the_short_tree_is_complete():
    """Top-level files and the library's folders, in both languages; what git doesn't know is left out."""
    assert list(readme_tables.TREE) == list(readme_chinese.TREE)
    assert [name for name in readme_tables.TREE if not (ROOT / name).exists()] == []
    assert {*readme_tables.TOP, *(f"{folder}/" for folder in readme_tables.FOLDERS)} <= set(readme_tables.TREE)


def test_files_that_they_name_exist():
    named = set(re.findall(r"(?:sh|python) ((?:[\w.-]+/)*[\w-]+\.(?:sh|py))", EVERYTHING))
    named |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (src[\w.]+)", EVERYTHING)}
    named |= set(re.findall(r"\b((?:src|tests|cuda)/[\w/.-]+\.(?:py|cu|cpp|h|cuh|sh))", EVERYTHING))
    assert len(named) >= 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


# flags of other programs, and of RWKV-LM where docs/from-rwkv-lm.md says that they are not here
FOREIGN = {
    *("dataset", "local_dir", "repo-type", "local-dir"),  # modelscope, hf
    *("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "nodes", "ntasks-per-node", "gpus-per-node"),
    *("time", "requeue", "kill-on-bad-exit"),  # sbatch, srun
    *("hostfile", "tool", "help", "version"),
}
NOT_HERE = {"my_pile_stage", "head_size_a", "layerwise_lr", "pre_ffn"}


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_flags_that_it_names_exist(page):
    """In commands of train.py and of the scripts that pass flags on: its flags; in code anywhere else: those of some program here."""
    own = {field.name for field in dataclasses.fields(RunConfig)} | set(COMPATIBILITY_FLAGS)
    programs = [
        *(ROOT / "src").rglob("*.py"),
        *ROOT.glob("*/*.py"),
        *ROOT.glob("*.py"),
        *(ROOT / "tests/bench").glob("*.py"),
    ]
    tools = {flag for path in programs for flag in re.findall(r'add_argument\(\s*"--([\w-]+)"', read(path))}
    text = read(page)
    code = [*FENCED.findall(text), *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))]
    used = {flag for span in code for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)}
    known = own | tools | FOREIGN | (NOT_HERE if page.stem.startswith("from-rwkv-lm") else set())
    assert used <= known
    for line in text.splitlines():
        for command in re.findall(r"(?:train\.py|demo-training-run(?:-sft)?\.sh)([^`|#]*)", line):
            flags = set(re.findall(r"(?<![\w-])--(\w+)", command)) - {"help", "version"}
            assert flags <= own, line


def test_environment_variables_that_the_code_reads_are_named():
    for page in (ROOT / "docs/flags.md", ROOT / "docs/flags_CN.md"):
        named = read(page)
        for path in (ROOT / "src").rglob("*.py"):
            for name in re.findall(r"os\.(?:environ\.get\(|environ\[|getenv\()\"(\w+)\"(?!\] =)", read(path)):
                assert f"`{name}`" in named, f"{path.relative_to(ROOT)} reads {name}"


def test_settings_of_the_scripts_are_theirs():
    """The table of docs/flags.md: each variable is read by the script that it names, and none that is read is missing."""
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
    read_there = set(re.findall(r"\$\{([A-Z_]+):-", shared + prepare + run + fine_tuning))
    told_elsewhere = {"CXX", "CUDA_HOME"}
    assert all(f"`{name}`" in page for name in told_elsewhere)
    assert read_there - named == told_elsewhere | {"VIRTUAL_ENV", "CONDA_PREFIX"}


def test_low_rank_sizes_of_the_releases():
    """With the flags in the table of docs/from-rwkv-lm.md, a model has the sizes w, a, v, g of the release."""
    released = {
        "0.1B": (64, 64, 32, 128), "0.4B": (64, 64, 32, 128), "1.5B": (96, 96, 64, 256), "2.9B": (96, 96, 64, 320),
        "7.2B": (128, 128, 96, 480), "13.3B": (192, 192, 128, 384),
    }  # fmt: skip
    rows = re.findall(r"^\| ([\d.]+B) \| (\d+), (\d+) \|(.*)\|", read(ROOT / "docs/from-rwkv-lm.md"), re.MULTILINE)
    made = {}
    for name, layers, width, flags in rows:
        sizes = {flag: int(size) for flag, size in re.findall(r"--(d_\w+) (\d+)", flags)}
        formula = ModelConfig(int(layers), int(width), 65536)
        assert all(getattr(formula, flag) != size for flag, size in sizes.items()), "a flag that changes nothing"
        c = ModelConfig(int(layers), int(width), 65536, **sizes)
        made[name] = (c.d_decay_lora, c.d_aaa_lora, c.d_mv_lora, c.d_gate_lora)
    assert made == released


def test_published_learning_rates():
    """The column of the expected losses, and that the command of the setting gives it."""
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| (0\.000\d{5}) \|", README, re.MULTILINE)
    assert len(rows) == 12
    for mini_epoch, lr in rows:
        last_step = (int(mini_epoch) + 1) * 40320 // 16 - 1
        ours = learning_rate(
            last_step, lr_init=6e-4, lr_final=6e-5, warmup_steps=10, exit_tokens=1498226207, tokens_per_step=16 * 512
        )
        assert f"{ours:.8f}" == lr


def test_the_recurrence_is_the_ops():
    """The five lines, run as they stand, give what `wkv7` gives."""
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


def test_another_network_from_the_parts_learns(capsys, monkeypatch):
    """The example runs as it stands, and what it builds has learned."""
    monkeypatch.syspath_prepend(str(ROOT))
    (example,) = python_blocks("docs/model.md")
    threads = torch.get_num_threads()
    exec(compile(example, "model.md", "exec"), {"__name__": "readme"})
    torch.set_num_threads(threads)
    accuracy = float(re.search(r"([\d.]+)% of new sequences", capsys.readouterr().out)[1])
    assert accuracy > 95


def test_the_harness_is_called_as_shown(capsys, monkeypatch, tmp_path):
    """The example runs as it stands, with a small model and with a harness that asks for one likelihood."""
    (example,) = python_blocks("docs/using.md")
    asked = types.SimpleNamespace(args=("The capital of France", " is Paris"))
    harness, api, models = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    harness.simple_evaluate = lambda model, tasks: {"results": (tasks, model.loglikelihood([asked]))}
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


def test_no_other_python_stands_there():
    assert {page.name: len(python_blocks(name_of(page))) for page in PAGES if python_blocks(name_of(page))} == {
        "README.md": 1,
        "model.md": 1,
        "using.md": 1,
    }


# ---- twins ------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")


def code_spans(markdown: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", markdown)]


def numbers(markdown: str) -> list[str]:
    return NUMBER.findall(re.sub(r"`[^`]+`", "", markdown))


def tables(markdown: str) -> list[list[list[str]]]:
    """Tables, their rows, their cells: a table is a run of lines that start with |."""
    runs = re.findall(r"(?:^\|.*\n?)+", FENCED.sub("", markdown), re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", row.strip()[1:-1]) for row in run.splitlines()] for run in runs]


def sections(markdown: str) -> list[tuple[str, str, str]]:
    """(level, heading, the prose below it) of each heading; code blocks and tables are left out."""
    prose = re.sub(r"^\|.*$", "", FENCED.sub("", markdown), flags=re.MULTILINE)
    parts = re.split(r"^(#+) (.*)$", prose, flags=re.MULTILINE)
    return list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))


def code_blocks(markdown: str) -> list[str]:
    """The code in fences, without comments, which are translated, and without what readme_tables.py makes."""
    for name in readme_tables.TABLES:
        markdown = readme_tables.section(name).sub("", markdown)
    return [re.sub(r"(?m)(^|(?<=\s))# .*$", "", block) for block in FENCED.findall(markdown)]


@pytest.fixture(params=TWINS, ids=name_of)
def twins(request):
    """The texts of an English page and of its Chinese twin."""
    return read(request.param), read(readme_tables.twin(request.param))


def test_chinese_code_blocks_are_the_english_ones(twins):
    for english, chinese in zip_longest(*map(code_blocks, twins)):
        assert [line.rstrip() for line in english.splitlines()] == [line.rstrip() for line in chinese.splitlines()]


def test_chinese_tables_have_the_english_cells(twins):
    """Words are translated; what rows and columns there are, and the code and the numbers in each cell, are not."""
    for english, chinese in zip_longest(*map(tables, twins), fillvalue=()):
        for row, row_cn in zip_longest(english, chinese, fillvalue=()):
            cells, cells_cn = (
                [(sorted(code_spans(cell)), sorted(numbers(cell))) for cell in line] for line in (row, row_cn)
            )
            assert cells == cells_cn, f"{row}\n{row_cn}"


def test_chinese_headings_are_as_many_and_as_deep(twins):
    for english, chinese in zip_longest(*map(sections, twins), fillvalue=("none",)):
        assert english[0] == chinese[0], f"{english[:2]}, {chinese[:2]}"


def test_chinese_prose_has_the_english_code_and_numbers(twins):
    """Section by section: every command, flag and file name, and every number as often; a sentence may put them in another order."""
    for (_, heading, english), (_, heading_cn, chinese) in zip(*map(sections, twins), strict=True):
        where = f"{heading}; {heading_cn}"
        assert set(code_spans(english)) == set(code_spans(chinese)), where
        assert Counter(numbers(heading + english)) == Counter(numbers(heading_cn + chinese)), where


def test_chinese_pages_link_to_the_same_places(twins):
    """To the Chinese twin of a page, where it has one."""
    english, chinese = ({link.split("#")[0].replace("_CN", "") for link in LINK.findall(text)} for text in twins)
    assert english == chinese
