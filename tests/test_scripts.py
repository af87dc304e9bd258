"""The shell scripts, and the download of minipile.

pip is replaced by a stand-in that records its arguments and installs empty packages.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_process
from packaging.requirements import Requirement
from safetensors.torch import save_file

from src.config import ModelConfig
from src.dataset import BinIdxWriter
from src.dataset.corpus.bpe import train_bpe
from src.inference.formats.convert import convert_model
from src.inference.formats.fla import write_fla
from src.inference.load import load_model
from src.model import RWKV7
from src.model.weights import read_weights

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / "tests" / "run.sh", ROOT / "tests" / "torch_versions.sh"]
ENVIRONMENT_FILES = ("demo-training-prepare.sh", "demo-training-shared.sh", "requirements.txt", "constraints.txt")
(TORCH,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
sys.path.insert(0, str(ROOT / "data"))

# REFUSED in the environment: arguments that make it fail, as pip does without a network or a solution.
PIP = """
import os, re, sys, sysconfig
from importlib import metadata
from pathlib import Path
arguments = sys.argv[1:]
with open(os.environ["PIP_CALLS"], "a") as calls:
    print(*arguments, file=calls)
if set(arguments) & set(os.environ.get("REFUSED", "").split()):
    sys.exit(1)
requirements = [argument for argument in arguments[1:] if re.match(r"torch[=>]=", argument)]
for option, value in zip(arguments, arguments[1:]):
    if option == "-r":
        requirements += [line for line in Path(value).read_text().splitlines() if line[:1].isalpha()]
