#!/bin/sh
# Fine-tunes a pretrained RWKV-7 model on conversations, so that it answers. Stop it with Ctrl-C; the same command continues.
#
#   sh demo-training-run-sft.sh                      the demo, after demo-training-run.sh: questions about Python's
#                                                    standard library
#   DATA_FILE=X.jsonl sh demo-training-run-sft.sh    one stage on conversations of your own
#   sh demo-training-run-sft.sh mini                 the published stages of the 34.2 M model, one after another: ctx 512,
#                                                    1024, 2048
#   sh demo-training-run-sft.sh mini 1024            one of them
#
# With a DATA_FILE of your own the model is the demo's, with the demo's settings. If you name another one by N_LAYER,
# N_EMBD, VOCAB_SIZE or TOKENIZER (a folder, or world), everything you don't set is as for mini. BASE names its weights: a
# run's folder, a weights file (.pth, .safetensors, .st) or a Hugging Face folder; by default it is the folder of the
# pretraining.
#
# Each stage has its own folder and starts from the final weights of the stage before (BASE for the first). They are
# copied to the stage's rwkv-init.pth, or converted where they are in another format, unless there is one already (yours,
# say). Nothing is overwritten or deleted, but a copy with which no training began. Every setting is a default that the
# environment overrides; further flags are passed on to train.py.

# shellcheck source=demo-training-shared.sh
. "$(dirname "$0")/demo-training-shared.sh"

# ---- settings -------------------------------------------------------------------------------------------------------

SETTING=demo
case ${1:-} in
'' | -*) if [ -n "${DATA_FILE:-}" ]; then SETTING=own; fi ;;
*) SETTING=$1 && shift ;;
esac
MODEL_SETTING=$SETTING
if [ "$SETTING" = own ]; then
    MODEL_SETTING=demo
    if [ -n "${N_LAYER:-}${N_EMBD:-}${VOCAB_SIZE:-}${TOKENIZER:-}" ]; then MODEL_SETTING=mini; fi
fi
case $MODEL_SETTING in
demo)
    CTX_LEN=${CTX_LEN:-256} M_BSZ=${M_BSZ:-8} LR_INIT=${LR_INIT:-1e-3} LR_FINAL=${LR_FINAL:-1e-4}
    EPOCH_STEPS=${EPOCH_STEPS:-100} EPOCH_SAVE=${EPOCH_SAVE:-1}
    ;;
mini)
    CTX_LEN=${CTX_LEN:-512} M_BSZ=${M_BSZ:-16} LR_INIT=${LR_INIT:-2e-5} LR_FINAL=${LR_FINAL:-1e-6}
    EPOCH_STEPS=${EPOCH_STEPS:-0} EPOCH_SAVE=${EPOCH_SAVE:-5}
    ;;
*) fail "$SETTING: no such setting; expected mini, or nothing for the demo, or DATA_FILE=X.jsonl in the environment" ;;
esac
model_of "$MODEL_SETTING"
WEIGHT_DECAY=${WEIGHT_DECAY:-0.001} WARMUP_STEPS=${WARMUP_STEPS:-10} GRAD_CP=${GRAD_CP:-0}
run_settings

STAGES=
if [ "$SETTING" = mini ]; then
    STAGES="512 1024 2048"
    case ${1:-} in
    512 | 1024 | 2048) STAGES=$1 && shift ;;
    '' | -*) ;;
    *) fail "mini $1: no such stage; expected 512, 1024 or 2048" ;;
    esac
fi
proj_dir_flag "$@"
MODEL=out/L$N_LAYER-D$N_EMBD-x070
NAMED_BASE=${BASE:-}
BASE=${BASE:-$MODEL} # the weights to start from

find_python

# ---- one stage ------------------------------------------------------------------------------------------------------

# stage FOLDER BASE DATA CTX POSITIONS [FLAGS]: one fine-tuning, from the final weights in BASE
stage() {
    folder=$1 base=$2 data=$3 ctx=$4 positions=$5
    shift 5
    if [ ! -f "$data" ]; then missing "$data"; fi
    if [ "$TOKENIZER" != world ] && [ ! -f "$TOKENIZER/tokenizer.json" ]; then missing "$TOKENIZER"; fi
    initial_weights "$folder" "$base"
    "$python" train.py --proj_dir "$folder" --train_stage 3 --load_model 0 --data_type sft --data_file "$data" \
        --tokenizer "$TOKENIZER" --n_layer "$N_LAYER" --n_embd "$N_EMBD" --vocab_size "$VOCAB_SIZE" \
        --ctx_len "$ctx" --micro_bsz "$M_BSZ" --my_exit_tokens "$positions" --magic_prime "${MAGIC_PRIME:-0}" \
        --lr_init "$LR_INIT" --lr_final "$LR_FINAL" --warmup_steps "$WARMUP_STEPS" --weight_decay "$WEIGHT_DECAY" \
        --epoch_steps "$EPOCH_STEPS" --epoch_save "$EPOCH_SAVE" --grad_cp "$GRAD_CP" --wandb "$WANDB" \
        --devices "$GPU_PER_NODE" --num_nodes "$N_NODE" --strategy "$STRATEGY" "$@" || stage_failed $?
}

