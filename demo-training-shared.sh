#!/bin/sh
# Functions that the demo scripts share: messages, model sizes, the Python environment. They read this file; run by
# itself it does nothing.

set -eu
cd "$(dirname "$0")"

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# ---- settings -------------------------------------------------------------------------------------------------------

# model_of SETTING: the sizes and the tokenizer of a setting's model
model_of() {
    case $1 in
    demo) # small enough for two CPU cores
        N_LAYER=${N_LAYER:-4} N_EMBD=${N_EMBD:-256} VOCAB_SIZE=${VOCAB_SIZE:-6400}
        TOKENIZER=${TOKENIZER:-data/demo_tokenizer}
        ;;
    digits | tones) # still smaller: it learns to see or to hear within minutes; its words are those of its questions
        N_LAYER=${N_LAYER:-2} N_EMBD=${N_EMBD:-128} VOCAB_SIZE=${VOCAB_SIZE:-0} TOKENIZER=${TOKENIZER:-data/$1/tokenizer}
        ;;
    minipile) # of the published run, with the vocabulary of RWKV World
        N_LAYER=${N_LAYER:-12} N_EMBD=${N_EMBD:-768} VOCAB_SIZE=${VOCAB_SIZE:-65536}
        TOKENIZER=${TOKENIZER:-world}
        ;;
    mini) # 34.2 M parameters, with MiniMind's vocabulary
        N_LAYER=${N_LAYER:-8} N_EMBD=${N_EMBD:-512} VOCAB_SIZE=${VOCAB_SIZE:-6400}
        TOKENIZER=${TOKENIZER:-data/minimind_tokenizer}
        ;;
    cluster) # a large model, by SIZE
        SIZE=${SIZE:-7b}
        sizes=src/training/preflight/model_sizes.txt
        row=$(grep "^$SIZE " $sizes) || fail "SIZE=$SIZE: no such size; expected one of" \
            "$(grep -v '^#' $sizes | cut -d' ' -f1 | tr '\n' ' ')"
        # shellcheck disable=SC2086 # the row's words
        set -- $row
        N_LAYER=${N_LAYER:-$2} N_EMBD=${N_EMBD:-$3} VOCAB_SIZE=${VOCAB_SIZE:-65536} TOKENIZER=${TOKENIZER:-world}
        LOW_RANK="--d_decay_lora $4 --d_aaa_lora $5 --d_mv_lora $6 --d_gate_lora $7"
        LR_INIT=${LR_INIT:-$8} STRATEGY=${STRATEGY:-deepspeed_stage_$9} M_BSZ=${M_BSZ:-${11}}
        GPU_PER_NODE=${GPU_PER_NODE:-8}
        ;;
    esac
}

# run_settings: what every training takes from the environment, whatever the setting
run_settings() {
    GPU_PER_NODE=${GPU_PER_NODE:-1} N_NODE=${N_NODE:-1} STRATEGY=${STRATEGY:-auto} WANDB=${WANDB:-}
    # Threads that wait give their core back: four times as fast as busy waiting on a machine that does other work too.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
}

# is_given FLAG FLAGS: whether it is among them
is_given() {
    wanted=$1 && shift
    for argument in "$@"; do
        case $argument in "$wanted" | "$wanted"=*) return 0 ;; esac
    done
    return 1
}

# proj_dir_flag FLAGS: sets PROJ_DIR if it is among the flags, for the steps before and after the training
proj_dir_flag() {
    previous=
    # shellcheck disable=SC2034 # the scripts that read this file use PROJ_DIR
    for argument in "$@"; do
        case $previous in --proj_dir) PROJ_DIR=$argument ;; esac
        case $argument in --proj_dir=*) PROJ_DIR=${argument#*=} ;; esac
        previous=$argument
    done
}

# ---- environment ----------------------------------------------------------------------------------------------------

PYTHON=${PYTHON:-} # the Python to use; empty: that of the active environment, else python3
REQUIREMENTS=requirements.txt
CONSTRAINTS=constraints.txt
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

# Prints the requirements that the Python $1 doesn't meet, one per line.
# Reads version numbers and imports no package, because this runs before every training: 0.1 s.
unmet() {
    # shellcheck disable=SC2086 # several files
    "$1" - $REQUIREMENTS 2>/dev/null <<'PYTHON' || say "Python 3.10 or later"
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version

# the environment markers of requirements, as in sys_platform == "linux"; not packaging's, which may not be installed yet
MARKERS = {
    "sys_platform": sys.platform,
    "platform_system": platform.system(),
    "platform_machine": platform.machine(),
    "implementation_name": sys.implementation.name,
}

def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])]

def applies(marker):
    return not marker or eval(marker, {"__builtins__": {}}, MARKERS)

def met(requirement):
    name, bounds = re.match(r"([\w.-]+)(.*)", requirement).groups()
    try:
        have = numbers(version(name))
    except PackageNotFoundError:
        return False
    return all((have < numbers(bound)) == (sign == "<") for sign, bound in re.findall(r"(>=|<)([\d.]+)", bounds))