for requirement in requirements:
    name, version = re.match(r"([\\w-]+)(?:[>=]=([\\d.]+))?", requirement).groups()
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        folder = Path(sysconfig.get_path("purelib")) / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
"""


class ScriptFolder:
    """A folder with copies of the scripts, the stand-in for pip, an empty .venv and nothing else on PATH."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        for name in ENVIRONMENT_FILES:
            shutil.copy(ROOT / name, folder)
        (folder / "lib" / "pip").mkdir(parents=True)
        (folder / "lib" / "pip" / "__init__.py").write_text("")
        (folder / "lib" / "pip" / "__main__.py").write_text(PIP)
        (folder / "bin").mkdir()
        for tool in ("dirname", "uname", "tr", "grep", "cat"):
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        base = getattr(sys, "_base_executable", sys.executable)
        (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{base}" "$@"\n')
        (folder / "bin" / "python3").chmod(0o755)
        subprocess.run([base, "-m", "venv", "--without-pip", folder / ".venv"], check=True)

    def add_package(self, name, version, python=".venv"):
        site = next((self.folder / python / "lib").glob("python3.*")) / "site-packages"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def prepare(self, *arguments, **environment):
        return subprocess.run(
            ["/bin/sh", "demo-training-prepare.sh", *arguments],
            cwd=self.folder, text=True, capture_output=True, timeout=120,
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder), "PYTHONPATH": str(self.folder / "lib"),
                 "PIP_CALLS": str(self.calls), **environment},
        )  # fmt: skip

    def pip_calls(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def constraints(self):
        return (self.folder / ".venv" / "constraints.txt").read_text().splitlines()


@pytest.fixture
def scripts(tmp_path):
    return ScriptFolder(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_posix(script):
    subprocess.run(["/bin/sh", "-n", script], check=True)
    assert script.read_text(encoding="utf-8").startswith("#!/bin/sh\n")


def test_adam_has_its_defaults_in_one_place():
    for script in SCRIPTS:
        assert not re.search(r"--(beta1|beta2|adam_eps) [\d.]", script.read_text(encoding="utf-8")), script.name


def test_a_checkout_with_crlf_line_ends_has_the_files_as_they_are(tree, tmp_path_factory):
    """Of git on Windows, as it is set up by default: scripts with CRLF fail in WSL, and so do pip's constraints."""
    git = partial(subprocess.run, check=True, capture_output=True, text=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid", "-c", "core.autocrlf=false"]
    git(["git", "init", "-q"], cwd=tree)
    git(["git", "add", "-A"], cwd=tree)
    git(["git", *identity, "commit", "-q", "-m", "x"], cwd=tree)
    checkout = tmp_path_factory.mktemp("checkout") / "tree"
    git(["git", "clone", "-q", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", tree, checkout])
    names = git(["git", "ls-files", "-z"], cwd=tree).stdout.split("\0")[:-1]
    assert {"demo-training-run.sh", "constraints.txt", "tests/fixtures/state_format_1/run/train_log.txt"} <= set(names)
    assert [name for name in names if (checkout / name).read_bytes() != (tree / name).read_bytes()] == []
    assert git(["git", "status", "--porcelain"], cwd=checkout).stdout == ""
    # What an editor on Windows saves with CRLF is corrected when it is added.
    script = checkout / "demo-training-run.sh"
    script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))
    git(["git", "add", "-A"], cwd=checkout)
    assert git(["git", "diff", "--cached", "--name-only"], cwd=checkout).stdout == ""


# ---- the environment -------------------------------------------------------------------------------------------------


def test_every_requirement_has_a_tested_version():
    """Each package of requirements.txt stands in constraints.txt, in a version that requirements.txt allows."""
    constraints = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            constraints[name] = version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(constraints[requirement.name]), line


def test_what_the_project_is_built_on_is_required():
    names = {line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()}
    assert {"torch", "pytorch-lightning", "deepspeed", "ninja", "numpy", "wandb"} <= names


def test_an_environment_that_has_everything_is_used_as_it_is(tmp_path):
    for name in ENVIRONMENT_FILES:
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["/bin/sh", "demo-training-prepare.sh", "environment"], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": ""}, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == f"{sys.prefix}/bin/python", done.stderr
    assert not (tmp_path / ".venv").exists()


def test_cpu_build_from_its_own_index_then_nothing_twice(scripts):
    done = scripts.prepare("environment")
    assert done.stdout == ".venv/bin/python\n", done.stderr
    torch, rest = scripts.pip_calls()
    assert "--index-url https://download.pytorch.org/whl/cpu" in torch
    assert "--timeout 10 --retries 1" in torch
    assert torch.endswith(f"torch=={TORCH}")
    assert rest.startswith("install --constraint .venv/constraints.txt -r requirements.txt")
    assert scripts.constraints()[0] == f"torch=={TORCH}"
    assert [line for line in scripts.constraints() if line.startswith("pytorch-lightning==")]

    again = scripts.prepare("environment")
    assert again.stdout == ".venv/bin/python\n"
    assert again.stderr == ""
    assert len(scripts.pip_calls()) == 2


def test_default_index_if_the_cpu_index_is_out_of_reach(scripts):
    done = scripts.prepare("environment", REFUSED="--index-url")
    assert done.returncode == 0, done.stderr
    assert scripts.pip_calls()[2] == f"install torch=={TORCH}"


def test_the_newest_torch_if_the_tested_one_has_no_build_for_this_python(scripts):
    done = scripts.prepare("environment", REFUSED=f"torch=={TORCH}")
    assert done.returncode == 0, done.stderr
    assert scripts.pip_calls()[1].endswith("--index-url https://download.pytorch.org/whl/cpu torch>=2.10")
    assert scripts.constraints()[0] == "torch==2.10"  # what the stand-in installs for it


def test_another_torch_on_request(scripts):
    scripts.prepare("environment", TORCH="2.12.1")
    assert scripts.pip_calls()[0].endswith("torch==2.12.1")
    assert scripts.constraints()[0] == "torch==2.12.1"


def test_default_build_if_there_is_an_nvidia_gpu(scripts):
    fake = scripts.folder / "bin" / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    fake.chmod(0o755)
    scripts.prepare("environment")
    assert scripts.pip_calls()[0] == f"install torch=={TORCH}"


def test_without_a_solution_for_the_tested_versions_the_newest_are_installed(scripts):
    """As with another Python, for which some of them have no build; an installed torch is kept all the same."""
    scripts.add_package("torch", "2.11.0")
    done = scripts.prepare("environment", REFUSED=".venv/constraints.txt")
    assert done.returncode == 0, done.stderr
    tested, newest = scripts.pip_calls()
    assert tested == "install --constraint .venv/constraints.txt -r requirements.txt"
    assert newest == "install --constraint .venv/torch.txt -r requirements.txt"
    assert (scripts.folder / ".venv" / "torch.txt").read_text() == "torch==2.11.0\n"
    assert "constraints.txt" in done.stderr


def test_packages_that_cannot_be_installed_end_the_script(scripts):
    done = scripts.prepare("environment", REFUSED="install")
    assert done.returncode == 1
    assert done.stdout == ""


@pytest.mark.parametrize(("version", "kept"), [("2.10.0", True), ("2.14.0a0+rocm7", True), ("2.9.1", False)])
def test_an_installed_torch_is_kept(scripts, version, kept):
    scripts.add_package("torch", version)
    scripts.prepare("environment")
    assert (f"torch=={TORCH}" not in " ".join(scripts.pip_calls())) == kept
    if kept:
        assert [line for line in scripts.constraints() if line.startswith("torch==")] == [f"torch=={version}"]


def test_venv_uses_the_torch_of_an_active_environment(scripts):
    """For a ROCm user: the active environment has torch and nothing else; .venv does not install another one."""
    os.rename(scripts.folder / ".venv", scripts.folder / "active")
    scripts.add_package("torch", "2.11.0+rocm6.4", python="active")
    done = scripts.prepare("environment", VIRTUAL_ENV=str(scripts.folder / "active"))
    assert done.stdout == ".venv/bin/python\n", done.stderr
    assert len(scripts.pip_calls()) == 1
    assert scripts.constraints()[0] == "torch==2.11.0+rocm6.4"


def test_more_requirements(scripts):
    (scripts.folder / "more.txt").write_text("# of the tests\nsome-linter>=1.2,<2\n")
    scripts.prepare("environment")
    scripts.prepare("environment", "more.txt")
    assert scripts.pip_calls()[2] == "install --constraint .venv/constraints.txt -r requirements.txt -r more.txt"
    (scripts.folder / "most.txt").write_text("some-harness\n")
    scripts.prepare("environment", "more.txt", "most.txt")
    assert scripts.pip_calls()[-1].endswith("-r requirements.txt -r more.txt -r most.txt")


@pytest.mark.parametrize(
    ("marker", "applies"),
    [
        ('sys_platform == "linux" or sys_platform == "darwin"', True),
        ('sys_platform == "plan9"', False),
        ('platform_machine != "z80" and implementation_name == "cpython"', True),
    ],
)
def test_a_requirement_holds_where_its_marker_does(scripts, marker, applies):
    scripts.prepare("environment")
    (scripts.folder / "more.txt").write_text(f"some-package>=1.2; {marker}  # why\n")
    scripts.prepare("environment", "more.txt")
    assert len(scripts.pip_calls()) == (3 if applies else 2)


@pytest.mark.parametrize("version", ["2.7.0", "2.5.9"])
def test_a_version_that_is_too_old_or_too_new_is_replaced(scripts, version):
    scripts.add_package("pytorch-lightning", version)
    scripts.prepare("environment")
    assert len(scripts.pip_calls()) == 2


def test_no_python_that_is_new_enough(scripts):
    shutil.rmtree(scripts.folder / ".venv")
    (scripts.folder / "bin" / "python3").write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.8.10\nexit 1\n")
    done = scripts.prepare("environment")
    assert done.returncode == 1
    assert "3.10" in done.stderr
    assert "Python 3.8.10" in done.stderr
    assert "PYTHON=" in done.stderr


def test_unknown_setting_is_refused_at_once(scripts):
    done = scripts.prepare("minipil")
    assert done.returncode == 1
    assert done.stderr.startswith("minipil: ")
    assert "expected demo, digits, tones, minipile, mini or cluster" in done.stderr
    assert scripts.pip_calls() == []


# ---- the runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """The sources as they are now, elsewhere."""
    names = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def warm_python(tmp_path_factory):
    """For the commands of the scripts; the modules that a warmed process has are those that `tree` copies."""
    with (
        warm_process.python_for_scripts(tmp_path_factory.mktemp("python")) as python,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PYTHON", str(python))
        yield python


def run_script(tree, *arguments, script="demo-training-run.sh", **environment):
    return subprocess.run(
        ["/bin/sh", script, *arguments], cwd=tree, text=True, timeout=570, capture_output=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_run_from_data_to_sample_and_again(tree):
    """Initial weights, training, held-out loss, sample; the second run finds it complete and changes nothing."""
    with BinIdxWriter(tree / "data" / "toy", np.uint16) as out:
        for _ in range(40):
            out.add_document([*range(300, 330), 0])
    settings = {
        "DATA_FILE": "data/toy", "VAL_DATA_FILE": "data/toy", "TOKENIZER": "world", "VOCAB_SIZE": "65536",
        "N_LAYER": "1", "N_EMBD": "64", "CTX_LEN": "16", "M_BSZ": "4", "EPOCH_STEPS": "4", "MY_EXIT_TOKENS": "512",
    }  # fmt: skip
    done = run_script(tree, "demo", "--random_seed", "3", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tree / "out" / "L1-D64-x070"
    names = {path.name for path in folder.iterdir()}
    assert {"rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth", "train_log.txt", "loss.png"} <= names
    heldout, sample = done.stdout.index("Loss on held-out text"), done.stdout.index('What it writes after "def "')
    assert "perplexity" in done.stdout[heldout:sample]
    assert done.stdout[sample:].split("\n")[1].startswith("def ")
    final = (folder / "rwkv-final.pth").stat()

    # with an interpreter of its own: the tree has all that a run needs
    again = run_script(tree, "demo", "--random_seed", "3", **settings, PYTHON=sys.executable)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "complete" in again.stdout
    assert "Loss on held-out text" not in again.stdout
    assert (folder / "rwkv-final.pth").stat().st_mtime_ns == final.st_mtime_ns


def test_a_data_file_that_is_missing(tree):
    done = run_script(tree, "mini")
    assert done.returncode == 1
    assert "data/pretrain_t2t_mini.bin and .idx are missing" in done.stderr
    assert "data/make_data.py" in done.stderr
    assert not (tree / "out").exists()


def test_a_stage_without_the_one_before_it(tree):
    (tree / "data" / "sft_1024.jsonl").write_text("")
    (tree / "data" / "minimind_tokenizer").mkdir()
    (tree / "data" / "minimind_tokenizer" / "tokenizer.json").write_text("{}")
    done = run_script(tree, "mini", "1024", script="demo-training-run-sft.sh")
    assert done.returncode == 1
    assert "out/L8-D512-x070-sft512 does not exist" in done.stderr
    assert not (tree / "out").exists()
    done = run_script(tree, "mini", "100", script="demo-training-run-sft.sh")
    assert "expected t2t, 512, 1024 or 2048" in done.stderr


def conversations_file(path, count=6):
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a test."}]
    path.write_text("".join(json.dumps({"conversations": turns}) + "\n" for _ in range(count)), encoding="utf-8")


@pytest.fixture
def pretrained(tree):
    """A tree with the results of the demo's pretraining: the tokenizer, and random final weights of the demo's size."""
    train_bpe(["What is it? It is a test.\n"], tree / "data" / "demo_tokenizer", 6400)
    folder = tree / "out" / "L4-D256-x070"
    folder.mkdir(parents=True)
    torch.save(RWKV7(ModelConfig(n_layer=4, n_embd=256, vocab_size=6400)).state_dict(), folder / "rwkv-final.pth")
    return tree


DRY_RUN = ("--dry_run", "--kernel", "reference", "--accelerator", "cpu")


def test_own_conversations_fine_tune_the_demos_model(pretrained):
    """DATA_FILE alone: the demo's model and settings. A later BASE is not used, because rwkv-init.pth exists."""
    conversations_file(pretrained / "mine.jsonl")
    fine_tune = partial(run_script, pretrained, *DRY_RUN, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl")
    done = fine_tune(CTX_LEN="32")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = "out/L4-D256-x070-sft-mine/rwkv-init.pth"
    assert f"{stage} is a copy of out/L4-D256-x070/rwkv-final.pth" in done.stdout
    assert "lr 1e-05," in done.stdout  # a hundredth of the demo's 1e-3: the first step of the warm-up
    assert "OK: 1 of 1 steps taken" in done.stdout

    torch.save(RWKV7(ModelConfig(n_layer=4, n_embd=256, vocab_size=6400)).state_dict(), pretrained / "other.pth")
    done = fine_tune(CTX_LEN="32", BASE="other.pth")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{stage} exists already, so BASE=other.pth is not used" in done.stdout
    done = fine_tune(CTX_LEN="32", BASE="out/L4-D256-x070")
    assert "is not used" not in done.stdout
    done = run_script(
        pretrained,
        *DRY_RUN,
        "--proj_dir",
        "out/x",
        script="demo-training-run-sft.sh",
        DATA_FILE="mine.jsonl",
        CTX_LEN="32",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out/x/rwkv-init.pth is a copy of" in done.stdout


BASES = {
    "other.safetensors": lambda model, path: save_file(model.state_dict(), path),
    "other.pth": lambda model, path: save_file(model.state_dict(), path),  # the ending doesn't decide
    "hub": lambda model, path: write_fla(model.state_dict(), model.config, path),
    "run": lambda model, path: (path.mkdir(), torch.save(model.state_dict(), path / "rwkv-3.pth")),
}


@pytest.mark.parametrize("name", BASES)
def test_base_takes_what_chat_takes(pretrained, name):
    conversations_file(pretrained / "mine.jsonl")
    fine_tune = partial(run_script, pretrained, *DRY_RUN, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl")
    model = RWKV7(ModelConfig(n_layer=4, n_embd=256, vocab_size=6400))
    BASES[name](model, pretrained / name)
    done = fine_tune(CTX_LEN="32", BASE=name)
    assert done.returncode == 0, done.stdout + done.stderr
    initial = read_weights(pretrained / "out/L4-D256-x070-sft-mine/rwkv-init.pth")
    assert torch.equal(initial["head.weight"], model.head.weight)
    done = fine_tune(CTX_LEN="32", BASE=name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is not used" not in done.stdout


def test_a_base_that_fails_is_not_kept(pretrained):
    """Else the next BASE would be ignored, as rwkv-init.pth exists."""
    conversations_file(pretrained / "mine.jsonl")
    fine_tune = partial(run_script, pretrained, *DRY_RUN, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl")
    (pretrained / "page.pth").write_text("<html>not found</html>")
    (pretrained / "page.st").write_text("<html>not found</html>")
    torch.save(RWKV7(ModelConfig(n_layer=3, n_embd=256, vocab_size=6400)).state_dict(), pretrained / "three.pth")
    sizes = {"N_LAYER": "4", "N_EMBD": "256", "VOCAB_SIZE": "6400", "TOKENIZER": "data/demo_tokenizer"}
    for base, message in (("page.pth", "a web page"), ("page.st", "a web page"), ("three.pth", "--n_layer 3")):
        done = fine_tune(CTX_LEN="32", BASE=base, **sizes)
        assert done.returncode == 2 or (base == "page.st" and done.returncode == 1), done.stdout + done.stderr
        assert message in done.stderr
        assert not list(pretrained.glob("out/*-sft-mine/rwkv-init.pth*"))
    done = fine_tune(CTX_LEN="32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rwkv-init.pth is a copy of out/L4-D256-x070/rwkv-final.pth" in done.stdout


def test_own_conversations_fine_tune_another_model(pretrained):
    """One setting of the model is enough for the settings of mini; world is a tokenizer without a folder."""
    conversations_file(pretrained / "mine.jsonl")
    fine_tune = partial(run_script, pretrained, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl")
    done = fine_tune(TOKENIZER="world", N_LAYER="12", N_EMBD="768", VOCAB_SIZE="65536")
    assert done.returncode == 1
    assert "out/L12-D768-x070 does not exist" in done.stderr
    done = fine_tune(TOKENIZER="data/demo_tokenizer")
    assert "out/L8-D512-x070 does not exist" in done.stderr
    shutil.rmtree(pretrained / "data" / "demo_tokenizer")
    done = fine_tune()
    assert "data/demo_tokenizer is missing" in done.stderr
    assert [path.name for path in (pretrained / "out").iterdir()] == ["L4-D256-x070"]


def test_the_fine_tuning_demo_asks_no_questions_after_a_dry_run(pretrained):
    for name in ("demo-sft.jsonl", "demo-sft-heldout.jsonl"):
        conversations_file(pretrained / "data" / name)
    done = run_script(pretrained, *DRY_RUN, script="demo-training-run-sft.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was kept" in done.stdout
    assert "What does" not in done.stdout


# ---- what the scripts pass to train.py -------------------------------------------------------------------------------


PYTHON = """#!/bin/sh
if [ "$1" != train.py ]; then exec "{python}" "$@"; fi
shift
printf '%s\\n' -- "$@" >>calls
if [ -n "${{SAVED:-}}" ]; then touch "$SAVED"; fi
exit ${{STATUS:-0}}
"""


class RecordedTraining:
    """Runs of a script with a train.py that does nothing but record its flags and exit with STATUS."""

    def __init__(self, tree, python):
        self.tree = tree
        (tree / "python").write_text(PYTHON.format(python=python))
        (tree / "python").chmod(0o755)
        (tree / "tokenizer").mkdir()
        (tree / "tokenizer" / "tokenizer.json").write_text("{}")
        self.out = tree / "out" / "L8-D512-x070"
        self.base = tree / "base.pth"
        self.base.write_bytes(b"some weights")

    def run(self, script, *arguments, **environment):
        settings = {"PYTHON": "./python", "TOKENIZER": "tokenizer", **environment}
        return run_script(self.tree, *arguments, script=f"demo-training-{script}.sh", **settings)

    def fine_tune(self, name, *arguments, **environment):
        (self.tree / name).write_text("{}\n")
        return self.run("run-sft", *arguments, **{"DATA_FILE": name, "BASE": "base.pth", **environment})

    def flags(self):
        """The flags of the newest call of train.py."""
        values = (self.tree / "calls").read_text().rpartition("--\n")[2].splitlines()
        return dict(zip(values[::2], values[1::2], strict=True))


@pytest.fixture
def recorded(tree, warm_python):
    return RecordedTraining(tree, warm_python)


def test_data_files_with_dots_are_runs_of_their_own(recorded):
    names = {
        "pets.cats.jsonl": "pets.cats", "pets.dogs.jsonl": "pets.dogs", "mine.jsonl": "mine", "a.b.jsonl.gz": "a.b",
        "c.jsonl.zst": "c", "d.v2.json": "d.v2",
    }  # fmt: skip
    for name, run in names.items():
        done = recorded.fine_tune(name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert recorded.flags()["--proj_dir"] == f"out/L8-D512-x070-sft-{run}"
        assert (recorded.tree / "out" / f"L8-D512-x070-sft-{run}" / "rwkv-init.pth").read_bytes() == b"some weights"


def test_an_empty_val_data_file_switches_held_out_data_off(recorded):
    (recorded.tree / "data" / "toy.idx").write_bytes(b"")
    for setting, expected in (({}, "data/demo-heldout"), ({"VAL_DATA_FILE": ""}, ""), ({"VAL_DATA_FILE": "x"}, "x")):
        done = recorded.run("run", "demo", DATA_FILE="data/toy", **setting)
        assert done.returncode == 0, done.stdout + done.stderr
        assert recorded.flags()["--val_data_file"] == expected
    for setting, expected in (({}, ""), ({"VAL_DATA_FILE": ""}, ""), ({"VAL_DATA_FILE": "x.jsonl"}, "x.jsonl")):
        recorded.fine_tune("mine.jsonl", **setting)
        assert recorded.flags()["--val_data_file"] == expected
    # The demo makes its own conversations, held-out ones too.
    (recorded.tree / "data" / "demo_conversations.py").write_text("")
    (recorded.tree / "data" / "demo-sft.jsonl").write_text("{}\n")
    for setting, expected in (({}, "data/demo-sft-heldout.jsonl"), ({"VAL_DATA_FILE": ""}, "")):
        done = recorded.run("run-sft", BASE="base.pth", **setting)
        assert done.returncode == 0, done.stdout + done.stderr
        assert recorded.flags()["--val_data_file"] == expected


@pytest.mark.parametrize("status", [1, 2])
def test_a_base_that_failed_leaves_no_initial_weights(recorded, status):
    """The next BASE would not be used: rwkv-init.pth is copied once."""
    done = recorded.fine_tune("mine.jsonl", STATUS=str(status))
    assert done.returncode == status
    assert "rwkv-init.pth is deleted again" in done.stderr
    assert not (recorded.tree / "out" / "L8-D512-x070-sft-mine").exists()
    (recorded.tree / "good.pth").write_bytes(b"good weights")
    done = recorded.fine_tune("mine.jsonl", BASE="good.pth")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (recorded.tree / "out" / "L8-D512-x070-sft-mine" / "rwkv-init.pth").read_bytes() == b"good weights"


def test_initial_weights_of_an_interrupted_run_and_those_of_the_user_are_kept(recorded):
    folder = recorded.tree / "out" / "L8-D512-x070-sft-mine"
    assert recorded.fine_tune("mine.jsonl", STATUS="130").returncode == 130  # Ctrl-C
    assert (folder / "rwkv-init.pth").is_file()
    assert recorded.fine_tune("mine.jsonl", STATUS="2").returncode == 2  # this start has copied nothing
    assert (folder / "rwkv-init.pth").is_file()
    for saved in ("rwkv-0.pth", "rwkv-final.pth", "resume/step-00000010"):
        shutil.rmtree(folder)
        (folder / "resume").mkdir(parents=True)
        done = recorded.fine_tune("mine.jsonl", STATUS="1", SAVED=str(folder / saved))
        assert done.returncode == 1
        assert (folder / "rwkv-init.pth").is_file(), saved
        # Of an earlier run, whose rwkv-init.pth was deleted to start from another BASE.
        os.utime(folder / saved, (0, 0))
        (folder / "rwkv-init.pth").unlink()
        assert recorded.fine_tune("mine.jsonl", STATUS="1").returncode == 1
        assert not (folder / "rwkv-init.pth").exists(), saved


def test_a_base_of_another_size_is_refused_and_can_be_replaced(pretrained):
    """With the real train.py."""
    conversations_file(pretrained / "mine.jsonl")
    torch.save(RWKV7(ModelConfig(n_layer=2, n_embd=64, vocab_size=6400)).state_dict(), pretrained / "small.pth")
    fine_tune = partial(
        run_script, pretrained, *DRY_RUN, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl", CTX_LEN="32"
    )
    done = fine_tune(BASE="small.pth", N_LAYER="4", N_EMBD="256", TOKENIZER="data/demo_tokenizer")
    assert done.returncode in (1, 2)
    assert not (pretrained / "out" / "L4-D256-x070-sft-mine" / "rwkv-init.pth").exists()
    done = fine_tune()
    assert done.returncode == 0, done.stdout + done.stderr


def test_adapters_read_the_base_where_it_is(recorded):
    """Its sizes are in its file; nothing is copied."""
    settings = {"PEFT": "lora", "QUANT": "nf4", "LR_INIT": "1e-4"}
    assert recorded.fine_tune("mine.jsonl", **settings).returncode == 0
    flags = recorded.flags()
    assert (flags["--load_model"], flags["--train_stage"], flags["--peft"]) == ("base.pth", "0", "lora")
    assert (flags["--quant"], flags["--proj_dir"]) == ("nf4", "out/base-lora-mine")
    assert not {"--n_layer", "--n_embd", "--vocab_size"} & flags.keys()
    assert not list(recorded.tree.glob("out/**/rwkv-init.pth"))
    assert recorded.fine_tune("mine.jsonl", TRAIN_TYPE="state", N_LAYER="12").returncode == 0
    flags = recorded.flags()
    assert (flags["--train_type"], flags["--peft"], flags["--n_layer"]) == ("state", "none", "12")
    assert flags["--proj_dir"] == "out/base-state-mine"


def test_a_base_in_another_format_is_converted(recorded):
    """A Hugging Face folder and a .safetensors file; the result has the tensors of the .pth that they were made of."""
    weights = RWKV7(ModelConfig(n_layer=2, n_embd=64, vocab_size=100)).state_dict()
    torch.save(weights, recorded.base)
    (recorded.tree / "broken.safetensors").write_bytes(b"x" * 100)
    for target in ("hf", "base.safetensors"):
        convert_model(
            load_model(recorded.base, "as is", "cpu"),
            recorded.tree / target,
            "fla" if target == "hf" else "safetensors",
        )
        done = recorded.fine_tune(f"for-{target[:2]}.jsonl", BASE=target)
        assert done.returncode == 0, done.stdout + done.stderr
        copy = torch.load(recorded.tree / "out" / f"L8-D512-x070-sft-for-{target[:2]}" / "rwkv-init.pth")
        idle = {f"blocks.0.att.v{i}" for i in range(3)}  # Hugging Face folders don't have them
        assert copy.keys() | idle == weights.keys()
        assert all(torch.equal(copy[name], weights[name]) for name in copy.keys() - idle)
        again = recorded.fine_tune(f"for-{target[:2]}.jsonl", BASE=target)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "which exists already" in again.stdout
    done = recorded.fine_tune("broken.jsonl", BASE="broken.safetensors")
    assert done.returncode == 1
    assert not (recorded.tree / "out" / "L8-D512-x070-sft-broken").exists()


def test_mini_trains_on_the_files_that_minimind_has_had(recorded):
    """pretrain_t2t and sft_t2t with their small variants, and the earlier pretrain_hq, sft_512, sft_1024, sft_2048."""
    data = recorded.tree / "data"
    for name in ("pretrain_t2t_mini", "pretrain_t2t", "pretrain_hq"):  # from the last choice to the first
        (data / f"{name}.idx").write_bytes(b"")
        done = recorded.run("run", "mini")
        assert done.returncode == 0, done.stdout + done.stderr
        assert recorded.flags()["--my_exit_tokens"] == "0"
        assert recorded.flags()["--data_file"] == f"data/{name}"

    recorded.out.mkdir(exist_ok=True, parents=True)
    (recorded.out / "rwkv-final.pth").write_bytes(b"pretrained weights")
    done = recorded.run("run-sft", "mini")
    assert done.returncode == 1
    assert "data/sft_t2t_mini.jsonl is missing" in done.stderr
    for name in ("sft_t2t_mini", "sft_t2t"):
        (data / f"{name}.jsonl").write_text("{}\n")
        for stage in ([], ["t2t"]):
            done = recorded.run("run-sft", "mini", *stage)
            assert done.returncode == 0, done.stdout + done.stderr
            flags = recorded.flags()
            assert flags["--proj_dir"] == "out/L8-D512-x070-sft-t2t"
            assert flags["--data_file"] == f"data/{name}.jsonl"
            assert (flags["--ctx_len"], flags["--my_exit_tokens"]) == ("768", "0")
    assert recorded.run("run-sft", "mini", "t2t", CTX_LEN="1024").returncode == 0
    assert recorded.flags()["--ctx_len"] == "1024"

    (data / "sft_512.jsonl").write_text("{}\n")
    done = recorded.run("run-sft", "mini")
    assert recorded.flags()["--data_file"] == "data/sft_512.jsonl"
    assert "data/sft_1024.jsonl is missing" in done.stderr
    done = recorded.run("run-sft", "mini", "512", DATA_FILE="data/sft_t2t_mini.jsonl", MY_EXIT_TOKENS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert recorded.flags()["--proj_dir"] == "out/L8-D512-x070-sft512"


@pytest.mark.slow
def test_both_demos_on_the_real_corpus(tree):
    """With interpreters of their own."""
    sizes = {"N_LAYER": "2", "N_EMBD": "64", "EPOCH_STEPS": "10", "PYTHON": sys.executable}
    done = run_script(tree, MY_EXIT_TOKENS="60000", **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What it writes after" in done.stdout
    final = (tree / "out" / "L2-D64-x070" / "rwkv-final.pth").read_bytes()

    done = run_script(tree, script="demo-training-run-sft.sh", MY_EXIT_TOKENS="60000", **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"held-out loss \d+\.\d+ before the run", done.stdout), done.stdout
    assert "What does `textwrap.dedent` do?" in done.stdout
    stage = tree / "out" / "L2-D64-x070-sft"
    assert (
        (stage / "rwkv-init.pth").read_bytes()
        == final
        == (tree / "out" / "L2-D64-x070" / "rwkv-final.pth").read_bytes()
    )
    assert (stage / "rwkv-final.pth").read_bytes() != final
    again = run_script(tree, script="demo-training-run-sft.sh", MY_EXIT_TOKENS="60000", **sizes)
    assert "complete" in again.stdout


# ---- minipile --------------------------------------------------------------------------------------------------------


class Server:
    """A file server with ranges that can break off: it sends `cuts` bytes, one entry per request, then everything."""

    def __init__(self, files):
        self.files, self.cuts, self.ranges, self.sends_length = files, [], [], True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = server.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
                server.ranges.append(begin)
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if begin else 200)
                if server.sends_length:
                    self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                cut = server.cuts.pop(0) if server.cuts else len(content)
                self.wfile.write(content[begin : begin + cut])

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server():
    server = Server({"/x.bin": bytes(range(256)) * 40})
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_download_that_breaks_off_continues(server, tmp_path):
    import fetch_minipile

    server.cuts = [1000, 2000]
    fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", 10240, pause=0)
    assert (tmp_path / "x.bin").read_bytes() == server.files["/x.bin"]
    assert server.ranges == [0, 1000, 3000]
    assert not (tmp_path / "x.bin.part").exists()


def test_a_download_continues_an_earlier_one(server, tmp_path):
    import fetch_minipile

    (tmp_path / "x.bin.part").write_bytes(server.files["/x.bin"][:5000])
    fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", 10240, pause=0)
    assert (tmp_path / "x.bin").read_bytes() == server.files["/x.bin"]
    assert server.ranges == [5000]


def test_a_complete_file_that_was_not_renamed_is_downloaded_again(server, tmp_path):
    import fetch_minipile

    (tmp_path / "x.bin.part").write_bytes(bytes(10240))
    fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", pause=0)
    assert (tmp_path / "x.bin").read_bytes() == server.files["/x.bin"]
    assert server.ranges == [10240, 0]


def test_a_server_that_does_not_send_the_length_is_refused(server, tmp_path):
    import fetch_minipile

    server.sends_length = False
    with pytest.raises(ValueError, match="Content-Length"):
        fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused(server, tmp_path):
    import fetch_minipile

    with pytest.raises(ValueError, match=r"10,240 bytes; expected 7 bytes"):
        fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", 7)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_names_the_files_and_their_folder(server, tmp_path, capsys):
    import fetch_minipile

    with pytest.raises(SystemExit) as end:
        fetch_minipile.main(["--out", str(tmp_path), "--url", server.url])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert f"{server.url}/minipile.idx" in message
    assert f"{server.url}/minipile.bin" in message
    assert str(tmp_path) in message
