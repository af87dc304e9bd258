"""Every setting of the project, once: its type, default, meaning, bounds, and whether it may change within a run.

`ModelConfig` is what a model needs to be built, `RunConfig` is what a run needs. The command line (cli.py), the table
of flags in docs/flags.md and the settings in `run.json` are made from these fields. Nothing heavy is imported here, so
that `train.py --help` answers at once.

A new flag is one field of `Flags` (flags.py), its meaning in Chinese (docs/flags_CN.md), and a line of the frozen list
in tests/test_cli.py.
"""

# Others import from here only: which file of the package declares a name may change.
from src.config.adapter import adapter_kind, split_list
from src.config.checks import ENDPOINT, VAL_EVERY, number_pair
from src.config.flags import MINI_EPOCH_SAMPLES, PRECISIONS, STRATEGIES
from src.config.media import image_size, keeps_base, kind_of_training, trained_parts
from src.config.model import KERNELS, PLACEHOLDER, PLAIN_KERNELS, ModelConfig, low_rank_size
from src.config.run import RunConfig, settings_with
from src.config.setting import GROUPS, default_text
from src.config.support import TARGETS, WHOLE_PARTS, refusal

__all__ = [
    "ENDPOINT",
    "GROUPS",
    "KERNELS",
    "MINI_EPOCH_SAMPLES",
    "PLACEHOLDER",
    "PLAIN_KERNELS",
    "PRECISIONS",
    "STRATEGIES",
    "TARGETS",
    "VAL_EVERY",
    "WHOLE_PARTS",
    "ModelConfig",
    "RunConfig",
    "adapter_kind",
    "default_text",
    "image_size",
    "keeps_base",
    "kind_of_training",
    "low_rank_size",
    "number_pair",
    "refusal",
    "settings_with",
    "split_list",
    "trained_parts",
]
