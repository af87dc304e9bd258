"""Generates sample texts at the end of a run and stores them in samples.json, next to how the data continues."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytorch_lightning as pl

from src.config import RunConfig
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.files import atomic_write
from src.inference.generation import generate
from src.model import RWKV7
from src.run_folder import SAMPLES
from src.training.console import is_rank_zero, warn_on_error
from src.training.control import RunControl
from src.training.data import HeldOut
from src.training.module import TrainingModule
from src.training.reporting.non_finite import NonFiniteMonitor
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import GeneratedSample
from src.training.schedule import RunLength

# few and short: decoding token by token delays the end of the run
COUNT, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 64
# a fixed seed makes the texts of two runs comparable
TEMPERATURE, TOP_P, SEED = 1.0, 0.7, 1


class GenerateSamples(pl.Callback):
    """Generates a few texts on rank 0 when the run is complete, from prompts of the held-out (else the training) data.

    Requires --tokenizer, and a model that is whole on one device (not ZeRO stage 3); otherwise it does nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        control: RunControl,
        reporter: Reporter,
        non_finite: NonFiniteMonitor,
        length: RunLength,
        proj_dir: Path,
    ) -> None:
        self.config, self.control, self.reporter, self.non_finite = config, control, reporter, non_finite
        self.length, self.proj_dir = length, proj_dir

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        is_complete = self.control.step >= self.length.steps and self.non_finite.failed_steps is None
        if not (is_rank_zero() and is_complete and self.config.tokenizer) or pl_module.hardware.is_partitioned:
            return
        # held-out text is preferred: the model may have memorised the training data
        source = self.config.val_data_file or self.config.data_file
        # the weights are saved already: a failure here must not make the run a failed one
        with warn_on_error(SAMPLES):
            held_out = HeldOut(replace(self.config, val_data_file=source, val_windows=COUNT))
            samples = generate_samples(pl_module.model, load_tokenizer(self.config.tokenizer), held_out)
            # read back by the report, which may run at any time
            with atomic_write(self.proj_dir / SAMPLES, "w") as file:
                json.dump([asdict(sample) for sample in samples], file, indent=1, ensure_ascii=False)
            self.reporter.report_samples(samples)


def generate_samples(model: RWKV7, tokenizer: Tokenizer, held_out: HeldOut) -> list[GeneratedSample]:
    """What the model generates after COUNT prompts of `held_out`, each with the same seed."""
    samples = []
    for prompt, continuation in held_out.prompts(COUNT, PROMPT_TOKENS):
        answer = generate(model, prompt, NEW_TOKENS, TEMPERATURE, TOP_P, seed=SEED, stop_ids=tokenizer.eos_ids)
        texts = (tokenizer.decode(list(ids)) for ids in (prompt, answer, continuation[:NEW_TOKENS]))
        samples.append(GeneratedSample(*texts))
    return samples
