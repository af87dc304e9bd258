"""What is wrong with the flags of pictures and sounds, and what these flags train."""

from __future__ import annotations

import re
from collections.abc import Iterator

from src.config.adapter import adapter_kind, split_list
from src.config.flags import Flags
from src.config.support import refusal
from src.errors import UserError

ENCODERS = ("patches", "logmel")  # besides hf:FOLDER
HF = "hf:"
PARTS = ("projector", "encoder", "model", "lora", "state")
OF_MODEL = PARTS[2:]
SETTINGS = (
    *("projector", "train_parts", "load_projector", "media_folder", "media_tokens", "image_size", "patch_size"),
    *("encoder_dim", "max_seconds", "broken_media", "cache_features", "media_workers"),
)
SMALLEST_PATCH = 4  # pixels
IMAGE_SIZE = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?")


def trained_parts(flags: Flags) -> tuple[str, ...]:
    """The entries of --train_parts. By default all of a small encoder that is trained from its beginning, and of one
    that is loaded the projector alone."""
    if not flags.encoder:
        return ()
    default = ("projector",) if flags.encoder.startswith(HF) else ("projector", "encoder", "model")
    return split_list(flags.train_parts) or default


def keeps_base(flags: Flags) -> bool:
    """Whether the weights of the language model stay as they are in their file."""
    return bool(adapter_kind(flags)) or (bool(flags.encoder) and "model" not in trained_parts(flags))


def kind_of_training(flags: Flags) -> str:
    """The row of the table in src/config/support.py."""
    if flags.encoder and not keeps_base(flags):
        return "full, encoder"
    return adapter_kind(flags) or ("projector" if keeps_base(flags) else "full")


def image_size(text: str) -> tuple[int, int] | None:
    """(height, width) of "24x56", or of "64", a square; None where it is neither."""
    match = IMAGE_SIZE.fullmatch(text)
    return (int(match[1]), int(match[2] or match[1])) if match else None


def media_faults(flags: Flags) -> Iterator[UserError]:
    """Values of these flags that are valid by themselves but not together, and texts that are in no valid form."""
    # whatever the strategy; what depends on it is refused once that is known
    if row := refusal(kind_of_training(flags), flags.quant, "one process"):
        yield row.error(getattr(flags, row.flag))
    if not flags.encoder:
        for name in SETTINGS:
            default = type(flags).__dataclass_fields__[name].default
            if (value := getattr(flags, name)) != default:
                given = int(value) if isinstance(value, bool) else value
                yield UserError("needs --encoder", flag=name, given=given, advice="leave it out")
        return
    if flags.encoder not in ENCODERS and not flags.encoder.startswith(HF):
        yield UserError(flag="encoder", given=flags.encoder, expected=f"one of {', '.join(ENCODERS)}, or hf:FOLDER")
    if flags.data_type != "sft":
        yield UserError(
            "pictures and sounds are in conversations",
            flag="encoder",
            given=flags.encoder,
            advice="use --data_type sft",
        )
    elif flags.sft_loss != "answers":
        yield UserError("with --encoder only answers count", flag="sft_loss", given=flags.sft_loss, expected="answers")
    yield from _part_faults(flags)
    yield from _size_faults(flags)


def _part_faults(flags: Flags) -> Iterator[UserError]:
    parts = trained_parts(flags)
    expected = f"a list of {', '.join(PARTS[:2])} and one of {', '.join(OF_MODEL)}"
    of_model = [part for part in parts if part in OF_MODEL]
    if set(parts) - set(PARTS) or len(of_model) > 1:
        yield UserError(flag="train_parts", given=flags.train_parts, expected=expected)
        return
    for flag, part in (("peft", "lora"), ("train_type", "state")):
        if getattr(flags, flag) != "none" and part not in parts:
            yield UserError(
                f"--train_parts {','.join(parts)} doesn't name it",
                flag=flag,
                given=getattr(flags, flag),
                advice=f"add {part} to --train_parts",
            )
    if flags.cache_features and "encoder" in parts:
        yield UserError("the encoder is trained, so its features change", flag="cache_features", given=1)
    # stages 2 and 3 begin with rwkv-init.pth; an adapter's own check says the same
    needs_base = keeps_base(flags) and not adapter_kind(flags) and flags.plan < 0
    if needs_base and flags.train_stage == 0 and not flags.load_model:
        yield UserError("missing", flag="load_model", expected="the weights that stay as they are")
    if "encoder" not in parts and flags.encoder in ENCODERS and not flags.load_projector:
        yield UserError(
            "neither trained nor loaded: it would stay noise",
            flag="encoder",
            given=flags.encoder,
            advice="add encoder to --train_parts, or name a trained one with --load_projector",
        )
    if "projector" not in parts and not flags.load_projector:
        yield UserError(
            "neither trained nor loaded: it would stay noise",
            flag="train_parts",
            given=flags.train_parts,
            advice="add projector, or name a trained one with --load_projector",
        )


def _size_faults(flags: Flags) -> Iterator[UserError]:
    if flags.max_seconds <= 0:
        yield UserError(flag="max_seconds", given=flags.max_seconds, expected="more than 0")
    if flags.encoder != "patches":
        return
    patch = flags.patch_size
    if patch < SMALLEST_PATCH or patch & (patch - 1):
        yield UserError(flag="patch_size", given=patch, expected=f"a power of two, at least {SMALLEST_PATCH}")
    size = image_size(flags.image_size)
    if size is None or not all(size) or any(patch and side % patch for side in size):
        yield UserError(
            flag="image_size",
            given=flags.image_size,
            expected=f"a side, or height x width such as 24x56, in multiples of --patch_size {patch}",
        )
    side = round(flags.media_tokens**0.5)
    if side * side != flags.media_tokens:
        yield UserError(flag="media_tokens", given=flags.media_tokens, expected="a square number: the grid is square")
