"""Fine-tuning end to end: packed rows are the mean of their conversations, and a tuned model answers better than
before."""

import csv
import itertools
import json

import pytest
import torch
from chat_models import chat_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from src.cli import parse
from src.dataset.sft import collate
from src.dataset.tokenizer import load_tokenizer
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.generate import generate
from src.inference.load import find_tokenizer, pretrained_only
from src.inference.sampling import Sampling
from src.inference.template_choice import find_template
from src.model import RWKV7, ModelConfig
from src.ops.loss import cross_entropy_l2wrap
from src.training.data import HeldOut, SftSamples
from src.training.run import run

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes as tokens, with ChatML's three special ones first."""
    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    raw.add_special_tokens(special)
    raw.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write(path, pairs):
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path.write_text("".join(json.dumps({"conversations": t}) + "\n" for t in turns))


@pytest.fixture
def files(tmp_path):
    """Questions "spell 7"; the held-out ones ask the same of other phrasing."""
    write(
        tmp_path / "train.jsonl",
        [(f"{verb} {i}", NUMBERS[i]) for i in range(10) for verb in ("spell", "write", "say") * 4],
    )
    write(tmp_path / "held.jsonl", [(f"name {i}", NUMBERS[i]) for i in range(10)])
    return tmp_path


def settings(files, folder, **changed):
    flags = {
        "data_type": "sft",
        "data_file": files / "train.jsonl",
        "tokenizer": folder,
        "proj_dir": files / "run",
        "ctx_len": 128,
        "micro_bsz": 2,
        "n_layer": 2,
        "n_embd": 64,
        "head_size": 32,
        "lr_init": 5e-3,
        "lr_final": 5e-4,
        "random_seed": 3,
        "epoch_steps": 20,
        "accelerator": "cpu",
        **changed,
    }
    return parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def test_the_seed_decides_on_the_order_of_training_and_on_nothing_held_out(files, tokenizer):
    def opened(seed):
        config = settings(files, tokenizer, random_seed=seed, val_data_file=files / "held.jsonl", val_windows=5)[0]
        return SftSamples(config), HeldOut(config)

    (three, held), (four, same), (drawn, _) = map(opened, (3, 4, -1))
    assert [samples.order_seed for samples in (three, four, drawn)] == [3, 4, 0]
    assert not torch.equal(three.rows.sample(0).inputs, four.rows.sample(0).inputs)
    for one, other in zip(held.batches(0, 1), same.batches(0, 1), strict=True):
        assert all(map(torch.equal, one, other))


def test_held_out_rows_are_spread_over_the_file_and_prompts_end_before_the_answer(files, tokenizer):
    flags = {"val_data_file": files / "held.jsonl", "val_windows": 5, "packing": 0}
    held, encoder = HeldOut(settings(files, tokenizer, **flags)[0]), load_tokenizer(tokenizer)
    inputs = torch.cat([batch[0].flatten() for batch in held.batches(0, 1)]).view(-1, 128)
    texts = [encoder.decode([token for token in row if token]) for row in inputs.tolist()]
    assert [i for i in range(10) if any(f"name {i}" in text for text in texts)] == [0, 2, 4, 6, 8]
    for i, (prompt, answer, *_) in enumerate(held.prompts(5, 99)):
        assert encoder.decode(prompt).rstrip().endswith("assistant")
        assert encoder.decode(answer).strip().startswith(NUMBERS[2 * i])


