#!/bin/sh
# Some of the quick tests with the oldest and the newest supported torch, each in an environment of its own.
#
#   sh tests/torch_versions.sh            both ends: the lower bound of requirements.txt and the version of constraints.txt
#   sh tests/torch_versions.sh 2.12.1     other versions
#
# The environments are kept in ~/.cache/rwkv7-torch (under XDG_CACHE_HOME if that is set); delete that folder to free
# the space: about 1 GB for a CPU build, 6 GB for one with CUDA libraries. Only torch is in them: the other packages are
# those of the environment that runs the tests. A version that pip cannot install here is skipped with a message, a
# failing test is an error.

set -eu
cd "$(dirname "$0")/.."

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/rwkv7-torch
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# What depends on torch most: operators with their native builds, the model, the loss, the optimizer, torch.compile, a run
# with Lightning and one that continues. 1 minute.
TESTS="tests/test_wkv7.py tests/test_model.py tests/test_elementwise.py tests/test_loss.py tests/test_optim.py
tests/test_compile.py::test_steps_compile_nothing_new tests/test_train.py::test_end_to_end_then_complete
tests/test_resume.py::test_continued_runs_are_the_uninterrupted_run"
base=$(sh demo-training-prepare.sh environment tests/requirements.txt)
version_of_base=$("$base" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')

if [ $# -eq 0 ]; then
    oldest=$(grep '^torch>=' requirements.txt)
    newest=$(grep '^torch==' constraints.txt)
    set -- "${oldest#torch>=}.0" "${newest#torch==}"
fi

# packages PYTHON: where it finds its packages, separated by colons
packages() {
    "$1" -c 'import sys; print(":".join(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))))'
}

# install VERSION: the environment of that version, complete or not there
install() {
    if [ -e "$CACHE/$1/complete" ]; then return; fi
    "$base" -m venv --clear --without-pip "$CACHE/$1"
    with_packages_of_base "$1"
    "$base" -m pip --python "$python" install -q --timeout 10 --retries 1 --index-url $TORCH_CPU_INDEX "torch==$1" ||
        "$base" -m pip --python "$python" install -q "torch==$1" || return 1
    touch "$CACHE/$1/complete"
}

# with_packages_of_base VERSION: sets $python, whose packages are its own and then those of the base
with_packages_of_base() {
    python=$CACHE/$1/bin/python
    PYTHONPATH=
    PYTHONPATH=$(packages "$python"):$(packages "$base")
    export PYTHONPATH
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
    with_packages_of_base "$1"
    # shellcheck disable=SC2086 # several files
    if OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$python" -m pytest -q -x -m "not slow" \
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
