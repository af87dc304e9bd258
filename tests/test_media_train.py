"""Runs with an encoder: what is trained and what stays, exact resuming, results as one folder. Real fits of tiny
models."""

import json

import pytest
import torch
from media_data import byte_tokenizer, coloured, tones
from random_model import random_model
from safetensors.torch import load_file, save_file
from test_distributed import needs_deepspeed
from test_multimodal import tiny_encoder
from training_runs import flags, newest_state, train, train_process, train_until

from src.cli import parse
from src.config import RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.errors import UserError
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.export import main as export
from src.inference.load import find_model, find_tokenizer, find_weights, load_model
from src.inference.sampling import Sampling
from src.model.weights import read_weights
from src.multimodal.config import media_of
from src.multimodal.files import LANGUAGE_MODEL, TENSORS, read_record
from src.multimodal.front_end import attach_front_end
from src.multimodal.hf_encoder import files_sha256
from src.training.data import SftSamples
from src.training.module import TrainingModule

SIZES = {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 259}
SHORT = {"ctx_len": 128, "micro_bsz": 2, "my_exit_tokens": 128 * 2 * 6, "epoch_steps": 3, "epoch_save": 1}
PATCHES = {"encoder": "patches", "image_size": "16", "encoder_dim": 16, "data_type": "sft", "lr_init": 1e-2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("pictures"), 12)


