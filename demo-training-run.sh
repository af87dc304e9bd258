#!/bin/sh
# Pretrains an RWKV-7 model, set-up included, and shows what it learned. Stop it with Ctrl-C; the same command continues.
#
#   sh demo-training-run.sh             the demo: a small model on the sources of Python's standard library, ten minutes
#                                       on two CPU cores
#   sh demo-training-run.sh digits      pictures of handwritten digits and questions about them, some minutes on two cores:
#                                       held-out accuracy beside that without the pictures, and a picture of examples
#   sh demo-training-run.sh tones       the same with sounds of chords
#   sh demo-training-run.sh minipile    the published run: L12-D768, 1.5 G tokens, for a GPU
#   sh demo-training-run.sh mini        the 34.2 M model L8-D512 on MiniMind's pretrain_t2t or pretrain_t2t_mini (or a
#                                       DATA_FILE of your own), for a GPU
#   SIZE=7b N_NODE=4 GPU_PER_NODE=8 sh demo-training-run.sh cluster
#                                       a large model on your DATA_FILE; SIZE is 3b, 7b, 13b, 30b or 70b
#                                       (src/training/preflight/model_sizes.txt). On each machine, with MASTER_ADDR and
#                                       MASTER_PORT as in docs/cluster.md. With --plan --my_exit_tokens N: what it needs
#
# The demo measures its speed at its start and trains what fits into TRAIN_MINUTES, between 1.3 M tokens and all of its
# 3.0 M; MY_EXIT_TOKENS sets a fixed number instead.
#
# Every setting is a default that the environment overrides; those of model and data are in demo-training-shared.sh and
# demo-training-prepare.sh. Further flags are passed on to train.py:
#   N_LAYER=4 M_BSZ=16 sh demo-training-run.sh demo --random_seed 1

# shellcheck source=demo-training-prepare.sh
. "$(dirname "$0")/demo-training-prepare.sh" # from here on "$@" are flags of train.py

stage=3
case $SETTING in
demo)
    if [ -z "${MY_EXIT_TOKENS:-}" ]; then TRAIN_MINUTES=${TRAIN_MINUTES:-9}; fi
    M_BSZ=${M_BSZ:-8} CTX_LEN=${CTX_LEN:-256} MY_EXIT_TOKENS=${MY_EXIT_TOKENS:-1300000} MAGIC_PRIME=${MAGIC_PRIME:-0}
    LR_INIT=${LR_INIT:-3e-3} LR_FINAL=${LR_FINAL:-3e-4} WARMUP_STEPS=${WARMUP_STEPS:-20}
    EPOCH_STEPS=${EPOCH_STEPS:-100} EPOCH_SAVE=${EPOCH_SAVE:-1}
    # - and not :-, because an empty VAL_DATA_FILE means no held-out data
    VAL_DATA_FILE=${VAL_DATA_FILE-data/demo-heldout} PROMPT=${PROMPT:-def }
    ;;