# stage_failed CODE: exit with it. Weights that no run began with are removed, as the next BASE would be ignored for them.
stage_failed() {
    if [ -n "$made_init" ] && [ ! -f "$folder/run.json" ]; then rm -f "$made_init"; fi
    exit "$1"
}

# initial_weights FOLDER BASE: FOLDER/rwkv-init.pth from BASE unless it exists; sets $made_init to it where it was made
initial_weights() {
    init=$1/rwkv-init.pth made_init='' weights=$2
    # A stage before this one must be complete. A folder that you name may be any that chat and export read.
    if [ -d "$2" ] && { [ "$2" != "$NAMED_BASE" ] || [ -f "$2/rwkv-final.pth" ]; }; then weights=$2/rwkv-final.pth; fi
    # A .pth is copied byte by byte (later calls compare the two); everything else is converted.
    case $weights in *.pth) is_copy=1 ;; *) is_copy=0 ;; esac
    if [ ! -f "$init" ]; then
        if [ ! -e "$weights" ] || { [ $is_copy = 1 ] && [ ! -f "$weights" ]; }; then
            fail "$weights does not exist; these are the weights to start from. Pretrain first (demo-training-run.sh),
put a base model at $init, or name one: BASE=model.pth sh $0"
        fi
        mkdir -p "$1"
        if [ $is_copy = 1 ]; then
            # under another name until it is complete: a copy that breaks off must not be taken for weights
            cp "$weights" "$init.tmp"
            mv "$init.tmp" "$init"
            say "$init is a copy of $weights"
        else
            "$python" -m src.inference.export "$weights" "$init" || exit 1
        fi
        made_init=$init
    elif [ "$2" != "$NAMED_BASE" ]; then
        return
    elif [ ! -e "$weights" ]; then
        say "note: BASE=$NAMED_BASE does not exist; using $init, which does"
    elif [ $is_copy = 0 ]; then
        say "note: using $init, which exists already; to convert BASE=$NAMED_BASE again, delete that file"
    elif ! cmp -s "$weights" "$init"; then
        say "note: $init exists already, so BASE=$NAMED_BASE is not used; to start from it, delete that file"
    fi
}

missing() {
    case $SETTING in
    mini) fail "$1 is missing. The conversations (sft_512.jsonl, sft_1024.jsonl, sft_2048.jsonl; sft_mini_512.jsonl is a small
one) and the tokenizer are MiniMind's. One of these downloads them:
  pip install modelscope       && modelscope download --dataset gongjy/minimind_dataset ${1##*/} --local_dir data
  pip install huggingface_hub  && hf download jingyaogong/minimind_dataset ${1##*/} --repo-type dataset --local-dir data
  (tokenizer.json and tokenizer_config.json are in the repository github.com/jingyaogong/minimind, for $TOKENIZER)" ;;
    demo) fail "$1 is missing: run sh demo-training-run.sh first, which makes it" ;;
    *)
        if [ "$1" = data/demo_tokenizer ]; then
            fail "$1 is missing: without N_LAYER, N_EMBD, VOCAB_SIZE or TOKENIZER this fine-tunes the demo's model; run
sh demo-training-run.sh first, which makes it, or name your own"
        fi
        fail "$1 is missing; DATA_FILE is a jsonl file of conversations, TOKENIZER the folder of the model's tokenizer, or world"
        ;;
    esac
}

# ---- all stages -----------------------------------------------------------------------------------------------------

case $SETTING in
demo)
    if [ ! -f "$TOKENIZER/tokenizer.json" ]; then "$python" data/demo_corpus.py; fi
    "$python" data/demo_conversations.py
    PROJ_DIR=${PROJ_DIR:-$MODEL-sft}
    was_complete=0
    if [ -f "$PROJ_DIR/rwkv-final.pth" ]; then was_complete=1; fi
    stage "$PROJ_DIR" "$BASE" data/demo-sft.jsonl "$CTX_LEN" "${MY_EXIT_TOKENS:-0}" \
        --val_data_file data/demo-sft-heldout.jsonl "$@"
    # Nothing to show if it was complete before, or if it took no steps (--check).
    if [ $was_complete = 1 ] || [ ! -f "$PROJ_DIR/rwkv-final.pth" ]; then exit; fi
    # shellcheck disable=SC2016 # the backquotes are Markdown in the questions, not commands
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
        case $ctx in # the positions that the published stages trained on
        512) base=$BASE positions=1843253579 ;;
        1024) base=$MODEL-sft512 positions=1430197426 ;;
        2048) base=$MODEL-sft1024 positions=2398644915 ;;
        esac
        stage "$MODEL-sft$ctx" "$base" "${DATA_FILE:-data/sft_$ctx.jsonl}" "$ctx" "${MY_EXIT_TOKENS:-$positions}" "$@"
    done
    ;;
esac
