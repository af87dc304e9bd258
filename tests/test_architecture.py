"""The house rules that can be read off the sources: who imports whom, who knows Lightning, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import from, as far as it does: text -> dataset -> model on ops -> training -> inference's answers, and
#   files      is a leaf (files that are whole or not there, held by one process): for whoever writes files; ops writes the build cache
#   inference  is under training, which evaluates and samples with it; of ops it takes the native step of one token
# The parts of a room (training/preflight, training/reporting) follow its rules.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "config": {"errors"},
    "files": {"errors"},
    "run_folder": {"errors", "files"},
    "run_log": {"config", "errors", "run_folder"},
    "cli": {"config", "errors", "version"},
    "ops": {"config", "errors", "files"},
    "model": {"config", "errors", "files", "ops"},
    "dataset": {"config", "errors", "files"},
    "inference": {"config", "dataset", "errors", "files", "model", "ops", "run_folder", "run_log"},
    "training": {"config", "dataset", "errors", "files", "inference", "model", "ops", "run_folder", "run_log"},
    "train.py": {"cli", "errors", "training"},
    "data": {"dataset", "errors", "files"},
    "API_DEMO_CHAT.py": {"errors", "inference"},
}
TRAINING_ONLY = {"lightning", "pytorch_lightning", "lightning_fabric", "deepspeed", "wandb"}
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "data").glob("*.py"), *ROOT.glob("*.py")])


def room(path):
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == "src" else parts[0]


def imported(source, package):
    """Full dotted names of the modules that a file of `package` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "src":
                yield from (f"src.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_order(path):
    here = room(path)
    if path == ROOT / "src" / "__init__.py":
        assert path.read_text(encoding="utf-8") == ""
        return
    assert here in ALLOWED, f"{here} has no place in architecture's order"
    modules = list(imported(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts))
    rooms = {name.split(".")[1] for name in modules if name.startswith("src.")} - {here}
    assert rooms <= ALLOWED[here], f"{here} imports {sorted(rooms - ALLOWED[here])}"
    if here != "training":
        assert not TRAINING_ONLY & {name.split(".")[0] for name in modules}


def test_imports_are_seen_wherever_they_stand():
    source = "from src import training\nfrom .rwkv7 import RWKV7\nfrom . import init\ndef f():\n    import wandb.sdk\n"
    assert set(imported(source, ("src", "model"))) == {
        "src",
        "src.training",
        "src.model.rwkv7",
        "src.model",
        "wandb.sdk",
    }


IMPORT_ALL = """
import importlib, os, sys, threading
from pathlib import Path
# what others do when they are imported is not the question
import jinja2, matplotlib, ninja, numpy, pytorch_lightning, pytorch_lightning.strategies, tokenizers, torch, torch.utils.checkpoint, tqdm

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
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
offences += [f"{threading.active_count() - threads} new threads"] * (threading.active_count() > threads)
offences += ["a device was touched"] * torch.cuda.is_initialized()
offences += ["the native library was loaded"] * any("rwkv7" in line for line in open("/proc/self/maps") if line.rstrip().endswith(".so"))
print(offences)
if "--negative-control" in sys.argv:
    exec(compile("import os; os.environ.get('HOME'); os.system('true')", ours + "/x.py", "exec"))
    print(len(offences))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_importing_does_nothing():
    """No compiler, no process, no thread, no device, no environment variable read; with a control that the watch sees."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT), "--negative-control"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "2"], done.stdout