@pytest.fixture
def base(tmp_path):
    torch.save(random_model(**SIZES).state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def fit(out, data, tokenizer, **changed):
    return train(out, data, **{**SIZES, **SHORT, **PATCHES, "tokenizer": tokenizer, **changed})


def tensors(folder):
    result = dict(read_weights(folder / TENSORS))
    for path in (folder / LANGUAGE_MODEL, folder / "adapter" / "adapter_model.safetensors", folder / "state.pth"):
        if path.is_file():
            result |= read_weights(path)
    return result


@pytest.mark.parametrize("parts", ["", "projector,encoder,lora"])
def test_a_killed_run_continues_to_the_same_weights(parts, tmp_path, pictures, tokenizer, base, monkeypatch):
    changed = {**PATCHES, **SHORT, **SIZES, "tokenizer": tokenizer, "train_parts": parts, "save_minutes": 1e-6}
    changed |= {"load_model": base, "lora_r": 4} if parts else {}
    assert train(tmp_path / "whole", pictures, **changed) == 0
    train_until(4, tmp_path / "cut", pictures, monkeypatch, **changed)
    assert not (tmp_path / "cut/multimodal").exists()
    assert train(tmp_path / "cut", pictures, **changed) == 0
    whole, cut = (tensors(tmp_path / name / "multimodal") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert ("blocks.0.att.key.weight" in whole) == (not parts)


def test_a_run_with_the_encoder_of_an_earlier_version_is_not_continued(
    tmp_path, pictures, tokenizer, capsys, monkeypatch
):
    """Its states have other tensors, and are not to be taken for damaged."""
    changed = {**PATCHES, **SHORT, **SIZES, "tokenizer": tokenizer, "save_minutes": 1e-6}
    with monkeypatch.context() as patch:
        patch.setattr("src.training.settings.CHANGED", {})  # earlier versions recorded none
        train_until(4, tmp_path / "run", pictures, patch, **changed)
    state = newest_state(tmp_path / "run")
    assert train(tmp_path / "run", pictures, **changed) == 2
    assert "--encoder of version 3: was of an earlier version" in capsys.readouterr().err
    assert newest_state(tmp_path / "run") == state


def test_only_the_projector_is_trained_and_the_base_is_a_reference(tmp_path, pictures, tokenizer, base, capsys):
    folder = tiny_encoder("clip", tmp_path / "clip")
    before = {path: path.read_bytes() for path in (base, folder / "model.safetensors")}
    seen = {}
    original = TrainingModule.on_train_start

    def watch(module):
        seen["frozen"] = {n: p.clone() for n, p in module.model.named_parameters() if not p.requires_grad}
        seen["model"] = module.model
        original(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingModule, "on_train_start", watch)
        changed = {"encoder": f"hf:{folder}", "load_model": base, "val_data_file": pictures, "val_windows": 4}
        assert fit(tmp_path / "run", pictures, tokenizer, **changed) == 0
    trained = dict(seen["model"].named_parameters())
    assert {name.split(".")[1] for name in trained if name not in seen["frozen"]} == {"projector"}
    assert all(torch.equal(trained[name], value) for name, value in seen["frozen"].items())
    assert all(path.read_bytes() == content for path, content in before.items())
    result = tmp_path / "run/multimodal"
    assert {path.name for path in result.iterdir()} == {"multimodal.json", "media.safetensors"}
    assert set(read_weights(result / TENSORS)) == {n.removeprefix("media.") for n in trained if "media.projector" in n}
    assert read_record(result).base_path == str(base)
    model = load_model(*find_model(tmp_path / "run")[:1], adaptation=find_model(tmp_path / "run")[1])
    assert model.media is not None
    assert torch.equal(model.media.projector.output.weight, trained["media.projector.output.weight"])
    samples = json.loads((tmp_path / "run/samples.json").read_text())
    assert all(sample["media"][0].startswith("data:image/png;base64,") for sample in samples)
    assert fit(tmp_path / "run", pictures, tokenizer, **changed) == 0  # complete
    # with other weights of the same encoder it would be another run
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    files_sha256.cache_clear()  # a process reads them once
    assert fit(tmp_path / "run", pictures, tokenizer, **changed) == 2
    assert "--encoder" in capsys.readouterr().err


def test_two_stages_and_cached_features(tmp_path, pictures, tokenizer, base):
    """Projector first, with features that are computed once; then with an adapter, from the first stage's folder."""
    folder = tiny_encoder("siglip", tmp_path / "siglip")
    losses = {}
    for cached in (0, 1):
        out = tmp_path / f"stage1-{cached}"
        changed = {"encoder": f"hf:{folder}", "load_model": base, "media_tokens": 4, "cache_features": cached}
        assert fit(out, pictures, tokenizer, **changed) == 0
        losses[cached] = tensors(out / "multimodal")
    assert all(torch.allclose(losses[0][name], losses[1][name], atol=1e-5) for name in losses[0])
    assert pictures.with_name("data.jsonl.sft-features.bin").is_file()
    changed = {"encoder": f"hf:{folder}", "media_tokens": 4, "train_parts": "projector,lora", "lora_r": 4}
    assert fit(tmp_path / "stage2", pictures, tokenizer, load_model=tmp_path / "stage1-0", **changed) == 0
    assert (tmp_path / "stage2/multimodal/adapter/adapter_config.json").is_file()
    weights, adaptation = find_model(tmp_path / "stage2")
    assert weights == base
    assert adaptation.adapter.endswith("multimodal/adapter")
    assert load_model(weights, adaptation=adaptation).media is not None
    assert find_tokenizer(weights, 259, adaptation=adaptation).vocab_size == 259
    # training on starts from the adapted model, not from its base
    with pytest.raises(UserError, match="merge it first"):
        find_weights(tmp_path / "stage2")
    assert export([str(tmp_path / "stage2"), str(tmp_path / "merged.pth")]) == 0
    merged, of_base = read_weights(tmp_path / "merged.pth"), read_weights(base)
    assert merged.keys() == of_base.keys()
    assert not torch.equal(merged["blocks.0.att.key.weight"], of_base["blocks.0.att.key.weight"])
    # all in one folder, without the base and the run
    assert export([str(tmp_path / "stage2"), str(tmp_path / "one"), "--format", "multimodal"]) == 0
    base.rename(base.with_name("moved.pth"))
    weights, adaptation = find_model(tmp_path / "one")
    model = load_model(weights, "as is", adaptation=adaptation)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items() if name in merged)
    projector = read_weights(tmp_path / "stage2/multimodal" / TENSORS)["projector.output.weight"]
    assert torch.equal(model.media.projector.output.weight, projector.to(model.emb.weight.dtype))
    assert find_tokenizer(weights, 259, adaptation=adaptation).vocab_size == 259


def test_what_is_loaded_and_stays_is_written_and_is_the_same_in_a_run(tmp_path, pictures, tokenizer, base, capsys):
    first, other = tmp_path / "first", tmp_path / "other"
    for seed, out in enumerate((first, other)):
        assert fit(out, pictures, tokenizer, random_seed=seed, my_exit_tokens=128 * 2) == 0
    changed = {"load_model": base, "train_parts": "lora", "lora_r": 4, "cache_features": 1}
    assert fit(tmp_path / "run", pictures, tokenizer, load_projector=first, **changed) == 0
    given, written = (read_weights(folder / "multimodal" / TENSORS) for folder in (first, tmp_path / "run"))
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in given)
    # the features are those of the loaded encoder, too
    weights, adaptation = find_model(tmp_path / "run")
    media = load_model(weights, "fp32", adaptation=adaptation).media
    samples = SftSamples(parse([word for name, value in {**PATCHES, **SIZES, **SHORT, "tokenizer": tokenizer,
        "data_file": pictures, "proj_dir": tmp_path}.items() for word in (f"--{name}", str(value))])[0])  # fmt: skip
    (name, count), *_ = samples.rows.conversations.media_of(0)
    prepared = samples.media(name, count)
    index = sorted({n for i in range(12) for n, _ in samples.rows.conversations.media_of(i)}).index(name)
    cached = MMapIndexedDataset(pictures.with_name("data.jsonl.sft-features"))[index].tobytes()
    expected = media.encoder(prepared, torch.tensor([1]))
    torch.testing.assert_close(torch.frombuffer(bytearray(cached), dtype=torch.float32).view_as(expected), expected)
    assert fit(tmp_path / "run", pictures, tokenizer, load_projector=other, **changed) == 2
    assert "--load_projector" in capsys.readouterr().err


