"""One run from settings to trained weights: check everything, say what will happen, fit, show the result."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from src.config import ModelConfig, RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.pretrain import PretrainDataset
from src.dataset.sampling import check_magic_prime, magic_prime
from src.inference.evaluate import heldout_loss
from src.model import RWKV7
from src.model.weights import fit_weights, read_weights
from src.ops.wkv7 import describe_kernel
from src.training import checkpoint, plot
from src.training.callbacks import SaveWeights, SetLearningRate, StopOnSignal
from src.training.checkpoint import Start
from src.training.module import TrainingModule
from src.training.report import Dashboard, MetricsFile, ProgressLine, Reporter, Sink, TrainLog
from src.training.say import say, say_error
from src.training.schedule import RunLength, learning_rate
from src.training.start import build_model, check_ids, find_vocab_size, put_aside_other_run
from src.training.strategy import Hardware, choose_hardware

STOPPED_EXIT_CODE = 130  # what shells report for Ctrl-C


def run(config: RunConfig, notes: list[str]) -> int:
    """Carry out `train.py` with these settings. The exit code: 0 done, 1 a failure, 2 a mistake in the call, 130 stopped."""
    _quiet_libraries()
    try:
        hardware = choose_hardware(config)
        for note in (*notes, *hardware.notes):
            say(f"note: {note}")
        proj_dir = _writable_folder(config.proj_dir)
        return (
            _write_init(config, hardware, proj_dir) if config.train_stage == 1 else _train(config, hardware, proj_dir)
        )
    except ValueError as error:
        if not _is_for_users(error):
            raise
        say_error(str(error))
        return 2
    except OSError as error:
        say_error(str(error))
        return 1
    except KeyboardInterrupt:
        say_error("stopped at once; the same command continues from the newest saved weights")
        return STOPPED_EXIT_CODE


def _is_for_users(error: ValueError) -> bool:
    """Our own ValueErrors explain themselves; one that a library raised in the middle of training needs its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(Path(__file__).parents[1]) in frame.tb_frame.f_code.co_filename


# ---- stage 1 ----------------------------------------------------------------------------------------------------------------


def _write_init(config: RunConfig, hardware: Hardware, proj_dir: Path) -> int:
    target = proj_dir / checkpoint.INIT
    model_config = config.model_config(find_vocab_size(config, None))
    if target.exists():
        with torch.device("meta"):
            like = RWKV7(model_config)
        fit_weights(read_weights(target), like, source=str(target))
        say(f"{target} is there already and fits; delete it to draw other initial weights")
        return 0
    seed = _seed(config)
    model = RWKV7(model_config).to(_init_dtype(config))
    checkpoint.save_weights(model, target)
    say(f"wrote {target}: {model_config.title}, {_count(model):,} parameters, seed {seed}")
    return 0


