"""GGUF files: read by gguf's own reader they hold the .pth, and what is damaged or foreign is refused in a sentence."""

import contextlib
import json
import os
import re
import stat
import struct
import weakref
from pathlib import Path

import gguf
import jinja2
import numpy as np
import pytest
import torch
from chat_models import CHATML, MARKED, make_tokenizer
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from src.adapt.adapter_files import Adapter, write_adapter
from src.adapt.config import AdapterConfig
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference.export import main
from src.inference.formats.format import Export
from src.inference.formats.gguf import TYPES, gguf_weights, read_gguf, write_gguf
from src.inference.formats.gguf_file import is_gguf, read_gguf_file
from src.inference.formats.gguf_lora import read_gguf_lora, write_gguf_lora
from src.inference.formats.gguf_tokenizer import PREFIX, tokenizer_from_metadata, tokenizer_metadata, tokenizer_of_gguf
from src.inference.formats.lazy import LazyWeights
from src.inference.load import find_tokenizer, find_weights, load_model, load_weights
from src.model.weights import IDLE_IN_LAYER_0

VOCAB_SIZE = 320
RELEASED = {  # (decay, iclr, value, gate) of released models
    "0.1B": (64, 64, 32, 128),
    "0.4B": (64, 64, 32, 128),
    "1.5B": (96, 96, 64, 256),
    "2.9B": (96, 96, 64, 320),
    "7.2B": (128, 128, 96, 480),
    "13.3B": (192, 192, 128, 384),
}


def sizes(name):
    return dict(zip(("d_decay_lora", "d_aaa_lora", "d_mv_lora", "d_gate_lora"), RELEASED[name], strict=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def stored_tokenizer(tokenizer):
    return tokenizer_from_metadata(tokenizer_metadata(tokenizer, VOCAB_SIZE), Path("x.gguf"))


@pytest.fixture(scope="module")
def small_file(tokenizer, tmp_path_factory):
    """A path to write to, the content of a small file, and where its tensors begin."""
    path = tmp_path_factory.mktemp("small") / "x.gguf"
    content = write(random_model(n_layer=1, n_embd=64, vocab_size=VOCAB_SIZE), tokenizer, path, "q8_0").read_bytes()
    return path, content, min(tensor.data_offset for tensor in GGUFReader(path).tensors)


def eight_bytes(number):
    return number.to_bytes(8, "little")


@pytest.fixture
def weights(tmp_path):
    torch.save(random_model(n_layer=2, vocab_size=VOCAB_SIZE).state_dict(), tmp_path / "rwkv-final.pth")
    make_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "rwkv-final.pth"


def pth_of(path):
    """An independent reading of the format: the state dict in a GGUF file, by gguf's own reader and the tables of
    llama.cpp's converter, without layer 0's v0, v1, v2."""
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(path).tensors}
    state, n_layer = {}, 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blk."))
    head_size = GGUFReader(path).fields["rwkv7.wkv.head_size"].contents()
    for ours, theirs in (("emb", "token_embd"), ("blocks.0.ln0", "token_embd_norm"), ("ln_out", "output_norm")):
        for part in ("weight", "bias") if ours != "emb" else ("weight",):
            state[f"{ours}.{part}"] = found.pop(f"{theirs}.{part}")
    state["head.weight"] = found.pop("output.weight")
    for i in range(n_layer):
        att, ffn, blk = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}."
        for ours, theirs in (("ln1", "attn_norm"), ("ln2", "attn_norm_2"), ("att.ln_x", "time_mix_ln")):
            for part in ("weight", "bias"):
                state[f"blocks.{i}.{ours}.{part}"] = found.pop(f"{blk}{theirs}.{part}")
        fused = found.pop(f"{blk}time_mix_lerp_fused.weight")
        assert fused.shape[:3] == (6, 1, 1)
        for j, mix in enumerate("rwkvag"):
            state[f"{att}x_{mix}"] = fused[j]
        for kind in "wavg":
            for part in "012" if kind != "g" else "12":
                values = found.pop(f"{blk}time_mix_{kind}{part}.weight")
                if i == 0 and kind == "v":  # copies, which the reader needs and doesn't use
                    original = state[f"{att}a{part}"]
                    assert torch.equal(values, original.flatten() if part == "0" else original.t())
                    continue
                state[f"{att}{kind}{part}"] = values.view(1, 1, -1) if part == "0" else values.t()
        for name in ("k_k", "k_a"):
            state[att + name] = found.pop(f"{blk}time_mix_{name}.weight").view(1, 1, -1)
        state[f"{att}r_k"] = found.pop(f"{blk}time_mix_r_k.weight").view(-1, head_size)
        for name in ("receptance", "key", "value", "output"):
            state[f"{att}{name}.weight"] = found.pop(f"{blk}time_mix_{name}.weight")
        state[f"{ffn}x_k"] = found.pop(f"{blk}channel_mix_lerp_k.weight").view(1, 1, -1)
        for name in ("key", "value"):
            state[f"{ffn}{name}.weight"] = found.pop(f"{blk}channel_mix_{name}.weight")
    assert not found
    return state


