#!/bin/sh
# Lint, types and tests; sets up what it needs.
#
#   sh tests/run.sh                        everything that is quick
#   sh tests/run.sh --all                  the tests marked slow too
#   sh tests/run.sh tests/test_model.py    further arguments are pytest's

set -eu
cd "$(dirname "$0")/.."

python=$(sh demo-training-prepare.sh environment tests/requirements.txt)

if [ "${1:-}" = --all ]; then
    shift
else
    set -- -m "not slow" "$@"
fi

"$python" -m ruff check .
"$python" -m mypy
# Two processes with one thread each are quicker on two cores than one with two.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$python" -m pytest -n 2 "$@"
