#!/bin/sh
# Fine-tunes a pretrained RWKV-7 model on conversations, so that it answers. Stop it with Ctrl-C; the same command continues.
#
#   sh demo-training-run-sft.sh                      the demo, after demo-training-run.sh: questions about Python's
#                                                    standard library
#   DATA_FILE=X.jsonl sh demo-training-run-sft.sh    one stage on conversations of your own
#   sh demo-training-run-sft.sh mini t2t             the 34.2 M model on MiniMind's sft_t2t (or sft_t2t_mini): one stage
#   sh demo-training-run-sft.sh mini                 the same, or, where data/sft_512.jsonl exists, the published stages
#                                                    on MiniMind's earlier sets, one after another: ctx 512, 1024, 2048
#   sh demo-training-run-sft.sh mini 1024            one of them
#
#   PEFT=lora sh demo-training-run-sft.sh            trains a LoRA adapter beside the model instead (or pissa, miss, dora),
#   TRAIN_TYPE=state sh demo-training-run-sft.sh     or its initial states; both after demo-training-run.sh
#   BASE=RWKV-x070-World-0.4B.pth TOKENIZER=world DATA_FILE=X.jsonl PEFT=lora sh demo-training-run-sft.sh
#                                                    the same with a released model, whose file has its sizes; QUANT=nf4
#                                                    keeps it in 4 bits
#
# With a DATA_FILE of your own the model is the demo's, with the demo's settings. If you name another one by N_LAYER,
# N_EMBD, VOCAB_SIZE or TOKENIZER (a folder, or world), everything you don't set is as for mini. BASE names its weights:
# a run's folder, a weights file or a Hugging Face folder; by default it is the folder of the pretraining. VAL_DATA_FILE
# names held-out conversations; empty: none.
#
# Each stage has its own folder and starts from the final weights of the stage before (BASE for the first). They are
# copied to the stage's rwkv-init.pth, or converted where they have another format, unless there is one already (yours,
# say). An adapter's run reads BASE itself, which stays where it is. Nothing is overwritten, and nothing is deleted but that copy, if the training can't begin with it. Every setting
# is a default that the environment overrides; further flags are passed on to train.py.

# shellcheck source=demo-training-shared.sh
. "$(dirname "$0")/demo-training-shared.sh"

# ---- settings -------------------------------------------------------------------------------------------------------

PEFT=${PEFT:-none} TRAIN_TYPE=${TRAIN_TYPE:-none} QUANT=${QUANT:-none}
case $PEFT-$TRAIN_TYPE in
none-none) ADAPTER= ;;
*-none) ADAPTER=$PEFT ;;
*) ADAPTER=$TRAIN_TYPE ;;
esac
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
# the sizes that are set; a BASE has those of its file
SIZES=
if [ -n "${N_LAYER:-}" ]; then SIZES="$SIZES --n_layer $N_LAYER"; fi
if [ -n "${N_EMBD:-}" ]; then SIZES="$SIZES --n_embd $N_EMBD"; fi
if [ -n "${VOCAB_SIZE:-}" ]; then SIZES="$SIZES --vocab_size $VOCAB_SIZE"; fi
case $ADAPTER in
'') ;;
state) LR_INIT=${LR_INIT:-1e-1} LR_FINAL=${LR_FINAL:-1e-3} WEIGHT_DECAY=${WEIGHT_DECAY:-0} ;; # far more than weights take
*)
    if [ "$MODEL_SETTING" = demo ]; then LR_INIT=${LR_INIT:-2e-3} LR_FINAL=${LR_FINAL:-2e-4}; fi
    LR_INIT=${LR_INIT:-1e-4} LR_FINAL=${LR_FINAL:-1e-5} WEIGHT_DECAY=${WEIGHT_DECAY:-0}
    ;;
esac
case $MODEL_SETTING in
demo)
    CTX_LEN=${CTX_LEN:-256} M_BSZ=${M_BSZ:-8} LR_INIT=${LR_INIT:-1e-3} LR_FINAL=${LR_FINAL:-1e-4}
    EPOCH_STEPS=${EPOCH_STEPS:-100} EPOCH_SAVE=${EPOCH_SAVE:-1}
    ;;
mini)
    T2T_CTX_LEN=${CTX_LEN:-768} # the length that MiniMind recommends for sft_t2t
    CTX_LEN=${CTX_LEN:-512} M_BSZ=${M_BSZ:-16} LR_INIT=${LR_INIT:-2e-5} LR_FINAL=${LR_FINAL:-1e-6}
    EPOCH_STEPS=${EPOCH_STEPS:-0} EPOCH_SAVE=${EPOCH_SAVE:-5}
    ;;
*) fail "$SETTING: no such setting; expected mini, or nothing for the demo, or DATA_FILE=X.jsonl in the environment" ;;
esac
model_of "$MODEL_SETTING"
WEIGHT_DECAY=${WEIGHT_DECAY:-0.001} WARMUP_STEPS=${WARMUP_STEPS:-10} GRAD_CP=${GRAD_CP:-0}
run_settings

