#!/bin/sh
# Fine-tunes a pretrained model on conversations. Stop it with Ctrl-C; the same command continues.
#
#   sh demo-training-run-sft.sh                         the demo: questions about Python's standard library, for the model that
#                                                       demo-training-run.sh has trained; some minutes on two CPU cores
#   DATA_FILE=X.jsonl sh demo-training-run-sft.sh       one stage on conversations of yours
#   sh demo-training-run-sft.sh mini                    the published stages of the 34.2 M model one after another, for a GPU
#   sh demo-training-run-sft.sh mini 1024               one of them (512, 1024, 2048)
#
# A stage lives in a folder of its own, BASE-sft-NAME, and starts from the final weights of the stage before it (the first from those in
# BASE); an rwkv-init.pth that you put there yourself is kept. Every setting is a default that the environment overrides; further
# flags are passed on to train.py.

set -eu
cd "$(dirname "$0")"

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

SETTING=demo
case ${1:-} in
'' | -*) ;;
*) SETTING=$1 && shift ;;
esac

case $SETTING in
demo)
    N_LAYER=${N_LAYER:-4} N_EMBD=${N_EMBD:-256} VOCAB_SIZE=${VOCAB_SIZE:-6400} TOKENIZER=${TOKENIZER:-data/demo_tokenizer}
    STAGES=demo M_BSZ=${M_BSZ:-4} EPOCHS=${EPOCHS:-2}
    LR_INIT=${LR_INIT:-1e-3} LR_FINAL=${LR_FINAL:-1e-4} EPOCH_STEPS=${EPOCH_STEPS:-80} EPOCH_SAVE=${EPOCH_SAVE:-1}
    ;;
mini)
    N_LAYER=${N_LAYER:-8} N_EMBD=${N_EMBD:-512} VOCAB_SIZE=${VOCAB_SIZE:-6400} TOKENIZER=${TOKENIZER:-data/minimind_tokenizer}
    STAGES='512 1024 2048' M_BSZ=${M_BSZ:-16} EPOCHS=${EPOCHS:-1}
    LR_INIT=${LR_INIT:-2e-5} LR_FINAL=${LR_FINAL:-1e-6} EPOCH_STEPS=${EPOCH_STEPS:-0} EPOCH_SAVE=${EPOCH_SAVE:-5}
    case ${1:-} in
    '' | -*) ;;
    512 | 1024 | 2048) STAGES=$1 && shift ;;
    *) fail "mini $1: no such stage; expected 512, 1024 or 2048" ;;
    esac
    ;;
*) fail "$SETTING: no such setting; expected demo or mini, then flags of train.py (python train.py --help)" ;;
esac
# a file of yours is one stage, named after it, unless a published stage was asked for by name
case ${DATA_FILE:+$STAGES} in
demo | *' '*) STAGES=$(basename "$DATA_FILE" .jsonl | tr ' ' _) ;;
esac
BASE=${BASE:-out/L$N_LAYER-D$N_EMBD-x070} # the pretraining run
WARMUP_STEPS=${WARMUP_STEPS:-10} WEIGHT_DECAY=${WEIGHT_DECAY:-0} GRAD_CP=${GRAD_CP:-0}
GPU_PER_NODE=${GPU_PER_NODE:-1} N_NODE=${N_NODE:-1} STRATEGY=${STRATEGY:-auto} WANDB=${WANDB:-}
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # see demo-training-run.sh

python=$(sh demo-training-prepare.sh environment)

# What a stage is trained on: data, held-out data, ctx_len, length in positions (0: EPOCHS passes), and the run before it.
settings_of() {
    held_out='' exit_tokens=0 ctx_len=512 before=$BASE data=${DATA_FILE:-data/sft_$1.jsonl}
    case $1 in # the lengths are those of the published stages
    demo) data=${DATA_FILE:-data/demo-sft.jsonl} held_out=data/demo-sft-heldout.jsonl ;;
    512) exit_tokens=1843253579 ;;
    1024) exit_tokens=1430197426 ctx_len=1024 before=$BASE-sft-512 ;;
    2048) exit_tokens=2398644915 ctx_len=2048 before=$BASE-sft-1024 ;;
    esac
    if [ -n "${DATA_FILE:-}" ]; then held_out='' exit_tokens=0; fi
    held_out=${VAL_DATA_FILE:-$held_out} ctx_len=${CTX_LEN:-$ctx_len} exit_tokens=${MY_EXIT_TOKENS:-$exit_tokens}
}

# train_stage FOLDER FLAGS...: with what settings_of has set.
train_stage() {
    folder=$1 && shift
    [ -f "$data" ] || fail "$data is missing: a {\"conversations\": [{\"role\": \"user\", \"content\": ...}, ...]} per line.
Those of MiniMind (sft_512.jsonl, sft_1024.jsonl, sft_2048.jsonl) are in the dataset jingyaogong/minimind_dataset on Hugging Face and
gongjy/minimind_dataset on ModelScope; put them into data/, or name a file of yours: DATA_FILE=X.jsonl sh $0"
    if ! ls "$folder"/rwkv-*.pth >/dev/null 2>&1; then
        [ -f "$before/rwkv-final.pth" ] || fail "$before/rwkv-final.pth is missing: the weights that $folder starts from.
Train them first (sh demo-training-run.sh), name another run (BASE=out/NAME sh $0), or put weights there as $folder/rwkv-init.pth"
        mkdir -p "$folder"
        cp "$before/rwkv-final.pth" "$folder/.rwkv-init.part" # under its name only when whole
        mv "$folder/.rwkv-init.part" "$folder/rwkv-init.pth"
        say "$folder starts from $before/rwkv-final.pth"
    fi
    "$python" train.py --load_model 0 --train_stage 3 --wandb "$WANDB" --proj_dir "$folder" \
        --n_layer "$N_LAYER" --n_embd "$N_EMBD" --vocab_size "$VOCAB_SIZE" --tokenizer "$TOKENIZER" \
        --data_type sft --data_file "$data" --val_data_file "$held_out" --ctx_len "$ctx_len" --micro_bsz "$M_BSZ" \
        --my_exit_tokens "$exit_tokens" --epochs "$EPOCHS" --lr_init "$LR_INIT" --lr_final "$LR_FINAL" --warmup_steps "$WARMUP_STEPS" \
        --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --weight_decay "$WEIGHT_DECAY" --epoch_steps "$EPOCH_STEPS" \
        --epoch_save "$EPOCH_SAVE" --grad_cp "$GRAD_CP" --devices "$GPU_PER_NODE" --num_nodes "$N_NODE" --strategy "$STRATEGY" "$@"
}

if [ "$STAGES" = demo ]; then "$python" data/demo_conversations.py; fi
for stage in $STAGES; do
    settings_of "$stage"
    train_stage "$BASE-sft-$stage" "$@"
done

if [ "$STAGES" = demo ]; then
    # shellcheck disable=SC2016 # the quotes are part of the question
    for question in 'What does `textwrap.dedent` do?' 'What is the module `json` for?'; do
        say "
> $question"
        "$python" API_DEMO_CHAT.py "$folder" --prompt "$question" --length 120
    done
fi
say "
Talk to it: $python API_DEMO_CHAT.py $folder"
