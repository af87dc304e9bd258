"""Evaluation agrees with the definition of each measure."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from chat_models import CHATML, MARKED, USER_OPENS, make_tokenizer, tokenizer_with_entries
from random_model import random_model

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference.evaluate import main
from src.inference.evaluation_data import encode_texts, read_texts, text_bytes
from src.inference.generation import generate
from src.inference.harness import HarnessMethods, harness_model
from src.inference.heldout_loss import heldout_loss
from src.inference.last_words import last_words
from src.inference.scoring import score_continuations
from src.inference.windows import windows


@pytest.fixture(scope="module")
def model():
    return random_model(n_layer=2, vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def data(tmp_path):
    with BinIdxWriter(tmp_path / "held-out", np.uint16) as writer:
        for n in range(5):
            writer.add_document([(i * 37 + n) % 400 for i in range(61)] + [0])
    return MMapIndexedDataset(tmp_path / "held-out")


def plain_log_p(model, tokens, first):
    """log p of tokens[first:], each after all before it, in float64."""
    logits, _ = model(torch.tensor([tokens]))
    log_p = torch.log_softmax(logits[0].double(), -1)
    return [float(log_p[i - 1, tokens[i]]) for i in range(first, len(tokens))]


# ---- held-out loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ctx_len"), [(310, 32), (33, 32), (20, 32), (2, 1), (1000, 1)])
def test_windows_predict_each_token_once(n, ctx_len):
    slices = list(windows(n, ctx_len))
    predicted = [i for w in slices for i in range(w.start + 1, w.stop)]
    assert predicted == list(range(1, len(predicted) + 1))
    assert n - 1 - len(predicted) < ctx_len
    assert slices[-1].stop <= n


def test_a_limited_number_of_windows_is_evenly_spaced():
    starts = [w.start for w in windows(100_001, 100, max_windows=8)]
    assert starts == [i * 12500 for i in range(8)]
    assert list(windows(301, 100, max_windows=8)) == list(windows(301, 100))


def test_heldout_loss_is_the_mean_over_independent_windows(model, data):
    result = heldout_loss(model, data, ctx_len=48, micro_bsz=4)
    losses = [-p for w in windows(data.n_tokens, 48) for p in plain_log_p(model, data.tokens[w].tolist(), 1)]
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result == heldout_loss(model, data, ctx_len=48, micro_bsz=4)
    assert heldout_loss(model, data, 48, micro_bsz=1).loss == pytest.approx(result.loss, rel=1e-6)
    assert heldout_loss(model, data, 48, max_windows=2).tokens == 96


def test_text_bytes_are_those_of_the_text(tmp_path, tokenizer):
    """The end of a document has no bytes, except in a vocabulary where 0 is text as well."""
    assert text_bytes(np.array([*tokenizer.encode("Hi!"), 0]), tokenizer) == 3
    zero_is_text = load_tokenizer(tokenizer_with_entries(tmp_path, ["!", "H", "i", "<end>"], "<end>"))
    assert text_bytes(np.array(zero_is_text.encode("Hi!")), zero_is_text) == 3


def test_special_tokens_in_texts_are_text_as_in_training_data(tokenizer):
    """Equal files give the tokens that data/make_data.py writes: a text ends where it ends."""
    text = "the <|endoftext|> answer"
    assert encode_texts([text], tokenizer).tolist() == [*tokenizer.encode_as_text(text), 0]
    assert tokenizer.encode_as_text(text).count(0) == 0


def test_bits_per_byte_of_a_uniform_distribution(model, tokenizer):
    """It needs log2 V bits per token."""
    uniform = random_model(n_layer=1, vocab_size=400)
    uniform.head.weight.zero_()
    text = tokenizer.encode("def answer(question): return 'the answer'" * 9)
    result = heldout_loss(uniform, np.array(text), ctx_len=len(text) - 1)
    n_bytes = len(tokenizer.decode_bytes(text[1:]))
    assert result.bits_per_byte(n_bytes) == pytest.approx(math.log2(400) * (len(text) - 1) / n_bytes, rel=1e-5)


@pytest.mark.parametrize(("tokens", "problem"), [([3], "has 1 tokens"), ([1, 400, 2], "id 400"), ([1, -1], "id -1")])
def test_unusable_data_is_rejected(model, tokens, problem):
    with pytest.raises(UserError) as caught:
        heldout_loss(model, np.array(tokens), 8)
    assert caught.value.flag == "data"
    assert problem in caught.value.problem


def test_an_error_about_windows_names_the_flag_of_the_caller():
    with pytest.raises(UserError) as caught:
        list(windows(1, 8, flag="val_data_file"))
    assert caught.value.flag == "val_data_file"


# ---- continuations ---------------------------------------------------------------------------------------------------


def test_scores_equal_those_of_each_pair_alone(model, monkeypatch):
    monkeypatch.setattr("src.inference.scoring.TOKENS_PER_PASS", 60)
    monkeypatch.setattr("src.inference.scoring.LOGIT_ROWS", 7)
    pairs = [
        ([(i * n) % 400 for i in range(1, n)], [(i * n + 1) % 400 for i in range(n % 5 + 1)]) for n in range(2, 24)
    ]
    context = [5, 6, 7]
    pairs.append((context, list(generate(model, context, 4, temperature=0))))
    scores = score_continuations(model, pairs)
    for (before, after), score in zip(pairs, scores, strict=True):
        assert score.log_probability == pytest.approx(sum(plain_log_p(model, before + after, len(before))), rel=1e-4)
        assert score.greedy == (list(generate(model, before, len(after), temperature=0)) == after)
    assert scores[-1].greedy


@pytest.mark.parametrize(("before", "after"), [(1, 300), (150, 151), (299, 2), (120, 1)])
def test_a_long_pair_is_processed_in_chunks_with_the_same_score(model, monkeypatch, before, after):
    ids = [(7 * i * i + i) % 400 for i in range(before + after)]
    pair = (ids[:before], ids[before:])
    whole = score_continuations(model, [pair])[0]
    monkeypatch.setattr("src.inference.scoring.TOKENS_PER_PASS", 60)
    lengths = []
    hidden = type(model).hidden

    def recording(self, tokens, *args, **kwargs):
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "hidden", recording)
    short = ([1, 2], [3])
    first, chunked, last = score_continuations(model, [short, pair, short])
    assert chunked.log_probability == pytest.approx(whole.log_probability, rel=1e-5)
    assert chunked.greedy == whole.greedy
    assert first == last
    assert max(lengths) == 60
    greedy = (ids[:70], list(generate(model, ids[:70], 100, temperature=0)))
    assert score_continuations(model, [greedy])[0].greedy


def test_last_words(model, tokenizer):
    context = "what is the answer"
    ids = [0, *tokenizer.encode(context)]
    texts = [f"{context} string", f"{context} list\n"]
    result = last_words(model, tokenizer, texts)
    log_p = [sum(plain_log_p(model, ids + tokenizer.encode(w), len(ids))) for w in (" string", " list")]
    assert result.texts == 2
    assert result.perplexity == pytest.approx(math.exp(-sum(log_p) / 2), rel=1e-4)
    assert 0 <= result.accuracy <= 1
    for texts in (["alone"], []):
        with pytest.raises(UserError) as caught:
            last_words(model, tokenizer, texts)
        assert caught.value.flag == "last_word"


# ---- the harness -----------------------------------------------------------------------------------------------------


class Request:
    def __init__(self, *args):
        self.args = args


def test_requests_of_the_harness(model, tokenizer):
    methods = HarnessMethods(model, tokenizer)
    scored = methods.loglikelihood([Request("what is ", "the answer"), Request("", "def")])
    ids = [0, *tokenizer.encode("what is")]
    assert scored[0][0] == pytest.approx(
        sum(plain_log_p(model, ids + tokenizer.encode(" the answer"), len(ids))), rel=1e-4
    )
    assert isinstance(scored[1][1], bool)
    text = "def answer(question): return"
    whole = [0, *tokenizer.encode(text)]
    assert methods.loglikelihood_rolling([Request(text)])[0] == pytest.approx(
        sum(plain_log_p(model, whole, 1)), rel=1e-4
    )
    free, short = methods.generate_until(
        [Request("def ", {"until": [], "max_gen_toks": 9}), Request("def ", {"until": ["e"], "max_gen_toks": 9})]
    )
    assert short == free.partition("e")[0]


QUESTION = [{"role": "user", "content": "what is it?"}]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("source", "end", "separator"),
    [
        (CHATML, "<|im_start|>assistant\n", ""),
        (MARKED, "<|im_start|>assistant\n", ""),
        (USER_OPENS, "<|im_start|>assistant\n", ""),
        (RWKV_TEMPLATE, "User: what is it?\n\nAssistant:", " "),
    ],
    ids=["chatml", "marked", "user opens", "rwkv"],
)
def test_the_chat_template_is_applied_up_to_the_answer(model, tokenizer, source, end, separator):
    """A prompt, plus an answer, is the conversation as fine-tuning renders it."""
    template = ChatTemplate(source, tokenizer.specials)
    methods = HarnessMethods(model, tokenizer, template)
    prompt = methods.apply_chat_template(QUESTION)
    assert prompt.endswith(end + separator)
    assert template.render([*QUESTION, {"role": "assistant", "content": "It"}]).startswith(prompt + "It")
    history = [*QUESTION, {"role": "assistant", "content": "the string"}, *QUESTION]
    assert methods.apply_chat_template(history).endswith(end + separator)
    # gen_prefix of a task: the beginning of the answer, with its spaces
    begun = methods.apply_chat_template([*history, {"role": "assistant", "content": "The answer is "}], False)
    assert begun == methods.apply_chat_template(history) + "The answer is "
    assert methods.chat_template(True) == source
    assert methods.chat_template(False) == ""


def test_scores_after_a_chat_template_are_those_of_the_rendered_conversation(model, tokenizer):
    """Of World's format too, whose answers begin with a space that belongs to the first word."""
    for source in (CHATML, RWKV_TEMPLATE):
        methods = HarnessMethods(model, tokenizer, ChatTemplate(source, tokenizer.specials))
        prompt = methods.apply_chat_template(QUESTION)
        ids = tokenizer.encode(prompt.rstrip())
        answer = tokenizer.encode(prompt[len(prompt.rstrip()) :] + "the string")
        (score,) = methods.loglikelihood([Request(prompt, "the string")])
        assert score[0] == pytest.approx(sum(plain_log_p(model, ids + answer, len(ids))), rel=1e-4)


