"""Weights & Biases, TensorBoard or csv files through Lightning's loggers, under the names that existing RWKV dashboards plot."""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from src import run_folder
from src.config import RunConfig
from src.errors import UserError
from src.training.console import log
from src.training.reporting.environment import git_commit
from src.training.reporting.sink import (
    UPDATE_GROUPS,
    GeneratedSample,
    MiniEpochReport,
    Sink,
    StepReport,
    ValidationReport,
)

# the first row is what RWKV training scripts have always logged
STEP_NAMES = ("loss", "lr", "wd", "Gtokens", "kt/s", "tokens", "grad norm", "largest logit", "MFU", "memory GiB")
UPDATE_NAMES = tuple(f"update ratio/{group}" for group in UPDATE_GROUPS)
OTHER_NAMES = ("val loss", "mini-epoch loss")
SAMPLE_TABLE = "samples"
TIME_SHARE = (
    0.003  # of the run that logging steps may take: where steps are short, some are left out (metrics.csv has all)
)


class LoggerSink(Sink):
    """Hands reports to one of Lightning's loggers. Its step is the run's, so that a continued run continues its curves."""

    def __init__(self, logger: Logger, weight_decay: float) -> None:
        self.logger, self.weight_decay = logger, weight_decay
        self._step = 0
        self._began, self._spent = time.perf_counter(), -math.inf  # the first one opens things, once

    def step(self, report: StepReport) -> None:
        begin = time.perf_counter()
        self._step = report.step
        if self._spent > TIME_SHARE * (begin - self._began) and not report.update_ratios:
            return
        shown = {
            "loss": report.loss,
            "lr": report.lr,
            "wd": self.weight_decay,
            "kt/s": report.tokens_per_second / 1e3,
            **_axes(report.tokens),
            "grad norm": report.grad_norm,
            "largest logit": report.largest_logit,
            "MFU": report.mfu,
            "memory GiB": report.memory_gib,
            **{f"update ratio/{group}": ratio for group, ratio in report.update_ratios.items()},
        }
        self._log({name: value for name, value in shown.items() if not math.isnan(value)})
        self._spent = max(0.0, self._spent + time.perf_counter() - begin)

    def mini_epoch(self, report: MiniEpochReport) -> None:
        self._log({"mini-epoch loss": report.loss, **_axes(report.last.tokens)})
        self.logger.save()

    def validation(self, report: ValidationReport) -> None:
        self._step = max(0, report.steps - 1)
        self._log({"val loss": report.loss, **_axes(report.tokens)})

    def samples(self, samples: list[GeneratedSample]) -> None:
        if isinstance(self.logger, WandbLogger):
            import wandb

            table = wandb.Table(["prompt", "the model goes on", "the data goes on"], _rows(samples))
            self.logger.experiment.log({SAMPLE_TABLE: table}, step=self._step)
        elif isinstance(self.logger, TensorBoardLogger):
            for i, (prompt, answer, in_data) in enumerate(_rows(samples)):
                text = f"**{prompt}** {answer}\n\nIn the data: {in_data}"
                self.logger.experiment.add_text(f"{SAMPLE_TABLE}/{i}", text, self._step)

    def close(self) -> None:
        self.logger.save()
        self.logger.finalize("finished")
        if isinstance(self.logger, WandbLogger):
            self.logger.experiment.finish()

    def _log(self, values: dict[str, float]) -> None:
        if isinstance(self.logger, WandbLogger):
            # with the run's own step too, which Lightning only keeps in this column
            self.logger.experiment.log({**values, "trainer/global_step": self._step}, step=self._step)
        else:
            self.logger.log_metrics(values, step=self._step)


def _axes(tokens: int) -> dict[str, float]:
    """What dashboards draw the others against."""
    return {"Gtokens": tokens / 1e9, "tokens": tokens}


def _rows(samples: list[GeneratedSample]) -> list[list[str]]:
    return [[sample.prompt, sample.answer, sample.in_data] for sample in samples]


def open_loggers(config: RunConfig, proj_dir: Path, settings: dict[str, Any]) -> list[Sink]:
    """What --wandb and --logger ask for. Raises ValueError when a package is missing."""
    loggers: list[Logger] = []
    if config.wandb:
        loggers.append(_open_wandb(config.wandb, proj_dir, settings))
    if config.logger == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("--logger tensorboard: the package tensorboard is missing; pip install tensorboard")
        loggers.append(TensorBoardLogger(proj_dir, name="tensorboard", version=""))
    if config.logger == "csv":
        loggers.append(CSVLogger(proj_dir, name="csv"))  # a folder for each start: it would empty one that is there
    return [LoggerSink(logger, config.weight_decay) for logger in loggers]


def _open_wandb(project: str, proj_dir: Path, settings: dict[str, Any]) -> WandbLogger:
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {project}: the package wandb is missing; pip install wandb, or leave the flag out")
    remembered = run_folder.read_run(proj_dir)
    identity = remembered.setdefault("wandb_id", secrets.token_hex(4))
    run_folder.write_run(proj_dir, remembered)
    mode = _wandb_mode(project, proj_dir)
    if mode == "offline":
        log(f"{'wandb':>12}  offline; `wandb sync {proj_dir}/wandb/offline-run-*-{identity}` sends it")
    logger = WandbLogger(
        project=project,
        name=proj_dir.name,
        id=identity,
        resume="allow",
        mode=mode,
        save_dir=str(proj_dir),
        config={**settings, "git_commit": git_commit()},
    )
    import wandb

    try:
        _ = logger.experiment  # opened now, before any training time is spent
    except wandb.Error as error:
        raise UserError(
            f"--wandb {project}: {error}; `wandb login` again, or set WANDB_MODE=offline to keep what is logged here"
        ) from error
    return logger


def _wandb_mode(project: str, proj_dir: Path) -> str:
    """online | offline | disabled: as WANDB_MODE says, else offline where no login is known."""
    if mode := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if _has_login():
        return "online"
    log(f"--wandb {project}: no login is known here (wandb login), so what is logged stays in {proj_dir / 'wandb'}")
    return "offline"


def _has_login() -> bool:
    """Whether wandb would find a key: in the environment, or where `wandb login` has put it."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = (urlsplit(wandb.setup().settings.base_url).hostname or "", "api.wandb.ai")
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
        return any(logins.authenticators(host) for host in hosts)
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError) as error:
        log(f"note: the file that keeps wandb's login can't be read: {error}")
        return False
