"""Every reader of files and texts that come from elsewhere: inputs to begin with, and the call that reads one."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chat_models import TEMPLATES, make_tokenizer
from random_model import random_model
from safetensors.torch import save as save_safetensors
from training_runs import flags

from src import run_folder
from src.cli import interpret
from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.conversation_files import read_conversation_pieces
from src.dataset.conversation_formats import read_conversation
from src.dataset.conversations import check_template
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.files import sha256_of
from src.inference.saved_chat import SavedChat, read_chat, write_chat
from src.model.weights import config_from_weights, read_weights
from src.run_log import read_columns, read_curves
from src.training.checkpoint.manifest import DamagedStateError, Entry
from src.training.checkpoint.parts import Part, whole_part
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.shard_file import ShardFile, header_of
from src.training.checkpoint.state import SavedState
from src.training.checkpoint.storage import StateWriter
from tests.faults.mutate import mutate_bytes, mutate_json, mutate_template, mutate_words

SIZES = {"n_layer": 1, "n_embd": 16, "head_size": 16, "vocab_size": 20}
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TURNS = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a list"}]
LINES = (
    {"messages": TURNS}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}, {"prompt": "a", "response": "b"},
    {"text": "User: a\n\nAssistant: b"}, {"question": "a", "answer": "b", "system": "c", "id": 3},
    {"messages": [*TURNS, {"role": "tool", "content": "5"}, {**TURNS[1], "weight": 0}], "tools": [{"name": "f"}]},
)  # fmt: skip
REFUSALS = (UserError, DamagedStateError)  # what a reader may raise


@dataclass(frozen=True)
class Reader:
    """`prepare(folder)` makes the inputs to begin with and what else the reader needs; `read(folder, data)` reads."""

    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    mutate: Callable[[bytes, bytes, Any], bytes]


def _weights(folder: Path) -> list[bytes]:
    model = random_model(**SIZES).state_dict()
    files = [save_safetensors(model)]
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(dict(model), file, _use_new_zipfile_serialization=zipped)
        files.append(file.getvalue())
    return files


def _read_weights(folder: Path, data: bytes) -> None:
    path = folder / "weights.pth"
    path.write_bytes(data)
    config_from_weights(read_weights(path), str(path))


def _state(folder: Path) -> Path:
    writer = StateWriter(folder, keep=1)
    position = {"step": 4, "samples": 16, "mini_epoch_samples": 8, "restarted_at_sample": 0, "mini_epoch_losses": [2.5],
                "skipped_samples": [[3, 2]], "weights_written": True}  # fmt: skip
    payload = {"position": position, "settings": {"n_layer": 1}, "counters": {"adam_steps": 4.0}, "saved_at": 1.0}
    writer.write(4, payload, [whole_part("emb.weight/master", torch.ones(3)), whole_part("b/exp_avg", torch.zeros(3))])
    writer.wait()
    return folder / "resume" / "step-00000004"


def _seed_of_state(name: str, folder: Path) -> list[bytes]:
    return [(_state(folder) / name).read_bytes()]


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = StateReader(folder)
    SavedState.from_payload(reader.payload)
    return reader.payload, reader.tensors()


def _of_state(name: str) -> Reader:
    """One file of a state is changed: it is refused, or what is read is what was written."""

    def read(folder: Path, data: bytes) -> None:
        state = folder / "resume" / "step-00000004"
        original = (state / name).read_bytes()
        before = _read_state(state)
        try:
            (state / name).write_bytes(data)
            payload, tensors = _read_state(state)
        finally:
            (state / name).write_bytes(original)
        same = payload == before[0] and tensors.keys() == before[1].keys()
        same = same and all(torch.equal(tensors[key], before[1][key]) for key in tensors)
        assert same, "a changed state is believed"

    mutate = mutate_json if name.endswith(".json") else mutate_bytes
    return Reader(partial(_seed_of_state, name), read, mutate)


def _shards(folder: Path) -> list[bytes]:
    part = Part("b/exp_avg", torch.zeros(3), (5,), 2)
    return [header_of([whole_part("a/master", torch.ones(2, 2)), part]) + bytes(28)]


def _read_shard(folder: Path, data: bytes) -> None:
    """A file of tensors changed, and its hash made to fit."""
    path = folder / "rank0-0000.safetensors"
    path.write_bytes(data)
    blocks = [data[i : i + 8] for i in range(0, len(data), 8)]
    entry = Entry(len(data), min(8, len(data)), 8, tuple(hashlib.sha256(block).hexdigest() for block in blocks))
    with ShardFile(path, entry) as file:
        for part in file.parts:
            file.copy(part, part.start, torch.empty(part.count, dtype=part.dtype))


def _read_payload(folder: Path, data: bytes) -> None:
    """state.json changed, and the manifest made to fit: as if another program had written both."""
    state = folder / "resume" / "step-00000004"
    (state / "state.json").write_bytes(data)
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": sha256_of(state / "state.json")}
    (state / "manifest.json").write_text(json.dumps(manifest))
    _read_state(state)


def _run_json(folder: Path) -> list[bytes]:
    settings = {"n_layer": 1, "lr_init": 1e-3, "ctx_len": 16}
    run = {"origin": {"sha256": "00", "path": ""}, "settings": settings, "starts": []}
    run_folder.write_run(folder, run)
    (folder / "rwkv-init.pth").write_bytes(b"weights")
    return [(folder / "run.json").read_bytes()]


def _read_run(folder: Path, data: bytes) -> None:
    (folder / "run.json").write_bytes(data)
    run_folder.has_drawn_init(folder)
    run_folder.read_run(folder)
    run_folder.is_swapped(folder, folder / "rwkv-init.pth")


def _logs(folder: Path) -> list[bytes]:
    header = b"step,tokens,loss,lr,seconds\n"
    rows = b"".join(b"%d,%d,%.4f,1e-3,%.2f\n" % (i, 16 * i, 3 - i / 9, i / 3) for i in range(8))
    log = b"NEW RUN\n{'n_layer': 1}\n0 2.5 12.18 0.00100000 2026-11-30 12:00:00.000000 0\n1 2.25 9.5 0.00050000 x 1\n"
    return [header + rows, log]


def _read_logs(folder: Path, data: bytes) -> None:
    name = "metrics.csv" if data[:4] == b"step" else "train_log.txt"
    for other in ("metrics.csv", "train_log.txt"):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    if name == "metrics.csv":
        read_columns(folder / name)
    read_curves(folder)


def _index(folder: Path) -> list[bytes]:
    with BinIdxWriter(folder / "data", np.uint16) as writer:
        for i in range(5):
            writer.add_document([*range(1, 9 + i), 0])
    return [(folder / "data.idx").read_bytes()]


def _read_index(folder: Path, data: bytes) -> None:
    (folder / "data.idx").write_bytes(data)
    dataset = MMapIndexedDataset(folder / "data")
    for i in {0, len(dataset) - 1} if len(dataset) else ():
        dataset[i].sum()


def _read_lines(folder: Path, data: bytes) -> None:
    path = folder / "conversations.jsonl"
    path.write_bytes(data)
    for piece in read_conversation_pieces(str(path)):
        for line in piece.lines.splitlines():
            try:
                read_conversation(line)
            except UserError:
                continue  # an unusable line is counted, and the others are read


def _conversation_files(folder: Path) -> list[bytes]:
    return [json.dumps(line).encode() for line in LINES] + [json.dumps(list(LINES)).encode()]


def _tokenizer(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        (folder / "tokenizer" / name).write_bytes(data)
        tokenizer = load_tokenizer(folder / "tokenizer")
        tokenizer.decode(tokenizer.encode("what is it? <|im_end|> 日本"))

    return Reader(lambda folder: [(make_tokenizer(folder / "tokenizer") / name).read_bytes()], read, mutate_json)


def _templates(folder: Path) -> list[bytes]:
    return [source.encode() for source in (*TEMPLATES.values(), RWKV_TEMPLATE)]


def _read_template(folder: Path, data: bytes) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), SPECIAL)
    template.render(TURNS, add_generation_prompt=True)
    check_template(template, list(SPECIAL.values()))


def _command_lines(folder: Path) -> list[bytes]:
    more = {"val_data_file": "x", "val_every": "10steps", "strategy": "ddp", "devices": 2, "precision": "bf16"}
    return [os.fsencode("\0".join(argv)) for argv in (flags("run", "data"), flags("run", "data", **more))]


def _read_command_line(folder: Path, data: bytes) -> None:
    interpret(os.fsdecode(data).split("\0"))


def _chat(folder: Path) -> list[bytes]:
    model = random_model(**SIZES)
    _, state = model(torch.tensor([[1, 2]]))
    write_chat(folder / "chat", SavedChat(TURNS, b"what", [3], state), model)
    return [(folder / "chat").read_bytes()]


def _read_chat(folder: Path, data: bytes) -> None:
    (folder / "chat").write_bytes(data)
    read_chat(folder / "chat", random_model(**SIZES))


READERS = {
    "weights": Reader(_weights, _read_weights, mutate_bytes),
    "state manifest": _of_state("manifest.json"),
    "state.json": _of_state("state.json"),
    "state tensors": _of_state("rank0-0000.safetensors"),
    "state tensors with their hashes": Reader(_shards, _read_shard, mutate_bytes),
    "state.json with a manifest": Reader(partial(_seed_of_state, "state.json"), _read_payload, mutate_json),
    "run.json": Reader(_run_json, _read_run, mutate_json),
    "logs": Reader(_logs, _read_logs, mutate_bytes),
    "binidx index": Reader(_index, _read_index, mutate_bytes),
    "conversations": Reader(_conversation_files, _read_lines, mutate_json),
    "tokenizer.json": _tokenizer("tokenizer.json"),
    "tokenizer_config.json": _tokenizer("tokenizer_config.json"),
    "chat template": Reader(_templates, _read_template, mutate_template),
    "command line": Reader(_command_lines, _read_command_line, mutate_words),
    "saved chat": Reader(_chat, _read_chat, mutate_bytes),
}
