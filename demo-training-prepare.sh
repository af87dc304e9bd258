#!/bin/sh
# What a run needs before it starts: Python environment, data, initial weights. What is there already is kept.
#
#   sh demo-training-prepare.sh                      for the demo: no download besides Python packages
#   sh demo-training-prepare.sh minipile | mini      for a published setting (demo-training-run.sh tells about them)
#   sh demo-training-prepare.sh environment [FILE]   the environment alone, with the packages listed in FILE too;
#                                                    prints the Python to use
#
# demo-training-run.sh reads this file, so there is no need to run it first. Every setting below is a default that the environment
# overrides, N_LAYER=8 N_EMBD=384 sh demo-training-prepare.sh for example; further flags are passed on to train.py.

set -eu
cd "$(dirname "$0")"

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# ---- settings ---------------------------------------------------------------------------------------------------------------

SETTING=demo
case ${1:-} in
'' | -*) ;;
*) SETTING=$1 && shift ;;
esac

case $SETTING in
demo) # the sources of Python's standard library; a model that two CPU cores train in ten minutes
    N_LAYER=${N_LAYER:-4} N_EMBD=${N_EMBD:-256} VOCAB_SIZE=${VOCAB_SIZE:-6400}
    DATA_FILE=${DATA_FILE:-data/demo} TOKENIZER=${TOKENIZER:-data/demo_tokenizer}
    ;;
minipile) # the published run: 1.5 G tokens of the Pile, RWKV World vocabulary
    N_LAYER=${N_LAYER:-12} N_EMBD=${N_EMBD:-768} VOCAB_SIZE=${VOCAB_SIZE:-65536}
    DATA_FILE=${DATA_FILE:-data/minipile} TOKENIZER=${TOKENIZER:-world}
    ;;
mini) # the 34.2 M model on MiniMind's pretrain_hq
    N_LAYER=${N_LAYER:-8} N_EMBD=${N_EMBD:-512} VOCAB_SIZE=${VOCAB_SIZE:-6400}
    DATA_FILE=${DATA_FILE:-data/pretrain_hq} TOKENIZER=${TOKENIZER:-data/minimind_tokenizer}
    ;;
environment) ;;
*) fail "$SETTING: no such setting; expected demo, minipile or mini, then flags of train.py (python train.py --help)" ;;
esac
PYTHON=${PYTHON:-} # the Python to use; empty: that of the active environment, else python3

# ---- environment ------------------------------------------------------------------------------------------------------------

TORCH=2.13.0 # installed where none is there
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
REQUIREMENTS=requirements.txt
if [ "$SETTING" = environment ] && [ $# -gt 0 ]; then REQUIREMENTS="$REQUIREMENTS $1"; fi

# The requirements that the Python $1 doesn't meet, one a line. Reads version numbers and imports no package: 0.1 s.
unmet() {
    # shellcheck disable=SC2086 # several files
    "$1" - $REQUIREMENTS 2>/dev/null <<'EOF' || say "Python 3.10 or later"
import re
import sys
from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])]

def met(requirement):
    name, bounds = re.match(r"([\w-]+)(.*)", requirement).groups()
    try:
        have = numbers(version(name))
    except PackageNotFoundError:
        return False
    return all((have < numbers(bound)) == (sign == "<") for sign, bound in re.findall(r"(>=|<)([\d.]+)", bounds))

assert sys.version_info >= (3, 10)
for file in sys.argv[1:]:
    for line in open(file):
        if line[0].isalpha() and not met(line):
            print(line.strip())
EOF
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

# Sets $python. An environment that has everything is used as it is; else .venv is made or completed.
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
    say "Installing into .venv what is missing (once; a few minutes):" "$(unmet $python | tr '\n' ' ')"
    if lacks_torch $python; then install_torch; fi
    # The constraint holds torch where it is, whatever the other packages would like.
    $python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >.venv/constraints.txt
    for file in $REQUIREMENTS; do set -- "$@" -r "$file"; done
    $python -m pip install --constraint .venv/constraints.txt "$@" || install_failed
    if [ -n "$(unmet $python)" ]; then fail ".venv still lacks: $(unmet $python); delete .venv and run again"; fi
}

