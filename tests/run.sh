#!/bin/sh
# Lint, types and tests; installs what it needs.
#
#   sh tests/run.sh                        everything that is quick
#   sh tests/run.sh --all                  also the tests marked slow, those that need further packages, and the oldest
#                                          and newest torch
#   sh tests/run.sh tests/test_model.py    further arguments are pytest's

set -eu
cd "$(dirname "$0")/.."

files=tests/requirements.txt
all=0
if [ "${1:-}" = --all ]; then
    all=1
    files="$files tests/requirements-all.txt"
    shift
else
    set -- -m "not slow" "$@"
fi

# shellcheck disable=SC2086 # several files
python=$(sh demo-training-prepare.sh environment $files)

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two processes with one thread each are faster on two cores than one process with two. Each has one half of the files, and
# then what is left of the other's: a fixture that the tests of a file share is made once.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$python" -m pytest -n 2 --dist worksteal "$@"
if [ $all = 1 ]; then sh tests/torch_versions.sh; fi