# - and not :-, because an empty VAL_DATA_FILE means no held-out data
if [ "$SETTING" = demo ]; then VAL_DATA_FILE=${VAL_DATA_FILE-data/demo-sft-heldout.jsonl}; fi
VAL_DATA_FILE=${VAL_DATA_FILE:-}

STAGES=
if [ "$SETTING" = mini ]; then
    STAGES=t2t
    if [ -f data/sft_512.jsonl ] || [ -n "${DATA_FILE:-}" ]; then STAGES="512 1024 2048"; fi
    case ${1:-} in
    512 | 1024 | 2048 | t2t) STAGES=$1 && shift ;;
    '' | -*) ;;
    *) fail "mini $1: no such stage; expected t2t, 512, 1024 or 2048" ;;
    esac
fi
if [ -n "$ADAPTER" ] && [ "${STAGES#* }" != "$STAGES" ]; then
    fail "an adapter is trained in one stage: mini t2t, or mini 512 with a DATA_FILE"
fi
proj_dir_flag "$@"
MODEL=out/L$N_LAYER-D$N_EMBD-x070
NAMED_BASE=${BASE:-}
if [ -z "$NAMED_BASE" ]; then SIZES="--n_layer $N_LAYER --n_embd $N_EMBD --vocab_size $VOCAB_SIZE"; fi
BASE=${BASE:-$MODEL} # the weights to start from
SUFFIX=${ADAPTER:-sft} # of the names of folders

find_python

# ---- one stage ------------------------------------------------------------------------------------------------------

# stage FOLDER BASE DATA CTX POSITIONS [FLAGS]: one fine-tuning, from the final weights in BASE
stage() {
    folder=$1 base=$2 data=$3 ctx=$4 positions=$5
    shift 5
    if [ ! -f "$data" ]; then missing "$data"; fi
    if [ "$TOKENIZER" != world ] && [ ! -f "$TOKENIZER/tokenizer.json" ]; then missing "$TOKENIZER"; fi
    if [ -n "$ADAPTER" ]; then
        copied=
        [ -e "$base" ] || fail "$base does not exist; these are the weights to adapt. Pretrain first (demo-training-run.sh), or name
others: BASE=model.pth sh $0"
        set -- --train_stage 0 --load_model "$base" --peft "$PEFT" --train_type "$TRAIN_TYPE" --quant "$QUANT" "$@"
    else
        initial_weights "$folder" "$base"
        set -- --train_stage 3 --load_model 0 "$@"
    fi
    status=0
    # shellcheck disable=SC2086 # several flags
    "$python" train.py --proj_dir "$folder" --data_type sft --data_file "$data" \
        --tokenizer "$TOKENIZER" $SIZES --ctx_len "$ctx" --micro_bsz "$M_BSZ" --my_exit_tokens "$positions" --magic_prime "${MAGIC_PRIME:-0}" \
        --lr_init "$LR_INIT" --lr_final "$LR_FINAL" --warmup_steps "$WARMUP_STEPS" --weight_decay "$WEIGHT_DECAY" \
        --epoch_steps "$EPOCH_STEPS" --epoch_save "$EPOCH_SAVE" --grad_cp "$GRAD_CP" --wandb "$WANDB" \
        --val_data_file "$VAL_DATA_FILE" \
        --devices "$GPU_PER_NODE" --num_nodes "$N_NODE" --strategy "$STRATEGY" "$@" || status=$?
    # 1 and 2 are errors; more are interruptions, after which the same command continues.
    case $status in
    0) ;;
    1 | 2)
        discard_copy "$folder"
        exit $status
        ;;
    *) exit $status ;;
    esac
}

# initial_weights FOLDER BASE: FOLDER/rwkv-init.pth, copied from BASE unless it exists; `copied` is its name if it was
initial_weights() {
    weights=$2 copied=
    # A stage before this one must be complete. A folder that is named may be any that chat and export read.
    if [ -d "$2" ] && { [ "$2" != "$NAMED_BASE" ] || [ -f "$2/rwkv-final.pth" ]; }; then weights=$2/rwkv-final.pth; fi
    if [ ! -f "$1/rwkv-init.pth" ]; then
        [ -e "$weights" ] || fail "$weights does not exist; these are the weights to start from. Pretrain first (demo-training-run.sh),
put a base model at $1/rwkv-init.pth, or name one: BASE=model.pth sh $0"
        mkdir -p "$1"
        copied=$1/rwkv-init.pth
        if is_converted "$weights"; then
            if ! "$python" -m src.inference.export "$weights" "$copied"; then
                discard_copy "$1"
                exit 1
            fi
            say "$copied holds the weights of $weights"
        else
            # under another name until it is complete: a copy that breaks off must not be taken for weights
            cp "$weights" "$copied.tmp"
            mv "$copied.tmp" "$copied"
            say "$copied is a copy of $weights"
        fi
    elif [ "$2" != "$NAMED_BASE" ]; then
        return
    elif [ ! -e "$weights" ]; then
        say "note: BASE=$NAMED_BASE does not exist; using $1/rwkv-init.pth, which does"
    elif is_converted "$weights"; then # the two can't be compared
        say "note: using $1/rwkv-init.pth, which exists already; to start from BASE=$NAMED_BASE again, delete that file"
    elif ! cmp -s "$weights" "$1/rwkv-init.pth"; then
        say "note: $1/rwkv-init.pth exists already, so BASE=$NAMED_BASE is not used; to start from it, delete that file"
    fi
}

