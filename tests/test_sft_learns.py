"""From a toy language to answers: what pretraining taught is asked for after fine-tuning, about subjects that were not
in it."""

import json
import random
from itertools import product
from pathlib import Path

import pytest
import torch
from chat_models import CHATML, chat_ids
from torch.utils.data import DataLoader

from src.dataset import BinIdxWriter, magic_prime
from src.dataset.pretrain import PretrainDataset
from src.dataset.sft import SftDataset, SftRows, collate_shares
from src.dataset.sft_cache import chat_tokenizer, open_conversations
from src.dataset.tokenizer import FolderTokenizer
from src.model import RWKV7, ModelConfig
from src.ops.loss import cross_entropy_l2wrap

COLORS = ["red", "green", "blue", "white"]
NAMES = [
    "".join(pair) for pair in product(["za", "ko", "mi", "lu", "pe", "ra"], ["n", "rt", "s", "x", "m", "lf", "d", "k"])
]
COLOR_OF = {name: random.Random(name).choice(COLORS) for name in NAMES}
ASKED, HELD_OUT = NAMES[::2] + NAMES[1::4], NAMES[3::4]


def word_tokenizer(folder: Path) -> FolderTokenizer:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*specials, "[UNK]", "is", "?", "user", "assistant", *COLORS, *NAMES]
    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.add_special_tokens([AddedToken(token, special=True) for token in specials])
    folder.mkdir()
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return chat_tokenizer(str(folder))


def train(model: RWKV7, batches: DataLoader, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    for inputs, targets, *bounds in batches:
        loss = cross_entropy_l2wrap(model(inputs, cu_seqlens=bounds[0] if bounds else None)[0], targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def right_answers(model: RWKV7, tokenizer: FolderTokenizer, names: list[str]) -> float:
    """The part of the names whose color is what the model finds most likely as the first word of an answer."""
    right = 0
    for name in names:
        question = [{"role": "user", "content": f"{name} ?"}]
        ids = chat_ids(tokenizer, question, add_generation_prompt=True)
        logits, _ = model(torch.tensor([ids]))
        right += int(logits[0, -1].argmax()) == tokenizer.encode(COLOR_OF[name])[0]
    return right / len(names)


@pytest.fixture
def tokenizer(tmp_path: Path) -> FolderTokenizer:
    return word_tokenizer(tmp_path / "tokenizer")


def test_fine_tuning_asks_for_what_pretraining_taught(tmp_path: Path, tokenizer: FolderTokenizer) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    with BinIdxWriter(tmp_path / "facts", "uint16") as out:
        for _ in range(2000):
            name = draw.choice(NAMES)
            out.add_document([*tokenizer.encode(f"{name} is {COLOR_OF[name]}"), 0])
    prime = magic_prime(8000, 32)
    windows = PretrainDataset(tmp_path / "facts", 32, prime, 0, 150 * 16, 16, 0, 1, tokenizer.vocab_size)
    model = RWKV7(ModelConfig(n_layer=2, n_embd=64, vocab_size=tokenizer.vocab_size))
    train(model, DataLoader(windows, batch_size=16), 4e-3)
    before = right_answers(model, tokenizer, HELD_OUT)

    lines = []
    for name in ASKED:
        turns = [{"content": f"{name} ?"}, {"content": COLOR_OF[name]}]
        lines.append(json.dumps({"conversations": turns}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    rows = SftRows(open_conversations(str(tmp_path / "questions.jsonl"), tokenizer.name, workers=1), 64)
    train(model, DataLoader(SftDataset(rows, 0, 120, 0, 1), batch_size=2, collate_fn=collate_shares), 1e-3)
    assert before < 0.4
    assert right_answers(model, tokenizer, ASKED) > 0.9
    assert right_answers(model, tokenizer, HELD_OUT) > 0.6