def test_a_resumed_run_needs_no_projector_to_begin_from(tmp_path, pictures, tokenizer, monkeypatch):
    assert fit(tmp_path / "first", pictures, tokenizer, my_exit_tokens=128 * 2) == 0
    settings = {**SIZES, **SHORT, **PATCHES, "tokenizer": tokenizer, "load_projector": tmp_path / "first"}
    train_until(4, tmp_path / "run", pictures, monkeypatch, save_minutes=1e-6, **settings)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert train(tmp_path / "run", pictures, save_minutes=1e-6, **settings) == 0


@pytest.mark.parametrize("encoder", ["logmel", "whisper", "clip", "siglip"])
def test_what_was_trained_is_read_again_and_answers(encoder, tmp_path, pictures, tokenizer, base):
    data, file = (pictures, "0.png") if encoder in ("clip", "siglip") else (tones(tmp_path / "tones", 8), "0.wav")
    changed = {"encoder": encoder, "ctx_len": 256, "my_exit_tokens": 256 * 2 * 3}
    if encoder != "logmel":
        changed |= {"encoder": f"hf:{tiny_encoder(encoder, tmp_path / encoder)}", "load_model": base}
        changed |= {"train_parts": "projector,model", "media_tokens": 4}
    assert fit(tmp_path / "run", data, tokenizer, **changed) == 0
    weights, adaptation = find_model(tmp_path / "run")
    assert weights.name == LANGUAGE_MODEL
    model, trained = load_model(weights, "fp32", adaptation=adaptation), tensors(tmp_path / "run/multimodal")
    kind = model.media.spec.kind
    assert kind == ("image" if data == pictures else "sound")
    assert torch.equal(model.media.projector.output.weight, trained["projector.output.weight"])
    words = find_tokenizer(weights, 259, adaptation=adaptation)
    chat = Conversation(Decoder(model), words, words.chat_template, Sampling(temperature=0), seed=0, max_new_tokens=5)
    chat.attach(kind, data.parent / file)
    assert "".join(piece.text for piece in chat.ask("What?"))


