"""llama.cpp computes what this project computes, from the GGUF files of the export: logits, tokens, text, LoRA, chat.

Needs llama-cpp-python (requirements-clients.txt); LLAMA_CPP_SOURCE is the folder of llama.cpp's source, for its
converter and its Jinja engine. On a processor with AMX, a quantised file needs use_extra_bufts=False in clients that
have the option: without it llama.cpp crashes or answers nothing.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chat_models import CHATML, TEMPLATES, make_tokenizer
from gguf import GGUFReader
from random_model import random_model
from test_gguf import CASES, VOCAB_SIZE, add_tokens, pairs

from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.tokenizer import load_tokenizer
from src.inference.export import main
from src.inference.formats.gguf_lora import write_gguf_lora
from src.inference.formats.gguf_tokenizer import TEXTS
from src.inference.formats.parity import SAMPLE
from src.inference.generation import generate
from src.inference.load import load_model
from src.model import RWKV7, ModelConfig
from src.model.weights import IDLE_IN_LAYER_0

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -r tests/requirements-clients.txt")
SOURCE = Path(os.environ.get("LLAMA_CPP_SOURCE", ""))
needs_source = pytest.mark.skipif(
    not (SOURCE / "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP_SOURCE isn't the folder of llama.cpp's source"
)
CONTROL = "<|im_start|>user\nthe answer<|im_end|>\n<|im_start|>assistant\n"


def llama(path, **options):
    return llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, logits_all=True, verbose=False, **options)


def logits_of(client, ids):
    client.reset()
    client.eval(ids)
    return torch.from_numpy(np.array(client.scores[: len(ids)]))


def greedy(client, prompt, count):
    client.reset()
    return [
        token for token, _ in zip(client.generate(prompt, temp=0.0, repeat_penalty=1.0), range(count), strict=False)
    ]


@torch.no_grad()
def logits(model, ids):
    return model.float()(torch.tensor([ids]))[0][0]


def loss(values, ids):
    return float(F.cross_entropy(values[:-1], torch.tensor(ids[1:])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_tokenizer(folder / "tokenizer")
    return folder


def exported(model, folder, name, type="f32", tokenizer=""):
    torch.save(model.state_dict(), folder / f"{name}.pth")
    out = folder / f"{name}-{type}.gguf"
    arguments = ["--tokenizer", tokenizer] if tokenizer else ["--tokenizer", str(folder / "tokenizer")]
    assert main([str(folder / f"{name}.pth"), str(out), "--type", type, *arguments]) == 0
    return out


@pytest.mark.parametrize("case", CASES)
def test_f32_logits_and_greedy_text_are_equal(folder, case):
    model = random_model(vocab_size=VOCAB_SIZE, **{"n_layer": 2, **CASES[case]})
    client = llama(exported(model, folder, case.replace(" ", "-")))
    ids = load_tokenizer(folder / "tokenizer").encode(SAMPLE)
    assert (logits_of(client, ids) - logits(model, ids)).abs().max() < 1e-4
    prompt = ids[:20]
    expected = list(generate(model, prompt, 40, temperature=0.0))
    assert greedy(client, prompt, len(expected)) == expected


@pytest.fixture(scope="module")
def trained(folder):
    """A model that has learned a text, with the tokens that it is measured on."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode_as_text(text))
    held_out, ids = ids[:400], ids[400:]
    torch.manual_seed(0)
    model = RWKV7(ModelConfig(n_layer=2, n_embd=128, vocab_size=VOCAB_SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(150):
        rows = torch.stack([ids[at : at + 129] for at in torch.randint(len(ids) - 129, (8,)).tolist()])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10)
        out = F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), held_out.tolist()


