#!/bin/sh
# Quick tests of the model with the oldest and the newest supported torch, each in an environment of its own.
#
#   sh tests/torch_versions.sh            both ends: the lower bound of requirements.txt and the version of constraints.txt
#   sh tests/torch_versions.sh 2.12.1     other versions
#
# The environments are kept in ~/.cache/rwkv7-torch (under XDG_CACHE_HOME if that is set); delete that folder to free
# the space: about 1 GB for a CPU build, 6 GB for one with CUDA libraries. A version that pip cannot install here is
# skipped with a message, a failing test is an error.

set -eu
cd "$(dirname "$0")/.."

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/rwkv7-torch
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# What depends on torch most: operators with their native builds, the model, the loss, a run with Lightning. 1 minute.
TESTS="tests/test_wkv7.py tests/test_model.py tests/test_elementwise.py tests/test_loss.py tests/test_train.py"
base=$(sh demo-training-prepare.sh environment tests/requirements.txt)
version_of_base=$("$base" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')

if [ $# -eq 0 ]; then
    oldest=$(grep '^torch>=' requirements.txt)
    newest=$(grep '^torch==' constraints.txt)
    set -- "${oldest#torch>=}.0" "${newest#torch==}"
fi

# install VERSION: the environment of that version, complete or not there
install() {
    python=$CACHE/$1/bin/python
    if [ -e "$CACHE/$1/complete" ]; then return; fi
    "$base" -m venv --clear "$CACHE/$1"
    "$python" -m pip install -q --timeout 10 --retries 1 --index-url $TORCH_CPU_INDEX "torch==$1" ||
        "$python" -m pip install -q "torch==$1" || return 1
    # The other packages in the versions of the environment that runs the tests, so that only torch differs.
    "$base" -m pip freeze --exclude torch | grep -E '^[A-Za-z0-9_.-]+==' >"$CACHE/$1/constraints.txt"
    grep -v -E '^(#|torch>|deepspeed)' requirements.txt >"$CACHE/$1/requirements.txt"
    "$python" -m pip install -q --constraint "$CACHE/$1/constraints.txt" -r "$CACHE/$1/requirements.txt" \
        pytest hypothesis scipy || return 1
    touch "$CACHE/$1/complete"
}

# check VERSION: installs it and runs the tests; prints a line about the result
check() {
    if [ "$1" = "$version_of_base" ]; then
        printf 'torch %s: the test suite itself runs with it\n' "$1"
        return 0
    fi
    mkdir -p "$CACHE"
    if ! install "$1" >"$CACHE/$1.log" 2>&1; then
        printf 'torch %s: skipped, it cannot be installed here (%s)\n' "$1" "$CACHE/$1.log"
        return 0
    fi
    # shellcheck disable=SC2086 # several files
    if OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$CACHE/$1/bin/python" -m pytest -q -x -m "not slow" \
        -p no:cacheprovider $TESTS >"$CACHE/$1.log" 2>&1; then
        printf 'torch %s: %s\n' "$1" "$(tail -n 1 "$CACHE/$1.log")"
    else
        printf 'torch %s: failed\n' "$1"
        tail -n 60 "$CACHE/$1.log"
        return 1
    fi
}

# All versions at the same time: one waits for the network while another one tests.
jobs=
for version in "$@"; do
    check "$version" &
    jobs="$jobs $!"
done
failed=0
for job in $jobs; do wait "$job" || failed=1; done
exit $failed
