"""The adapter and the initial state of a chat: listed, and replaced while it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from src.adapt.adapter_files import CONFIG
from src.inference.adaptation import Adaptation
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.load import load_model
from src.run_folder import TUNED_STATE

NONE = "none"


@dataclass
class ModelSwitch:
    """Loads the model of `conversation` again from `weights`, with another adapter or initial state.

    dtype, device: as `load_model` takes them. `out`: where runs are looked for.
    """

    conversation: Conversation
    weights: Path
    adaptation: Adaptation
    dtype: str | None = None
    device: str | None = None
    out: Path = Path("out")

    def switch(self, flag: str, argument: str) -> str:
        """Use another adapter or state ("none": no longer one), and begin a new conversation: its state belongs to the
        model before. `flag`: "adapter" or "state". Returns what was done; without an argument, what there is.

        Raises UserError when it doesn't fit; then nothing has changed.
        """
        if not argument:
            return self._listed(flag)
        path = "" if argument == NONE else str(Path(argument).expanduser())
        adaptation = self.adaptation
        # With another one goes what was said of the one before: a file that has its own alpha would refuse it, and
        # another state may have the other layout.
        if flag == "adapter" and path != adaptation.adapter:
            adaptation = replace(adaptation, adapter=path, lora_alpha=None)
        elif flag == "state" and path != adaptation.state:
            adaptation = replace(adaptation, state=path, state_layout="")
        model = load_model(self.weights, self.dtype, self.device, adaptation)
        self.adaptation = adaptation
        self.conversation.use(Decoder(model))
        return f"{flag} {path or NONE}, new conversation"

    def _listed(self, flag: str) -> str:
        """The current one, and those of the runs under `out`."""
        current = getattr(self.adaptation, flag) or NONE
        if flag == "adapter":
            found = [path.parent for path in self.out.glob(f"**/{CONFIG}")]
        else:
            found = [path for path in self.out.glob("**/*.pth") if TUNED_STATE.matches(path.name)]
        others = sorted(str(path) for path in found if str(path) != current)
        return "\n".join(
            [f"  {flag} {current}", *(f"  /{flag} {name}" for name in others), f"  /{flag} FILE or {NONE}"]
        )