@pytest.mark.parametrize("source", [CHATML, RWKV_TEMPLATE], ids=["chatml", "rwkv"])
def test_a_generated_answer_ends_where_the_template_ends_one(model, tokenizer, monkeypatch, source):
    """At <|im_end|>, or at the blank line of World's format, without the space that the prompt asks for."""
    methods = HarnessMethods(model, tokenizer, ChatTemplate(source, tokenizer.specials))
    prompts, space = [], " " if source == RWKV_TEMPLATE else ""
    end = "\n\n" if space else "<|im_end|>"

    def answer(network, encoded, max_new_tokens, *args, is_complete, **kwargs):
        prompts.extend(encoded)
        written = tokenizer.encode(f"{space}the answer{end}the string")
        length = next(n for n in range(len(written)) if is_complete(written[:n]))
        return [written[:length]] * len(encoded)

    monkeypatch.setattr("src.inference.harness.generate_batch", answer)
    prompt = methods.apply_chat_template(QUESTION)
    settings = {"until": ["</s>"], "max_gen_toks": 9}
    requests = [Request(prompt, settings), Request(prompt, settings), Request(prompt, {**settings, "until": ["swer"]})]
    assert methods.generate_until(requests) == ["the answer", "the answer", "the an"]
    assert prompts == [tokenizer.encode(prompt.removesuffix(" "))] * 3


