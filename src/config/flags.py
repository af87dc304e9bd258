"""`Flags`: every flag of train.py, declared once."""

from __future__ import annotations

from dataclasses import dataclass

from src.config.model import KERNELS
from src.config.setting import flag
from src.config.support import PEFT_KINDS, QUANTISATIONS, TARGETS, TRAIN_TYPES

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
# Lightning's names: existing scripts pass them.
STRATEGIES = (
    "auto",
    "ddp",
    *(f"deepspeed_stage_{stage}{offload}" for stage in (1, 2, 3) for offload in ("", "_offload")),
)
# What special tokens that stand in a text are.
SPECIAL_TOKENS = ("text", "parse")
# Whether an answer begins with a thought, and which; "" leaves it to the data or the model.
THINK_MODES = ("on", "off", "short", "long")
# Samples of a mini-epoch unless --epoch_steps is given, as in RWKV-LM: 8!, which many batch sizes divide.
MINI_EPOCH_SAMPLES = 40320
# A larger --my_exit_tokens is a slip of the keyboard, and sums of such numbers would not fit into 64 bits.
MAX_TOKENS = 10**18
MAX_LAYERS = 10_000
# The largest seed that every random generator takes: numpy's has 32 bits.
MAX_SEED = 2**32 - 1


@dataclass
class Flags:
    """The flags of train.py. Names and defaults are public: existing scripts pass them."""

    # run. The order here is the order of --help and of the tables in docs/.
    train_stage: int = flag(
        0,
        "run",
        "1: write rwkv-init.pth and stop; 0, 2, 3: train, resuming the run in --proj_dir if there is one. A new run "
        "starts from --load_model; without it, 0 initialises new weights, 2 and 3 require rwkv-init.pth",
        at_least=0,
        below=4,
        within_run="free",
    )
    plan: float = flag(
        -1.0,
        "run",
        "print parameters, memory per device (for a GPU in bf16, unless --accelerator cpu), steps and, given the "
        "tokens per second of all processes, the duration; then stop",
        at_least=-1,
        const=0.0,
        within_run="free",
    )
    plan_bandwidth: str = flag(
        "450,50",
        "run",
        "for --plan: GB/s that a GPU sends within a machine, and to other machines",
        within_run="free",
    )
    plan_gpu: str = flag(
        "989,40",
        "run",
        "for --plan: peak TFLOP/s of a GPU, and the MFU in percent without communication",
        within_run="free",
    )
    plan_disks: str = flag(
        "8,2", "run", "for --plan: the number of disks for states, and GB/s of each", within_run="free"
    )
    plan_mtbf: float = flag(
        6000.0,
        "run",
        "for --plan: hours between two failures of a machine; 0: none fails",
        at_least=0,
        within_run="free",
    )
    check: bool = flag(
        False,
        "run",
        "check whether the run fits and works: software, kernel, data, memory, disk, duration; then stop",
        const=True,
        within_run="free",
    )
    dry_run: bool = flag(False, "run", "take two training steps, save nothing, stop", const=True, within_run="free")
    proj_dir: str = flag("out", "run", "folder of the run: weights, logs, settings", within_run="free")
    load_model: str = flag(
        "",
        "run",
        'weights to start from: a file, a run\'s folder or a Hugging Face folder; "0" or empty: none',
        within_run="free",
    )
    load_partial: bool = flag(
        False, "run", "1: parameters missing from the weights file keep their initial values", within_run="free"
    )
    resize_vocab: bool = flag(
        False,
        "run",
        "1: where the tokenizer or --vocab_size has more ids than the weights file has rows, add rows, the mean of the "
        "others",
        within_run="free",
    )
    restart: bool = flag(
        False, "run", "1: start again from the initial weights; existing files move to previous-k/", within_run="free"
    )
    save_minutes: float = flag(
        15.0,
        "run",
        "minutes between saves of the full state, in addition to those at saved mini-epochs and stops; 0: only those",
        at_least=0,
        within_run="free",
    )
    keep_resume: int = flag(2, "run", "number of full states to keep", at_least=1, within_run="free")
    time_limit: float = flag(
        0.0,
        "run",
        "minutes until the machine is taken away: save and stop before that; 0: no limit",
        at_least=0,
        within_run="free",
    )
    max_bad_steps: int = flag(
        3,
        "run",
        "after this many consecutive steps without a finite gradient, roll back and skip their samples",
        at_least=1,
    )
    random_seed: int = flag(
        -1,
        "run",
        "seed of all random numbers; -1: a different one each time (it is printed)",
        at_least=-1,
        below=MAX_SEED + 1,
        within_run="free",
    )

    # data. The file's name may change, its content may not: the settings of a run hold an identity of the data.
    data_file: str = flag(
        "", "data", "binidx data, given as X, X.bin or X.idx; for sft a jsonl file of conversations", within_run="free"
    )
    data_type: str = flag(
        "binidx",
        "data",
        "binidx: pretraining on token files; sft: fine-tuning on conversations (jsonl)",
        choices=("binidx", "sft"),
        within_run="fixed",
    )
    tokenizer: str = flag(
        "", "data", 'tokenizer of the data: "world" or a Hugging Face folder; copied into the run', within_run="fixed"
    )
    vocab_size: int = flag(
        0,
        "data",
        "rows of the embedding; 0: from the weights, the tokenizer or the data",
        at_least=0,
        within_run="fixed",
    )
    ctx_len: int = flag(1024, "data", "context length: tokens per sample", at_least=1, within_run="fixed")
    document_states: bool = flag(
        False,
        "data",
        "binidx: 1: every document in a window begins from its own initial state; 0: with the state of the one before",
    )
    magic_prime: int = flag(
        0,
        "data",
        "determines the order in which windows of the data are read; 0: computed from the data",
        at_least=0,
        within_run="fixed",
    )
    sft_loss: str = flag(
        "answers",
        "data",
        "sft: tokens that contribute to the loss; text: prompts too; all: prompts and padding too, as in some "
        "published runs",
        choices=("answers", "text", "all"),
        within_run="fixed",
    )
    packing: bool = flag(
        True,
        "data",
        "sft: 1: several conversations share a row of ctx_len tokens; 0: one conversation per row, padded",
        within_run="fixed",
    )
    truncate: str = flag(
        "end",
        "data",
        "sft: a conversation longer than ctx_len: cut its end, drop it, or stop with an error",
        choices=("end", "drop", "error"),
        within_run="fixed",
    )
    special_tokens: str = flag(
        "text",
        "data",
        "sft: what special tokens such as <|im_end|> are that stand in a message: text, or tokens (parse)",
        choices=SPECIAL_TOKENS,
        within_run="fixed",
    )
    think: str = flag(
        "",
        "data",
        "sft: answers are those of a model that is asked to think (on, short, long) or not to (off); empty: neither",
        choices=("", *THINK_MODES),
        within_run="fixed",
    )
    val_data_file: str = flag(
        "",
        "data",
        "held-out data, in the form of --data_file: its loss is measured during training and the best weights are "
        "kept; heldout: DATA-heldout, the part set aside by make_data.py --holdout",
    )
    # text: one flag for two units
    val_every: str = flag(
        "1",
        "data",
        'how often the held-out loss is measured: "2": every two mini-epochs; "500steps": every 500 steps; '
        '"0": only at the end',
        within_run="free",
    )
    val_windows: int = flag(
        512, "data", "held-out samples per measurement, evenly spaced and always the same", at_least=1
    )

    # model
    n_layer: int = flag(6, "model", "number of blocks", at_least=1, below=MAX_LAYERS, within_run="fixed")
    n_embd: int = flag(512, "model", "width of the model (C)", at_least=1, within_run="fixed")
    head_size: int = flag(
        64, "model", "width of a head (N); n_embd is a multiple of it", at_least=1, within_run="fixed"
    )
    dim_ffn: int = flag(0, "model", "hidden width of the channel mix; 0: 4 * n_embd", at_least=0, within_run="fixed")
    d_decay_lora: int = flag(
        0,
        "model",
        "low-rank size of the decay w, a part of RWKV-7 (not LoRA fine-tuning); 0: computed from n_embd",
        at_least=0,
        within_run="fixed",
    )
    d_aaa_lora: int = flag(
        0,
        "model",
        "low-rank size of the in-context learning rate a; 0: computed from n_embd",
        at_least=0,
        within_run="fixed",
    )
    d_mv_lora: int = flag(
        0, "model", "low-rank size of the value residual; 0: computed from n_embd", at_least=0, within_run="fixed"
    )
    d_gate_lora: int = flag(
        0, "model", "low-rank size of the gate g; 0: computed from n_embd", at_least=0, within_run="fixed"
    )

    # fine-tuning a part: an adapter or tuned initial states, beside weights that stay as they are
    peft: str = flag(
        "none",
        "adapt",
        "train an adapter, and no other weights: LoRA, PiSSA, MiSS (earlier DiSHA, Bone) or DoRA",
        choices=PEFT_KINDS,
        within_run="fixed",
    )
    lora_r: int = flag(32, "adapt", "rank of the adapter", at_least=1, below=1 << 16, within_run="fixed")
    lora_alpha: float = flag(
        64.0,
        "adapt",
        "lora, dora: the adapter's product is multiplied by lora_alpha / lora_r",
        at_least=0,
        within_run="fixed",
    )
    lora_dropout: float = flag(
        0.0, "adapt", "probability with which an input of the adapter is dropped in training", at_least=0, below=1.0
    )
    use_rslora: bool = flag(False, "adapt", "1: multiply by lora_alpha / sqrt(lora_r) instead", within_run="fixed")
    lora_targets: str = flag(
        ",".join(TARGETS),
        "adapt",
        "the matrices that get an adapter; key and value without their half mean those of both",
        within_run="fixed",
    )
    lora_train: str = flag(
        "",
        "adapt",
        "trained in full beside the adapter: ln (LayerNorms), vectors (x_*, w0, a0, v0, k_k, k_a, r_k), or both",
        within_run="fixed",
    )
    train_type: str = flag(
        "none",
        "adapt",
        "state: train the initial state of every block, and no weights",
        choices=TRAIN_TYPES,
        within_run="fixed",
    )
    quant: str = flag(
        "none",
        "adapt",
        "keep the six large matrices of a block in 8 or 4 bits, frozen; for adapters and tuned states",
        choices=QUANTISATIONS,
        within_run="fixed",
    )

    # pictures and sounds: an encoder and a projector in front of the model
    encoder: str = flag(
        "",
        "media",
        "reads the pictures or sounds of conversations: patches (pictures) or logmel (sounds), small and trained from "
        "their beginning, or hf:FOLDER, a model of transformers; empty: none",
        within_run="fixed",
    )
    projector: str = flag(
        "mlp",
        "media",
        "from the encoder's width to the model's: linear; mlp (two layers); gated (as in VisualRWKV)",
        choices=("linear", "mlp", "gated"),
        within_run="fixed",
    )
    train_parts: str = flag(
        "",
        "media",
        "what is trained: a list of projector, encoder, and one of model, lora (the adapter of --peft), state; empty: "
        "projector,encoder,model, with hf:FOLDER projector",
        within_run="fixed",
    )
    load_projector: str = flag(
        "",
        "media",
        "projector, and encoder where it was trained, to start from: the folder of a run with --encoder; empty: new",
        within_run="free",
    )
    media_folder: str = flag(
        "", "media", "folder of the files that conversations name; empty: that of --data_file", within_run="free"
    )
    media_tokens: int = flag(
        0,
        "media",
        "tokens of a picture (a square number) or sound, to which the encoder's are pooled; 0: as many as it gives",
        at_least=0,
        below=1 << 16,
        within_run="fixed",
    )
    image_size: str = flag(
        "64",
        "media",
        "patches: side of the pictures, or height x width such as 24x56; others are scaled to fit",
        within_run="fixed",
    )
    patch_size: int = flag(
        8, "media", "patches: side of a patch, a power of two", at_least=2, below=257, within_run="fixed"
    )
    encoder_dim: int = flag(
        128, "media", "patches, logmel: width of a token", at_least=1, below=1 << 16, within_run="fixed"
    )
    max_seconds: float = flag(
        30.0, "media", "longest sound; a conversation with a longer one is left out", at_least=0, within_run="fixed"
    )
    broken_media: str = flag(
        "drop",
        "media",
        "a file that is missing or damaged: leave its conversation out and list it, or stop with an error",
        choices=("drop", "stop"),
        within_run="free",
    )
    cache_features: bool = flag(
        False,
        "media",
        "1: compute what a frozen encoder makes of each file once, and keep it on the disk",
        within_run="free",
    )
    media_workers: int = flag(
        -1,
        "media",
        "processes that decode files besides the training; -1: with a GPU up to eight, else none",
        at_least=-1,
        below=257,
        within_run="free",
    )

    # length, batch size and learning rate. A run counts samples, not steps: its batch size may change.
    micro_bsz: int = flag(12, "length", "samples per device and micro step", at_least=1)
    accumulate_grad_batches: int = flag(1, "length", "micro steps per optimizer step", at_least=1)
    my_exit_tokens: int = flag(
        0,
        "length",
        "positions to train on (tokens; in rows of conversations also padding); the cosine ends there; "
        "0: --epochs times the data",
        at_least=0,
        below=MAX_TOKENS,
    )
    epochs: float = flag(
        1.0,
        "length",
        "passes over the data, if --my_exit_tokens is not given",
        at_least=0,
        below=1e6,
        within_run="free",
    )
    train_minutes: float = flag(
        0.0,
        "length",
        "train for about so many minutes: the number of tokens follows from the speed measured at the start, at least "
        "--my_exit_tokens, at most --epochs times the data; 0: not",
        at_least=0,
        below=1e6,
        within_run="free",
    )
    epoch_steps: int = flag(
        0,
        "length",
        f"optimizer steps per mini-epoch (one line of the log); 0: {MINI_EPOCH_SAMPLES} samples",
        at_least=0,
    )
    epoch_save: int = flag(5, "length", "write rwkv-N.pth every this many mini-epochs", at_least=1)
    epoch_begin: int = flag(
        0,
        "length",
        "with --load_model: the mini-epoch at which training begins; must lie within the run",
        at_least=0,
        within_run="free",
    )
    lr_init: float = flag(6e-4, "length", "learning rate at the start", at_least=0)
    lr_final: float = flag(1e-5, "length", "learning rate at the end of the cosine", at_least=0)
    warmup_steps: int = flag(
        -1,
        "length",
        "steps of linear warm-up at the start of the run; -1: none. Resuming from rwkv-N.pth without a full state: "
        "at least 10 more",
        at_least=-1,
    )

    # optimizer: RWKV-LM's defaults. Its eps is far below the usual 1e-8, which would damp the updates of parameters
    # with tiny gradients.
    beta1: float = flag(0.9, "optimizer", "Adam: decay rate of the first moment", at_least=0, below=1)
    beta2: float = flag(0.99, "optimizer", "Adam: decay rate of the second moment", at_least=0, below=1)
    adam_eps: float = flag(1e-18, "optimizer", "Adam: added to the square root of the second moment", at_least=0)
    weight_decay: float = flag(0.0, "optimizer", "decoupled weight decay of the large matrices", at_least=0)
    grad_clip: float = flag(1.0, "optimizer", "maximum global gradient norm; 0: off", at_least=0)

    # memory and speed: how a step is computed, not what it computes, hence free
    grad_cp: bool = flag(
        False,
        "speed",
        "1: gradient checkpointing: recompute activations in the backward pass to save memory",
        within_run="free",
    )
    head_chunk: int = flag(
        0,
        "speed",
        "rows of logits in memory at once: 4096 saves memory with a large vocabulary; 0: all",
        at_least=0,
        within_run="free",
    )
    chunk_ctx: int = flag(
        0,
        "speed",
        "compute a sample in pieces of this many tokens, with the memory of one piece and the gradient of the whole; "
        "0: in one",
        at_least=0,
        within_run="free",
    )
    bptt: int = flag(
        -1,
        "speed",
        "with --chunk_ctx: gradients connect this many pieces at the end of a sample, across the borders between them; "
        "-1: all; 1: across none, truncated as in RWKV-PEFT",
        at_least=-1,
    )
    kernel: str = flag("auto", "speed", "implementation of the recurrence", choices=KERNELS, within_run="free")
    # not a boolean: old scripts pass 0 or 1, and without it the device decides (RunConfig.compiles)
    compile: str = flag(
        "auto",
        "speed",
        "fuse elementwise operations with torch.compile; auto: on for a GPU, off on a CPU",
        choices=("auto", "0", "1"),
        within_run="free",
    )
    cuda_graph: str = flag(
        "auto",
        "speed",
        "start the kernels of a step together, as a CUDA graph; auto: where one GPU trains on rows of one length",
        choices=("auto", "on", "off"),
        within_run="free",
    )
    profile: int = flag(
        0,
        "speed",
        "profile this many steps: writes profile.json.gz for ui.perfetto.dev and prints the ten slowest operations",
        at_least=0,
        within_run="free",
    )

    # hardware: free too, except the precision, which changes the rounding of every step
    accelerator: str = flag(
        "auto",
        "hardware",
        "device to train on: auto (a GPU, or the CPU), cpu, gpu, mps, xpu, or another name of torch.accelerator",
        within_run="free",
    )
    # text, because of "auto"
    devices: str = flag("1", "hardware", 'processes per node, one per device; "auto": all devices', within_run="free")
    # text, because of "2:4"
    num_nodes: str = flag(
        "1",
        "hardware",
        "number of nodes; FEWEST:MOST: the run goes on while nodes leave and join, with the global batch of MOST",
        within_run="free",
    )
    rdzv_endpoint: str = flag(
        "",
        "hardware",
        "HOST:PORT of one of several nodes, where they meet; default: MASTER_ADDR and MASTER_PORT of the environment",
        within_run="free",
    )
    dist_timeout: int = flag(
        600,
        "hardware",
        "seconds that processes wait for each other in one collective operation before the run fails or starts again",
        at_least=10,
        within_run="free",
    )
    max_restarts: int = flag(
        3,
        "hardware",
        "several processes: how often they start again from the newest state when one dies, hangs or fails",
        at_least=0,
        within_run="free",
    )
    precision: str = flag(
        "",
        "hardware",
        "default: bf16 on a GPU, fp32 on a CPU (bf16 if a short measurement finds it much faster)",
        choices=("", *PRECISIONS),
    )
    strategy: str = flag(
        "auto", "hardware", "how several processes share the work", choices=STRATEGIES, within_run="free"
    )
    context_parallel: int = flag(
        1,
        "hardware",
        "so many processes share each sample, with one part of its context each",
        at_least=1,
        within_run="free",
    )
    ds_bucket_mb: int = flag(200, "hardware", "DeepSpeed: bucket size in MB", at_least=1, within_run="free")

    # logging
    wandb: str = flag(
        "",
        "logging",
        "Weights & Biases project; empty: off. Without a login the run is recorded offline",
        within_run="free",
    )
    logger: str = flag(
        "", "logging", "an additional log in --proj_dir", choices=("", "tensorboard", "csv"), within_run="free"
    )
    # text, not a boolean: saved settings of earlier runs hold "True"
    enable_progress_bar: str = flag(
        "True",
        "logging",
        "the live progress line",
        choices=("True", "False", "true", "false", "1", "0"),
        within_run="free",
    )