assert sys.version_info >= (3, 10)
for file in sys.argv[1:]:
    for line in open(file):
        requirement, _, marker = line.partition("#")[0].partition(";")
        if requirement[:1].isalpha() and applies(marker.strip()) and not met(requirement):
            print(requirement.strip())
PYTHON
}

lacks_torch() {
    case $(unmet "$1") in
    *torch\>=* | *Python*) return 0 ;;
    esac
    return 1
}

sees_nvidia_gpu() {
    PATH=$PATH:/usr/lib/wsl/lib nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# Sets $python. An environment that has everything is used as it is; else .venv is created or completed.
find_python() {
    if [ -n "$PYTHON" ]; then
        active=$PYTHON
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        active=$VIRTUAL_ENV/bin/python
    elif [ -n "${CONDA_PREFIX:-}" ]; then
        active=$CONDA_PREFIX/bin/python
    else
        active=python3
    fi
    for python in "$active" .venv/bin/python; do
        if [ -z "$(unmet "$python")" ]; then return; fi
    done

    if ! .venv/bin/python -c 'import sys, pip; assert sys.version_info >= (3, 10)' 2>/dev/null; then make_venv; fi
    python=.venv/bin/python
    say "Installing missing packages into .venv (once; a few minutes):" "$(unmet $python | tr '\n' ' ')"
    if lacks_torch $python; then install_torch; fi
    install_requirements
    if [ -n "$(unmet $python)" ]; then fail ".venv still lacks $(unmet $python); delete .venv and run this again"; fi
}

make_venv() {
    base=
    for candidate in "$active" python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || fail "Python 3.10 or later is needed, and $active is $("$active" --version 2>&1 || true).
Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python3.12 sh $0"
    "$base" -c 'import ensurepip, venv' 2>/dev/null || fail "$base cannot create virtual environments: its venv module is missing.
Install it (Debian, Ubuntu: apt install python3-venv) and run this again, or activate an environment of your own first."
    say "Creating .venv with $("$base" --version)"
    "$base" -m venv --clear .venv
    if lacks_torch "$base"; then return; fi
    # An installed torch may be a CUDA or ROCm build chosen on purpose: .venv uses it instead of installing another one.
    installed=$("$base" -c 'from importlib.metadata import distribution; print(distribution("torch").locate_file(""))')
    say "It uses the torch in $installed"
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$installed" >"$site/torch-elsewhere.pth"
}

# Installs the torch of constraints.txt, or of TORCH in the environment; the newest one if that has no build for this Python.
install_torch() {
    pinned=$(grep '^torch==' $CONSTRAINTS)
    TORCH=${TORCH:-${pinned#torch==}}
    allowed=$(grep '^torch>=' requirements.txt)
    if sees_nvidia_gpu; then
        say "An NVIDIA GPU was found: installing torch $TORCH in its default build (several GB with the CUDA libraries)"
    elif [ "$(uname)" = Linux ]; then
        if [ -e /dev/kfd ]; then
            say "An AMD GPU was found. To train on it, install a ROCm build of torch into an environment of your own, activate it and
run this again."
        fi
        say "No NVIDIA GPU was found: installing torch $TORCH in its CPU build, from $TORCH_CPU_INDEX"
        for requirement in "torch==$TORCH" "$allowed"; do
            if $python -m pip install --timeout 10 --retries 1 --index-url $TORCH_CPU_INDEX "$requirement"; then return; fi
        done
        say "The CPU build is not available. Installing torch from pip's default index, which may include CUDA libraries (several GB)."
    fi
    if $python -m pip install "torch==$TORCH"; then return; fi
    say "torch $TORCH cannot be installed with $($python --version). Installing the newest one that requirements.txt allows."
    $python -m pip install "$allowed" || install_failed
}

install_requirements() {
    for file in $REQUIREMENTS; do set -- "$@" -r "$file"; done
    # The first line keeps the installed torch, whatever version constraints.txt names or another package would prefer.
    $python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >.venv/torch.txt
    { cat .venv/torch.txt && grep '^[A-Za-z]' $CONSTRAINTS | grep -v '^torch=='; } >.venv/constraints.txt
    # DeepSpeed would compile its operations where this is 1; the CPU needs none, a GPU compiles on first use.
    export DS_BUILD_OPS=0
    if $python -m pip install --constraint .venv/constraints.txt "$@"; then return; fi
    say "The versions in $CONSTRAINTS cannot be installed with $($python --version). Installing the newest ones that requirements.txt
allows; these were not tested together."
    $python -m pip install --constraint .venv/torch.txt "$@" || install_failed
}

install_failed() {
    fail "pip could not install the packages; its last lines above say why. Fix the cause (network, disk space, or no build of torch for
this Python: PYTHON=python3.12 sh $0) and run this again: installed packages are kept."
}