def test_a_template_that_rejects_system_turns_gets_the_conversation_without(model, tokenizer, caplog):
    methods = HarnessMethods(model, tokenizer, ChatTemplate(NO_SYSTEM, tokenizer.specials))
    with_system = [{"role": "system", "content": "Be of help"}, *QUESTION]
    assert methods.apply_chat_template(with_system) == methods.apply_chat_template(QUESTION)
    assert "no system turn" in caplog.text
    refusing = HarnessMethods(model, tokenizer, ChatTemplate("{{ raise_exception('never') }}", tokenizer.specials))
    with pytest.raises(UserError, match="never"):
        refusing.apply_chat_template(QUESTION)


def test_a_tokenizer_without_a_chat_template_is_an_error_only_where_one_is_applied(model, tmp_path):
    plain = load_tokenizer(make_tokenizer(tmp_path / "plain", template=None))
    methods = HarnessMethods(model, plain)
    assert methods.chat_template(True) == ""
    assert methods.loglikelihood([Request("what is", " it")])
    with pytest.raises(UserError) as caught:
        methods.apply_chat_template(QUESTION)
    assert caught.value.given == plain.name
    # "tokenizer_name" is part of a file's name, and prompts of another template must not be read from it.
    name = methods.tokenizer_name
    assert "/" not in name
    assert name.startswith("plain-")
    assert name != HarnessMethods(model, plain, ChatTemplate(CHATML, {})).tokenizer_name


