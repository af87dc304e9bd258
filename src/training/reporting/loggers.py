"""Logs a run to Weights & Biases, TensorBoard or csv files, under the names that existing RWKV dashboards plot."""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger, WandbLogger

# The names of what is logged. Those up to "kt/s" are what RWKV training scripts have always logged: dashboards rely on
# them.
STEP_NAMES = ("loss", "lr", "wd", "Gtokens", "kt/s", "tokens", "grad norm", "largest logit", "MFU", "memory GiB")
UPDATE_NAMES = tuple(f"update ratio/{group}" for group in UPDATE_GROUPS)
OTHER_NAMES = ("val loss", "mini-epoch loss")
SAMPLE_TABLE = "samples"
# Share of the run's time that logging steps may take. Where steps are shorter, some are not logged, and `close` prints
# how many; metrics.csv has all of them.
TIME_SHARE = 0.003


class LoggerSink(Sink):
    """Passes reports to one of Lightning's loggers, with the run's own step: a resumed run continues its curves.

    Where logging every step would take more than TIME_SHARE of the time, some steps are left out, and `close` prints
    how many; the last step of a start is always logged. `name` is that of the logger in this message.
    """

    FIRST_STEP = 0  # the number that the run's first step is logged under

    def __init__(self, logger: Logger, weight_decay: float, name: str) -> None:
        self.logger: Any = logger  # the `experiment` of each logger has methods of its own
        self.weight_decay, self.name = weight_decay, name
        self._step = self._steps = self._omitted_steps = 0
        self._omitted: StepReport | None = None  # the newest step, if it was left out
        # -infinity exempts the first call, which opens connections and files
        self._began, self._spent_seconds = time.perf_counter(), -math.inf

    def step(self, report: StepReport) -> None:
        begin = time.perf_counter()
        self._step, self._omitted = report.step + self.FIRST_STEP, None
        self._steps += 1
        # steps with update ratios are always logged: only few steps have these values
        if self._spent_seconds > TIME_SHARE * (begin - self._began) and not report.update_ratios:
            self._omitted = report
            self._omitted_steps += 1
            return
        self._log_step(report)
        self._spent_seconds = max(0.0, self._spent_seconds + time.perf_counter() - begin)

    def _log_step(self, report: StepReport) -> None:
        values = {
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
        self._log({name: value for name, value in values.items() if not math.isnan(value)})

    def _log_last_step(self) -> None:
        """Log the newest step if it was left out: loggers show the values of the last row as the result of a run."""
        if self._omitted is None:
            return
        # A validation between two steps doesn't change it: both are logged under the number of the step before.
        self._step = self._omitted.step + self.FIRST_STEP
        self._log_step(self._omitted)
        self._omitted = None
        self._omitted_steps -= 1

    def mini_epoch(self, report: MiniEpochReport) -> None:
        self._log({"mini-epoch loss": report.loss, **_axes(report.last.tokens)})
        self.logger.save()

    def validation(self, report: ValidationReport) -> None:
        self._step = max(0, report.steps - 1 + self.FIRST_STEP)  # the step that it follows
        self._log({"val loss": report.loss, **_axes(report.tokens)})

    def close(self) -> None:
        self._log_last_step()
        self.logger.save()
        self.logger.finalize("finished")
        if self._omitted_steps:
            log(
                f"{self.name:>12}  {self._omitted_steps:,} of {self._steps:,} steps were left out, because logging is "
                f"limited to {100 * TIME_SHARE:g} % of the time; {run_folder.METRICS} has all of them"
            )

    def _log(self, values: dict[str, float]) -> None:
        self.logger.log_metrics(values, step=self._step)


class TensorBoardSink(LoggerSink):
    """Adds generated samples as text."""

    def samples(self, samples: list[GeneratedSample]) -> None:
        for i, sample in enumerate(samples):
            text = f"**{sample.prompt}** {sample.answer}\n\nIn the data: {sample.in_data}"
            self.logger.experiment.add_text(f"{SAMPLE_TABLE}/{i}", text, self._step)


class WandbSink(LoggerSink):
    """Adds generated samples as a table, and finishes the run at the end."""

    # as in the official trainer, whose curves can then be laid over these step by step
    FIRST_STEP = 1

    def samples(self, samples: list[GeneratedSample]) -> None:
        import wandb

        rows = [[sample.prompt, sample.answer, sample.in_data] for sample in samples]
        table = wandb.Table(["prompt", "the model goes on", "the data goes on"], rows)
        self.logger.experiment.log({SAMPLE_TABLE: table}, step=self._step)

    def close(self) -> None:
        super().close()
        self.logger.experiment.finish()  # Lightning leaves it open and would log the fit after a roll-back into it

    def _log(self, values: dict[str, float]) -> None:
        # wandb's own step is set too: Lightning's logger keeps the number in the column trainer/global_step only
        self.logger.experiment.log({**values, "trainer/global_step": self._step}, step=self._step)


def _axes(tokens: int) -> dict[str, float]:
    """The x axes of dashboards."""
    return {"Gtokens": tokens / 1e9, "tokens": tokens}


def open_loggers(config: RunConfig, proj_dir: Path, settings: dict[str, Any]) -> list[Sink]:
    """The sinks of --wandb and --logger. Raises UserError when a package is missing or wandb refuses."""
    sinks: list[Sink] = []
    if config.wandb:
        sinks.append(WandbSink(_open_wandb(config.wandb, proj_dir, settings), config.weight_decay, "wandb"))
    if config.logger == "tensorboard":
        _require("tensorboard", flag="logger", given="tensorboard")
        from pytorch_lightning.loggers import TensorBoardLogger

        # without a version in the path, a resumed run appends to the same curves
        logger = TensorBoardLogger(proj_dir, name="tensorboard", version="")
        sinks.append(TensorBoardSink(logger, config.weight_decay, "tensorboard"))
    if config.logger == "csv":
        from pytorch_lightning.loggers import CSVLogger

        # a numbered folder for each start: CSVLogger empties an existing one
        sinks.append(LoggerSink(CSVLogger(proj_dir, name="csv"), config.weight_decay, "csv"))
    return sinks


def _require(package: str, *, flag: str, given: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"the package {package} is missing",
            flag=flag,
            given=given,
            advice=f"pip install {package}, or leave the flag out",
        )


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


def _open_wandb(project: str, proj_dir: Path, settings: dict[str, Any]) -> WandbLogger:
    """The logger, connected. One wandb run per folder: its id is kept in run.json."""
    _require("wandb", flag="wandb", given=project)
    record = run_folder.read_run(proj_dir)
    run_id = record.setdefault("wandb_id", secrets.token_hex(4))
    run_folder.write_run(proj_dir, record)
    mode = _wandb_mode(project, proj_dir)
    if mode == "offline":
        log(f"{'wandb':>12}  offline; `wandb sync {proj_dir}/wandb/offline-run-*-{run_id}` uploads it")
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    logger = WandbLogger(
        project=project,
        name=proj_dir.name,
        id=run_id,
        resume="allow",
        mode=mode,
        save_dir=str(proj_dir),
        config={**settings, "git_commit": git_commit()},
    )
    try:
        _ = logger.experiment  # connects now: a mistake is reported before any training time is spent
    except wandb.Error as error:
        raise UserError(
            str(error),
            flag="wandb",
            given=project,
            advice="run `wandb login` again, or set WANDB_MODE=offline to log to this folder only",
        ) from error
    return logger


def _wandb_mode(project: str, proj_dir: Path) -> str:
    """online | offline | disabled: the value of WANDB_MODE, else offline where nobody is logged in."""
    if mode := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)  # wandb's older names
    if _is_logged_in():
        return "online"
    # wandb itself would prompt for a key, or fail where there is no terminal
    log(f"note: --wandb {project}: not logged in (`wandb login`); logging offline to {proj_dir / 'wandb'}")
    return "offline"


def _is_logged_in() -> bool:
    """Whether wandb would find an API key: in the environment, or in the netrc file that `wandb login` writes."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    # the configured server, which may be self-hosted, and the public one
    hosts = (urlsplit(wandb.setup().settings.base_url).hostname or "", "api.wandb.ai")
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
        return any(logins.authenticators(host) for host in hosts)
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError) as error:
        log(f"note: the netrc file with wandb's login can't be read: {error}")
        return False
