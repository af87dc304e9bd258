"""Rules that can be read off the sources: who imports whom, who knows Lightning, and that importing does nothing."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each package may import: text -> dataset -> model on ops -> training -> inference's answers. errors, config,
# files, run_folder and run_log are below everything. inference is below training, which evaluates and generates with
# it; of ops it uses the native step of one token.
ALLOWED = {
    "terminal": set(),
    "errors": {"terminal"},
    "version": set(),
    "config": {"errors"},
    "files": {"errors"},
    "run_folder": {"errors", "files"},
    "run_log": {"config", "errors", "run_folder"},
    "cli": {"config", "errors", "terminal", "version"},
    "ops": {"config", "errors", "files"},
    "model": {"config", "errors", "files", "ops"},
    "adapt": {"config", "errors", "files", "model", "ops"},
    "multimodal": {"config", "dataset", "errors", "files", "model"},
    "dataset": {"config", "errors", "files", "terminal"},
    "inference": {
        "adapt",
        "config",
        "dataset",
        "errors",
        "files",
        "model",
        "multimodal",
        "ops",
        "run_folder",
        "run_log",
        "terminal",
    },
    "training": {
        "adapt",
        "config",
        "dataset",
        "errors",
        "files",
        "inference",
        "model",
        "multimodal",
        "ops",
        "run_folder",
        "run_log",
        "terminal",
    },
    "train.py": {"cli", "errors", "terminal", "training"},
    "data": {"dataset", "errors", "files", "terminal"},
    "API_DEMO_CHAT.py": {"errors", "terminal", "inference"},
}
# Inside src/training: each package or module imports only those on later lines. Nothing imports the first line, which
# are programs.
TRAINING_ORDER = (
    ("plot", "html_report", "dashboard", "run", "simulate"),
    ("training_run",),
    ("preflight", "rollback"),
    ("trainer",),
    ("settings", "validation"),
    ("model_setup",),
    ("checkpoint", "figures"),
    ("reporting",),
    ("module",),
    ("objectives",),
    ("hardware",),
    ("control",),
    ("distributed",),
    ("console",),
    ("optim", "schedule", "data"),
)
TRAINING_ONLY = {"lightning", "pytorch_lightning", "lightning_fabric", "deepspeed", "wandb"}
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "data").glob("*.py"), *ROOT.glob("*.py")])


def package(path):
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == "src" else parts[0]


def imported(source, within):
    """Full dotted names of the modules that a file of the package `within` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = within[: len(within) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module.split(".")[0] == "src":  # `from src.training import trainer` imports src.training.trainer
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_order(path):
    here = package(path)
    if path == ROOT / "src" / "__init__.py":
        assert path.read_text(encoding="utf-8") == ""
        return
    assert here in ALLOWED, f"{here} has no place in architecture's order"
    modules = list(imported(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts))
    packages = {name.split(".")[1] for name in modules if name.startswith("src.")} - {here}
    assert packages <= ALLOWED[here], f"{here} imports {sorted(packages - ALLOWED[here])}"
    if here != "training":
        assert not TRAINING_ONLY & {name.split(".")[0] for name in modules}


def training_package(name):
    """The package or module of src/training that a full dotted name lies in; "" for the names that src.training itself
    has."""
    return [*name.split("."), ""][2]


def test_training_is_in_layers():
    layer = {name: i for i, names in enumerate(TRAINING_ORDER) for name in names}
    arrows = set()
    for path in (ROOT / "src" / "training").rglob("*.py"):
        within = path.relative_to(ROOT).parent.parts
        here = training_package(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imported(path.read_text(encoding="utf-8"), within):
            there = training_package(name) if name.startswith("src.training.") else here
            if there != here and there in layer:
                arrows.add((here, there))
    assert {here for here, _ in arrows} >= {"run", "trainer", "checkpoint"}
    assert [(here, there) for here, there in sorted(arrows) if layer[here] >= layer[there]] == []


def test_no_module_imports_itself_by_way_of_others():
    """No circles, whatever the package: a module can be read after those that it imports."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    graph = {}
    for name, path in names.items():
        targets = imported(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts)
        # a package's __init__ imports its modules: an import of a module is no import of the package that it lies in
        graph[name] = {target for target in targets if target in names and not name.startswith(f"{target}.")}
    assert list(graphlib.TopologicalSorter(graph).static_order())
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**graph, "src.errors": {"src.training.run"}}).prepare()


def test_few_modules_stand_beside_the_packages_of_training():
    assert len(list((ROOT / "src" / "training").glob("*.py"))) <= 18


def test_imports_are_seen_wherever_they_stand():
    source = "from src import training\nfrom .rwkv7 import RWKV7\nfrom . import init\ndef f():\n    import wandb.sdk\n"
    seen = set(imported(source, ("src", "model")))
    assert {"src.training", "src.model.rwkv7", "src.model.init", "wandb.sdk"} <= seen


IMPORT_ALL = """
import importlib, os, sys, threading
from pathlib import Path
# what others do when they are imported is not the question
import jinja2, matplotlib, ninja, numpy, pytorch_lightning, pytorch_lightning.strategies, tokenizers, torch
import torch.utils.checkpoint, tqdm

root = Path(sys.argv[1])
sys.path.insert(0, str(root))
ours = str(root / "src")
offences = []

def watch(event, args):
    if event in {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"}:
        offences.append(f"{event} {args[:1]}")

class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename in {os.__file__, "<frozen os>", "<frozen _collections_abc>"}:
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith(ours):
            offences.append(f"{frame.f_code.co_filename} reads {key}")
        return super().__getitem__(key)

os.environ.__class__ = Watched
sys.addaudithook(watch)
threads = threading.active_count()
for path in sorted((root / "src").rglob("*.py")):
    if path.parent.name == "hf_model":  # copied into exported folders, for programs that have transformers
        continue
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
offences += [f"{threading.active_count() - threads} new threads"] * (threading.active_count() > threads)
offences += ["a device was touched"] * torch.cuda.is_initialized()
libraries = [line for line in open("/proc/self/maps") if line.rstrip().endswith(".so")]
offences += ["the native library was loaded"] * any("rwkv7" in line for line in libraries)
print(offences)
if "--negative-control" in sys.argv:
    exec(compile("import os; os.environ.get('HOME'); os.system('true')", ours + "/x.py", "exec"))
    print(len(offences))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_importing_does_nothing():
    """No compiler, no process, no thread, no device, no environment variable read; with a control that the watch
    sees."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT), "--negative-control"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "2"], done.stdout


# torch's agent does the rest. Policy (restarts.py) and what a failure leaves (failure.py) are not among them.
PROCESS_FILES, PROCESS_LINES = ("launch", "ranks", "watch"), 150


def test_lines_that_start_find_and_watch_processes_do_not_grow():
    """Lines of functions and classes, without comments and docstrings."""
    counted = 0
    for name in PROCESS_FILES:
        text = (ROOT / f"src/training/distributed/{name}.py").read_text()
        tree = ast.parse(text)
        nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        lines = {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        code = [text.splitlines()[line - 1].strip() for line in lines]
        counted += sum(bool(line) and not line.startswith("#") for line in code)
    assert counted <= PROCESS_LINES
