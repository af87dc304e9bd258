"""The file format of saved conversations: messages, the recurrent state after them, and which model they belong to.

A file is a dict saved by torch.save, of plain types and tensors only, so that loading one executes no code. Versions of
the format:

    1   "format" is "rwkv7-conversation-1"; early files have no "weights"
    2   "format" is "rwkv7-conversation", and "version" the number
    3   of conversations with pictures or sounds: "media" are their rows; others are written as version 2
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.dataset.chat_template import Message
from src.dataset.media_parts import OBJECT
from src.errors import UserError
from src.files import atomic_write
from src.model import RWKV7, LayerState, State
from src.model.torch_file import read_torch_file

FORMAT, FORMAT_VERSION = "rwkv7-conversation", 3
# Version 1 had its number in the name, so that a program could tell "not mine" from "too new" only by parsing it.
FORMAT_1 = "rwkv7-conversation-1"
EXPECTED = "a file written by /save"


@dataclass
class SavedChat:
    """A conversation between two turns.

    messages   the turns so far, as the chat template takes them
    processed  the text, as bytes, that `state` has processed; used with a chat template only
    pending    generated tokens that it has yet to process
    state      of one sequence
    media      the rows [tokens, C] of each picture or sound of the messages, in order
    """

    messages: list[Message]
    processed: bytes
    pending: list[int]
    state: State
    media: list[Tensor] = field(default_factory=list)


def write_chat(path: str | Path, chat: SavedChat, model: RWKV7) -> None:
    """Write `chat`, held with `model`, to `path`, whole or not at all. Raises UserError when that fails."""
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION if chat.media else 2,
        "model": model_sizes(model),
        "weights": weights_hash(model),
        "blocks": blocks_hash(model),
        "messages": chat.messages,
        # Latin-1 maps bytes to characters one to one, which keeps the pickle to plain types.
        "fed": chat.processed.decode("latin-1"),
        "unfed": chat.pending,
        # On the CPU, so that a conversation held on a GPU can be continued without one.
        "layers": [tuple(tensor.cpu() for tensor in layer) for layer in chat.state.layers],
        **({"media": [rows.cpu() for rows in chat.media]} if chat.media else {}),
    }
    try:
        with atomic_write(path) as file:
            torch.save(record, file)
    except OSError as error:
        raise UserError(
            f"can't be written ({error.strerror})", given=path, advice="name a file in a folder that is writable"
        ) from error


def read_chat(path: str | Path, model: RWKV7) -> SavedChat:
    """The conversation in `path`, of any format version; its state on the CPU.

    Raises UserError when the file isn't a conversation, is damaged, is of a later version, or belongs to another model
    than `model`.
    """
    record = _read_record(path)
    try:
        # Everything is converted before anything is compared, so that a damaged file is reported as one.
        sizes, weights, blocks = dict(record["model"]), record.get("weights"), record.get("blocks")
        chat = SavedChat(
            messages=list(record["messages"]),
            processed=record["fed"].encode("latin-1"),
            pending=list(record["unfed"]),
            state=State([LayerState(*layer) for layer in record["layers"]]),
            media=list(record.get("media", [])),
        )
        _check_types(chat)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("a damaged saved conversation", given=path, expected=EXPECTED) from error
    # A state of other sizes can't be loaded; one of other weights could be, and would continue with nonsense.
    if sizes != model_sizes(model):
        raise UserError(
            f"saved with a model of other sizes ({_listed(sizes)})", given=path, expected=_listed(model_sizes(model))
        )
    # None: a file from before they were recorded
    if weights not in (None, weights_hash(model)) or blocks not in (None, blocks_hash(model)):
        raise UserError(
            "saved with other weights or another adapter, or one of the two is in fp16: a state is valid for its own "
            "weights only",
            given=path,
            advice="load it with its own model, --adapter and --dtype",
        )
    _check_state(chat, model, path)
    return chat


def _check_types(chat: SavedChat) -> None:
    """Raises TypeError unless the turns are what a chat template takes, and the state consists of tensors."""
    for message in chat.messages:
        if not isinstance(message, dict) or not all(isinstance(message[key], str) for key in ("role", "content")):
            raise TypeError("not a turn")
        message["content"].encode()  # lone surrogates can't be tokenized: UnicodeEncodeError, a ValueError
    if not all(isinstance(token, int) for token in chat.pending):
        raise TypeError("not a token")
    if not all(isinstance(rows, torch.Tensor) and rows.dim() == 2 for rows in chat.media):
        raise TypeError("not the rows of a medium")
    if not all(isinstance(tensor, torch.Tensor) for layer in chat.state.layers for tensor in layer):
        raise TypeError("not a state")


def _check_state(chat: SavedChat, model: RWKV7, path: str | Path) -> None:
    """Raises UserError unless the state has the shapes of `model`'s and finite values, and the tokens are in its
    vocabulary."""
    zeros = State.zeros(model.config, batch=1, device="meta")
    fits = len(chat.state.layers) == len(zeros.layers) and all(
        tensor.shape == zero.shape and tensor.is_floating_point() and bool(tensor.isfinite().all())
        for layer, of_zeros in zip(chat.state.layers, zeros.layers, strict=True)
        for tensor, zero in zip(layer, of_zeros, strict=True)
    )
    rows_fit = all(rows.shape[1] == model.config.n_embd and bool(rows.isfinite().all()) for rows in chat.media)
    # without media the character is text like any other
    places = sum(message["content"].count(OBJECT) for message in chat.messages) if chat.media else 0
    if (
        not fits
        or not rows_fit
        or places != len(chat.media)
        or not all(0 <= token < model.config.vocab_size for token in chat.pending)
    ):
        raise UserError("a damaged saved conversation", given=path, expected=EXPECTED)


def model_sizes(model: RWKV7) -> dict[str, int]:
    """The sizes that the shapes of a state depend on, and the vocabulary's."""
    return {name: getattr(model.config, name) for name in ("n_layer", "n_embd", "head_size", "vocab_size")}


