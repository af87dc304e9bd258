"""Decoding agrees with the training forward; sampling follows the probabilities; text has whole characters only."""

import gc
import json
import math
import os
import resource
from dataclasses import asdict

import pytest
import torch
from chat_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.errors import UserError
from src.inference.characters import CharacterStream
from src.inference.decoder import PREFILL_TOKENS, Decoder
from src.inference.generate import main
from src.inference.generation import generate, generate_batch
from src.inference.load import find_tokenizer, find_weights, latest_trained_weights, load_model
from src.inference.sampling import Sampler, Sampling, draw, probabilities

TOKENS = [t * 31 % 97 for t in range(40)]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


# ---- the decoder agrees with the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 7, 39])
@pytest.mark.parametrize(
    "sizes", [{}, {"n_layer": 1}, {"n_embd": 96, "head_size": 32}, {"d_decay_lora": 16, "d_gate_lora": 48}]
)
def test_steps_after_a_prompt_give_the_logits_of_the_whole_sequence(split, sizes):
    model = random_model(**sizes)
    whole, state = model(torch.tensor([TOKENS]))
    decoder = Decoder(model)
    logits = [decoder.prefill([TOKENS[:split]]), *(decoder.step([token]) for token in TOKENS[split:])]
    torch.testing.assert_close(torch.cat(logits), whole[0, split - 1 :], rtol=0, atol=1e-5)
    for layer, expected in zip(decoder.state.layers, state.layers, strict=True):
        for a, b in zip(layer, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_prompt_longer_than_one_prefill_chunk(model):
    prompt = [t * 7 % 97 for t in range(2 * PREFILL_TOKENS + 5)]
    whole, _ = model(torch.tensor([prompt]))
    torch.testing.assert_close(Decoder(model).prefill([prompt]), whole[:, -1], rtol=0, atol=1e-5)


def test_prompts_of_different_lengths_give_the_logits_of_each_alone(model):
    prompts = [TOKENS[:1], TOKENS, TOKENS[3:17]]
    together = Decoder(model, batch=3)
    logits = [together.prefill(prompts), together.step([5, 6, 7]), together.prefill([[1], [2, 3], [4, 5, 6]])]
    for row, prompt in enumerate(prompts):
        alone = Decoder(model)
        expected = [alone.prefill([prompt]), alone.step([5 + row]), alone.prefill([[[1], [2, 3], [4, 5, 6]][row]])]
        for a, b in zip(logits, expected, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=2e-5)


def test_prompts_that_end_where_a_chunk_ends(model, monkeypatch):
    monkeypatch.setattr("src.inference.decoder.PREFILL_TOKENS", 12)  # 4 of each
    prompts = [TOKENS[:4], TOKENS[:8], TOKENS[:11]]
    logits = Decoder(model, batch=3).prefill(prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[row], Decoder(model).prefill([prompt])[0], rtol=0, atol=2e-5)


def test_a_state_is_a_copy_that_can_be_restored(model):
    decoder = Decoder(model)
    decoder.prefill([TOKENS])
    saved = decoder.state
    first = decoder.step([3])
    decoder.step([4])
    decoder.state = saved
    assert torch.equal(decoder.step([3]), first)
    decoder.reset()
    assert torch.equal(decoder.prefill([TOKENS]), Decoder(model).prefill([TOKENS]))


def test_bf16_decoding_is_close_to_the_bf16_training_forward():
    model = random_model().bfloat16()
    whole, _ = model(torch.tensor([TOKENS]))
    decoder = Decoder(model)
    logits = [decoder.prefill([TOKENS[:8]]), *(decoder.step([token]) for token in TOKENS[8:])]
    difference = (torch.cat(logits) - whole[0, 7:]).float()
    exact, _ = random_model()(torch.tensor([TOKENS]))
    assert difference.norm() < 2 * (whole - exact).float().norm()


# ---- generate --------------------------------------------------------------------------------------------------------


def test_greedy_decoding_takes_the_most_likely_token(model):
    text = TOKENS[:5]
    for token in generate(model, text, 12, temperature=0):
        logits, _ = model(torch.tensor([text]))
        assert token == int(logits[0, -1].argmax())
        text = [*text, token]
    assert len(text) == 17


def test_seeds_stop_ids_and_lengths(model):
    tokens = list(generate(model, torch.tensor(TOKENS), 20, top_p=1, seed=3))
    assert tokens == list(generate(model, TOKENS, 20, top_p=1, seed=3))
    assert tokens != list(generate(model, TOKENS, 20, top_p=1, seed=4))
    stop = tokens[11]
    assert list(generate(model, TOKENS, 20, top_p=1, seed=3, stop_ids=[stop])) == tokens[: tokens.index(stop)]
    assert list(generate(model, TOKENS, 0)) == []


def test_a_batch_gives_the_answers_of_each_prompt_alone(model):
    prompts = [TOKENS[:1], TOKENS, TOKENS[3:9], TOKENS[20:24], [0]]
    sampling = Sampling(top_p=0.95, presence_penalty=0.3, frequency_penalty=0.3)
    alone = [
        list(
            generate(
                model, p, 25, 1.0, 0.95, seed=5 + i, stop_ids=range(8), presence_penalty=0.3, frequency_penalty=0.3
            )
        )
        for i, p in enumerate(prompts)
    ]
    assert len({len(answer) for answer in alone}) > 2, "answers of equal length would not test how rows finish"
    assert generate_batch(model, prompts, 25, sampling, seed=5, stop_ids=range(8)) == alone
    three = generate_batch(
        model, prompts, 25, sampling, seed=5, stop_ids=range(8), is_complete=lambda answer: len(answer) == 3
    )
    assert three == [answer[:3] for answer in alone]


def test_a_batch_of_no_prompts_has_no_answers(model):
    assert generate_batch(model, [], 5) == []


def test_a_decoder_has_processed_all_generated_tokens_when_the_iterator_is_exhausted(model):
    decoder = Decoder(model)
    generated = list(generate(decoder, TOKENS, 6, seed=1))
    after = Decoder(model)
    after.prefill([TOKENS + generated])
    torch.testing.assert_close(decoder.step([1]), after.step([1]), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tokens", "problem"), [([], "empty"), ([97], "token id 97"), ([-1], "token id -1")])
def test_an_empty_prompt_and_ids_outside_the_vocabulary_are_rejected(model, tokens, problem):
    with pytest.raises(UserError) as caught:
        generate(model, tokens, 5)
    assert problem in caught.value.problem


@pytest.mark.slow
def test_memory_is_constant_over_100_000_decoded_tokens():
    model = random_model(n_layer=1, n_embd=64, vocab_size=16, d_decay_lora=8, d_aaa_lora=8, d_gate_lora=8)
    stream = generate(model, [1], 100_000, seed=0, presence_penalty=0.1)
    for _ in range(5_000):
        next(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in stream) == 95_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KB


def test_a_step_leaks_no_tensor(model):
    decoder = Decoder(model)
    decoder.prefill([TOKENS])

    def tensors() -> int:
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    decoder.step([1])
    before = tensors()
    for token in range(50):
        decoder.step([token])
    assert tensors() == before


# ---- sampling --------------------------------------------------------------------------------------------------------


def by_definition(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Probabilities over the whole vocabulary in float64, written for clarity."""
    p = torch.softmax(logits.double(), 0)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))
    kept, mass = [], 0.0
    for i in order:
        if mass < s.top_p or not kept:
            kept.append(i)
        mass += float(p[i])
    if s.top_k:
        kept = kept[: s.top_k]
    if s.temperature == 0:
        kept = kept[:1]
    out = torch.zeros_like(p)
    out[kept] = p[kept] ** (1 / s.temperature) if s.temperature else 1.0
    return out / out.sum()


SETTINGS = [
    Sampling(1.0, 1.0),
    Sampling(0.7, 1.0),
    Sampling(1.5, 0.8),
    Sampling(1.0, 0.0),
    Sampling(0.0, 0.9),
    Sampling(1.0, 1.0, top_k=3),
    Sampling(0.6, 0.9, top_k=4),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_probabilities_follow_the_definition(sampling):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    ids, p = probabilities(logits, sampling)
    dense = torch.zeros(50, dtype=torch.float64).index_add(0, ids, p.double())
    torch.testing.assert_close(dense, by_definition(logits, sampling), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.50001, 2), (0.75, 2), (0.7500001, 3), (0.875, 3), (0.9, 4)])
def test_top_p_at_a_boundary(top_p, kept):
    """The token whose sum reaches top_p exactly is the last one: of 1/2, 1/4, 1/8, 1/8, exact in binary."""
    p = torch.tensor([0.125, 0.5, 0.125, 0.25])
    ids, _ = probabilities(p.log(), Sampling(1.0, top_p))
    assert len(ids) == kept
    assert ids[:2].tolist() == [1, 3][:kept]


def test_the_default_of_each_setting():
    """Pinned: scripts that leave a setting out depend on it, and texts of a seed with it."""
    assert asdict(Sampling()) == {
        **{"temperature": 1.0, "top_p": 0.85, "top_k": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        "penalty_decay": 0.996,
    }


@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[2], SETTINGS[-1]], ids=str)
def test_draws_follow_the_probabilities(sampling):
    """Chi-squared test over 4,000 draws with a fixed seed, at a level of 1e-4."""
    from scipy.stats import chisquare

    logits = torch.randn(12, generator=torch.Generator().manual_seed(2)) * 1.5
    sampler, draws = Sampler(sampling, seed=0), 4_000
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(draws)]), minlength=12)
    expected = by_definition(logits, sampling) * draws
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0
    if int(possible.sum()) > 1:
        assert chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > 1e-4


def test_a_low_temperature_does_not_underflow():
    ids, p = probabilities(torch.linspace(-30, 30, 1000), Sampling(1e-4, 1.0))
    assert float(p.sum()) == pytest.approx(1)
    assert int(ids[p.argmax()]) == 999


def test_the_lowest_temperatures_are_greedy():
    for temperature in (1e-46, 5e-324):
        ids, p = probabilities(torch.linspace(-30, 30, 1000), Sampling(temperature, 1.0))
        assert (ids.tolist(), p.tolist()) == ([999], [1.0])


def test_penalties_grow_with_each_use_and_decay():
    sampling = Sampling(0.0, presence_penalty=0.5, frequency_penalty=0.25, penalty_decay=0.996)
    sampler = Sampler(sampling, uncounted_ids=[2])
    counts: dict[int, float] = {}
    base = torch.tensor([1.0, 0.9, 0.8, 0.0])
    for _ in range(60):
        penalised = base.clone()
        for token, count in counts.items():
            penalised[token] -= 0.5 + 0.25 * count
        expected = int(penalised.argmax())
        assert sampler(base) == expected
        counts = {token: count * 0.996 for token, count in counts.items()}
        counts[expected] = counts.get(expected, 0.0) + (expected != 2)
    assert counts[2] == 0.0
    assert {0, 1, 2} <= set(counts)


def test_tokens_drawn_together_are_those_drawn_alone():
    """Each row has settings, a seed and counts of its own; one whose logits are not finite disturbs no other."""
    choices = [*SETTINGS, Sampling(), Sampling(presence_penalty=0.4, frequency_penalty=0.3), Sampling()]
    together = [Sampler(sampling, seed=i) for i, sampling in enumerate(choices)]
    alone = [Sampler(sampling, seed=i) for i, sampling in enumerate(choices)]
    draws = torch.Generator().manual_seed(5)
    for _ in range(12):
        logits = 3 * torch.randn(len(choices), 3000, generator=draws)
        logits[-1, 7] = math.nan
        tokens = draw(together, logits.clone())
        assert tokens[:-1] == [sampler(row) for sampler, row in zip(alone, logits[:-1], strict=False)]
        assert isinstance(tokens[-1], UserError)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        Sampler(Sampling())(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 1.5), ("top_k", -1), ("penalty_decay", 2), ("presence_penalty", math.nan)],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(UserError) as caught:
        Sampling(**{name: value})
    assert (caught.value.flag, caught.value.given) == (name, value)
    assert caught.value.expected


# ---- whole characters ------------------------------------------------------------------------------------------------


class Bytes(Tokenizer):
    """Ids are bytes."""

    name, vocab_size = "bytes", 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    characters = CharacterStream(tokenizer)
    return [*(characters.feed(i) for i in ids), characters.finish()]


@settings(max_examples=300)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_random_bytes_never_break_the_stream(ids):
    pieces = stream(Bytes(), ids)
    assert "".join(pieces) == bytes(ids).decode("utf-8", errors="replace")
    for piece in pieces:
        piece.encode("utf-8")


@settings(max_examples=100)
@given(text=st.text(max_size=20))
def test_text_is_returned_in_whole_characters(text):
    pieces = stream(Bytes(), list(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 or piece.count("\ufffd") for piece in pieces)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_random_tokens_of_a_folder_tokenizer(tokenizer, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 65535), max_size=30))
def test_random_tokens_of_the_world_tokenizer(world, ids):
    assert "".join(stream(world, ids)) == world.decode(ids)


# ---- the command line ------------------------------------------------------------------------------------------------


def make_run(folder, vocab_size=400):
    folder.mkdir(parents=True)
    torch.save(random_model(vocab_size=vocab_size).state_dict(), folder / "rwkv-final.pth")
    make_tokenizer(folder / "tokenizer")
    (folder / "run.json").write_text(json.dumps({"tokenizer": "a folder that no longer exists"}))
    return folder


def test_generate_continues_a_prompt_with_the_tokenizer_of_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    flags = [str(run), "--prompt", "def ", "--length", "12", "--device", "cpu", "--seed", "1"]
    assert main(flags) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert main([*flags, "--temperature", "1.0"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("flags", "about", "detail"),
    [
        (["nowhere"], "nowhere", "no such file"),
        (["{run}", "--temperature", "-2"], "--temperature -2.0", "0 (greedy) or more"),
        (["{run}", "--tokenizer", "world"], "--tokenizer world", "a vocabulary of 400"),
        (["{empty}"], "{empty}", "contains no rwkv-final.pth"),
        (["{several}"], "{several}", "a.pth (one of 2)"),
        (["{run}", "--device", "cuda"], "--device cuda", "finds no GPU"),
        (["{run}", "--device", "abacus"], "--device abacus", "no such device"),
        (["{run}", "--device", "meta"], "--device meta", "not supported; expected cpu, cuda"),
        (["{run}", "--seed", str(2**64)], f"--seed {2**64}", "an integer from 0 to 2^63 - 1"),
        (["{run}", "--seed", "-1"], "--seed -1", "an integer from 0"),
        (["{run}", "--length", "-5"], "--length -5", "at least 0"),
    ],
)
def test_errors_name_the_flag_and_the_value(tmp_path, capsys, flags, about, detail):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folders = {name: tmp_path / name for name in ("empty", "several")}
    for folder in folders.values():
        folder.mkdir()
    for name in ("b.pth", "a.pth"):
        (folders["several"] / name).touch()
    folders["run"] = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        main([flag.format(**folders) for flag in flags])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"{about.format(**folders)}: " in message
    assert detail in message
    assert message.count("\n") == 1


def test_a_numbered_cpu_is_a_cpu(tmp_path):
    weights = find_weights(make_run(tmp_path / "run"))
    assert load_model(weights, device="cpu:0").emb.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "text", "message"),
    [
        (3e38, "def \n", "the model's logits are not finite"),  # finite weights whose products overflow
        (math.nan, "", "{run}/rwkv-final.pth: head.weight contains values that are not finite"),
    ],
)
def test_weights_that_are_not_finite_are_reported_in_one_line(tmp_path, capsys, value, text, message):
    run = make_run(tmp_path / "run")
    weights = torch.load(run / "rwkv-final.pth")
    weights["head.weight"][:] = value
    torch.save(weights, run / "rwkv-final.pth")
    with pytest.raises(SystemExit) as stopped:
        main([str(run), "--prompt", "def ", "--device", "cpu"])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == text
    assert output.err.startswith(f"python -m src.inference.generate: {message.format(run=run)}")
    assert output.err.count("\n") == 1


def test_the_most_trained_weights_of_a_run_are_found(tmp_path):
    for name in ("rwkv-init.pth", "rwkv-2.pth", "rwkv-10.pth", "rwkv-final.pth", "other.pth"):
        (tmp_path / name).touch()
    for name in ("rwkv-final.pth", "rwkv-10.pth", "rwkv-2.pth", "rwkv-init.pth"):
        assert find_weights(tmp_path).name == name
        (tmp_path / name).unlink()
    assert find_weights(tmp_path / "other.pth").name == "other.pth"


def test_the_latest_trained_weights_under_out(tmp_path):
    with pytest.raises(UserError, match="no trained weights"):
        latest_trained_weights(tmp_path)
    names = ["b/rwkv-final.pth", "a/rwkv-best.pth", "a/sub/rwkv-3.pth", "a/rwkv-init.pth", "a/other.pth"]
    for age, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    for name in ("a/sub/rwkv-3.pth", "a/rwkv-best.pth", "b/rwkv-final.pth"):
        assert latest_trained_weights(tmp_path) == tmp_path / name
        (tmp_path / name).unlink()


def test_the_tokenizer_of_weights(tmp_path):
    run = make_run(tmp_path / "run")
    assert find_tokenizer(run / "rwkv-final.pth", 400).name == str(run / "tokenizer")
    single_file = tmp_path / "single.pth"
    assert find_tokenizer(single_file, 65536).name == "world"
    with pytest.raises(UserError) as caught:
        find_tokenizer(single_file, 400)
    assert (caught.value.flag, caught.value.given) == ("tokenizer", None)
    assert str(single_file) in caught.value.problem


@pytest.mark.parametrize("version", [None, 1, 2])
def test_run_json_of_any_version_is_read(tmp_path, version):
    recorded = {"tokenizer": "world"} | ({} if version is None else {"version": version})
    (tmp_path / "run.json").write_text(json.dumps(recorded))
    assert find_tokenizer(tmp_path / "rwkv-final.pth", 70_000).name == "world"


@pytest.mark.parametrize("content", ["{", '{"version": 99}', '{"settings": 1}'])
def test_an_unusable_run_json_is_reported(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError) as caught:
        find_tokenizer(tmp_path / "rwkv-final.pth", 65536)
    assert caught.value.given == tmp_path / "run.json"


@pytest.mark.parametrize("deviation", [0.3, 2.0, 4.0])
def test_top_p_of_a_large_vocabulary_does_not_depend_on_the_way_it_is_found(monkeypatch, deviation):
    logits = (deviation * torch.randn(5000, generator=torch.Generator().manual_seed(0))).mul(8).round() / 8  # with ties
    choices = [Sampling(top_p=top_p, top_k=top_k) for top_p in (0.1, 0.85, 0.999) for top_k in (0, 9)]
    quick = [probabilities(logits, sampling) for sampling in choices]
    monkeypatch.setattr("src.inference.sampling.FEW", 10**9)
    whole = [probabilities(logits, sampling) for sampling in choices]
    for (ids, p), (same_ids, same_p) in zip(quick, whole, strict=True):
        assert torch.equal(ids, same_ids)
        assert torch.equal(p, same_p)