def write(model, tokenizer, path, type="f32", weights=None):
    write_gguf(Export(weights or model.state_dict(), model.config, "a title", tokenizer, type), path)
    return path


def same(one, other):
    assert one.keys() - set(IDLE_IN_LAYER_0) == other.keys() - set(IDLE_IN_LAYER_0)
    assert [name for name in one.keys() - set(IDLE_IN_LAYER_0) if not torch.equal(one[name], other[name])] == []


# ---- models ----------------------------------------------------------------------------------------------------------

CASES = {
    **{name: {"n_layer": 2, "n_embd": 128, **sizes(name)} for name in RELEASED},
    "one layer": {"n_layer": 1},
    "heads of 128": {"n_embd": 256, "head_size": 128},
    "another ffn": {"n_layer": 2, "dim_ffn": 96},
}


@pytest.mark.parametrize("case", CASES)
def test_an_independent_reader_gives_the_pth_back_bit_by_bit(tmp_path, tokenizer, case):
    model = random_model(vocab_size=VOCAB_SIZE, **{"n_layer": 2, **CASES[case]})
    path = write(model, tokenizer, tmp_path / "x.gguf")
    same(pth_of(path), model.state_dict())
    same(load_weights(path), model.state_dict())
    config, fields = model.config, {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    expected = {
        "general.architecture": "rwkv7",
        "general.file_type": 0,
        "rwkv7.block_count": config.n_layer,
        "rwkv7.embedding_length": config.n_embd,
        "rwkv7.feed_forward_length": config.dim_ffn,
        "rwkv7.wkv.head_size": config.head_size,
        "rwkv7.attention.head_count": 0,
        "rwkv7.attention.decay_lora_rank": config.d_decay_lora,
        "rwkv7.attention.iclr_lora_rank": config.d_aaa_lora,
        "rwkv7.attention.value_residual_mix_lora_rank": config.d_mv_lora if config.n_layer > 1 else config.d_aaa_lora,
        "rwkv7.attention.gate_lora_rank": config.d_gate_lora,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["rwkv7.attention.layer_norm_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize("has_idle", [True, False])
def test_layer_0_needs_no_value_residual(weights, tmp_path, has_idle):
    state = torch.load(weights)
    if not has_idle:
        state = {name: tensor for name, tensor in state.items() if name not in IDLE_IN_LAYER_0}
        torch.save(state, weights)
    assert main([str(weights), str(tmp_path / "x.gguf"), "--type", "f32"]) == 0
    same(pth_of(tmp_path / "x.gguf"), torch.load(weights))


@pytest.mark.parametrize("type", TYPES)
def test_each_type_is_stored_as_it_says_and_read_back(weights, tmp_path, capsys, type):
    out, back = tmp_path / "x.gguf", tmp_path / "back.pth"
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the answer to the question is the string that it returns " * 40)
    assert main([str(weights), str(out), "--type", type, "--data", str(held_out)]) == 0
    report = capsys.readouterr().out
    assert "differ by 0.0e+00 from the weights that were written" in report
    assert "held-out loss" in report
    ours, original = load_weights(out), torch.load(weights)
    small, large = "blocks.1.att.w1", "blocks.1.ffn.key.weight"
    assert torch.equal(ours[small].float(), original[small])
    if type == "q8_0":  # llama.cpp's formula: blocks of 32 along a row, d = max |x| / 127 as fp16, q = round(x / d)
        x = original[large].reshape(-1, 32)
        d = x.abs().amax(1, keepdim=True) / 127
        expected = ((x / d).round() * d.half().float()).reshape(original[large].shape)
        assert (ours[large] - expected).abs().max() <= float(d.max()) * 1.01  # ties and the last bit of x / d
        assert ((ours[large] - expected).abs() > 1e-6).float().mean() < 1e-3
    else:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[type]
        assert torch.equal(ours[large].float(), original[large].to(dtype).float())
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(out).tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.time_mix_key.weight"] == GGMLQuantizationType[type.upper()]
    assert kinds["blk.1.time_mix_g2.weight"] == kinds["blk.0.time_mix_lerp_fused.weight"] == GGMLQuantizationType.F32
    assert main([str(out), str(back)]) == 0
    same({n: t.float() for n, t in torch.load(back).items()}, {n: t.float() for n, t in ours.items()})


def test_a_bf16_model_comes_back_as_bf16(weights, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in torch.load(weights).items()}
    torch.save(state, weights)
    assert main([str(weights), str(tmp_path / "x.gguf"), "--type", "bf16"]) == 0
    same(load_weights(tmp_path / "x.gguf"), state)


def test_the_file_of_another_writer_is_read(tmp_path, tokenizer):
    """As llama.cpp's converter writes F16: low-rank matrices too, without types of this project's choice."""
    model = random_model(n_layer=2, vocab_size=VOCAB_SIZE)
    ours = write(model, tokenizer, tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "rwkv7")
    for key, field in GGUFReader(ours).fields.items():
        if key.startswith("rwkv7.") and key != "rwkv7.attention.layer_norm_epsilon":
            writer.add_uint32(key, int(field.contents()))
    for tensor in GGUFReader(ours).tensors:
        data = np.array(tensor.data)
        writer.add_tensor(tensor.name, data.astype(np.float16) if data.ndim == 2 else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "theirs.gguf")
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}  # fp16 wouldn't hold all vectors
    assert torch.equal(read["blocks.1.att.w2"], model.state_dict()["blocks.1.att.w2"].half().float())


def test_one_tensor_is_in_memory_at_a_time(tmp_path, tokenizer):
    """Every tensor that the writer is given is gone when it asks for the next one, the six mixes excepted."""
    model, alive = random_model(n_layer=2, vocab_size=VOCAB_SIZE), {}

    def give(name):
        mine = name.rpartition(".x_")[0]
        left = [n for n, reference in alive.items() if reference() is not None and n.rpartition(".x_")[0] != mine]
        assert len(left) <= 1 or mine, left
        tensor = model.state_dict()[name].clone()
        alive[name] = weakref.ref(tensor)
        return tensor

    weights = LazyWeights({name: lambda name=name: give(name) for name in model.state_dict()})
    same(pth_of(write(model, tokenizer, tmp_path / "x.gguf", weights=weights)), model.state_dict())


def test_the_file_has_the_mode_of_the_umask(weights, tmp_path):
    before = os.umask(0o027)
    try:
        assert main([str(weights), str(tmp_path / "x.gguf")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.gguf").stat().st_mode) == 0o640


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_the_byte_level_tokenizer_comes_back(weights, tmp_path):
    assert main([str(weights), str(tmp_path / "x.gguf")]) == 0
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert fields[f"{PREFIX}model"] == "gpt2"
    assert len(fields[f"{PREFIX}tokens"]) == VOCAB_SIZE
    assert fields[f"{PREFIX}token_type"][:4] == [3, 3, 3, 1]
    assert {fields[f"{PREFIX}eos_token_id"], fields[f"{PREFIX}eot_token_id"]} == {0, 2}
    assert fields["tokenizer.chat_template"] == CHATML
    ours = load_tokenizer(weights.parent / "tokenizer")
    back = find_tokenizer(find_weights(tmp_path / "x.gguf"), VOCAB_SIZE)
    assert (back.eos_ids, back.specials) == (ours.eos_ids, ours.specials)
    turns = [{"role": "user", "content": "the question"}]
    assert back.chat_template.render(turns, True) == ours.chat_template.render(turns, True)
    # The file's own counts, whatever the run in whose folder it lies recorded.
    (tmp_path / "run.json").write_text('{"tokenizer": "world"}')
    assert find_tokenizer(tmp_path / "x.gguf", VOCAB_SIZE).encode("the answer") == ours.encode("the answer")
    (tmp_path / "run.json").unlink()
    # A folder export of the file has the tokenizer's files.
    assert main([str(tmp_path / "x.gguf"), str(tmp_path / "hf"), "--format", "fla"]) == 0
    assert load_tokenizer(tmp_path / "hf").encode("the<|im_end|> answer") == ours.encode("the<|im_end|> answer")


@settings(max_examples=60)
@given(text=st.text(max_size=40) | st.sampled_from(["<|im_end|>a", "a . b", " <|im_start|> ", "\r\n\n 12"]))
def test_the_byte_level_tokenizer_that_is_read_encodes_alike(tokenizer, stored_tokenizer, text):
    assert stored_tokenizer.encode(text) == tokenizer.encode(text)
    assert stored_tokenizer.encode_as_text(text) == tokenizer.encode_as_text(text)
    assert stored_tokenizer.decode(stored_tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def undo(match):
    escaped = match[1]
    if escaped[0] == "x":
        return chr(int(escaped[1:], 16))
    return {"n": "\n", "t": "\t", "r": "\r"}.get(escaped, escaped)


def test_the_world_tokenizer_comes_back():
    world = load_tokenizer("world")
    metadata = tokenizer_metadata(world, 65536)
    tokens = metadata[f"{PREFIX}tokens"]
    assert len(tokens) == 65536
    assert tokens[65530:] == [f"[PAD{i}]" for i in range(65530, 65536)]
    assert [metadata[f"{PREFIX}{name}_token_id"] for name in ("bos", "eos", "eot")] == [0, 0, 261]
    # Undone as llama.cpp does: \n \t \r \xHH, another escaped character as it is.
    undone = [re.sub(r"\\(x..|.)", undo, token).encode("latin-1") for token in tokens[1:65530]]
    assert undone == [world.decode_bytes([i]) for i in range(1, 65530)]
    assert "generation %}" not in metadata["tokenizer.chat_template"]


def change_tokenizer(folder, change):
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def add_tokens(folder, *texts):
    """Tokens that are found in any text, as <think> is in many vocabularies; the ids leave a gap, which isn't kept."""

    def add(content):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        first = max(content["model"]["vocab"].values()) + 3
        content["added_tokens"] += [{"id": first + i, "content": text, **flags} for i, text in enumerate(texts)]

    change_tokenizer(folder, add)
    return folder


def test_tokens_that_are_found_in_any_text_come_back(tmp_path):
    ours = load_tokenizer(add_tokens(make_tokenizer(tmp_path / "t"), "<think>", "</think> x"))
    metadata = tokenizer_metadata(ours, ours.vocab_size + 4)
    assert metadata[f"{PREFIX}token_type"][-6:] == [4, 4, 5, 5, 5, 5]
    back = tokenizer_from_metadata(metadata, Path("x.gguf"))
    for text in ("a<think>b</think> xc", "<think><|im_end|>"):
        assert back.encode(text) == ours.encode(text)
        assert back.encode_as_text(text) == ours.encode_as_text(text)


DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "<|im_end|>": 2}, "unk_token": "a"}
UNSUPPORTED = {
    "its normalizer is NFC": lambda c: c.update(normalizer={"type": "NFC"}),
    '"add_prefix_space": true': lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    '"Digits"': lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, c["pre_tokenizer"]]}),
    "has lstrip": lambda c: c["added_tokens"][1].update(lstrip=True),
    "its model is WordLevel": lambda c: c.update(model=WORDS),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_tokenizer_that_llama_cpp_can_not_reproduce_is_refused(weights, tmp_path, capsys, reason):
    change_tokenizer(weights.parent / "tokenizer", UNSUPPORTED[reason])
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), str(tmp_path / "x.gguf")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.gguf"))


