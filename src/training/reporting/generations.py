"""What the model writes at the end of a run, beside what stands in the data: kept in samples.json, shown by the loggers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytorch_lightning as pl

from src.config import RunConfig
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.files import atomic_write
from src.inference.generate import generate
from src.model import RWKV7
from src.run_folder import SAMPLES
from src.training.checkpoint.callbacks import NonFiniteMonitor
from src.training.console import warn_on_error
from src.training.module import TrainingModule
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sample
from src.training.schedule import RunLength
from src.training.validation import HeldOut

COUNT, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 64
TEMPERATURE, TOP_P, SEED = 1.0, 0.7, 1


class ShowSamples(pl.Callback):
    """Lets rank 0 write a few texts when the run is complete: after beginnings of held-out texts, or of training ones where none are.

    Needs --tokenizer, and a model that is whole on one device (not ZeRO 3); without them there are none.
    """

    def __init__(
        self, config: RunConfig, reporter: Reporter, bad_steps: NonFiniteMonitor, length: RunLength, proj_dir: Path
    ) -> None:
        self.config, self.reporter, self.bad_steps, self.length, self.proj_dir = (
            config,
            reporter,
            bad_steps,
            length,
            proj_dir,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        whole = not pl_module.hardware.model_in_parts
        complete = self.reporter.next_step >= self.length.steps and self.bad_steps.too_many is None
        if not (trainer.is_global_zero and self.config.tokenizer and whole and complete):
            return
        source = self.config.val_data_file or self.config.data_file
        with warn_on_error(SAMPLES):
            held_out = HeldOut(replace(self.config, val_data_file=source, val_windows=COUNT))
            samples = write_samples(pl_module.model, load_tokenizer(self.config.tokenizer), held_out)
            with atomic_write(self.proj_dir / SAMPLES, "w") as file:
                json.dump([asdict(sample) for sample in samples], file, indent=1, ensure_ascii=False)
            self.reporter.show(samples)


def write_samples(model: RWKV7, tokenizer: Tokenizer, held_out: HeldOut) -> list[Sample]:
    """What the model writes after COUNT prompts of `held_out`, each drawn with the same seed."""
    samples = []
    for prompt, following in held_out.prompts(COUNT, PROMPT_TOKENS):
        answer = generate(model, prompt, NEW_TOKENS, TEMPERATURE, TOP_P, seed=SEED, stop_ids=tokenizer.eos_ids)
        texts = (tokenizer.decode(list(ids)) for ids in (prompt, answer, following[:NEW_TOKENS]))
        samples.append(Sample(*texts))
    return samples