def _init_dtype(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.precision in ("fp32", "tf32") else torch.bfloat16


# ---- training ---------------------------------------------------------------------------------------------------------------


def _train(config: RunConfig, hardware: Hardware, proj_dir: Path) -> int:
    data = MMapIndexedDataset(config.data_file)
    prime = config.magic_prime or magic_prime(data.n_tokens, config.ctx_len)
    check_magic_prime(prime, data.n_tokens, config.ctx_len)
    held_out = MMapIndexedDataset(config.val_data_file) if config.val_data_file else None
    global_batch = config.micro_bsz * config.accumulate_grad_batches * hardware.world_size
    length = RunLength(config.my_exit_tokens or data.n_tokens, config.ctx_len, global_batch, config.epoch_steps)

    if rank_zero_only.rank == 0:
        put_aside_other_run(config, proj_dir)
    start = checkpoint.find_start(proj_dir, config.train_stage, config.load_model, config.epoch_begin)
    if start.complete:
        say(_words_for_complete(proj_dir))
        return 0
    first_step = 0 if start.mini_epoch == 0 else length.step_after(start.mini_epoch - 1)

    seed = _seed(config)
    model = build_model(config, hardware, start)
    check_ids(data, model.config.vocab_size, config)
    settings = _settings(config, model.config, hardware, length, prime, seed)
    say(_summary(config, model, hardware, data, length, prime, start, first_step))
    _remember(config, proj_dir, settings)
    if first_step >= length.steps:
        checkpoint.save_weights(model, proj_dir / checkpoint.FINAL)
        say(f"every step is done: wrote {proj_dir / checkpoint.FINAL}")
        return 0

    stop = _fit(config, hardware, proj_dir, model, data, prime, length, start, first_step, settings)
    if stop.received:
        if rank_zero_only.rank == 0:
            _picture(proj_dir)
        say(
            "stopped; the same command continues from the newest saved weights (or from the start, if none are saved yet)"
        )
        return STOPPED_EXIT_CODE
    if rank_zero_only.rank == 0:
        picture = _picture(proj_dir)
        say(f"done: {proj_dir / checkpoint.FINAL}, {proj_dir / checkpoint.LOG}, {picture}")
        if held_out is not None:
            model.eval()
            result = heldout_loss(model, held_out, config.ctx_len, max_windows=512, micro_bsz=config.micro_bsz)
            say(f"held-out loss {result.loss:.4f} over {result.tokens:,} tokens of {config.val_data_file}")
    return 0


def _fit(
    config: RunConfig,
    hardware: Hardware,
    proj_dir: Path,
    model: RWKV7,
    data: MMapIndexedDataset,
    prime: int,
    length: RunLength,
    start: Start,
    first_step: int,
    settings: dict[str, Any],
) -> StopOnSignal:
    samples = (length.steps - first_step) * length.global_batch // hardware.world_size  # of one rank

    def make_dataset(rank: int, world_size: int) -> PretrainDataset:
        return PretrainDataset(
            config.data_file,
            ctx_len=config.ctx_len,
            prime=prime,
            first_sample=first_step * length.global_batch,
            n_samples=samples,
            micro_bsz=config.micro_bsz,
            rank=rank,
            world_size=world_size,
            vocab_size=model.config.vocab_size,
        )

    if config.compile:
        for block in model.blocks:
            block.compile()
    stop = StopOnSignal()
    sinks = _sinks(config, proj_dir, length, start, first_step, settings) if rank_zero_only.rank == 0 else []
    callbacks = [
        stop,
        SetLearningRate(_schedule(config, length, restarted_at=first_step), first_step),
        Reporter(length, first_step, sinks),
        SaveWeights(length, first_step, config.epoch_save, proj_dir),
    ]
    trainer = pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=hardware.strategy,
        precision="32-true",  # ours: parameters have their dtype already, the optimizer keeps fp32 masters
        max_epochs=1,
        max_steps=length.steps - first_step,
        accumulate_grad_batches=config.accumulate_grad_batches,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=proj_dir,
    )
    trainer.fit(TrainingModule(model, config, hardware, make_dataset))
    return stop


def _schedule(config: RunConfig, length: RunLength, restarted_at: int) -> Callable[[int], float]:
    def at(step: int) -> float:
        return learning_rate(
            step,
            lr_init=config.lr_init,
            lr_final=config.lr_final,
            warmup_steps=max(0, config.warmup_steps),
            exit_tokens=length.exit_tokens,
            tokens_per_step=length.tokens_per_step,
            restarted_at=restarted_at,
        )

    return at


def _sinks(
    config: RunConfig, proj_dir: Path, length: RunLength, start: Start, first_step: int, settings: dict[str, Any]
) -> list[Sink]:
    live = config.enable_progress_bar.lower() in ("true", "1") and sys.stdout.isatty()
    sinks: list[Sink] = [
        TrainLog(proj_dir / checkpoint.LOG, start.mini_epoch, settings),
        MetricsFile(proj_dir / checkpoint.METRICS, first_step),
        ProgressLine(length, first_step, live),
    ]
    if config.wandb:
        from pytorch_lightning.loggers import WandbLogger

        try:
            logger = WandbLogger(project=config.wandb, name=proj_dir.name, save_dir=str(proj_dir), config=settings)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--wandb {config.wandb}: the package wandb is missing; pip install wandb, or leave the flag out"
            ) from error
        sinks.append(Dashboard(logger, config.weight_decay, length.tokens_per_step))
    return sinks