# is_converted WEIGHTS: whether they are no .pth, which would be copied byte by byte
is_converted() {
    case $1 in *.pth) return 1 ;; esac
}

# discard_copy FOLDER: deletes what `initial_weights` copied, unless a training has saved something since: a BASE that
# doesn't fit must not be in the way of the next one
discard_copy() {
    if [ -z "$copied" ]; then return; fi
    for saved in "$1"/rwkv-[0-9f]*.pth "$1"/resume/step-*; do
        # older ones are of an earlier run in this folder
        if [ -e "$saved" ] && [ ! "$saved" -ot "$copied" ]; then return; fi
    done
    rm -f "$copied"
    rmdir "$1" 2>/dev/null || true # it may hold other files
    say "$copied is deleted again, so that it is copied from the BASE of the next start" >&2
}

# is_complete FOLDER: whether a training there has ended
is_complete() { [ -f "$1/rwkv-final.pth" ] || [ -d "$1/adapter" ] || [ -f "$1/state.pth" ]; }

missing() {
    case $SETTING in
    mini)
        if [ "$1" = "$TOKENIZER" ]; then
            fail "$1 is missing. For MiniMind's data it holds the tokenizer of MiniMind-3:
  pip install huggingface_hub  && hf download jingyaogong/minimind-3 tokenizer.json tokenizer_config.json chat_template.jinja --local-dir $1
They are also in the folder model of github.com/jingyaogong/minimind."
        fi
        fail "$1 is missing. The conversations are MiniMind's. One of these downloads them:
  pip install modelscope       && modelscope download --dataset gongjy/minimind_dataset ${1##*/} --local_dir data
  pip install huggingface_hub  && hf download jingyaogong/minimind_dataset ${1##*/} --repo-type dataset --local-dir data
Its set of 2026 has sft_t2t.jsonl and sft_t2t_mini.jsonl (a small one), for the stage t2t; earlier ones had
sft_512.jsonl, sft_1024.jsonl, sft_2048.jsonl and sft_mini_512.jsonl."
        ;;
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
    PROJ_DIR=${PROJ_DIR:-$MODEL-$SUFFIX}
    was_complete=0
    if is_complete "$PROJ_DIR"; then was_complete=1; fi
    stage "$PROJ_DIR" "$BASE" data/demo-sft.jsonl "$CTX_LEN" "${MY_EXIT_TOKENS:-0}" "$@"
    # Nothing to show if it was complete before, or if it took no steps (--check).
    if [ $was_complete = 1 ] || ! is_complete "$PROJ_DIR"; then exit; fi
    # shellcheck disable=SC2016 # the backquotes are Markdown in the questions, not commands
    for question in 'What does `textwrap.dedent` do?' 'What is the signature of `json.dumps`?'; do
        say "" "$question"
        "$python" API_DEMO_CHAT.py "$PROJ_DIR" --prompt "$question"
    done
    say "" "Ask it more: $python API_DEMO_CHAT.py $PROJ_DIR"
    ;;
own)
    name=${DATA_FILE##*/}
    # Only the ending: pets.cats.jsonl and pets.dogs.jsonl are two runs.
    for ending in .gz .zst .jsonl .json .parquet; do name=${name%"$ending"}; done
    if [ -n "$ADAPTER" ] && [ -n "$NAMED_BASE" ]; then
        MODEL=out/${NAMED_BASE##*/}
        MODEL=${MODEL%.pth}
    fi
    stage "${PROJ_DIR:-$MODEL-$SUFFIX-$name}" "$BASE" "$DATA_FILE" "$CTX_LEN" "${MY_EXIT_TOKENS:-0}" "$@"
    ;;
mini)
    for ctx in $STAGES; do
        case $ctx in # the positions that the published stages trained on; 0: one pass
        t2t)
            data=data/sft_t2t_mini.jsonl
            if [ -f data/sft_t2t.jsonl ]; then data=data/sft_t2t.jsonl; fi
            stage "${PROJ_DIR:-$MODEL-$SUFFIX-t2t}" "$BASE" "${DATA_FILE:-$data}" "$T2T_CTX_LEN" "${MY_EXIT_TOKENS:-0}" "$@"
            continue
            ;;
        512) base=$BASE positions=1843253579 ;;
        1024) base=$MODEL-sft512 positions=1430197426 ;;
        2048) base=$MODEL-sft1024 positions=2398644915 ;;
        esac
        stage "$MODEL-$SUFFIX$ctx" "$base" "${DATA_FILE:-data/sft_$ctx.jsonl}" "$ctx" "${MY_EXIT_TOKENS:-$positions}" "$@"
    done
    ;;
esac
