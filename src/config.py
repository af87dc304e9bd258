"""Every setting of the project, once: its type, default, meaning and check, and the sizes derived from it.

`ModelConfig` is what a model needs to be built, `RunConfig` is what a run needs; the command line (cli.py), the
table of flags in docs/flags.md and the settings kept in `run.json` are all made from these fields. Nothing heavy is imported here, so
that `train.py --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from src.errors import UserError

MOST_TOKENS = 10**18  # of a run: a larger number is a slip of the finger, and sums of them would soon pass 64 bits
KERNELS = ("auto", "recurrent", "chunked", "reference")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
STRATEGIES = (
    "auto",
    "ddp",
    *(f"deepspeed_stage_{stage}{offload}" for stage in (1, 2, 3) for offload in ("", "_offload")),
)
MINI_EPOCH_SAMPLES = 40320  # 8!: divisible by many batch sizes
GROUPS = {  # the topics of `train.py --help`, in this order
    "run": "the run: where it lives, what it starts from",
    "data": "data",
    "model": "model",
    "length": "length, batch and learning rate",
    "optimizer": "optimizer",
    "speed": "memory and speed",
    "hardware": "hardware",
    "logging": "what is shown and kept",
}


VAL_EVERY = re.compile(r"(\d+) *(steps?)?")


def low_rank_size(factor: float, n_embd: int, head_size: int = 64) -> int:
    """Default inner size D of a low-rank product: max(32, 32 * round(f * sqrt(C) / 32)).

    f is 2.5 for decay and in-context learning rate, 1.7 for the value residual, 5 for the gate; pass `head_size` for the first
    three, which grow with N / 64 when N > 64. Python's round (half to even) is part of the formula: C = 1024 gives 64.
    """
    scale = max(1.0, head_size / 64)
    return max(32, 32 * round(factor * scale * math.sqrt(n_embd) / 32))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of an RWKV-7 model. A size given as 0 is worked out here, so the fields of a built config are the real ones.

    Raises ValueError naming the flag when the sizes can't make a model.
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int = 64
    dim_ffn: int = 0
    d_decay_lora: int = 0
    d_aaa_lora: int = 0
    d_mv_lora: int = 0
    d_gate_lora: int = 0
    kernel: str = "auto"
    grad_cp: bool = False

    def __post_init__(self) -> None:
        faults = [
            f"--{name} {getattr(self, name)}: expected a whole number of at least 1"
            for name in ("n_layer", "n_embd", "vocab_size", "head_size")
            if getattr(self, name) < 1
        ]
        faults += [
            f"--{name} {getattr(self, name)}: expected 0 (worked out from n_embd) or a positive size"
            for name in ("dim_ffn", "d_decay_lora", "d_aaa_lora", "d_mv_lora", "d_gate_lora")
            if getattr(self, name) < 0
        ]
        if self.head_size >= 1 and self.head_size % 16:
            faults.append(f"--head_size {self.head_size}: expected a multiple of 16 (64 is what released models have)")
        elif self.n_embd >= 1 and self.head_size >= 1 and self.n_embd % self.head_size:
            below = self.n_embd // self.head_size * self.head_size
            near = f"{below} or {below + self.head_size}" if below else f"{self.head_size}"
            faults.append(
                f"--n_embd {self.n_embd}: expected a multiple of --head_size {self.head_size}, for example {near}"
            )
        if self.kernel not in KERNELS:
            faults.append(f"--kernel {self.kernel}: expected one of {', '.join(KERNELS)}")
        if faults:
            raise UserError("\n".join(faults))
        derived = {
            "dim_ffn": 4 * self.n_embd,
            "d_decay_lora": low_rank_size(2.5, self.n_embd, self.head_size),
            "d_aaa_lora": low_rank_size(2.5, self.n_embd, self.head_size),
            "d_mv_lora": low_rank_size(1.7, self.n_embd, self.head_size),
            "d_gate_lora": low_rank_size(5, self.n_embd),
        }
        for name, size in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, size)

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @property
    def title(self) -> str:
        return f"L{self.n_layer}-D{self.n_embd}"


def flag(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
    alone: float | None = None,
) -> Any:
    """A field of RunConfig: default, topic, meaning, what values it takes, and what it means without one (None: it needs one)."""
    return dataclasses.field(
        default=default,
        metadata={
            "group": group,
            "help": help,
            "choices": choices,
            "at_least": at_least,
            "below": below,
            "alone": alone,
        },
    )


@dataclass
class RunConfig:
    """The flags of train.py. `faults()` lists what is wrong with the values by themselves; what depends on data, weights
    or the machine is checked where those are read."""

    # the run
    train_stage: int = flag(
        0,
        "run",
        "1: write rwkv-init.pth and stop; 0, 2, 3: train, and go on where a run in --proj_dir stopped. A new run starts from "
        "--load_model, else with 0 from new weights, with 2 or 3 from rwkv-init.pth, which must be there",
        at_least=0,
        below=4,
    )
    plan: float = flag(
        -1.0,
        "run",
        "print parameters, memory per device (of a GPU in bf16, unless --accelerator cpu), steps and, given the tokens per second of all "
        "processes, the time; then stop",
        at_least=-1,
        alone=0.0,
    )
    check: int = flag(
        0,
        "run",
        "look whether the run would fit and work: software, kernel, data, memory, disk, time; then stop",
        at_least=0,
        below=2,
        alone=1,
    )
    dry_run: int = flag(
        0, "run", "rehearse: take two real training steps, save nothing, stop", at_least=0, below=2, alone=1
    )
    proj_dir: str = flag("out", "run", "folder of the run: weights, logs, settings")
    load_model: str = flag("", "run", 'weights to start from (.pth); "0" or empty: none')
    load_partial: int = flag(
        0, "run", "1: parameters that the weights file lacks stay as initialised", at_least=0, below=2
    )
    restart: int = flag(
        0, "run", "1: begin again from the initial weights; what is there moves to previous-k/", at_least=0, below=2
    )
    save_minutes: float = flag(
        15.0,
        "run",
        "minutes between two saves of the full state, besides those at saved mini-epochs and stops; 0: only those",
        at_least=0,
    )
    keep_resume: int = flag(2, "run", "full states that are kept", at_least=1)
    time_limit: float = flag(
        0.0, "run", "minutes until the machine is taken away: save and stop in time; 0: none", at_least=0
    )
    max_bad_steps: int = flag(
        3, "run", "after so many steps in a row without a finite gradient, go back and skip their samples", at_least=1
    )
    random_seed: int = flag(
        -1, "run", "seed of everything drawn; -1: another one each time (it is printed)", at_least=-1, below=2**32
    )

    # data
    data_file: str = flag("", "data", "binidx data, as X, X.bin or X.idx; for sft a jsonl of conversations")
    data_type: str = flag(
        "binidx",
        "data",
        "binidx: pretraining on token files; sft: fine-tuning on conversations (jsonl)",
        ("binidx", "sft"),
    )
    tokenizer: str = flag("", "data", 'tokenizer of the data: "world" or a Hugging Face folder; kept with the run')
    vocab_size: int = flag(
        0, "data", "rows of the embedding; 0: from the tokenizer, the weights or the data", at_least=0
    )
    ctx_len: int = flag(1024, "data", "context length: tokens per sample", at_least=1)
    magic_prime: int = flag(
        0, "data", "fixes the order in which windows of the data are read; 0: worked out from the data", at_least=0
    )
    sft_loss: str = flag(
        "answers",
        "data",
        "sft: which tokens count for the loss; all: prompts and padding too, as some published runs did",
        ("answers", "all"),
    )
    packing: int = flag(
        1, "data", "sft: 1: conversations share rows of ctx_len; 0: one a row, padded", at_least=0, below=2
    )
    truncate: str = flag(
        "end",
        "data",
        "sft: a conversation longer than ctx_len: cut its end, drop it, or stop",
        ("end", "drop", "error"),
    )
    val_data_file: str = flag(
        "",
        "data",
        "held-out data, like --data_file: its loss is measured on the way, and its best weights are kept; heldout: the "
        "part that make_data.py --holdout kept aside, DATA-heldout",
    )
    val_every: str = flag(
        "1",
        "data",
        'how often the held-out loss is measured: "2": every two mini-epochs; "500steps": every 500 steps; "0": at the end only',
    )
    val_windows: int = flag(
        512, "data", "samples of the held-out data that are looked at, evenly spaced, always the same", at_least=1
    )

    # model
    n_layer: int = flag(6, "model", "number of blocks", at_least=1, below=10_000)
    n_embd: int = flag(512, "model", "width of the model (C)", at_least=1)
    head_size: int = flag(64, "model", "width of a head (N); n_embd is a multiple of it", at_least=1)
    dim_att: int = flag(0, "model", "0 or n_embd: the time mix is as wide as the model", at_least=0)
    dim_ffn: int = flag(0, "model", "hidden width of the channel mix; 0: 4 * n_embd", at_least=0)
    d_decay_lora: int = flag(
        0,
        "model",
        "low-rank size of the decay w, a part of RWKV-7 (not LoRA fine-tuning); 0: by the formula",
        at_least=0,
    )
    d_aaa_lora: int = flag(0, "model", "low-rank size of the in-context learning rate a; 0: by the formula", at_least=0)
    d_mv_lora: int = flag(0, "model", "low-rank size of the value residual; 0: by the formula", at_least=0)
    d_gate_lora: int = flag(0, "model", "low-rank size of the gate g; 0: by the formula", at_least=0)
    my_testing: str = flag("x070", "model", "architecture name, accepted for compatibility; leave it out", ("x070",))

    # length, batch, learning rate
    micro_bsz: int = flag(12, "length", "samples per device and micro step", at_least=1)
    accumulate_grad_batches: int = flag(1, "length", "micro steps per optimizer step", at_least=1)
    my_exit_tokens: int = flag(
        0,
        "length",
        "positions (tokens; in rows of conversations padding too) to train on; the cosine ends there; 0: --epochs times the data",
        at_least=0,
        below=MOST_TOKENS,
    )
    epochs: float = flag(
        1.0, "length", "passes over the data, where --my_exit_tokens is not given", at_least=0, below=1e6
    )
    epoch_steps: int = flag(
        0, "length", f"optimizer steps per mini-epoch (a line of the log); 0: {MINI_EPOCH_SAMPLES} samples", at_least=0
    )
    epoch_save: int = flag(5, "length", "write rwkv-N.pth every this many mini-epochs", at_least=1)
    epoch_begin: int = flag(
        0,
        "length",
        "with --load_model: the mini-epoch that these weights begin; it must lie within the run",
        at_least=0,
    )
    epoch_count: int = flag(0, "length", "accepted for compatibility and ignored: --my_exit_tokens ends the run")
    lr_init: float = flag(6e-4, "length", "learning rate at the start", at_least=0)
    lr_final: float = flag(1e-5, "length", "learning rate at the end of the cosine", at_least=0)
    warmup_steps: int = flag(
        -1,
        "length",
        "steps of linear warm-up at the run's beginning; -1: none. Where rwkv-N.pth goes on without a full state: at least 10 more",
        at_least=-1,
    )

    # optimizer
    beta1: float = flag(0.9, "optimizer", "Adam: decay of the first moment", at_least=0, below=1)
    beta2: float = flag(0.99, "optimizer", "Adam: decay of the second moment", at_least=0, below=1)
    adam_eps: float = flag(1e-18, "optimizer", "Adam: added to the root of the second moment", at_least=0)
    weight_decay: float = flag(0.0, "optimizer", "decoupled decay of the large matrices", at_least=0)
    grad_clip: float = flag(1.0, "optimizer", "largest global gradient norm; 0: off", at_least=0)

    # memory and speed
    grad_cp: int = flag(
        0, "speed", "1: gradient checkpointing: recompute activations in backward, for less memory", at_least=0, below=2
    )
    head_chunk: int = flag(
        0,
        "speed",
        "token rows of logits that exist at once: 4096 saves memory with a large vocabulary; 0: all",
        at_least=0,
    )
    kernel: str = flag("auto", "speed", "how the recurrence is computed", KERNELS)
    compile: int = flag(0, "speed", "1: fuse the elementwise work with torch.compile", at_least=0, below=2)

    profile: int = flag(
        0,
        "speed",
        "record so many steps: profile.json.gz for ui.perfetto.dev, and the ten slowest operations",
        at_least=0,
    )

    # hardware
    accelerator: str = flag("auto", "hardware", "where to train", ("auto", "cpu", "gpu", "cuda"))
    devices: str = flag("1", "hardware", 'processes per node, one per device; "auto": all')
    num_nodes: int = flag(1, "hardware", "machines", at_least=1)
    precision: str = flag(
        "",
        "hardware",
        "default: bf16 on a GPU, fp32 on a CPU (bf16 where a short measurement finds it much faster)",
        ("", *PRECISIONS),
    )
    strategy: str = flag("auto", "hardware", "how several processes share the work", STRATEGIES)
    ds_bucket_mb: int = flag(200, "hardware", "DeepSpeed: bucket size in MB", at_least=1)

    # logging
    wandb: str = flag("", "logging", "Weights & Biases project; empty: off. Without a login it is kept offline")
    logger: str = flag("", "logging", "a second log of everything, in --proj_dir", ("", "tensorboard", "csv"))
    enable_progress_bar: str = flag("True", "logging", "the live line", ("True", "False", "true", "false", "1", "0"))

    def faults(self) -> list[str]:
        """What is wrong with these values, one sentence a flag; empty when nothing is."""
        found = [fault for field in dataclasses.fields(self) if (fault := self._fault_of(field))]
        found += self._faults_together()
        try:
            self.model_config(max(1, self.vocab_size))
        except ValueError as error:
            told = {words.split(" ")[0] for words in found}
            found += [words for words in str(error).splitlines() if words.split(" ")[0] not in told]
        return found

    def _fault_of(self, field: dataclasses.Field[Any]) -> str:
        """What is wrong with one value by itself: its choices and bounds; '' when nothing is."""
        value, meta = getattr(self, field.name), field.metadata
        if isinstance(value, float) and not math.isfinite(value):
            return f"--{field.name} {value}: expected a finite number"
        if meta["choices"] and value not in meta["choices"]:
            return f"--{field.name} {value!r}: expected one of {', '.join(c for c in meta['choices'] if c)}"
        if meta["at_least"] is not None and value < meta["at_least"]:
            return f"--{field.name} {value}: expected at least {meta['at_least']}"
        if meta["below"] is not None and value >= meta["below"]:
            limit = f"less than {meta['below']}" if field.type == "float" else f"at most {meta['below'] - 1}"
            return f"--{field.name} {value}: expected {limit}"
        return ""

    def _faults_together(self) -> Iterator[str]:
        """What is wrong with a value's form, or with several flags beside each other."""
        if not self.proj_dir:
            yield "--proj_dir: empty; expected a folder for the run"
        if self.dim_att not in (0, self.n_embd):
            yield (
                f"--dim_att {self.dim_att}: expected --n_embd {self.n_embd} (the time mix is as wide as the model); leave the flag out"
            )
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) >= 1):
            yield f'--devices {self.devices!r}: expected a number of processes or "auto"'
        if not VAL_EVERY.fullmatch(self.val_every):
            yield (
                f'--val_every {self.val_every!r}: expected a number of mini-epochs, as in "2", or of steps, as in "500steps"'
            )
        if self.lr_final > self.lr_init:
            yield (
                f"--lr_final {self.lr_final}: expected at most --lr_init {self.lr_init} (the cosine falls from lr_init to lr_final)"
            )
        if self.lr_init == 0 and self.train_stage != 1:
            yield "--lr_init 0: nothing would be learned; expected more than 0, for example 6e-4"
        if self.data_type == "sft" and not self.tokenizer:
            yield (
                "--tokenizer: missing; --data_type sft needs that of the model: a folder with a chat template, or world"
            )
        if self.train_stage == 1 and self.load_model:
            yield (
                f"--load_model {self.load_model}: --train_stage 1 draws new weights; leave it out, or use --train_stage 0"
            )
        if self.epochs == 0 and not self.my_exit_tokens:
            yield "--epochs 0: nothing would be trained; expected more than 0, or --my_exit_tokens"
        if self.train_stage != 1 and not self.data_file and self.plan < 0:
            expected = (
                "a jsonl of conversations"
                if self.data_type == "sft"
                else "binidx data, which data/make_data.py makes from a jsonl (sh demo-training-run.sh trains on demo data)"
            )
            yield f"--data_file: missing; expected {expected}"
        if self.epoch_begin and not self.load_model:
            yield f"--epoch_begin {self.epoch_begin}: has a meaning with --load_model only; leave it out"
        alone = [
            name for name, on in (("plan", self.plan >= 0), ("check", self.check), ("dry_run", self.dry_run)) if on
        ]
        if len(alone) > 1:
            yield f"{' and '.join(f'--{name}' for name in alone)}: each does something and stops; give one of them"
        if self.dry_run and self.train_stage == 1:
            yield (
                "--dry_run takes steps, which --train_stage 1 does not; use --train_stage 0, or 3 for what is in --proj_dir"
            )
        if self.dry_run and self.profile:
            yield f"--profile {self.profile} writes a file, --dry_run keeps nothing; leave one out"
        if self.load_partial and not self.load_model and self.train_stage < 2:
            yield "--load_partial 1: has a meaning with --load_model only; leave it out"
        if self.my_exit_tokens and self.epochs not in (0, 1):
            yield (
                f"--epochs {self.epochs} and --my_exit_tokens {self.my_exit_tokens} both say how long the run is; leave one out"
            )

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that these flags describe, with the vocabulary found for the run."""
        return ModelConfig(
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            vocab_size=vocab_size,
            head_size=self.head_size,
            dim_ffn=self.dim_ffn,
            d_decay_lora=self.d_decay_lora,
            d_aaa_lora=self.d_aaa_lora,
            d_mv_lora=self.d_mv_lora,
            d_gate_lora=self.d_gate_lora,
            kernel=self.kernel,
            grad_cp=bool(self.grad_cp),
        )