def test_a_packed_batch_is_the_token_weighted_mean_of_its_conversations(files, tokenizer):
    rows = SftSamples(settings(files, tokenizer)[0]).rows
    batch = collate([rows.row(0), rows.row(1)])
    torch.manual_seed(0)
    model = RWKV7(ModelConfig(2, 64, rows.conversations.data.tokens.max().item() + 300, head_size=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    cross_entropy_l2wrap(model(batch.inputs, cu_seqlens=batch.cu_seqlens)[0], batch.targets).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    bounds = batch.cu_seqlens.tolist()
    counted = (batch.targets >= 0).sum()
    assert len(bounds) > 6
    for begin, end in itertools.pairwise(bounds):
        targets = batch.targets[:, begin:end]
        alone = cross_entropy_l2wrap(model(batch.inputs[:, begin:end])[0], targets)
        (alone * (targets >= 0).sum() / counted).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, atol=2e-5, rtol=2e-3, msg=name)


def test_a_tuned_model_answers_held_out_questions_better(files, tokenizer, capfd):
    base = files / "base.pth"
    torch.manual_seed(0)
    spec = load_tokenizer(str(tokenizer))
    torch.save(RWKV7(ModelConfig(2, 64, spec.vocab_size, head_size=32)).state_dict(), base)
    assert run(*settings(files, tokenizer, load_model=base, epochs=12, val_data_file=files / "held.jsonl")) == 0
    output = capfd.readouterr().out
    losses = [
        float(line.split("loss ")[1].split()[0])
        for line in output.splitlines()
        if line.startswith("held-out loss ") and "over" in line
    ]
    assert losses[0] < 2.5
    model = RWKV7.from_checkpoint(files / "run" / "rwkv-final.pth")
    right = 0
    for i in range(10):
        prompt = chat_ids(spec, [{"role": "user", "content": f"name {i}"}], add_generation_prompt=True)
        answer = list(generate(model, prompt, 12, temperature=0, stop_ids=spec.eos_ids))
        right += spec.decode(answer).startswith(NUMBERS[i])
    assert right >= 7


def test_a_world_model_is_tuned_and_answers_in_its_own_format(files):
    pytest.importorskip("pyrwkv_tokenizer")
    assert run(*settings(files, "world", epochs=12, ctx_len=96, lr_init=1e-2)) == 0
    world = load_tokenizer("world")
    weights = files / "run" / "rwkv-final.pth"
    assert find_tokenizer(weights, 65536, "").name == "world"
    template = find_template("", world, pretrained_only(weights))
    talk = Conversation(Decoder(RWKV7.from_checkpoint(weights)), world, template, Sampling(temperature=0), 0, 20)
    right = 0
    for i, number in enumerate(NUMBERS):
        right += "".join(piece.text for piece in talk.ask(f"say {i}")).strip() == number
        talk.reset()
    assert right >= 7


def test_fine_tuning_continues_to_the_bit_and_leaves_out_nothing(files, tokenizer):
    """Stopped by the end of a shorter run's states: the second start reads on where the first stopped."""
    whole, cut = files / "whole", files / "cut"
    assert run(*settings(files, tokenizer, proj_dir=whole, my_exit_tokens=128 * 2 * 20, save_minutes=0)) == 0
    assert run(
        *settings(files, tokenizer, proj_dir=cut, my_exit_tokens=128 * 2 * 20, save_minutes=0, time_limit=0.51)
    ) in (0, 124)
    assert run(*settings(files, tokenizer, proj_dir=cut, my_exit_tokens=128 * 2 * 20, save_minutes=0)) == 0
    one, two = (torch.load(path / "rwkv-final.pth") for path in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_accumulated_batches_weigh_their_answers_as_one_batch_does(files, tokenizer):
    """Rows hold different numbers of answer tokens, so a plain mean over the micro batches would be another loss."""
    lengths = [("say", " ".join(NUMBERS[: 1 + i % 9])) for i in range(120)]
    write(files / "train.jsonl", lengths)
    losses = []
    for name, micro_bsz, accumulate in (("whole", 4, 1), ("cut", 1, 4)):
        flags = {"proj_dir": files / name, "micro_bsz": micro_bsz, "accumulate_grad_batches": accumulate}
        assert run(*settings(files, tokenizer, my_exit_tokens=128 * 4 * 8, packing=0, adam_eps=1e-3, **flags)) == 0
        rows = csv.DictReader((files / name / "metrics.csv").read_text().splitlines())
        losses.append([float(row["loss"]) for row in rows])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(
    ("changed", "output"),
    [
        ({"tokenizer": ""}, "--tokenizer"),
        ({"data_file": "no.jsonl"}, "no.jsonl"),
        ({"ctx_len": 4}, "--ctx_len"),
        ({"vocab_size": 50}, "--vocab_size"),
        ({"truncate": "error", "ctx_len": 20}, "--truncate"),
    ],
)
def test_wrong_input(files, tokenizer, capfd, changed, output):
    try:
        code = run(*settings(files, tokenizer, **changed))
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert output in capfd.readouterr().err