def test_a_tag_of_generation_becomes_one_that_others_know(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "t", MARKED))
    source = tokenizer_metadata(tokenizer, VOCAB_SIZE)["tokenizer.chat_template"]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source).render(messages=turns)
    assert plain == tokenizer.chat_template.render(turns)


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(UserError) as caught:
        load_model(find_weights(path), "fp32", "cpu")
    assert caught.value.given == path
    return str(caught.value)


def small_gguf(path, architecture="rwkv7", kind=None, **keys):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    data = np.ones((4, 256), np.float32)
    if kind is not None:
        writer.add_tensor("token_embd.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor("token_embd.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_foreign_files_are_named(tmp_path, capsys):
    assert "architecture llama" in refused(small_gguf(tmp_path / "a.gguf", "llama"))
    assert "Q4_0" in refused(small_gguf(tmp_path / "b.gguf", kind=GGMLQuantizationType.Q4_0))
    assert "type adapter" in refused(small_gguf(tmp_path / "c.gguf", general__type="adapter"))
    assert "rwkv7.block_count" in refused(small_gguf(tmp_path / "d.gguf"))
    (tmp_path / "e.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "version 1" in refused(tmp_path / "e.gguf")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "a.gguf"), str(tmp_path / "out.pth")])
    assert stopped.value.code == 2
    assert not (tmp_path / "out.pth").exists()


def test_a_cut_file_is_refused_wherever_it_ends(tmp_path, tokenizer):
    model = random_model(n_layer=1, n_embd=64, vocab_size=VOCAB_SIZE)
    content = write(model, tokenizer, tmp_path / "x.gguf").read_bytes()
    begin = len(content) - sum(t.n_bytes for t in GGUFReader(tmp_path / "x.gguf").tensors)
    cut = tmp_path / "cut.gguf"
    # densely in the first keys, then in steps through arrays, tensor table and data
    for length in [*range(4, 400, 7), *range(400, begin, 997), *range(begin, len(content) - 32, 40_000)]:
        cut.write_bytes(content[:length])
        assert is_gguf(cut)
        assert "cut short" in refused(cut), length


def test_a_damaged_length_is_refused(tmp_path, tokenizer):
    """A length of 2^60 in the place of the first array's is no endless loop and no allocation."""
    path = write(random_model(n_layer=1, n_embd=64, vocab_size=VOCAB_SIZE), tokenizer, tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        at = content.index(key) + len(key) + 4 + 4  # the array's type and that of its elements
        damaged = content[:at] + struct.pack("<Q", 1 << 60) + content[at + 8 :]
        path.write_bytes(damaged)
        assert "cut short" in refused(path)


@settings(max_examples=80)
@given(st.data())
def test_a_changed_byte_is_refused_or_read(small_file, data):
    """No other error than the sentence, whatever it is that changes in keys, tables and lengths."""
    path, content, begin = small_file
    at = data.draw(st.integers(4, 1300) | st.integers(begin - 2500, begin) | st.integers(4, begin))
    change = data.draw(st.binary(min_size=1, max_size=1) | st.sampled_from([2**31, 2**60, 2**64 - 1]).map(eight_bytes))
    path.write_bytes(content[:at] + change + content[at + len(change) :])
    for read in (lambda: load_model(path, "fp32", "cpu"), lambda: find_tokenizer(path, VOCAB_SIZE)):
        with contextlib.suppress(UserError):
            read()


def test_values_beyond_fp16_name_the_tensor(weights, tmp_path, capsys):
    state = torch.load(weights)
    state["blocks.1.ffn.value.weight"][0, 0] = 7e4
    torch.save(state, weights)
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), str(tmp_path / "x.gguf"), "--type", "f16"])
    assert stopped.value.code == 2
    assert "blocks.1.ffn.value.weight has a value of 70000" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.gguf*"))
    assert main([str(weights), str(tmp_path / "x.gguf"), "--type", "bf16"]) == 0


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        (["x.gguf", "--dtype", "bf16"], "--type f16 | f32 | bf16 | q8_0"),
        (["x.pth", "--type", "f16"], "--dtype fp32 | bf16 | fp16"),
        (["x.pth", "--format", "gguf"], "expected x.pth.gguf"),
        (["x.gguf", "--tokenizer", "world"], "its largest id is 65529"),
        (["x.gguf", "--data", "no-such-file"], "no-such-file: no such file"),
    ],
)
def test_a_wrong_call_is_one_message(weights, tmp_path, capsys, monkeypatch, arguments, detail):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert detail in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("x.*"))


