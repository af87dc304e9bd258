#!/bin/sh
# What a run needs before it starts: Python environment, data, initial weights. Existing files are kept.
#
#   sh demo-training-prepare.sh                      for the demo: no download besides Python packages
#   sh demo-training-prepare.sh digits | tones | minipile | mini | cluster
#                                                    for another setting (described in demo-training-run.sh)
#   sh demo-training-prepare.sh environment [FILE ...]   the environment alone, with the packages that the
#                                                    files list, too; prints the Python to use
#
# demo-training-run.sh reads this file, so there is no need to run it first. Every setting below is a default that the
# environment overrides, N_LAYER=8 N_EMBD=384 sh demo-training-prepare.sh for example; further flags are passed on to
# train.py.

# shellcheck source=demo-training-shared.sh
. "$(dirname "$0")/demo-training-shared.sh"

# ---- settings -------------------------------------------------------------------------------------------------------

SETTING=demo
case ${1:-} in
'' | -*) ;;
*) SETTING=$1 && shift ;;
esac
case $SETTING in
demo) DATA_FILE=${DATA_FILE:-data/demo} ;;          # the sources of Python's standard library
digits | tones) # pictures of handwritten digits, or sounds of chords, and questions about them
    DATA_FILE=${DATA_FILE:-data/$SETTING/train.jsonl}
    if [ "$SETTING" = digits ]; then # the scans are in a package
        REQUIREMENTS="$REQUIREMENTS data/requirements-digits.txt"
    fi
    ;;
minipile) DATA_FILE=${DATA_FILE:-data/minipile} ;;  # 1.5 G tokens of the Pile
mini) # MiniMind's pretrain_t2t or its small pretrain_t2t_mini; earlier versions of the set had pretrain_hq instead
    for name in pretrain_hq pretrain_t2t pretrain_t2t_mini; do
        if [ -f data/$name.idx ]; then DATA_FILE=${DATA_FILE:-data/$name}; fi
    done
    DATA_FILE=${DATA_FILE:-data/pretrain_t2t_mini}
    ;;
cluster) DATA_FILE=${DATA_FILE:-data/train} ;; # yours
environment)
    if [ $# -gt 0 ]; then REQUIREMENTS="$REQUIREMENTS $*"; fi
    find_python >&2
    say "$python"
    exit
    ;;
*) fail "$SETTING: no such setting; expected demo, digits, tones, minipile, mini or cluster, then flags of train.py (python train.py --help)" ;;
esac
LOW_RANK=
model_of "$SETTING"

# ---- environment ----------------------------------------------------------------------------------------------------

find_python
if [ -z "${CXX:-}" ] && ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    say "Warning: no C++ compiler was found: a CPU trains without the native kernels, which takes several times as long. Install one
(apt install g++)."
fi
if sees_nvidia_gpu && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && ! command -v nvcc >/dev/null; then
    say "Warning: an NVIDIA GPU was found, but no nvcc: it trains without the native kernels, which takes several times as long.
Install the CUDA toolkit of the major version that torch is built for."
fi

# ---- data -----------------------------------------------------------------------------------------------------------

if [ "$DATA_FILE" = data/demo ]; then
    "$python" data/demo_corpus.py
elif [ "$DATA_FILE" = "data/$SETTING/train.jsonl" ]; then
    "$python" data/demo_media.py "$SETTING"
elif [ "$DATA_FILE" = data/minipile ]; then
    "$python" data/fetch_minipile.py
elif is_given --plan "$@"; then
    : # which reads no data if it is told the number of tokens
elif [ ! -f "${DATA_FILE%.*}.idx" ] && [ ! -f "$DATA_FILE.idx" ]; then
    fail "$DATA_FILE.bin and .idx are missing. Make them from a jsonl file with one {\"text\": ...} per line:
  $python data/make_data.py $DATA_FILE.jsonl 1 512 --tokenizer $TOKENIZER
For the setting mini: pretrain_t2t_mini.jsonl, or the larger pretrain_t2t.jsonl (in earlier versions pretrain_hq.jsonl),
of MiniMind's dataset (jingyaogong/minimind_dataset on Hugging Face, gongjy/minimind_dataset on ModelScope), and
MiniMind's tokenizer.json and tokenizer_config.json in $TOKENIZER."
fi

# ---- initial weights ------------------------------------------------------------------------------------------------

case $SETTING in
digits | tones) PROJ_DIR=${PROJ_DIR:-out/$SETTING} ;;
esac
PROJ_DIR=${PROJ_DIR:-out/L$N_LAYER-D$N_EMBD-x070}
proj_dir_flag "$@"
# shellcheck disable=SC2086 # several flags
set -- --proj_dir "$PROJ_DIR" $LOW_RANK --n_layer "$N_LAYER" --n_embd "$N_EMBD" --vocab_size "$VOCAB_SIZE" \
    --tokenizer "$TOKENIZER" --data_file "$DATA_FILE" "$@"

# Only into a folder without weights: new initial weights next to those of a run would start another run. Those of a
# large model are made where it is trained, without being in the memory of one process, and those with an encoder, too.
case $SETTING in
digits | tones | cluster) draws=0 ;;
*) draws=1 ;;
esac
if [ $draws = 1 ] && ! ls "$PROJ_DIR"/rwkv-*.pth >/dev/null 2>&1; then
    "$python" train.py --train_stage 1 "$@" --check 0 --dry_run 0
fi
