"""Generates sample texts at the end of a run and stores them in samples.json, next to how the data continues."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.config import PLACEHOLDER, RunConfig
from src.dataset.media_files import IMAGE, Picture, data_url, read_medium
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.errors import UserError
from src.files import atomic_write
from src.inference.generation import generate
from src.model import RWKV7
from src.multimodal.front_end import FrontEnd
from src.run_folder import SAMPLES
from src.training.console import is_rank_zero, warn_on_error
from src.training.control import RunControl
from src.training.data import HeldOut, SamplePrompt
from src.training.module import TrainingModule
from src.training.reporting.non_finite import NonFiniteMonitor
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import GeneratedSample
from src.training.schedule import RunLength

# few and short: decoding token by token delays the end of the run
COUNT, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 64
# a fixed seed makes the texts of two runs comparable
TEMPERATURE, TOP_P, SEED = 1.0, 0.7, 1
SHOWN_SIDE = 256  # pixels of a picture in the report


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
            # features that were computed before are of the run's own data sets, and this opens one again
            config = replace(self.config, val_data_file=source, val_windows=COUNT, cache_features=False)
            held_out = HeldOut(config)
            samples = generate_samples(pl_module.model, load_tokenizer(self.config.tokenizer), held_out)
            # read back by the report, which may run at any time
            with atomic_write(self.proj_dir / SAMPLES, "w") as file:
                json.dump([asdict(sample) for sample in samples], file, indent=1, ensure_ascii=False)
            self.reporter.report_samples(samples)


def generate_samples(model: RWKV7, tokenizer: Tokenizer, held_out: HeldOut) -> list[GeneratedSample]:
    """What the model generates after COUNT prompts of `held_out`, each with the same seed."""
    samples = []
    for prompt in held_out.prompts(COUNT, PROMPT_TOKENS):
        embeds = _rows_of(model, prompt)
        settings = {"seed": SEED, "stop_ids": tokenizer.eos_ids, "embeds": embeds}
        answer = generate(model, prompt.ids, NEW_TOKENS, TEMPERATURE, TOP_P, **settings)  # type: ignore[arg-type]
        ids = [token for token in prompt.ids if token != PLACEHOLDER]
        text, answer_text, in_data = (
            tokenizer.decode(list(part)) for part in (ids, answer, prompt.continuation[:NEW_TOKENS])
        )
        samples.append(GeneratedSample(text, answer_text, in_data, tuple(map(_shown, prompt.files))))
    return samples


@torch.no_grad()
def _rows_of(model: RWKV7, prompt: SamplePrompt) -> Tensor | None:
    """The rows in the places of a prompt's media."""
    front_end = model.media
    if front_end is None or PLACEHOLDER not in prompt.ids:
        return None
    assert isinstance(front_end, FrontEnd)
    with front_end.from_files():
        device = model.emb.weight.device
        media, lengths = (part.to(device) for part in prompt.media)
        return front_end(media, lengths)[: prompt.ids.count(PLACEHOLDER)]


def _shown(file: Path) -> str:
    """A picture as a small PNG for the report; of a sound its name."""
    try:
        picture = read_medium(IMAGE, file, 0)
    except UserError:
        return file.name
    assert isinstance(picture, Picture)
    return data_url(picture, SHOWN_SIDE)
