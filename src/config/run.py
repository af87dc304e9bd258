"""`RunConfig`: the flags of train.py with their checks, and the model they describe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from src.config.adapter import split_list
from src.config.checks import combination_faults, form_faults, value_faults
from src.config.flags import Flags
from src.config.model import ModelConfig
from src.errors import UserError, UserErrors


@dataclass
class RunConfig(Flags):
    """What a run needs: the flags of train.py.

    Any values can be constructed; `faults()` checks them. What depends on data, weights or the machine is checked where
    those are read.
    """

    def __post_init__(self) -> None:
        # The flags of the command line. Not a field, as it is none; a copy by `replace` doesn't have it.
        self.given: frozenset[str] = frozenset()
        # The run's length in batches of each process, as commands of RWKV-PEFT give it; 0: by the flags. The same.
        self.batches = 0
        # --train_parts projector,lora says what --peft lora does
        parts = split_list(self.train_parts) if self.encoder else ()
        if "lora" in parts and self.peft == "none":
            self.peft = "lora"
        if "state" in parts:
            self.train_type = "state"

    def faults(self) -> list[UserError]:
        """What is wrong with these values, for all flags at once; empty if nothing is."""
        faults = [*value_faults(self), *form_faults(self), *combination_faults(self)]
        try:
            # A vocabulary of 0 is found later, from the tokenizer, the weights or the data: 1 stands for it.
            self.model_config(max(1, self.vocab_size))
        except UserErrors as error:
            # The model repeats the bounds of its sizes: one message per flag is enough.
            flags = {fault.flag for fault in faults}
            faults += [fault for fault in error.faults if fault.flag not in flags]
        return faults

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that these flags describe, with the run's vocabulary size. Raises `UserErrors` if none can."""
        # By name: a size of ModelConfig is a flag of the same name. Kinds of blocks have no flag.
        own = {field.name for field in dataclasses.fields(ModelConfig)} - {"vocab_size", "blocks"}
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in own})

    @property
    def fewest_nodes(self) -> int:
        """Of --num_nodes FEWEST:MOST, or the number of nodes."""
        return int(self.num_nodes.partition(":")[0])

    @property
    def most_nodes(self) -> int:
        return int(self.num_nodes.rpartition(":")[2])

    def compiles(self, device_type: str) -> bool:
        """Whether --compile asks for torch.compile on a device of this type ("cuda", "cpu")."""
        if self.context_parallel > 1:  # blocks communicate, which a compiled graph can't
            return False
        # Compiling takes 10 to 17 s. On a CPU it gains about 10 %, which short runs do not earn back. Of other devices
        # these two have Triton, which generates the fused code.
        return self.compile == "1" or (self.compile == "auto" and device_type in ("cuda", "xpu"))

    def as_settings(self) -> dict[str, Any]:
        """Every flag by name, as run.json and the log's header hold them: a boolean is 0 or 1, as in earlier runs."""
        values = dataclasses.asdict(self)
        return {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}


def settings_with(within_run: str) -> tuple[str, ...]:
    """Names of the flags declared as "fixed", "free" or "noted" within a run (setting.WITHIN_RUN)."""
    return tuple(field.name for field in dataclasses.fields(RunConfig) if field.metadata["within_run"] == within_run)
