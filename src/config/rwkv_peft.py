"""RWKV-PEFT's notations as flags of this program: settings in JSON, --dataload, --loss_mask, names of kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from src.errors import UserError

# by flag: keys of its JSON object -> our flag; "": has to be empty or 0, as it continues what a run of ours continues
# by itself, or has no meaning here
JSON_FLAGS: dict[str, dict[str, str]] = {
    "peft_config": {
        **{"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora"},
        **{"target_modules": "lora_targets", "train": "lora_train"},
    },
    "lora_config": {
        **{"lora_r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_load": ""},
    },
    "pissa_config": {"pissa_r": "lora_r", "svd_niter": "-", "pissa_load": "", "pissa_init": ""},
    "disha_config": {"r": "lora_r", "mode": "mode", "load": ""},
}
# by flag: value -> our flags
NOTATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "dataload": {
        "pad": {"data_type": "sft", "packing": False},
        "only": {"data_type": "sft", "packing": False},
        "get": {"data_type": "binidx"},
    },
    "loss_mask": {"qa": {"sft_loss": "answers"}, "pad": {"sft_loss": "text"}},
}
# other spellings of a value
ALIASES = {
    "peft": {"disha": "miss", "bone": "miss"},
    "train_type": {"states": "state", "": "none"},
    "quant": {"4bit": "nf4", "": "none"},
}
REFUSED = {
    ("quant", "fp4"): "there is nf4, of the same size and closer to the weights",
    ("quant", "fp8"): "there is int8, of the same size",
    ("loss_mask", "se"): "there are qa (answers count) and pad (everything but padding)",
}
# values of our flags that stand for others: -> our flags, of which one that is given keeps its value
STANDS_FOR: dict[tuple[str, str], dict[str, Any]] = {
    ("train_type", "infctx"): {"train_type": "none", "chunk_ctx": 512},
}
FLAGS = (*JSON_FLAGS, *NOTATIONS, "merge")
EPOCH_STEPS = 1000  # the default of its --epoch_steps


def translate(texts: dict[str, str], values: dict[str, Any]) -> tuple[dict[str, Any], list[UserError]]:
    """Values of our flags from `texts`, those of the flags in FLAGS, beside the `values` that were given by our flags'
    names (without those in REFUSED and STANDS_FOR); and what is wrong with them."""
    translated: dict[str, Any] = {}
    faults: list[UserError] = []
    for flag, text in [item for item in values.items() if item in REFUSED]:
        faults.append(UserError("not offered", flag=flag, given=text, advice=REFUSED[flag, text]))
        del values[flag]  # else the check of its choices would name it a second time
    for flag, text in [item for item in values.items() if item in STANDS_FOR]:
        del values[flag]
        translated |= {name: value for name, value in STANDS_FOR[flag, text].items() if name not in values}
    for flag, text in texts.items():
        try:
            for name, value in _meaning(flag, text):
                given = {**translated, **values}.get(name, value)
                if given != value:
                    raise UserError(
                        f"contradicts --{name} {given}", flag=flag, given=text, advice="leave one of them out"
                    )
                translated[name] = value
        except UserError as fault:
            faults.append(fault)
    return translated, faults


def _meaning(flag: str, text: str) -> Iterator[tuple[str, Any]]:
    if (flag, text) in REFUSED:
        raise UserError("not offered", flag=flag, given=text, advice=REFUSED[flag, text])
    if flag == "merge":
        if text not in ("0", "1"):
            raise UserError(flag=flag, given=text, expected="0")
        if text == "1":
            raise UserError(
                "the adapter is kept beside the base",
                flag=flag,
                given=text,
                advice="leave it out; afterwards: python -m src.inference.export BASE OUT --adapter PROJ_DIR/adapter",
            )
    elif flag in NOTATIONS:
        if text not in NOTATIONS[flag]:
            raise UserError(flag=flag, given=text, expected=f"one of {', '.join(NOTATIONS[flag])}")
        yield from NOTATIONS[flag][text].items()
    else:
        yield from _json_values(flag, text)


def _json_values(flag: str, text: str) -> Iterator[tuple[str, Any]]:
    known = JSON_FLAGS[flag]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(flag=flag, given=text, expected='a JSON object such as {"r": 32}')
    for key, value in content.items():
        if key not in known:
            raise UserError(f"has no {key!r}", flag=flag, given=text, expected=f"keys out of {', '.join(known)}")
        name = known[key]
        if not name and value:
            raise UserError(
                f"{key} isn't offered",
                flag=flag,
                given=text,
                advice="a run in the same --proj_dir continues its own adapter; merge another one into the base first",
            )
        if name == "mode" and value != "bone":
            raise UserError(f"mode {value!r} isn't offered", flag=flag, given=text, expected='"bone", which is MiSS')
        if name in ("", "-", "mode"):
            continue
        yield name, _typed(flag, text, key, name, value)


def _typed(flag: str, text: str, key: str, name: str, value: Any) -> Any:
    """A value of the JSON object in the type of our flag."""
    if name in ("lora_targets", "lora_train"):
        entries = value.split(",") if isinstance(value, str) else value
        if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
            return ",".join(entry.strip() for entry in entries)
        raise UserError(f"{key} {value!r}", flag=flag, given=text, expected="a list of names")
    if name == "use_rslora" and isinstance(value, bool):
        return value
    # bool is an int to Python, and 8.0 is a rank all the same
    if name != "use_rslora" and isinstance(value, (int, float)) and not isinstance(value, bool):
        if name != "lora_r":
            return float(value)
        if value == int(value):
            return int(value)
    expected = {"use_rslora": "true or false", "lora_r": "a whole number"}.get(name, "a number")
    raise UserError(f"{key} {value!r}", flag=flag, given=text, expected=expected)