def test_a_head_size_that_llama_cpp_computes_wrongly_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError) as caught:
        write(random_model(n_embd=96, head_size=32, vocab_size=VOCAB_SIZE), tokenizer, tmp_path / "x.gguf")
    assert caught.value.flag == "format"
    assert not (tmp_path / "x.gguf").exists()


def test_no_tokenizer_no_file(weights, tmp_path, capsys):
    for file in (weights.parent / "tokenizer").iterdir():
        file.unlink()
    (weights.parent / "tokenizer").rmdir()
    with pytest.raises(SystemExit):
        main([str(weights), str(tmp_path / "x.gguf")])
    assert "--tokenizer: missing" in capsys.readouterr().err


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def pairs(n_layer=2, n_embd=128, r=4):
    generator = torch.Generator().manual_seed(0)
    shapes = {"att.receptance": (128, 128), "att.key": (128, 128), "ffn.key": (512, 128), "ffn.value": (128, 512)}
    tensors = {}
    for layer in range(n_layer):
        for name, (out, inner) in shapes.items():
            tensors[f"blocks.{layer}.{name}.lora_A"] = torch.randn(r, inner, generator=generator)
            tensors[f"blocks.{layer}.{name}.lora_B"] = torch.randn(out, r, generator=generator)
    return tensors


