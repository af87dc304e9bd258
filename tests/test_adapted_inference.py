"""Adapters and initial states in chat, evaluation, generation and export: what is computed, found and refused."""

import sys
from pathlib import Path

import pytest
import torch
from chat_models import make_tokenizer
from random_adapter import random_adapter
from random_model import random_model

from src.adapt.adapter_files import read_adapter, write_adapter
from src.adapt.config import AdapterConfig
from src.errors import UserError
from src.inference import evaluate, export, generate
from src.inference.adaptation import Adaptation
from src.inference.decoder import Decoder
from src.inference.formats.convert import unmerged_model
from src.inference.load import find_model, find_tokenizer, find_weights, load_model, load_weights, pretrained_only
from src.inference.scoring import score_continuations
from src.inference.switching import ModelSwitch
from src.model import State
from src.model.weights import config_from_weights
from src.run_folder import write_run

sys.path.insert(0, str(Path(__file__).parents[1]))
import API_DEMO_CHAT

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 96, 0, 0, 11]
CONFIGS = {
    "lora": AdapterConfig("lora", r=4, lora_alpha=6.0),
    "dora": AdapterConfig("dora", r=4, lora_alpha=6.0, target_modules=("att.key", "ffn.value")),
    "miss": AdapterConfig("miss", r=12),
    "whole": AdapterConfig("lora", r=4, lora_alpha=6.0, train=("ln", "vectors")),
}
STATE = AdapterConfig("state", target_modules=())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A bf16 base, a run that trained each kind of adapter beside it, and one that trained initial states."""
    folder = tmp_path_factory.mktemp("out")
    model = random_model(n_layer=2, vocab_size=400).bfloat16()
    torch.save(model.state_dict(), folder / "base.pth")
    for kind, config in CONFIGS.items():
        whole = ("blocks.1.ln2.weight", "blocks.1.ln2.bias", "blocks.0.att.x_r") if kind == "whole" else ()
        (folder / kind).mkdir()
        write_adapter(folder / kind / "adapter", random_adapter(model, config, whole=whole))
    (folder / "tuned").mkdir()
    write_adapter(folder / "tuned" / "state.pth", random_adapter(model, STATE))
    for run in (*CONFIGS, "tuned"):
        make_tokenizer(folder / run / "tokenizer")
        write_run(folder / run, {"settings": {"load_model": str(folder / "base.pth"), "data_type": "sft"}})
    return folder


def forward(model):
    return model(torch.tensor([TOKENS]))[0][0].float()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_adapter_computes_what_the_adapter_beside_its_base_does(files, kind):
    base, adaptation = files / "base.pth", Adaptation(adapter=str(files / kind / "adapter"))
    merged = load_model(base, "fp32", "cpu", adaptation)
    expected = forward(unmerged_model(base, adaptation))
    assert (forward(load_model(base, "fp32", "cpu")) - expected).abs().max() > 0.1
    torch.testing.assert_close(forward(merged), expected, rtol=1e-4, atol=1e-4)
    decoder = Decoder(merged)
    decoder.prefill([TOKENS[:5]])
    for token in TOKENS[5:]:
        last = decoder.step([token])
    torch.testing.assert_close(last[0], expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_export_merges_and_compares(files, tmp_path, capsys, kind):
    out = tmp_path / "merged.pth"
    assert export.main([str(files / "base.pth"), str(out), "--adapter", str(files / kind)]) == 0
    printed = capsys.readouterr().out
    assert "from those of the adapter beside its base" in printed
    assert f"base.pth + {files / kind / 'adapter'}" in printed
    adaptation = Adaptation(adapter=str(files / kind))
    written, base = torch.load(out, weights_only=True), torch.load(files / "base.pth", weights_only=True)
    assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in base.items()}
    exact = load_model(files / "base.pth", "fp32", "cpu", adaptation).state_dict()
    for name, tensor in written.items():
        assert torch.equal(tensor, exact[name].bfloat16()), f"{name} was rounded more than once"
    # a run's folder is its base with its adapter
    assert export.main([str(files / kind), str(tmp_path / "fp32.pth"), "--dtype", "fp32"]) == 0
    assert "differ by 0.0e+00 from the weights that were written" in capsys.readouterr().out
    expected = forward(unmerged_model(files / "base.pth", adaptation))
    torch.testing.assert_close(forward(load_model(tmp_path / "fp32.pth", device="cpu")), expected, rtol=1e-4, atol=1e-4)


# ---- initial states --------------------------------------------------------------------------------------------------


def test_every_text_begins_from_the_initial_state(files):
    base, plain = files / "base.pth", load_model(files / "base.pth", "fp32", "cpu")
    model = load_model(base, "fp32", "cpu", Adaptation(state=str(files / "tuned")))
    tensors = read_adapter(files / "tuned" / "state.pth").tensors
    start = State.zeros(plain.config, 1)
    for i, layer in enumerate(start.layers):
        layer.wkv.copy_(tensors[f"blocks.{i}.att.time_state"])
    expected = plain(torch.tensor([TOKENS]), start)[0][0]
    assert (forward(plain) - expected).abs().max() > 0.1
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=0)
    decoder = Decoder(model, batch=2)
    for _ in range(2):
        torch.testing.assert_close(decoder.prefill([TOKENS, TOKENS])[1], expected[-1], rtol=1e-5, atol=1e-5)
        decoder.reset()
    decoder.keep([0])
    torch.testing.assert_close(decoder.step(TOKENS[:1])[0], expected[0], rtol=1e-4, atol=1e-4)
    # packed with others, as the harness scores, and alone
    pairs = [(TOKENS[:4], TOKENS[4:]), (TOKENS[:2], TOKENS[2:9])]
    together = [score.log_probability for score in score_continuations(model, pairs)]
    alone = [score_continuations(model, [pair])[0].log_probability for pair in pairs]
    log_p = torch.log_softmax(expected, -1)[torch.arange(3, 14), TOKENS[4:]].sum()
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[0] == pytest.approx(float(log_p), abs=1e-4)


def test_states_are_exported_where_the_format_has_a_place(files, tmp_path, capsys):
    adaptation = Adaptation(adapter=str(files / "lora"), state=str(files / "tuned"))
    model = load_model(files / "base.pth", "as is", "cpu", adaptation)
    flags = ["--adapter", adaptation.adapter, "--state", adaptation.state]
    assert export.main([str(files / "base.pth"), str(tmp_path / "out.pth"), *flags]) == 0
    read = load_model(tmp_path / "out.pth", "as is", "cpu")
    assert torch.equal(forward(read), forward(model))
    assert read.blocks[1].att.time_state.dtype == torch.float32
    with pytest.raises(SystemExit):
        export.main([str(files / "base.pth"), str(tmp_path / "fla"), *flags])
    assert "--state" in (message := capsys.readouterr().err)
    assert "no place" in message


def test_states_beside_the_weights_are_never_dropped_or_written_where_no_program_finds_them(files, tmp_path, capsys):
    both, tokenizer = tmp_path / "both.pth", ["--tokenizer", str(files / "lora" / "tokenizer")]
    assert export.main([str(files / "tuned"), str(both)]) == 0
    for out in ("out.st", "out.gguf", "fla"):
        with pytest.raises(SystemExit):
            export.main([str(both), str(tmp_path / out), *tokenizer])
        assert "time_state: --format" in (message := capsys.readouterr().err)
        assert "no place for tuned initial states" in message
        assert not (tmp_path / out).exists()
    # an adapter of the base is applied to the file with the states as well
    read = load_model(both, "fp32", "cpu", Adaptation(adapter=str(files / "lora")))
    expected = load_model(
        files / "base.pth", "fp32", "cpu", Adaptation(adapter=str(files / "lora"), state=str(files / "tuned"))
    )
    assert torch.equal(forward(read), forward(expected))
    # training begins texts from zeros
    with pytest.raises(UserError, match="with tuned initial states beside its weights"):
        config_from_weights(load_weights(both), "both.pth")
    with pytest.raises(UserError, match=r"base\.pth"):
        find_weights(files / "tuned")


def test_an_export_does_not_replace_what_it_is_made_of(files, tmp_path, capsys):
    state = tmp_path / "state.pth"
    state.write_bytes((files / "tuned" / "state.pth").read_bytes())
    with pytest.raises(SystemExit):
        export.main([str(files / "base.pth"), str(state), "--state", str(state)])
    assert "name another file" in capsys.readouterr().err
    assert state.read_bytes() == (files / "tuned" / "state.pth").read_bytes()
    # a run's folder as OUT would be another model afterwards, and its figure another run's
    with pytest.raises(SystemExit):
        export.main([str(files / "lora"), str(files / "lora"), "--format", "hf"])
    assert "the folder of a run" in capsys.readouterr().err
    assert not (files / "lora" / "config.json").exists()


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_a_run_names_its_base_and_its_tokenizer(files, tmp_path):
    for given, expected in (
        (files / "lora", Adaptation(adapter=str(files / "lora" / "adapter"))),
        (files / "lora" / "adapter", Adaptation(adapter=str(files / "lora" / "adapter"))),
        (files / "tuned", Adaptation(state=str(files / "tuned" / "state.pth"))),
        (files / "tuned" / "state.pth", Adaptation(state=str(files / "tuned" / "state.pth"))),
    ):
        weights, adaptation = find_model(given)
        assert (weights, adaptation) == (files / "base.pth", expected)
        assert find_tokenizer(weights, 400, "", adaptation).name.startswith(str(files))
        assert not pretrained_only(weights, adaptation)
    _, both = find_model(files / "lora", Adaptation(state=str(files / "tuned")))
    assert both == Adaptation(adapter=str(files / "lora" / "adapter"), state=str(files / "tuned"))
    model = random_model(n_layer=2, vocab_size=400)
    write_adapter(tmp_path / "adapter", random_adapter(model, CONFIGS["lora"]))
    with pytest.raises(UserError, match=r"base.pth is not there"):
        find_model(tmp_path / "adapter")


def test_programs_take_an_adapter_and_a_state(files, capsys):
    (files / "text.txt").write_text("def a(): return 1\n" * 8)
    outputs = []
    for flags in ([], ["--adapter", str(files / "lora")], ["--state", str(files / "tuned")]):
        model = [str(files / "base.pth"), "--device", "cpu", "--tokenizer", str(files / "lora" / "tokenizer"), *flags]
        assert evaluate.main([*model, "--data", str(files / "text.txt")]) == 0
        assert generate.main([*model, "--prompt", "def", "--length", "8", "--seed", "1"]) == 0
        outputs.append(capsys.readouterr().out.replace(" ".join(flags[1:]), ""))
    losses = {output.partition("loss ")[2].partition(",")[0] for output in outputs}
    assert len(losses) == 3


BAD = {
    "state as adapter": (lambda f: ["--adapter", f / "tuned" / "state.pth"], "name it as --state"),
    "adapter as state": (lambda f: ["--state", f / "lora" / "adapter"], "name it as --adapter"),
    "alpha alone": (lambda f: ["--lora_alpha", "3"], "needs --adapter"),
    "alpha twice": (lambda f: ["--adapter", f / "lora", "--lora_alpha", "3"], "the file says 6"),
    "no file": (lambda f: ["--adapter", f / "missing"], "--adapter {f}/missing: no such file or folder"),
    "state's run as adapter": (lambda f: ["--adapter", f / "tuned"], "name it as --state"),
    "adapter's run as state": (lambda f: ["--state", f / "lora"], "name it as --adapter"),
    "layout alone": (lambda f: ["--state_layout", "key-value"], "needs --state"),
}


@pytest.mark.parametrize("case", BAD)
def test_flags_that_do_not_fit_are_named(files, capsys, case):
    flags, message = BAD[case]
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(files / "base.pth"), "--device", "cpu", *map(str, flags(files))])
    assert stopped.value.code == 2
    assert message.format(f=files) in capsys.readouterr().err


def test_an_adapter_file_as_model_is_answered_with_the_command(files):
    with pytest.raises(UserError) as caught:
        load_model(files / "lora" / "adapter" / "adapter_model.safetensors", device="cpu")
    assert "--adapter" in caught.value.advice
    with pytest.raises(UserError) as caught:
        load_model(files / "tuned" / "state.pth", device="cpu")
    assert "--state" in caught.value.advice


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_lists_and_switches_adapters_and_states(files, capsys):
    _, options = API_DEMO_CHAT.parse([str(files / "lora"), "--device", "cpu", "--seed", "1", "--length", "4"])
    talk = API_DEMO_CHAT.build(options)
    models = ModelSwitch(talk, options.weights, options.adaptation, None, "cpu", out=files)

    def turn(line):
        API_DEMO_CHAT.run_turn(talk, line, models)
        return capsys.readouterr().out

    turn("/set temperature 0")
    turn("what?")
    with_lora = talk.decoder.state
    listed = turn("/adapter")
    assert f"adapter {files / 'lora' / 'adapter'}\n" in listed
    assert f"/adapter {files / 'dora' / 'adapter'}\n" in listed
    assert f"/state {files / 'tuned' / 'state.pth'}\n" in turn("/state")
    turn(f"/save {files / 'talk'}")
    assert "new conversation" in turn("/adapter none")
    assert talk.transcript.messages == []
    with pytest.raises(UserError, match="another adapter"):
        turn(f"/load {files / 'talk'}")
    turn("what?")
    assert not torch.equal(talk.decoder.state.layers[1].wkv, with_lora.layers[1].wkv)
    turn(f"/state {files / 'tuned' / 'state.pth'}")
    tuned = read_adapter(files / "tuned" / "state.pth").tensors["blocks.1.att.time_state"]
    assert torch.equal(talk.decoder.state.layers[1].wkv[0], tuned)
    with pytest.raises(UserError):
        turn(f"/adapter {files / 'base.pth'}")
    assert models.adaptation == Adaptation(state=str(files / "tuned" / "state.pth"))
    turn("/state none")
    # the layout that was given is that of the state that was named with it
    models.adaptation = Adaptation(state=str(files / "other.pth"), state_layout="key-value")
    turn(f"/state {files / 'tuned' / 'state.pth'}")
    assert torch.equal(talk.decoder.state.layers[1].wkv[0], tuned)
    turn("/state none")
    turn(f"/adapter {files / 'lora' / 'adapter'}")
    turn("what?")
    assert torch.equal(talk.decoder.state.layers[1].wkv, with_lora.layers[1].wkv)
