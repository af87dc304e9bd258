"""From a toy language to answers: what pretraining taught is asked for after fine-tuning, about subjects that were not
in it."""

import copy
import json
import random
from itertools import product
from pathlib import Path

import pytest
import torch
from chat_models import CHATML, chat_ids
from torch.utils.data import DataLoader

from src.adapt.adapter import add_adapter
from src.adapt.config import AdapterConfig
from src.dataset import BinIdxWriter, magic_prime
from src.dataset.encode_conversation import chat_tokenizer
from src.dataset.pretrain import PretrainDataset
from src.dataset.sft import SftDataset, SftRows, collate_shares
from src.dataset.sft_cache import open_conversations
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.99), weight_decay=0.0)
    for inputs, targets, *bounds in batches:
        loss = cross_entropy_l2wrap(model(inputs, cu_seqlens=bounds[0] if bounds else None)[0], targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FolderTokenizer:
    return word_tokenizer(tmp_path_factory.mktemp("toy") / "tokenizer")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: FolderTokenizer) -> RWKV7:
    """Knows that "zan is red", and no questions."""
    facts = tmp_path_factory.mktemp("toy") / "facts"
    torch.manual_seed(0)
    draw = random.Random(0)
    with BinIdxWriter(facts, "uint16") as out:
        for _ in range(2000):
            name = draw.choice(NAMES)
            out.add_document([*tokenizer.encode(f"{name} is {COLOR_OF[name]}"), 0])
    windows = PretrainDataset(facts, 32, magic_prime(8000, 32), 0, 150 * 16, 16, 0, 1, tokenizer.vocab_size)
    model = RWKV7(ModelConfig(n_layer=2, n_embd=64, vocab_size=tokenizer.vocab_size))
    train(model, DataLoader(windows, batch_size=16), 4e-3)
    return model


def conversations(folder: Path, tokenizer: FolderTokenizer, answers: list[tuple[str, str]], steps: int) -> DataLoader:
    """Batches of questions about names with their answers."""
    lines = [json.dumps({"conversations": [{"content": f"{name} ?"}, {"content": answer}]}) for name, answer in answers]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    rows = SftRows(open_conversations(str(folder / "questions.jsonl"), tokenizer.name, workers=1), 64)
    return DataLoader(SftDataset(rows, 0, steps, 0, 1), batch_size=2, collate_fn=collate_shares)


def test_fine_tuning_asks_for_what_pretraining_taught(
    tmp_path: Path, tokenizer: FolderTokenizer, pretrained: RWKV7
) -> None:
    model = copy.deepcopy(pretrained)
    before = right_answers(model, tokenizer, HELD_OUT)
    train(model, conversations(tmp_path, tokenizer, [(name, COLOR_OF[name]) for name in ASKED], 120), 1e-3)
    assert before < 0.4
    assert right_answers(model, tokenizer, ASKED) > 0.9
    assert right_answers(model, tokenizer, HELD_OUT) > 0.6


def test_lora_asks_for_what_pretraining_taught_and_learns_a_fact(
    tmp_path: Path, tokenizer: FolderTokenizer, pretrained: RWKV7
) -> None:
    """Held-out names are answered too, though their facts are in frozen weights; one name gets another color."""
    model = copy.deepcopy(pretrained)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, AdapterConfig("lora", r=8, lora_alpha=16))
    train(model, conversations(tmp_path, tokenizer, [(name, COLOR_OF[name]) for name in ASKED], 160), 3e-3)
    assert right_answers(model, tokenizer, HELD_OUT) > 0.6
    changed = next(color for color in COLORS if color != COLOR_OF[ASKED[0]])
    others = ASKED[1:8]
    answers = 4 * [(ASKED[0], changed)] + [(name, COLOR_OF[name]) for name in others]
    train(model, conversations(tmp_path, tokenizer, answers, 60), 1e-2)
    assert answer_words(model, tokenizer, ASKED[0], 1) == [changed]
    assert right_answers(model, tokenizer, others) > 0.8
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


def test_state_tuning_learns_a_style(tmp_path: Path, tokenizer: FolderTokenizer, pretrained: RWKV7) -> None:
    """Answers of one word get another before them, for names that were not asked for in this style too."""
    model = copy.deepcopy(pretrained)
    train(model, conversations(tmp_path, tokenizer, [(name, COLOR_OF[name]) for name in ASKED], 120), 1e-3)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert answer_words(model, tokenizer, HELD_OUT[0], 1)[0] in COLORS
    add_adapter(model, AdapterConfig("state"))
    answers = [(name, f"is {COLOR_OF[name]}") for name in ASKED]
    train(model, conversations(tmp_path, tokenizer, answers, 160), 0.3)
    styled = [answer_words(model, tokenizer, name, 2) for name in HELD_OUT]
    assert sum(first == "is" and second in COLORS for first, second in styled) > 0.9 * len(HELD_OUT)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


@torch.no_grad()
def answer_words(model: RWKV7, tokenizer: FolderTokenizer, name: str, count: int) -> list[str]:
    """The first words of the most likely answer."""
    ids = chat_ids(tokenizer, [{"role": "user", "content": f"{name} ?"}], add_generation_prompt=True)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return [tokenizer.decode([i]).strip() for i in ids[-count:]]
