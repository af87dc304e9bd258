#!/bin/sh
# Fine-tunes a pretrained RWKV-7 model on conversations, so that it answers. Stop it with Ctrl-C; the same command continues.
#
#   sh demo-training-run-sft.sh                      the demo, after demo-training-run.sh: questions about Python's standard library
#   DATA_FILE=X.jsonl sh demo-training-run-sft.sh    one stage on conversations of yours
#   sh demo-training-run-sft.sh mini                 the published stages of the 34.2 M model, one after another: ctx 512, 1024, 2048
#   sh demo-training-run-sft.sh mini 1024            one of them
#
# With a DATA_FILE of yours the model is the demo's, with the demo's settings. As soon as you name another one by N_LAYER, N_EMBD,
# VOCAB_SIZE or TOKENIZER (a folder, or world), whatever you don't set is as for mini. BASE says where its weights are, a run's folder
# or a .pth; by default that is the folder of the pretraining.
#
# Each stage has a folder of its own and starts from the final weights of the one before (BASE: the first one, or the only one). They
# are copied to the stage's rwkv-init.pth, unless one is there already (put there by hand, say). Nothing is overwritten or deleted.
# Every setting is a default that the environment overrides; further flags are passed on to train.py.

set -eu
cd "$(dirname "$0")"
say() { printf '%s\n' "$*"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

SETTING=demo
case ${1:-} in
'' | -*) if [ -n "${DATA_FILE:-}" ]; then SETTING=own; fi ;;
*) SETTING=$1 && shift ;;
esac
STAGES=
MODEL_OF=$SETTING
if [ "$SETTING" = own ]; then
    MODEL_OF=demo
    if [ -n "${N_LAYER:-}${N_EMBD:-}${VOCAB_SIZE:-}${TOKENIZER:-}" ]; then MODEL_OF=mini; fi
fi
case $MODEL_OF in
demo)
    N_LAYER=${N_LAYER:-4} N_EMBD=${N_EMBD:-256} VOCAB_SIZE=${VOCAB_SIZE:-6400} TOKENIZER=${TOKENIZER:-data/demo_tokenizer}
    CTX_LEN=${CTX_LEN:-256} M_BSZ=${M_BSZ:-8} LR_INIT=${LR_INIT:-1e-3} LR_FINAL=${LR_FINAL:-1e-4} EPOCH_STEPS=${EPOCH_STEPS:-100}
    EPOCH_SAVE=${EPOCH_SAVE:-1}
    ;;
mini)
    N_LAYER=${N_LAYER:-8} N_EMBD=${N_EMBD:-512} VOCAB_SIZE=${VOCAB_SIZE:-6400} TOKENIZER=${TOKENIZER:-data/minimind_tokenizer}
    CTX_LEN=${CTX_LEN:-512} M_BSZ=${M_BSZ:-16} LR_INIT=${LR_INIT:-2e-5} LR_FINAL=${LR_FINAL:-1e-6} EPOCH_STEPS=${EPOCH_STEPS:-0}
    EPOCH_SAVE=${EPOCH_SAVE:-5}
    ;;
*) fail "$SETTING: no such setting; expected mini, or nothing for the demo, or DATA_FILE=X.jsonl in the environment" ;;
esac
if [ "$SETTING" = mini ]; then
    STAGES="512 1024 2048"
    case ${1:-} in
    512 | 1024 | 2048) STAGES=$1 && shift ;;
    '' | -*) ;;
    *) fail "mini $1: no such stage; expected 512, 1024 or 2048" ;;
    esac