def test_packed_rows_have_the_loss_of_their_conversations_alone(tmp_path, pictures, tokenizer):
    """Pictures of one conversation are not seen in another, however a row is filled and however batches are made."""
    flags = {
        **SIZES,
        **PATCHES,
        "tokenizer": tokenizer,
        "data_file": pictures,
        "proj_dir": tmp_path,
        "kernel": "reference",
    }

    def module(**changed):
        settings = {**flags, **changed}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return parse(words)[0]

    packed, alone = SftSamples(module(ctx_len=256)), SftSamples(module(ctx_len=256, packing=0))
    model = random_model(**SIZES, kernel="reference").double()
    front_end = attach_front_end(model, media_of(packed.config)).double()

    def losses(samples):
        found = {}
        for number in range(len(samples.rows)):
            row = samples.rows.row(number)
            embeds = front_end(*row.media)
            logits, _ = model(row.inputs[None], cu_seqlens=row.cu_seqlens, embeds=embeds)
            each = torch.nn.functional.cross_entropy(logits[0], row.targets, reduction="none")
            members = samples.rows._rows.row(number)
            ends = row.cu_seqlens.tolist()
            for begin, end, member in zip(ends[:-1], ends[1:], members, strict=False):
                found[int(member)] = each[begin:end].sum().item()
        return found

    expected = losses(alone)
    assert len(expected) == 12
    assert losses(packed) == pytest.approx(expected, rel=1e-9)
    assert len(packed.rows) < 12


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"encoder": "vit"}, "encoder"),
        ({"encoder": "patches", "data_type": "binidx"}, "encoder"),
        ({"sft_loss": "text"}, "sft_loss"),
        ({"train_parts": "model,lora"}, "train_parts"),
        ({"train_parts": "projector,vision"}, "train_parts"),
        ({"train_parts": "projector,model"}, "encoder"),
        ({"train_parts": "encoder,model"}, "train_parts"),
        ({"train_parts": "projector,encoder"}, "load_model"),
        ({"peft": "lora", "load_model": "x"}, "peft"),
        ({"image_size": "20"}, "image_size"),
        ({"patch_size": 6}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"media_tokens": 5}, "media_tokens"),
        ({"quant": "nf4"}, "quant"),
        ({"context_parallel": 2}, "context_parallel"),
        ({"cache_features": 1}, "cache_features"),
        ({"encoder": "", "media_folder": "x"}, "media_folder"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed, flag):
    settings = {**PATCHES, "tokenizer": "world", "data_file": "x.jsonl", "image_size": "16", **changed}
    assert flag in {fault.flag for fault in RunConfig(**settings).faults()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_stage_2", marks=needs_deepspeed)])
def test_two_processes_train_as_one_with_pictures_on_one_of_them_only(strategy, tmp_path, pictures, tokenizer):
    """Some micro batches have no picture: their process takes part in the encoder's gradients with zeros."""
    lines = pictures.read_text().splitlines()
    text = {"conversations": [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "none"}]}
    data = pictures.with_name("some.jsonl")
    data.write_text("\n".join([*lines[:3], *[json.dumps(text)] * 9]) + "\n")
    changed = {**SIZES, **PATCHES, "tokenizer": tokenizer, "ctx_len": 64, "packing": 0, "adam_eps": 1e-8}
    changed |= {"my_exit_tokens": 64 * 4 * 6, "epoch_steps": 6, "lr_init": 1e-3}
    for processes in (1, 2):
        several = {"devices": 2, "strategy": strategy} if processes == 2 else {}
        process = train_process(flags(tmp_path / str(processes), data, **changed, micro_bsz=4 // processes, **several))
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    one, two = (tensors(tmp_path / str(processes) / "multimodal") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
