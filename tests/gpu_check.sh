#!/bin/sh
# What a machine with one NVIDIA GPU can tell, in one call: tests, compute-sanitizer, benchmarks. Writes it to a file (gpu_check.txt).
#
#   sh tests/gpu_check.sh [FILE]          PYTHON=python3 with torch and the packages of requirements.txt and tests/requirements.txt
#
# Goes on after a failure; the last lines say what failed, and so does the exit code.

set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
result=${1:-gpu_check.txt}
failed=""
: > "$result"

step() { # NAME COMMAND...: runs it, shows and keeps its words, notes a failure
    name=$1
    shift
    { echo && echo "## $name: $*"; } | tee -a "$result"
    { "$@" 2>&1; echo "exit $?"; } | tee -a "$result"
    tail -n 1 "$result" | grep -qx "exit 0" || failed="$failed, $name"
}

if git rev-parse --git-dir > /dev/null 2>&1; then # not in a copy without its history
    step commit git log -1 --format=%H
    step changes git status --short
fi
step machine nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
step versions "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
step compiler nvcc --version
step tests "$python" -m pytest -q -m gpu tests
if command -v compute-sanitizer > /dev/null; then
    # Without PyTorch's cache of memory each tensor has its own bounds.
    for tool in memcheck racecheck; do
        step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tests/gpu_small.py
    done
else
    step sanitizer sh -c 'echo "compute-sanitizer is not installed (it comes with the CUDA toolkit)"; exit 1'
fi
step benchmark "$python" tests/bench/wkv7.py
step loader "$python" tests/bench/loader.py
step "loader, conversations" "$python" tests/bench/loader.py --data_type sft
step "small products" "$python" tests/bench/low_rank.py
# Of a whole training step: first as it is started by default, then compiled; the lean setting; more at a time; the larger models.
bench="$python tests/bench/train_step.py --device cuda --profile 1"
step "training step" $bench --config 0.1b
step "training step, compiled" $bench --config 0.1b --compile 1
step "training step, lean" $bench --config 0.1b --compile 1 --grad_cp 1 --head_chunk 4096
step "training step, micro batch 64" $bench --config 0.1b --compile 1 --micro_bsz 64
step "training step, 0.4b" $bench --config 0.4b --compile 1
step "training step, 1.5b" $bench --config 1.5b --compile 1 --grad_cp 1 --head_chunk 4096
step "training step, 2.9b" $bench --config 2.9b --compile 1 --grad_cp 1 --head_chunk 4096

echo | tee -a "$result"
if [ -n "$failed" ]; then
    echo "failed: ${failed#, }" | tee -a "$result"
    exit 1
fi
echo "all passed; the words are in $result" | tee -a "$result"