def test_a_lora_adapter_has_llama_cpps_names_and_alpha(tmp_path):
    tensors = pairs()
    write_gguf_lora(tensors, 2.0, "a title", tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert torch.equal(found["blk.1.time_mix_key.weight.lora_a"], tensors["blocks.1.att.key.lora_A"])
    assert torch.equal(found["blk.0.channel_mix_value.weight.lora_b"], tensors["blocks.0.ffn.value.lora_B"])
    assert len(found) == len(tensors)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    back, scale = read_gguf_lora(tmp_path / "x.gguf")
    assert scale == 2.0
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("type", ["f32", "f16"])
def test_an_adapter_of_this_project_is_exported(weights, tmp_path, capsys, type):
    tensors, out = pairs(), tmp_path / "lora.gguf"
    adapter = Adapter(AdapterConfig("lora", r=4, lora_alpha=8.0, use_rslora=True), tensors)
    write_adapter(tmp_path / "adapter", adapter)
    arguments = [str(weights), str(out), "--adapter", str(tmp_path / "adapter"), "--format", "gguf-lora"]
    assert main([*arguments, "--type", type]) == 0
    assert "differ by 0.0e+00 from the weights that were written" in capsys.readouterr().out
    back, scale = read_gguf_lora(out)
    assert scale == pytest.approx(8.0 / 4**0.5)
    dtype = torch.float32 if type == "f32" else torch.float16
    assert all(torch.equal(back[name], tensor.to(dtype)) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        (["x.gguf", "--format", "gguf-lora"], "writes one adapter or one set"),
        (["x.gguf", "--format", "gguf-lora", "--state", "adapter"], "name it as --adapter"),
        (["x.gguf", "--format", "gguf-lora", "--adapter", "dora"], "an adapter of the kind dora"),
        (["x.gguf", "--format", "gguf-lora", "--adapter", "wide"], "doesn't fit the base"),
    ],
)
def test_a_wrong_adapter_is_one_message(weights, tmp_path, capsys, monkeypatch, arguments, detail):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapter", Adapter(AdapterConfig("lora", r=4), pairs()))
    wide = {name: torch.cat([t, t], dim=-1 if name.endswith("A") else 0) for name, t in pairs().items()}
    write_adapter(tmp_path / "wide", Adapter(AdapterConfig("lora", r=4), wide))
    magnitudes = {name.replace("_B", "_magnitude"): t[:, 0].abs() for name, t in pairs().items() if name.endswith("B")}
    write_adapter(tmp_path / "dora", Adapter(AdapterConfig("dora", r=4), {**pairs(), **magnitudes}))
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), *arguments])
    assert stopped.value.code == 2
    assert detail in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("name", ["blocks.0.ln1.weight", "blocks.0.att.key.lora_magnitude", "head.lora_A"])
def test_what_llama_cpp_does_not_apply_is_refused(tmp_path, name):
    with pytest.raises(UserError) as caught:
        write_gguf_lora({**pairs(), name: torch.ones(4, 128)}, 2.0, "a title", tmp_path / "x.gguf")
    assert name in caught.value.problem
    assert not (tmp_path / "x.gguf").exists()


def test_the_reader_shares_nothing_with_the_writer_but_the_names(tmp_path, tokenizer):
    """Keys and offsets as gguf's own reader finds them."""
    path = write(random_model(n_layer=2, vocab_size=VOCAB_SIZE), tokenizer, tmp_path / "x.gguf", "q8_0")
    theirs, ours = GGUFReader(path), read_gguf_file(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.tensors[tensor.name].numpy(), expected), tensor.name
    assert gguf_weights(path).keys() == random_model(n_layer=2, vocab_size=VOCAB_SIZE).state_dict().keys() - set(
        IDLE_IN_LAYER_0
    )
    assert tokenizer_of_gguf(path).encode("the answer") == tokenizer.encode("the answer")