@pytest.mark.parametrize(("type", "limit"), [("f32", 1e-3), ("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.5)])
def test_every_type_keeps_the_loss(folder, trained, type, limit):
    model, ids = trained
    ours = logits(model, ids)
    theirs = logits_of(llama(exported(model, folder, "trained", type)), ids)
    assert loss(ours, ids) < 4.5  # it has learned something: ln 320 = 5.8
    difference, change = float((ours - theirs).abs().max()), loss(theirs, ids) / loss(ours, ids) - 1
    print(f"{type}: logits {difference:.1e}, loss {change:+.3%}")
    assert difference < limit
    assert abs(change) < 0.005


def test_llama_quantize_takes_the_file(folder, trained):
    model, ids = trained
    source, out = exported(model, folder, "trained"), folder / "q4.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) == 0
    assert abs(loss(logits_of(llama(out), ids), ids) / loss(logits(model, ids), ids) - 1) < 0.1


@pytest.fixture(scope="module")
def world(folder):
    model = random_model(n_layer=2, n_embd=64, vocab_size=65536)
    return model, exported(model, folder, "world", "f32", "world")


def random_texts(count):
    numbers = np.random.default_rng(0)
    hard = [CONTROL, "<s>", "</s>", "[PAD3]", "a . b", " 's", "\n\n", "\t", "  ", "é", "你好", "🙂"]
    pieces = [*TEXTS, *SAMPLE.split(" "), *hard]
    for _ in range(count):
        chosen = numbers.choice(len(pieces), numbers.integers(1, 6))
        text = "".join(pieces[i] for i in chosen)
        begin = int(numbers.integers(0, max(1, len(text) - 20)))
        yield text[begin : begin + 60]


def test_world_tokens_logits_and_text(world):
    model, path = world
    tokenizer, client = load_tokenizer("world"), llama(path)
    ids = tokenizer.encode(SAMPLE)
    assert (logits_of(client, ids) - logits(model, ids)).abs().max() < 1e-3
    for text in (*TEXTS, *random_texts(300)):
        data = text.encode()
        assert client.tokenize(data, add_bos=False, special=True) == tokenizer.encode(text), text
        assert client.tokenize(data, add_bos=False, special=False) == tokenizer.encode(text), text
        assert client.detokenize(tokenizer.encode(text)) == data
    prompt = ids[:16]
    expected = list(generate(model, prompt, 20, temperature=0.0))
    assert greedy(client, prompt, len(expected)) == expected
    vocabulary = llama_cpp.llama_model_get_vocab(client._model.model)
    assert [i for i in range(65536) if llama_cpp.llama_vocab_is_eog(vocabulary, i)] == [0, 261]


def test_byte_level_tokens(folder, trained):
    client, tokenizer = llama(exported(trained[0], folder, "trained")), load_tokenizer(folder / "tokenizer")
    for text in (CONTROL, *TEXTS, *random_texts(300)):
        data = text.encode()
        assert client.tokenize(data, add_bos=False, special=True) == tokenizer.encode(text), text
        assert client.tokenize(data, add_bos=False, special=False) == tokenizer.encode_as_text(text), text
        ids = tokenizer.encode_as_text(text)
        assert client.detokenize(ids) == data
    vocabulary = llama_cpp.llama_model_get_vocab(client._model.model)
    assert [i for i in range(VOCAB_SIZE) if llama_cpp.llama_vocab_is_eog(vocabulary, i)] == [0, 2]


def test_tokens_that_are_found_in_any_text(folder):
    tokenizer = load_tokenizer(add_tokens(make_tokenizer(folder / "more"), "<think>", "</think> x"))
    model = random_model(n_layer=1, n_embd=64, vocab_size=330)
    client = llama(exported(model, folder, "more", "f32", tokenizer.name))
    for text in random_texts(100):
        text = f"{text[:9]}<think>{text[9:]}</think> x"
        assert client.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text
        assert client.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode_as_text(text), text


def test_chat_uses_the_template_and_stops(folder):
    """A model that always predicts <|im_end|> after "the": its answer ends there, in llama.cpp's chat as in ours."""
    model = random_model(n_layer=1, n_embd=64, vocab_size=VOCAB_SIZE)
    path = exported(model, folder, "chat")
    client, tokenizer = llama(path), load_tokenizer(folder / "tokenizer")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the question"}]
    assert client.metadata["tokenizer.chat_template"] == CHATML
    seen = []
    client.tokenize = (lambda tokenize: lambda data, *a, **k: seen.append(data.decode()) or tokenize(data, *a, **k))(
        client.tokenize
    )
    answer = client.create_chat_completion(turns, max_tokens=30, temperature=0.0, repeat_penalty=1.0)
    assert seen[0] == tokenizer.chat_template.render(turns, add_generation_prompt=True)
    ids = tokenizer.encode(seen[0])
    expected = list(generate(model, ids, 30, temperature=0.0, stop_ids=tokenizer.eos_ids))
    # llama-cpp-python drops bytes that are no UTF-8
    text = tokenizer.decode_bytes(expected).decode(errors="ignore")
    assert answer["choices"][0]["message"]["content"] == text
    assert (answer["choices"][0]["finish_reason"] == "stop") == (len(expected) < 30)


def test_a_lora_adapter_acts_as_the_merged_model(folder):
    model = random_model(n_layer=2, vocab_size=VOCAB_SIZE)
    tensors = {name: tensor * 0.1 for name, tensor in pairs().items()}
    write_gguf_lora(tensors, 0.5, "a title", folder / "lora.gguf")
    base = exported(model, folder, "lora-base")
    client = llama(base, lora_path=str(folder / "lora.gguf"), lora_scale=1.0)
    ids = load_tokenizer(folder / "tokenizer").encode(SAMPLE)
    plain = logits(model, ids)
    for name in tensors:
        if name.endswith("lora_A"):
            stem = name.removesuffix(".lora_A")
            delta = tensors[f"{stem}.lora_B"] @ tensors[name]
            model.get_parameter(f"{stem}.weight").add_(0.5 * delta)
    merged = logits(model, ids)
    assert (plain - merged).abs().max() > 0.1
    assert (logits_of(client, ids) - merged).abs().max() < 1e-3


@needs_source
def test_llama_cpps_converter_writes_the_same_tensors(world, folder):
    """From the fla folder of the same model. Its keys differ in the named ones only."""
    from pyrwkv_tokenizer import RWKVTokenizer

    _, ours = world
    assert main([str(folder / "world.pth"), str(folder / "fla"), "--format", "fla"]) == 0
    shutil.copy(RWKVTokenizer().vocab_filepath, folder / "fla" / "rwkv_vocab_v20230424.txt")
    theirs = folder / "theirs.gguf"
    command = [
        sys.executable,
        SOURCE / "convert_hf_to_gguf.py",
        folder / "fla",
        "--outtype",
        "f32",
        "--outfile",
        theirs,
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(SOURCE / "gguf-py")}, capture_output=True)
    one, other = ({t.name: t for t in GGUFReader(path).tensors} for path in (ours, theirs))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tensor_type == other[name].tensor_type
        assert one[name].data.shape == other[name].data.shape
        assert one[name].data.tobytes() == other[name].data.tobytes(), name
    keys, their_keys = (
        {key: field.contents() for key, field in GGUFReader(path).fields.items()} for path in (ours, theirs)
    )
    different = {key for key in keys.keys() | their_keys.keys() if keys.get(key) != their_keys.get(key)}
    assert different == {"general.name", "tokenizer.ggml.tokens", "tokenizer.chat_template"}
    assert keys["tokenizer.ggml.tokens"][1:] == their_keys["tokenizer.ggml.tokens"][1:]


RENDER = """
#include <fstream>
#include <iostream>
#include <sstream>
#include "json.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"

static std::string text_of(const char * path) {
    std::stringstream content;
    content << std::ifstream(path).rdbuf();
    return content.str();
}

int main(int, char ** arguments) {
    const std::string source = text_of(arguments[1]);
    jinja::lexer lexer;
    jinja::program program = jinja::parse_from_tokens(lexer.tokenize(source));
    jinja::context context(source);
    jinja::global_from_json(context, common_json::parse(text_of(arguments[2])), false);
    jinja::runtime runtime(context);
    std::cout << runtime.gather_string_parts(runtime.execute(program))->as_string().str();
}
"""


@needs_source
def test_chat_templates_render_alike_in_llama_cpps_engine(tmp_path):
    libraries = Path(llama_cpp.__file__).parents[1] / "lib"
    (tmp_path / "render.cpp").write_text(RENDER)
    includes = [f"-I{SOURCE / name}" for name in ("common", "vendor", "include", "ggml/include")]
    command = ["g++", "-std=c++17", *includes, tmp_path / "render.cpp", f"-L{libraries}", "-lllama-common"]
    subprocess.run([*command, "-Wl,--allow-shlib-undefined", "-o", tmp_path / "render"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    conversations = (
        [("system", "a\n\n\nb"), ("user", " x\r\n\r\ny  "), ("assistant", "q\n\nz"), ("user", "t")],
        [("user", "你好 🙂")],
        [("user", "c"), ("tool", "r\n\nk")],
    )
    for source in (*TEMPLATES.values(), RWKV_TEMPLATE):
        template = ChatTemplate(source, {})
        (tmp_path / "template").write_text(template.portable_source)
        for turns in conversations:
            messages = [{"role": role, "content": content} for role, content in turns]
            (tmp_path / "variables").write_text(json.dumps({"messages": messages, "add_generation_prompt": True}))
            arguments = [tmp_path / "render", tmp_path / "template", tmp_path / "variables"]
            done = subprocess.run(arguments, check=True, capture_output=True, env=environment)
            assert done.stdout.decode() == template.render(messages, add_generation_prompt=True)


def test_what_comes_back_is_the_model(world, folder):
    model, path = world
    state = load_model(path, "fp32", "cpu").state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items() if n not in IDLE_IN_LAYER_0)
