"""What a long context gives a model: loss by position, and facts found after a distance."""

import numpy as np
import pytest
import torch
from chat_models import make_tokenizer
from random_model import random_model

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.needle import NeedleMaker
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference import evaluate, position_loss
from src.inference.evaluate import main
from src.inference.heldout_loss import heldout_loss
from src.inference.needle import find_needles
from src.inference.position_loss import PositionLoss, loss_by_position, position_table
from src.model.weights import save_weights


@pytest.fixture(scope="module")
def model():
    return random_model(n_layer=2, vocab_size=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TOKENS = np.random.default_rng(0).integers(0, 400, 1000)


def test_the_loss_by_position_is_that_of_each_position(model, monkeypatch):
    """Positions 1 .. 15, 16 .. 31, 32 .. 40, over windows of 40; the state is carried between passes."""
    monkeypatch.setattr(position_loss, "TOKENS_PER_PASS", 24)
    result = loss_by_position(model, TOKENS, 40, micro_bsz=3)
    assert list(zip(result.begins, result.ends, strict=True)) == [(1, 15), (16, 31), (32, 40)]
    windows = torch.tensor(np.stack([TOKENS[i * 40 : i * 40 + 41] for i in range(24)]))
    log_p = torch.log_softmax(model(windows[:, :-1])[0].double(), -1)
    losses = -log_p.gather(-1, windows[:, 1:, None]).squeeze(-1).mean(0)
    expected = [losses[:15].mean(), losses[15:31].mean(), losses[31:].mean()]
    assert result.losses == pytest.approx([float(loss) for loss in expected], rel=1e-5)
    whole = heldout_loss(model, TOKENS, 40)
    assert np.average(result.losses, weights=result.counts) == pytest.approx(whole.loss, rel=1e-5)
    assert sum(result.counts) == whole.tokens


def test_windows_longer_than_the_data_end_with_it(model):
    assert loss_by_position(model, TOKENS[:100], 4096).ends == (15, 31, 63, 99)


def test_needles_lie_where_they_say(folder):
    tokenizer = load_tokenizer(folder)
    maker = NeedleMaker(TOKENS % 50 + 5, tokenizer.encode_as_text)
    near, again, other = maker.test(3, 10), maker.test(3, 10), maker.test(4, 10)
    assert near == again != other
    far = maker.test(3, 2500)  # longer than the filler
    for needle, distance in ((near, 10), (far, 2500)):
        text = tokenizer.decode(needle.prompt[64:])
        number = tokenizer.decode(needle.answer).strip()
        assert len(number) == 5
        assert number.isdigit()
        fact = tokenizer.encode_as_text(f"\nThe pass key is {number}. Remember it: {number}.\n")
        question = tokenizer.encode_as_text("\nWhat is the pass key? The pass key is")
        assert needle.prompt[64 : 64 + len(fact)] == list(fact)
        assert needle.prompt[-len(question) :] == list(question)
        assert len(needle.prompt) == 64 + len(fact) + distance + len(question)
        assert text.count(number) >= 2
    questions = []
    for number in range(8):
        document = maker.document(number, 500)
        assert len(document) == 500
        first, *answered = tokenizer.decode(document).split("What is the pass key? The pass key is ")
        assert {part[:5] for part in answered[:-1]} <= {first.split("Remember it: ")[1][:5]}
        questions.append((len(first), len(answered)))
    # of some texts the first question comes at once, and more follow; of others it comes late
    assert min(questions)[1] > 4
    assert max(questions)[0] > 2 * min(questions)[0]


def test_the_score_counts_answers_that_greedy_decoding_gives(folder):
    """A model of which every token is certain, and one that answers at random."""
    tokenizer = load_tokenizer(folder)
    maker = NeedleMaker(TOKENS, tokenizer.encode_as_text)
    model = random_model(n_layer=2, vocab_size=400)
    (result,) = find_needles(model, maker, [30], texts=3)
    needles = [maker.test(n, 30) for n in range(3)]
    expected = []
    for needle in needles:
        logits = model(torch.tensor([[*needle.prompt, *needle.answer[:-1]]]))[0][0, -len(needle.answer) :]
        expected.append(torch.log_softmax(logits.double(), -1).gather(-1, torch.tensor(needle.answer)[:, None]).sum())
        assert (logits.argmax(-1) == torch.tensor(needle.answer)).all() in (True, False)
    assert result.log_probability == pytest.approx(float(sum(expected) / 3), rel=1e-5)
    assert (result.distance, result.texts, result.found) == (30, 3, 0.0)


def test_the_command_draws_and_scores(model, folder, tmp_path, capsys):
    save_weights(model.state_dict(), tmp_path / "model.pth")
    with BinIdxWriter(tmp_path / "text", np.uint16) as writer:
        writer.add_document(TOKENS.tolist())
    picture, weights, data = tmp_path / "curve.svg", str(tmp_path / "model.pth"), str(tmp_path / "text")
    assert main([weights, "--data", data, "--by_position", "--ctx_len", "64", "--compare", weights,
                 "--picture", str(picture)]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "32 - 64" in out
    assert "<svg" in picture.read_text()
    assert main([weights, "--data", data, "--tokenizer", str(folder), "--needle", "8, 20", "--needle_texts", "2"]) == 0
    assert "       20      0%" in capsys.readouterr().out
    for argv, message in (
        (["--needle", "8,far"], "expected numbers of tokens"),
        (["--needle", "8", "--by_position"], "cannot be combined"),
        (["--compare", weights], "isn't used by --data, but by --by_position"),
        (["--needle", "8", "--ctx_len", "64"], "--ctx_len 64: isn't used by --needle"),
        (["--needle", "8", "--max_windows", "3"], "--max_windows 3: isn't used by --needle"),
        (["--by_position", "--needle_texts", "2"], "--needle_texts 2: isn't used by --by_position"),
        (["--needle", "8", "--needle_texts", "0"], "at least 1"),
        (["--needle", "8"], "--tokenizer"),
        (["--by_position", "--picture", str(tmp_path / "curve.xyz")], "ends in .png or .svg"),
        (["--by_position", "--picture", str(tmp_path / "none" / "curve.png")], "no such folder"),
    ):
        with pytest.raises(SystemExit):
            main([weights, "--data", data, *argv])
        assert message in capsys.readouterr().err


def test_models_are_compared_on_the_same_positions(model):
    results = [("a", loss_by_position(model, TOKENS[:100], 90)), ("b", loss_by_position(model, TOKENS[:60], 90))]
    with pytest.raises(UserError, match="different lengths"):
        position_table(results)


def test_an_adapter_is_not_of_the_models_compared_with(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(evaluate, "_open", lambda name, _, adapted: given.append(adapted.adapter) or (name, None, None))
    monkeypatch.setattr(evaluate, "read_tokens", lambda *_: TOKENS)
    monkeypatch.setattr(evaluate, "loss_by_position", lambda *_: PositionLoss((1,), (2,), (0.0,), (1,)))
    main(
        ["M", "--data", "d", "--by_position", "--adapter", "A", "--compare", "M", "--picture", str(tmp_path / "p.svg")]
    )
    assert given == ["A", ""]


def test_documents_with_needles_are_made(folder, tmp_path, capsys):
    from data.make_needles import main as make

    with BinIdxWriter(tmp_path / "text", np.uint16) as writer:
        writer.add_document(TOKENS.tolist())
    make(
        [str(tmp_path / "text"), str(folder), "--length", "300,100", "--count", "2", "--out", str(tmp_path / "needles")]
    )
    made = MMapIndexedDataset(tmp_path / "needles")
    assert made.sizes.tolist() == [300, 100, 100, 100] * 2
    assert all(made[i][-1] == 0 for i in range(8))
    assert len({bytes(made[i]) for i in range(8)}) == 8