digits | tones)
    case $SETTING in # a model that knows single digits learns numbers faster with twice the rate that it began with
    digits) MY_EXIT_TOKENS=${MY_EXIT_TOKENS:-1900000} LR_INIT=${LR_INIT:-2e-3} ;;
    tones) MY_EXIT_TOKENS=${MY_EXIT_TOKENS:-1500000} LR_INIT=${LR_INIT:-1e-3} ;;
    esac
    M_BSZ=${M_BSZ:-4} CTX_LEN=${CTX_LEN:-256} MAGIC_PRIME=${MAGIC_PRIME:-0}
    SINGLE_TOKENS=${SINGLE_TOKENS:-500000} SINGLE_LR=${SINGLE_LR:-1e-3}
    LR_FINAL=${LR_FINAL:-1e-4} WARMUP_STEPS=${WARMUP_STEPS:-20}
    EPOCH_STEPS=${EPOCH_STEPS:-1000} EPOCH_SAVE=${EPOCH_SAVE:-100}
    VAL_DATA_FILE=${VAL_DATA_FILE-${DATA_FILE%/*}/heldout.jsonl}
    case $SETTING in
    digits) set -- --encoder patches --image_size 16x48 "$@" ;;
    tones) set -- --encoder logmel "$@" ;;
    esac
    # a fixed seed: the same run every time
    set -- --data_type sft --projector linear --random_seed 1 "$@"
    stage=0
    ;;
minipile) # batch, length, prime and learning rates are those of the published run, so that its losses can be compared
    M_BSZ=${M_BSZ:-16} CTX_LEN=${CTX_LEN:-512} MY_EXIT_TOKENS=${MY_EXIT_TOKENS:-1498226207}
    MAGIC_PRIME=${MAGIC_PRIME:-2926181}
    LR_INIT=${LR_INIT:-6e-4} LR_FINAL=${LR_FINAL:-6e-5} WARMUP_STEPS=${WARMUP_STEPS:-10}
    EPOCH_STEPS=${EPOCH_STEPS:-0} EPOCH_SAVE=${EPOCH_SAVE:-10}
    VAL_DATA_FILE=${VAL_DATA_FILE:-} PROMPT=${PROMPT:-The }
    ;;
mini)
    M_BSZ=${M_BSZ:-16} CTX_LEN=${CTX_LEN:-512} MY_EXIT_TOKENS=${MY_EXIT_TOKENS:-0} MAGIC_PRIME=${MAGIC_PRIME:-0}
    LR_INIT=${LR_INIT:-6e-4} LR_FINAL=${LR_FINAL:-2e-5} WARMUP_STEPS=${WARMUP_STEPS:-10}
    EPOCH_STEPS=${EPOCH_STEPS:-0} EPOCH_SAVE=${EPOCH_SAVE:-5}
    VAL_DATA_FILE=${VAL_DATA_FILE:-} PROMPT=${PROMPT:-}
    ;;
cluster)
    CTX_LEN=${CTX_LEN:-4096} MY_EXIT_TOKENS=${MY_EXIT_TOKENS:-0} MAGIC_PRIME=${MAGIC_PRIME:-0}
    LR_FINAL=${LR_FINAL:-1e-5} WARMUP_STEPS=${WARMUP_STEPS:-500} GRAD_CP=${GRAD_CP:-1}
    EPOCH_STEPS=${EPOCH_STEPS:-0} EPOCH_SAVE=${EPOCH_SAVE:-5}
    VAL_DATA_FILE=${VAL_DATA_FILE:-} PROMPT=${PROMPT:-The }
    stage=0
    set -- --accelerator gpu --head_chunk 4096 "$@"
    ;;
esac
TRAIN_MINUTES=${TRAIN_MINUTES:-0} WEIGHT_DECAY=${WEIGHT_DECAY:-0.001} GRAD_CP=${GRAD_CP:-0}
run_settings

# is_complete: whether the training in the folder has ended
is_complete() { [ -f "$PROJ_DIR/rwkv-final.pth" ] || [ -f "$PROJ_DIR/multimodal/multimodal.json" ]; }

was_complete=0
if is_complete; then was_complete=1; fi

# train FLAGS: with those of the setting, which later ones override
train() {
    "$python" train.py --load_model 0 --train_stage $stage --wandb "$WANDB" \
        --ctx_len "$CTX_LEN" --micro_bsz "$M_BSZ" --my_exit_tokens "$MY_EXIT_TOKENS" \
        --train_minutes "$TRAIN_MINUTES" --magic_prime "$MAGIC_PRIME" --lr_init "$LR_INIT" --lr_final "$LR_FINAL" \
        --warmup_steps "$WARMUP_STEPS" --weight_decay "$WEIGHT_DECAY" \
        --epoch_steps "$EPOCH_STEPS" --epoch_save "$EPOCH_SAVE" --grad_cp "$GRAD_CP" \
        --val_data_file "$VAL_DATA_FILE" --val_windows 64 \
        --devices "$GPU_PER_NODE" --num_nodes "$N_NODE" --strategy "$STRATEGY" "$@"
}

if [ "$SETTING" = digits ] && [ "$DATA_FILE" = data/digits/train.jsonl ]; then
    single=$PROJ_DIR-single
    if [ ! -f "$single/multimodal/multimodal.json" ]; then
        say "First single digits, into $single: what they look like"
        train "$@" --proj_dir "$single" --data_file data/digits/single.jsonl --val_data_file '' \
            --my_exit_tokens "$SINGLE_TOKENS" --lr_init "$SINGLE_LR" --lr_final "$SINGLE_LR"
    fi
    # not there after --check or --dry_run
    if [ -d "$single/multimodal" ]; then set -- "$@" --load_model "$single"; fi
fi
train "$@"

if [ "$python" = .venv/bin/python ]; then say "To run commands yourself: . .venv/bin/activate"; fi
# Nothing to show if it was complete before, or if it took no steps (--check).
if [ $was_complete = 1 ] || ! is_complete; then exit; fi

case $SETTING in
digits | tones)
    say "
Answers to held-out questions:"
    folder=${DATA_FILE%/*} medium="--sound data/tones/files/heldout-0.wav"
    if [ "$SETTING" = digits ]; then
        medium="--image data/digits/files/heldout-0.png"
        "$python" -m src.inference.evaluate "$PROJ_DIR" --answers "$folder/two-digits.jsonl"
    fi
    "$python" -m src.inference.evaluate "$PROJ_DIR" --answers "$folder/heldout.jsonl" --examples "$PROJ_DIR/examples.png"
    say "
To ask it more: $python API_DEMO_CHAT.py $PROJ_DIR $medium"
    exit
    ;;
esac

if [ -n "$VAL_DATA_FILE" ]; then
    say "
Loss on held-out text:"
    "$python" -m src.inference.evaluate "$PROJ_DIR" --data "$VAL_DATA_FILE" --ctx_len "$CTX_LEN"
fi
say "
What it writes after \"$PROMPT\":"
"$python" -m src.inference.generate "$PROJ_DIR" --prompt "$PROMPT" --seed 1
say "
To talk to it in a browser or through an API: $python -m src.inference.serve $PROJ_DIR"