def local_task(tmp_path, **settings):
    rows = [{"question": f"{n} what is", "choices": ["the answer", "the string"], "label": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **settings,
    }


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.parametrize("source", [CHATML, RWKV_TEMPLATE], ids=["chatml", "rwkv"])
def test_local_tasks_run_with_the_chat_template(model, tokenizer, tmp_path, monkeypatch, source):
    """A choice, one after the beginning of an answer, and a generated answer: the prompts are those of the chat."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed", exc_type=ImportError)
    from lm_eval.tasks import TaskManager

    contexts = {"loglikelihood": [], "generate_until": []}
    originals = {name: getattr(HarnessMethods, name) for name in contexts}

    def recorded(name):
        def answer(self, requests, disable_tqdm=False):
            contexts[name] += [request.args[0] for request in requests]
            return originals[name](self, requests)

        return answer

    for name in contexts:
        monkeypatch.setattr(HarnessMethods, name, recorded(name))
    rows, choice = local_task(tmp_path, description="Be of help", **CHOICE)
    begun = {**choice, "task": "tiny_prefix", "gen_prefix": "It is"}
    generation = {
        **local_task(tmp_path, output_type="generate_until", doc_to_target="{{choices[label]}}")[1],
        "task": "tiny_generation",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    harness = harness_model(model, tokenizer, ChatTemplate(source, tokenizer.specials))
    evaluation = lm_eval.simple_evaluate(
        harness,
        tasks=[choice, begun, generation],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert evaluation["results"].keys() == {"tiny_choice", "tiny_prefix", "tiny_generation"}
    turns = [[{"role": "user", "content": row["question"]}] for row in rows]
    assert sorted(contexts["generate_until"]) == [harness.apply_chat_template(turn) for turn in turns]
    system, prefix = {"role": "system", "content": "Be of help"}, {"role": "assistant", "content": "It is"}
    asked = [harness.apply_chat_template([system, *turn]) for turn in turns]
    asked += [harness.apply_chat_template([system, *turn, prefix], False) for turn in turns]
    assert sorted(contexts["loglikelihood"]) == sorted(2 * asked)


def test_a_local_task_runs_in_the_harness(model, tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed", exc_type=ImportError)
    from lm_eval.tasks import TaskManager

    rows, task = local_task(tmp_path, **CHOICE)
    evaluation = lm_eval.simple_evaluate(
        harness_model(model, tokenizer),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    expected = 0
    for row in rows:
        ids = [0, *tokenizer.encode(row["question"])]
        log_p = [sum(plain_log_p(model, ids + tokenizer.encode(" " + c), len(ids))) for c in row["choices"]]
        expected += int(log_p.index(max(log_p)) == row["label"])
    assert evaluation["results"]["tiny_choice"]["acc,none"] == pytest.approx(expected / 6)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "rwkv-final.pth")
    make_tokenizer(folder / "tokenizer")
    return folder


def test_reports_for_binidx_text_and_last_words(run, data, tokenizer, tmp_path, capsys):
    result = heldout_loss(random_model(n_layer=2, vocab_size=400), data, 32)
    assert main([str(run), "--data", str(data.prefix), "--ctx_len", "32", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert f"loss {result.loss:.4f}, perplexity {result.perplexity:.4f}, bits per byte" in output
    assert f"{result.tokens:,} tokens" in output

    texts = ["what is the answer", "def return the string"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main([str(run), "--data", str(tmp_path / "texts.jsonl"), "--device", "cpu"]) == 0
    tokens = [i for text in texts for i in [*tokenizer.encode(text), 0]]
    assert f"{len(tokens) - 1} tokens" in capsys.readouterr().out
    assert main([str(run), "--last_word", str(tmp_path / "texts.jsonl"), "--device", "cpu"]) == 0
    assert "2 texts" in capsys.readouterr().out


def test_only_an_unknown_tokenizer_leaves_bits_per_byte_open(run, data, capsys):
    arguments = [str(run), "--data", str(data.prefix), "--ctx_len", "32", "--device", "cpu"]
    (run / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "tokenizer.json is not readable" in capsys.readouterr().err
    (run / "tokenizer").rename(run / "elsewhere")
    assert main(arguments) == 0
    assert "bits per byte unknown without --tokenizer" in capsys.readouterr().out


def test_texts_are_read_as_in_data_preparation(run, tokenizer, tmp_path, capsys):
    """With a byte order mark, compressed, with empty lines: the tokens of the plain file."""
    lines = b'{"text": "what is the answer"}\n\n{"text": "def return the string"}\n{"text": ""}\n'
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "compressed.jsonl.gz").write_bytes(gzip.compress(lines))
    tokens = [i for text in ("what is the answer", "def return the string") for i in [*tokenizer.encode(text), 0]]
    for name in ("bom.jsonl", "compressed.jsonl.gz"):
        texts = list(read_texts(tmp_path / name, "data"))
        assert encode_texts(texts, tokenizer).tolist() == tokens
        assert main([str(run), "--last_word", str(tmp_path / name), "--device", "cpu"]) == 0
        assert "2 texts" in capsys.readouterr().out
    (tmp_path / "code.py").write_text("\ufeffdef\n", encoding="utf-8")
    assert list(read_texts(tmp_path / "code.py", "data")) == ["def\n"]


@pytest.mark.parametrize("flag", ["--data", "--last_word"])
def test_a_file_without_read_permission_is_reported(run, tmp_path, capsys, monkeypatch, flag):
    path = tmp_path / "secret.jsonl"
    path.write_text('{"text": "what is the answer"}\n')
    original_open = open

    def deny(file, *args, **kwargs):  # root may read everything
        if file == path or file == str(path):
            raise PermissionError(13, "Permission denied")
        return original_open(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(SystemExit) as stopped:
        main([str(run), flag, str(path), "--device", "cpu"])
    assert stopped.value.code == 2
    assert f"{flag} {path}: can't be read (Permission denied)" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_an_error(run, data, tmp_path, capsys):
    """Of finite weights whose products overflow, and of weights that contain NaN, which are named as the cause."""
    weights = torch.load(run / "rwkv-final.pth")
    weights["head.weight"] = torch.full_like(weights["head.weight"], 3e38)
    torch.save(weights, tmp_path / "large.pth")
    weights["head.weight"][0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    for name, message in (("large.pth", "its loss is nan"), ("nan.pth", "head.weight contains values that are not")):
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path / name), "--data", str(data.prefix), "--device", "cpu"])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (["--data", "nowhere"], "--data nowhere: no such file"),
        (["--data", "{bad}"], "--data {bad}:2: "),
        (["--last_word", "{bad}"], "--last_word {bad}:2: "),
        (["--data", "{bad}", "--ctx_len", "0"], "--ctx_len 0: expected at least 1"),
        (["--last_word", "{latin}"], "--last_word {latin}:1: "),
        (["--last_word", "{text}"], "--last_word {text}: not a .jsonl file"),
    ],
)
def test_errors_name_the_flag_the_file_and_the_line(run, tmp_path, capsys, flags, about):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a fine one"}\n{"text": \n')
    text = tmp_path / "text.txt"
    text.write_text("what is the answer")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    files = {"bad": bad, "latin": latin, "text": text}
    with pytest.raises(SystemExit) as stopped:
        main([str(run), "--device", "cpu", *(flag.format(**files) for flag in flags)])
    assert stopped.value.code == 2
    assert about.format(**files) in capsys.readouterr().err