make_venv() {
    maker=
    for candidate in "$active" python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null; then
            maker=$candidate
            break
        fi
    done
    [ -n "$maker" ] || fail "Python 3.10 or later is needed, and $active is $("$active" --version 2>&1 || true).
Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python3.12 sh $0"
    "$maker" -c 'import ensurepip, venv' 2>/dev/null || fail "$maker can't make virtual environments: its venv module is missing.
Install it (Debian, Ubuntu: apt install python3-venv) and run this again, or activate an environment of yours first."
    say "Making .venv with $("$maker" --version)"
    "$maker" -m venv --clear .venv
    if lacks_torch "$maker"; then return; fi
    # The torch that is there may be a CUDA or ROCm build chosen on purpose: .venv uses it instead of another one.
    beside=$("$maker" -c 'from importlib.metadata import distribution; print(distribution("torch").locate_file(""))')
    say "It uses the torch in $beside"
    printf '%s\n' "$beside" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-elsewhere.pth"
}

install_torch() {
    if sees_nvidia_gpu; then
        say "An NVIDIA GPU is here: torch $TORCH in its default build (several GB with the CUDA libraries)"
    elif [ "$(uname)" = Linux ]; then
        if [ -e /dev/kfd ]; then
            say "An AMD GPU is here. To train on it, install a ROCm build of torch into an environment of yours, activate it and run this again."
        fi
        say "No NVIDIA GPU is seen: torch $TORCH in its CPU build, from $TORCH_CPU_INDEX"
        if $python -m pip install --timeout 10 --retries 1 --index-url $TORCH_CPU_INDEX torch==$TORCH; then return; fi
        say "That index can't be reached. Taking torch from pip's default index; its build may bring CUDA libraries (several GB) along."
    fi
    $python -m pip install torch==$TORCH || install_failed
}

install_failed() {
    fail "pip could not install the packages; its last lines above say why. Mend that (network, disk space, or a Python that torch $TORCH
has no build for: PYTHON=python3.12 sh $0) and run this again: what is installed stays."
}

if [ "$SETTING" = environment ]; then
    find_python >&2
    say "$python"
    exit
fi
find_python
if [ -z "${CXX:-}" ] && ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    say "Warning: no C++ compiler is found, and training stops without one. Install it: apt install g++ (or train with --kernel reference,
which takes no compiler, but many times as long)"
fi
if sees_nvidia_gpu && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && ! command -v nvcc >/dev/null; then
    say "Warning: an NVIDIA GPU is here, but no nvcc, and training on the GPU stops without it. Install the CUDA toolkit of the major version
that torch is built for, or train with --accelerator cpu."
fi

# ---- data -------------------------------------------------------------------------------------------------------------------

if [ "$DATA_FILE" = data/demo ]; then
    "$python" data/demo_corpus.py
elif [ "$DATA_FILE" = data/minipile ]; then
    "$python" data/fetch_minipile.py
elif [ ! -f "${DATA_FILE%.*}.idx" ] && [ ! -f "$DATA_FILE.idx" ]; then
    fail "$DATA_FILE.bin and .idx are missing. They are made from a jsonl file, a {\"text\": ...} per line:
  $python data/make_data.py $DATA_FILE.jsonl 1 512 --tokenizer $TOKENIZER
For the setting mini: pretrain_hq.jsonl of MiniMind's dataset (jingyaogong/minimind_dataset on Hugging Face, gongjy/minimind_dataset
on ModelScope), and the tokenizer.json and tokenizer_config.json of MiniMind in $TOKENIZER."
fi

# ---- initial weights --------------------------------------------------------------------------------------------------------

PROJ_DIR=${PROJ_DIR:-out/L$N_LAYER-D$N_EMBD-x070}
before=
for word in "$@"; do # given as a flag, it holds for what comes after the training too
    case $before in --proj_dir) PROJ_DIR=$word ;; esac
    case $word in --proj_dir=*) PROJ_DIR=${word#*=} ;; esac
    before=$word
done
set -- --proj_dir "$PROJ_DIR" --n_layer "$N_LAYER" --n_embd "$N_EMBD" --vocab_size "$VOCAB_SIZE" --tokenizer "$TOKENIZER" \
    --data_file "$DATA_FILE" "$@"

# Only an empty folder gets them: beside the weights of a run, other initial ones would mean another run.
if ! ls "$PROJ_DIR"/rwkv-*.pth >/dev/null 2>&1; then
    "$python" train.py --train_stage 1 "$@" --check 0 --dry_run 0
fi