def weights_hash(model: RWKV7) -> str:
    """A hash that differs between models of equal sizes, a fine-tuned one and its base included."""
    # 64 rows of the two matrices that all training of whole weights changes.
    return _hash([model.emb.weight[:64], model.head.weight[:64]])


def blocks_hash(model: RWKV7) -> str:
    """The same of the blocks: an adapter that is merged changes nothing else. Not of what an initial state is."""
    return _hash([p.flatten()[:64] for name, p in model.blocks.named_parameters() if not name.endswith("time_state")])


def _hash(rows: Sequence[Tensor]) -> str:
    # In bf16, so that fp32 and bf16 give one hash.
    data = b"".join(tensor.bfloat16().view(torch.int16).cpu().numpy().tobytes() for tensor in rows)
    return hashlib.sha256(data).hexdigest()[:16]


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _read_record(path: str | Path) -> dict[str, Any]:
    """The content of a conversation of a known version. Raises UserError otherwise."""
    try:
        record = read_torch_file(Path(path), mmap=False)  # not mapped: /save may replace the file
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", given=path) from error
    except UserError as error:
        raise UserError("not a saved conversation, or cut short", given=path, expected=EXPECTED) from error
    version = _version_of(record)
    # "Not one" and "too new" are distinguished, as only the second is solved by an update.
    if version is None:
        raise UserError("not a saved conversation", given=path, expected=EXPECTED)
    if version > FORMAT_VERSION:
        raise UserError(
            f"format version {version}", given=path, expected=f"at most {FORMAT_VERSION}", advice="update this program"
        )
    assert isinstance(record, dict)
    return record


def _version_of(record: Any) -> int | None:
    """The format version of what a file contains; None when it isn't a conversation."""
    if not isinstance(record, dict):
        return None
    if record.get("format") == FORMAT_1:
        return 1
    version = record.get("version")
    return version if record.get("format") == FORMAT and isinstance(version, int) and version >= 1 else None
