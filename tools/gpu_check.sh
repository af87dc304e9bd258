#!/bin/sh
# What one NVIDIA GPU shows about this project, in parts of a few minutes: the quickest and most important come first.
#
#   sh tools/gpu_check.sh                    all parts
#   sh tools/gpu_check.sh build times step   only these
#
#   OUT=FOLDER        for the results (default: out/gpu_check): PART.txt with a part's output, summary.txt with a line for each part
#   PYTHON=python3    with torch, pytorch-lightning and ninja; a part that needs more is skipped and says so
#   LIMIT=SECONDS     for each part, instead of its own time limit
#
# Parts that have passed are not run again in the same OUT: after an interruption the same command continues. A failed build ends it, since
# everything else needs the library; after any other failure the next part runs. Exit code 0: every part passed or was skipped.

set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-out/gpu_check}
chosen=" $* "
failed=""
known=""
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)

record() { # NAME STATUS: the status for the next call, a line for people
    echo "$2" > "$out/$1.status"
    echo "$1: $2" | tee -a "$out/summary.txt"
}

is_due() { # NAME: whether it is chosen and has not passed before
    known="$known $1"
    case "$chosen" in "  " | *" $1 "*) ;; *) return 1 ;; esac
    case "$(cat "$out/$1.status" 2> /dev/null)" in
        passed*) echo "$1: $(cat "$out/$1.status") (in an earlier call)" && return 1 ;;
    esac
}

skip() { # NAME REASON
    if is_due "$1"; then record "$1" "skipped, $2"; fi
}

part() { # NAME SECONDS COMMAND...
    name=$1 limit=${LIMIT:-$2}
    shift 2
    is_due "$name" || return 0
    echo && echo "## $name, at most $limit s: $*"
    begin=$(date +%s)
    # The exit code goes through a file: a pipe gives only that of tee.
    {
        # 10 s after the first signal a second one that can't be ignored: a hanging kernel keeps Python from ending.
        timeout -k 10 "$limit" "$@" 2>&1
        echo $? > "$out/$name.code"
    } | tee "$out/$name.txt"
    code=$(cat "$out/$name.code") && rm -f "$out/$name.code"
    seconds=$(($(date +%s) - begin))
    case $code in
        0) record "$name" "passed in $seconds s" && return 0 ;;
        124 | 137) record "$name" "stopped at its time limit of $limit s" ;;
        *) record "$name" "failed with exit code $code in $seconds s" ;;
    esac
    failed="$failed $name"
}

finish() {
    for name in $chosen; do
        case "$known " in *" $name "*) ;; *) echo "no part is called $name; there are:$known" && failed="$failed $name" ;; esac
    done
    if [ -n "$failed" ]; then
        echo "failed:$failed; results are in $out" && exit 1
    fi
    echo "all passed or skipped; results are in $out" && exit 0
}

# ---- The library, then what matters most: right results, the kernels' times, the step's time ------------------------------------------------

part machine 30 sh -c 'nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv && nvcc --version
git log -1 --format="commit %H" 2> /dev/null; "$0" -c "import torch; print(\"torch\", torch.__version__, \"CUDA\", torch.version.cuda)"' "$python"
part build 300 "$python" tests/bench/wkv7_gpu.py build
case "$failed " in *" build "*) finish ;; esac
part errors 120 "$python" tests/bench/wkv7_gpu.py errors
part times 180 "$python" tests/bench/wkv7_gpu.py times
# The same with the kernel for warpgroups, where this GPU has them.
part errors-wgmma 120 env RWKV7_WGMMA=1 "$python" tests/bench/wkv7_gpu.py errors
part times-wgmma 180 env RWKV7_WGMMA=1 "$python" tests/bench/wkv7_gpu.py times
part op-errors 120 "$python" tests/bench/step_ops_gpu.py errors
part op-times 180 "$python" tests/bench/step_ops_gpu.py times
step="$python tests/bench/train_step.py --device cuda --profile 1"
part step 180 $step --config 0.1b
part step-compiled 300 $step --config 0.1b --compile 1
part step-graph 300 $step --config 0.1b --compile 1 --cuda_graph on
part step-lean 300 $step --config 0.1b --compile 1 --grad_cp 1 --head_chunk 4096
part step-batch-64 300 $step --config 0.1b --compile 1 --micro_bsz 64
part step-0.4b 300 $step --config 0.4b --compile 1
part step-1.5b 480 $step --config 1.5b --compile 1 --grad_cp 1 --head_chunk 4096
part step-2.9b 480 $step --config 2.9b --compile 1 --grad_cp 1 --head_chunk 4096

# ---- Tests, sanitizers, profiles: longer, or with tools that may be missing ------------------------------------------------------------------

if "$python" -c "import pytest" 2> /dev/null; then
    part tests 900 "$python" -m pytest -q -m gpu tests
    part tests-wgmma 600 env RWKV7_WGMMA=1 "$python" -m pytest -q -m gpu tests/test_cuda_op.py
else
    skip tests "pytest is not installed"
fi
for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
        # Without PyTorch's caching allocator each tensor has its own bounds.
        part $tool 480 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 "$python" tests/gpu_small.py
    else
        skip $tool "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    fi
done
if command -v ncu > /dev/null; then
    part profile-kernels 300 ncu --set full --import-source yes -k "regex:wkv7|cross_entropy" -f -o "$out/kernels" "$python" tests/bench/wkv7_gpu.py once
    part profile-ops 300 ncu --set full --import-source yes -k "regex:token_shift|inputs_|output_|relu_squared|add_tiles|adamw" -f -o "$out/ops" "$python" tests/bench/step_ops_gpu.py once
else
    skip profile-kernels "ncu (Nsight Compute) is not installed"
    skip profile-ops "ncu (Nsight Compute) is not installed"
fi
if command -v nsys > /dev/null; then
    part profile-step 300 nsys profile -f true -o "$out/step" "$python" tests/bench/train_step.py --device cuda --config 0.1b --steps 3
else
    skip profile-step "nsys (Nsight Systems) is not installed"
fi
part low-rank 120 "$python" tests/bench/low_rank.py
finish