def _seed(config: RunConfig) -> int:
    seed = config.random_seed if config.random_seed >= 0 else secrets.randbelow(2**31)
    pl.seed_everything(seed, verbose=False)
    return seed


# ---- what is remembered and said --------------------------------------------------------------------------------------------


def _settings(
    config: RunConfig, model_config: ModelConfig, hardware: Hardware, length: RunLength, prime: int, seed: int
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config),
        **dataclasses.asdict(model_config),
        "grad_cp": config.grad_cp,
        "magic_prime": prime,
        "my_exit_tokens": length.exit_tokens,
        "precision": hardware.precision,
        "accelerator": hardware.accelerator,
        "random_seed": seed,
        "global_batch": length.global_batch,
    }


def _remember(config: RunConfig, proj_dir: Path, settings: dict[str, Any]) -> None:
    if rank_zero_only.rank != 0:
        return
    remembered = checkpoint.read_run(proj_dir)
    if "origin" not in remembered:
        origin = checkpoint.origin_weights(proj_dir, config.train_stage, config.load_model)
        remembered["origin"] = checkpoint.fingerprint(origin)
    remembered["settings"] = settings
    remembered["tokenizer"] = config.tokenizer or remembered.get("tokenizer", "")
    folder = Path(config.tokenizer)
    if config.tokenizer and folder.is_dir():  # a model that is moved elsewhere still knows its words
        shutil.copytree(folder, proj_dir / "tokenizer", dirs_exist_ok=True)
    checkpoint.write_run(proj_dir, remembered)


def _summary(
    config: RunConfig,
    model: RWKV7,
    hardware: Hardware,
    data: MMapIndexedDataset,
    length: RunLength,
    prime: int,
    start: Start,
    first_step: int,
) -> str:
    device = "cuda" if hardware.accelerator == "gpu" else "cpu"
    where = torch.cuda.get_device_name() if hardware.accelerator == "gpu" else f"CPU, {torch.get_num_threads()} threads"
    begins = "new weights" if start.weights is None else str(start.weights)
    if first_step:
        begins += f", at step {first_step:,} (mini-epoch {start.mini_epoch}), with a fresh optimizer"
    rows = {
        "model": f"{model.config.title}, {_count(model):,} parameters, vocabulary {model.config.vocab_size:,}",
        "data": f"{config.data_file}, {data.n_tokens:,} tokens, magic prime {prime:,}",
        "run": f"{length.steps:,} steps of {length.global_batch} x {config.ctx_len} tokens, {length.exit_tokens:,} in all",
        "lr": f"{config.lr_init:g} to {config.lr_final:g}",
        "where": f"{where}, {hardware.world_size} process{'es' * (hardware.world_size > 1)}, {hardware.precision}",
        "wkv7": describe_kernel(device, hardware.dtype, model.config.head_size, model.config.kernel),
        "starts from": begins,
        "folder": config.proj_dir,
    }
    return "\n".join(f"{name:>12}  {text}" for name, text in rows.items())


def _words_for_complete(proj_dir: Path) -> str:
    final = proj_dir / checkpoint.FINAL
    return (
        f"the run in {proj_dir} is complete: {final}\n"
        f'  use it:      python -m src.inference.generate {proj_dir} --prompt "..."\n'
        f"  go on:       a new folder that starts from it: --proj_dir NEW --train_stage 0 --load_model {final}\n"
        f"  start over:  move or delete {final} and {proj_dir}/rwkv-[0-9]*.pth (rwkv-init.pth stays), and run the command again"
    )


def _picture(proj_dir: Path) -> Path:
    return plot.loss_curve(proj_dir / checkpoint.METRICS, proj_dir / "loss.png")


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _writable_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--proj_dir {name}: can't be written ({error.strerror or error}); choose a folder of yours"
        ) from error
    return folder


def _quiet_libraries() -> None:
    """Lightning's banners say nothing about a run that the summary doesn't say better."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