fi
before=
for word in "$@"; do # given as a flag, it is where the weights to start from have to be put
    case $before in --proj_dir) PROJ_DIR=$word ;; esac
    case $word in --proj_dir=*) PROJ_DIR=${word#*=} ;; esac
    before=$word
done
WEIGHT_DECAY=${WEIGHT_DECAY:-0.001}
WARMUP_STEPS=${WARMUP_STEPS:-10}
GRAD_CP=${GRAD_CP:-0}
N_NODE=${N_NODE:-1}
GPU_PER_NODE=${GPU_PER_NODE:-1}
STRATEGY=${STRATEGY:-auto}
WANDB=${WANDB:-}
MODEL=out/L$N_LAYER-D$N_EMBD-x070
NAMED_BASE=${BASE:-}
BASE=${BASE:-$MODEL} # where the weights to start from are: a run's folder, or a .pth

python=$(sh demo-training-prepare.sh environment)
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# copy_whole FROM TO: TO appears whole or not at all
copy_whole() {
    cp "$1" "$2.tmp"
    mv "$2.tmp" "$2"
}

# stage FOLDER BASE DATA CTX POSITIONS [FLAGS]: one fine-tuning, from the final weights in BASE
stage() {
    folder=$1 base=$2 data=$3 ctx=$4 positions=$5
    shift 5
    if [ ! -f "$data" ]; then missing "$data"; fi
    if [ "$TOKENIZER" != world ] && [ ! -f "$TOKENIZER/tokenizer.json" ]; then missing "$TOKENIZER"; fi
    weights=$base
    if [ -d "$base" ]; then weights=$base/rwkv-final.pth; fi
    if [ -f "$folder/rwkv-init.pth" ]; then
        if [ "$base" = "$NAMED_BASE" ] && [ ! -f "$weights" ]; then
            say "note: BASE=$NAMED_BASE is not there; $folder/rwkv-init.pth is, and goes on"
        elif [ "$base" = "$NAMED_BASE" ] && ! cmp -s "$weights" "$folder/rwkv-init.pth"; then
            say "note: $folder/rwkv-init.pth is there already, so BASE=$NAMED_BASE is not read; to begin anew from it, delete that file"
        fi
    else
        [ -f "$weights" ] || fail "$weights is not there: it has the weights to start from. Pretrain first (demo-training-run.sh), or put a
base model at $folder/rwkv-init.pth, or name one: BASE=model.pth sh $0"
        mkdir -p "$folder"
        copy_whole "$weights" "$folder/rwkv-init.pth"
        say "$folder/rwkv-init.pth is a copy of $weights"
    fi
    "$python" train.py --proj_dir "$folder" --train_stage 3 --load_model 0 --data_type sft --data_file "$data" --tokenizer "$TOKENIZER" \
        --n_layer "$N_LAYER" --n_embd "$N_EMBD" --vocab_size "$VOCAB_SIZE" --ctx_len "$ctx" --micro_bsz "$M_BSZ" \
        --my_exit_tokens "$positions" --magic_prime "${MAGIC_PRIME:-0}" --lr_init "$LR_INIT" --lr_final "$LR_FINAL" \
        --warmup_steps "$WARMUP_STEPS" --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --weight_decay "$WEIGHT_DECAY" \
        --epoch_steps "$EPOCH_STEPS" --epoch_save "$EPOCH_SAVE" --grad_cp "$GRAD_CP" --wandb "$WANDB" \
        --devices "$GPU_PER_NODE" --num_nodes "$N_NODE" --strategy "$STRATEGY" "$@"
}

missing() {
    case $SETTING in
    mini) fail "$1 is missing. The conversations (sft_512.jsonl, sft_1024.jsonl, sft_2048.jsonl; sft_mini_512.jsonl is a small one) and the
tokenizer are MiniMind's. One of these fetches them:
  pip install modelscope       && modelscope download --dataset gongjy/minimind_dataset ${1##*/} --local_dir data
  pip install huggingface_hub  && hf download jingyaogong/minimind_dataset ${1##*/} --repo-type dataset --local-dir data
  (tokenizer.json and tokenizer_config.json are in the repository github.com/jingyaogong/minimind, for $TOKENIZER)" ;;
    demo) fail "$1 is missing: run sh demo-training-run.sh first, which makes it" ;;
    *)
        if [ "$1" = data/demo_tokenizer ]; then
            fail "$1 is missing: without another model (N_LAYER, N_EMBD, VOCAB_SIZE, TOKENIZER) this fine-tunes the demo's; run
sh demo-training-run.sh first, which makes it, or name yours"
        fi
        fail "$1 is missing; DATA_FILE is a jsonl of conversations, TOKENIZER the folder of the model's tokenizer, or world"
        ;;
    esac
}

case $SETTING in
demo)
    if [ ! -f "$TOKENIZER/tokenizer.json" ]; then "$python" data/demo_corpus.py; fi
    "$python" data/demo_conversations.py
    PROJ_DIR=${PROJ_DIR:-$MODEL-sft}
    was_complete=0
    if [ -f "$PROJ_DIR/rwkv-final.pth" ]; then was_complete=1; fi
    stage "$PROJ_DIR" "$BASE" data/demo-sft.jsonl "$CTX_LEN" "${MY_EXIT_TOKENS:-0}" --val_data_file data/demo-sft-heldout.jsonl "$@"
    if [ $was_complete = 1 ] || [ ! -f "$PROJ_DIR/rwkv-final.pth" ]; then exit; fi # complete before, or only looked at (--check)
    for question in 'What does `textwrap.dedent` do?' 'What is the signature of `json.dumps`?'; do
        say "" "$question"
        "$python" API_DEMO_CHAT.py "$PROJ_DIR" --prompt "$question"
    done
    say "" "Ask it more: $python API_DEMO_CHAT.py $PROJ_DIR"
    ;;
own)
    name=${DATA_FILE##*/}
    stage "${PROJ_DIR:-$MODEL-sft-${name%%.*}}" "$BASE" "$DATA_FILE" "$CTX_LEN" "${MY_EXIT_TOKENS:-0}" "$@"
    ;;
mini)
    for ctx in $STAGES; do
        case $ctx in # positions that the published stages trained on
        512) base=$BASE positions=1843253579 ;;
        1024) base=$MODEL-sft512 positions=1430197426 ;;
        2048) base=$MODEL-sft1024 positions=2398644915 ;;
        esac
        stage "$MODEL-sft$ctx" "$base" "${DATA_FILE:-data/sft_$ctx.jsonl}" "$ctx" "${MY_EXIT_TOKENS:-$positions}" "$@"
    done
    ;;
esac
