"""`--format hf`: transformers alone opens the folder, with equal logits, text, ids and gradients; and it comes back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_models import make_tokenizer
from random_model import random_model

from src.dataset.tokenizer import load_tokenizer
from src.inference.export import main
from src.inference.formats.fla import fla_name, to_fla
from src.inference.formats.hf_tokenizer import END_OF_TEXT, VOCABULARY
from src.inference.load import find_tokenizer, find_weights, load_model
from src.model import RWKV7
from src.model.weights import IDLE_IN_LAYER_0, read_weights

pytest.importorskip("transformers")

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 96, 0, 0, 11, 7, 12, 90, 42, 17, 33]  # more than one chunk
TEXTS = [
    "The history of the bridge, 1873.",
    "他们说，今天天气很好。",
    "def area(r):\n    return 3.14159 * r ** 2  # \U0001f642\n\n\n",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1f3 \u00e9 e\u0301 fließt\t\r\n \x00\x16\x17",
    "<s> <|endoftext|> <|im_start|>x<|im_end|>",
    "   leading, and trailing   ",
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One.\n\nTwo?"},
    {"role": "assistant", "content": "Three.\n\nFour."},
    {"role": "user", "content": "Five?"},
]


def client(requests: dict, folder: Path) -> dict:
    """What hf_client.py finds in the folders."""
    (folder / "request.json").write_text(json.dumps(requests))
    environment = os.environ | {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "hf_client.py"
    command = [sys.executable, "-I", str(script), str(folder / "request.json"), str(folder / "answer.pt")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "answer.pt", weights_only=False)


def greedy(model: RWKV7, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two models: byte-level BPE from a run's folder, and World. (folders, models, what transformers found in them)"""
    root = tmp_path_factory.mktemp("hf")
    models = {
        "bpe": random_model(n_layer=3, vocab_size=400, d_decay_lora=32, d_gate_lora=64),
        "world": random_model(n_layer=1, n_embd=64, vocab_size=65536),
    }
    requests = {}
    for name, model in models.items():
        (root / name).mkdir()
        torch.save(model.state_dict(), root / name / "rwkv-final.pth")
        if name == "bpe":
            make_tokenizer(root / name / "tokenizer")
        assert main([str(root / name), str(root / f"{name}-hf"), "--format", "hf"]) == 0
        tokenizer = load_tokenizer("world" if name == "world" else root / name / "tokenizer")
        ids = tokenizer.encode("".join(TEXTS))
        requests[str(root / f"{name}-hf")] = {
            "tokens": TOKENS,
            "texts": TEXTS,
            "pieces": [ids[i : i + 1] for i in range(0, len(ids), 3)] + [[65531, 70, 0]] * (name == "world"),
            "chat": CHAT,
            "save": str(root / f"{name}-saved"),
        }
    found = client(requests, root)
    return (
        root,
        models,
        {name: (found[str(root / f"{name}-hf")], requests[str(root / f"{name}-hf")]) for name in models},
    )


@pytest.mark.parametrize("name", ["bpe", "world"])
def test_transformers_alone_computes_the_same(exported, name):
    _, models, results = exported
    found, _ = results[name]
    model = models[name]
    expected = model(torch.tensor([TOKENS]))[0][0]
    assert expected.std() > 0.3, "logits close to 0 would be equal for any model"
    assert found["names"] == []  # no parameter is missing or unexpected
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["continued"], expected[len(TOKENS) // 2 :], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["padded after"][: len(TOKENS)], expected, rtol=0, atol=1e-4)
    count = len(found["generated"]) - len(TOKENS)
    assert count > 0
    assert found["generated"] == greedy(model, TOKENS, count)
    assert found["without cache"] == found["generated in a batch"] == found["generated"]
    assert found["beams"][0] == 1


@pytest.mark.parametrize("name", ["bpe", "world"])
def test_gradients_of_the_loss_are_equal(exported, name):
    _, models, results = exported
    found, _ = results[name]
    model = RWKV7(models[name].config)
    model.load_state_dict(models[name].state_dict())
    tokens = torch.tensor([TOKENS])
    loss = torch.nn.functional.cross_entropy(model(tokens)[0][0, :-1], tokens[0, 1:])
    loss.backward()
    torch.testing.assert_close(found["loss"], loss, rtol=0, atol=1e-5)
    ours = to_fla({n: p.grad for n, p in model.named_parameters() if n not in IDLE_IN_LAYER_0})
    assert ours.keys() == found["gradients"].keys()
    for key, gradient in ours.items():
        theirs = found["gradients"][key]
        assert (theirs - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key
    assert found["checkpointing changes gradients by"] < 1e-6


@pytest.mark.parametrize("name", ["bpe", "world"])
def test_the_tokenizer_gives_the_same_ids_text_and_chat(exported, name):
    root, _, results = exported
    found, request = results[name]
    tokenizer = load_tokenizer("world" if name == "world" else root / name / "tokenizer")
    assert found["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["decoded"] == [tokenizer.decode(ids) for ids in found["ids"]]
    if name == "world":  # the end of a document has a name there, which is no text here
        request["pieces"][-1] = request["pieces"][-1][:2]
        assert found["pieces"][-1].removesuffix(END_OF_TEXT) == tokenizer.decode(request["pieces"].pop())
        found["pieces"].pop()
    assert found["pieces"] == [tokenizer.decode(ids) for ids in request["pieces"]]
    assert any("\N{REPLACEMENT CHARACTER}" in piece for piece in found["pieces"])  # parts of characters
    assert found["chat"] == tokenizer.chat_template.render(CHAT, add_generation_prompt=True)


def test_all_ends_are_known(exported):
    root, _, results = exported
    for name, ends in (("bpe", [0, 2]), ("world", [0])):
        config = json.loads((root / f"{name}-hf" / "config.json").read_text())
        generation = json.loads((root / f"{name}-hf" / "generation_config.json").read_text())
        assert config["eos_token_id"] == generation["eos_token_id"] == ends
        assert config["pad_token_id"] == generation["pad_token_id"] == 0
        found, _ = results[name]
        assert found["specials"][0] in ends


@pytest.mark.parametrize("name", ["bpe", "world"])
def test_what_transformers_saves_comes_back(exported, name):
    root, models, _ = exported
    saved = root / f"{name}-saved"
    model = load_model(find_weights(saved), "as is", "cpu")
    for key, tensor in model.state_dict().items():
        if key not in IDLE_IN_LAYER_0:
            assert torch.equal(tensor, models[name].state_dict()[key]), key
    assert find_tokenizer(saved, model.config.vocab_size).name == ("world" if name == "world" else str(saved))
    # by the code that was copied along, it can be opened again
    assert {"modeling_rwkv7.py", "layers_rwkv7.py", "configuration_rwkv7.py"} <= {file.name for file in saved.iterdir()}


def test_fla_folders_of_world_models_have_their_tokenizer_too(exported, tmp_path):
    root, _, _ = exported
    assert main([str(root / "world-hf"), str(tmp_path / "fla")]) == 0
    assert (tmp_path / "fla" / VOCABULARY).read_bytes() == load_tokenizer("world").vocabulary_file.read_bytes()
    assert find_tokenizer(find_weights(tmp_path / "fla"), 65536).name == "world"


def test_a_tokenizer_of_another_export_is_replaced(exported, tmp_path):
    root, _, _ = exported
    out = Path(shutil.copytree(root / "world-hf", tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    assert main([str(root / "bpe"), str(out), "--format", "hf"]) == 0
    assert not (out / VOCABULARY).exists()
    assert find_tokenizer(out, 400).name == str(out)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_tokenizer_that_does_not_belong_leaves_nothing(exported, tmp_path, capsys):
    root, _, _ = exported
    with pytest.raises(SystemExit) as stopped:
        main([str(root / "bpe"), str(tmp_path / "out"), "--format", "hf", "--tokenizer", "world"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "largest id is 65529" in error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_heads_of_other_sizes_are_written_with_their_epsilon(tmp_path):
    torch.save(random_model(n_embd=256, head_size=128).state_dict(), tmp_path / "wide.pth")
    assert main([str(tmp_path / "wide.pth"), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["group_norm_eps"] == 64e-5
    assert "another epsilon" in (tmp_path / "hf" / "README.md").read_text()


def test_the_card_describes_the_run(tmp_path):
    run = tmp_path / "bridge"
    run.mkdir()
    torch.save(random_model(n_layer=1, vocab_size=97).state_dict(), run / "rwkv-final.pth")
    settings = {"data_file": "/home/somebody/books", "data_type": "binidx", "ctx_len": 512, "lr_init": 0.0006}
    settings |= {"peft": "none", "lora_r": 8}
    (run / "run.json").write_text(json.dumps({"settings": settings}))
    steps = "".join(f"{i},{i * 100},{5 - i / 10},0.0006\n" for i in range(1, 31))
    (run / "metrics.csv").write_text("step,tokens,loss,lr\n" + steps)
    (run / "val.csv").write_text("step,tokens,loss\n10,1000,4.25\n30,3000,4.5\n")
    (run / "loss.png").write_bytes(b"\x89PNG picture")
    assert main([str(run), str(tmp_path / "hf"), "--format", "hf"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "# bridge" in card
    assert "3,000 tokens" in card
    assert "training loss at the end: 2.4500 (mean of the last 10 steps)" in card
    assert "held-out loss: 4.5000 at the end, 4.2500 at its lowest" in card
    assert "| data_file | books |" in card
    assert "somebody" not in card
    assert "| lr_init | 0.0006 |" in card
    assert "![The loss of the run](loss.png)" in card
    assert (tmp_path / "hf" / "loss.png").read_bytes() == b"\x89PNG picture"
    assert "lora" not in card
    (run / "run.json").write_text(json.dumps({"settings": settings | {"peft": "lora"}}))
    assert main([str(run), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert "| peft | lora |\n| lora_r | 8 |" in (tmp_path / "hf" / "README.md").read_text()


def test_a_page_of_ones_own_is_kept(tmp_path):
    torch.save(random_model(n_layer=1).state_dict(), tmp_path / "model.pth")
    out = tmp_path / "out"
    assert main([str(tmp_path / "model.pth"), str(out), "--format", "hf"]) == 0
    written = (out / "README.md").read_text()
    (out / "README.md").write_text(written + "one more line\n")
    assert main([str(tmp_path / "model.pth"), str(out), "--format", "hf"]) == 0
    assert (out / "README.md").read_text() == written  # its mark says that it is replaced
    (out / "README.md").write_text("# My project\n")
    (out / "loss.png").write_bytes(b"mine")
    assert main([str(tmp_path / "model.pth"), str(out), "--format", "hf"]) == 0
    assert (out / "README.md").read_text() == "# My project\n"
    assert (out / "loss.png").read_bytes() == b"mine"


def test_values_beyond_fp16_are_named(tmp_path, capsys):
    model = random_model(n_layer=1)
    model.blocks[0].ffn.value.weight[3, 5] = -7e4
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "model.pth"), str(tmp_path / "out"), "--format", "hf", "--dtype", "fp16"])
    assert stopped.value.code == 2
    assert "blocks.0.ffn.value.weight has values up to 70000" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_names_are_those_that_the_code_in_the_folder_has(exported):
    _, models, results = exported
    found, _ = results["bpe"]
    names = {fla_name(name) for name in models["bpe"].state_dict() if name not in IDLE_IN_LAYER_0}
    assert names == found["gradients"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["transformers", "rwkv7-hf"])
def test_every_released_size_gives_equal_logits(tmp_path, who):
    """Low-rank sizes of released models, one and two layers, layer 0 with and without v0, v1, v2; heads of 128."""
    if who == "rwkv7-hf":
        pytest.importorskip("rwkv7_hf")
    from test_export import RELEASED

    cases = {
        f"{size}-{layers}": {"n_layer": layers, "n_embd": 192, **ranks}
        for size, ranks in RELEASED.items()
        for layers in (1, 2)
    }
    if who == "transformers":  # the other one derives the norm's epsilon from the head size
        cases["wide heads"] = {"n_layer": 2, "n_embd": 256, "head_size": 128}
    models = {}
    for name, sizes in cases.items():
        models[name] = random_model(**sizes)
        weights = models[name].state_dict()
        if name.endswith("-2"):
            weights = {key: tensor for key, tensor in weights.items() if key not in IDLE_IN_LAYER_0}
        torch.save(weights, tmp_path / f"{name}.pth")
        assert main([str(tmp_path / f"{name}.pth"), str(tmp_path / name), "--format", "hf"]) == 0
    requests = {
        str(tmp_path / name): {"tokens": TOKENS, "client": who, "save": str(tmp_path / f"{name}-saved")}
        for name in cases
    }
    found = client(requests, tmp_path)
    for name, model in models.items():
        answer = found[str(tmp_path / name)]
        assert answer["names"] == [], name
        torch.testing.assert_close(answer["logits"], model(torch.tensor([TOKENS]))[0][0], rtol=0, atol=1e-4)
        assert answer["generated"] == greedy(model, TOKENS, len(answer["generated"]) - len(TOKENS)), name
        saved = load_model(find_weights(tmp_path / f"{name}-saved"), "fp32", "cpu")
        torch.testing.assert_close(
            saved(torch.tensor([TOKENS]))[0], model(torch.tensor([TOKENS]))[0], rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_lora_of_peft_merges_into_a_model_of_ours(exported, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    root, models, _ = exported
    model = AutoModelForCausalLM.from_pretrained(root / "bpe-hf", trust_remote_code=True)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    tokens = torch.tensor([TOKENS])
    for _ in range(3):
        optimizer.zero_grad()
        tuned(tokens, labels=tokens).loss.backward()
        optimizer.step()
    tuned.eval()
    expected = tuned(tokens).logits[0].detach()
    assert (expected - models["bpe"](tokens)[0][0]).abs().max() > 0.1, "nothing was learned"
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    back = load_model(find_weights(tmp_path / "merged"), "fp32", "cpu")
    torch.testing.assert_close(back(tokens)[0][0], expected, rtol=0, atol=1e-4)
    assert read_weights(tmp_path / "merged" / "model.safetensors").keys() == to_fla(models["bpe"].state_dict()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_trl_trains_the_folder(exported, tmp_path, stage):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, _, _ = exported
    folder = root / "bpe-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    question, answer = {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "the string of all"}
    options = {"output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    options |= {"use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}

    def model():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    if stage == "sft":
        data = datasets.Dataset.from_list([{"messages": [question, answer]}] * 12)
        arguments = trl.SFTConfig(**options, gradient_checkpointing=True)
        trainer = trl.SFTTrainer(model(), arguments, train_dataset=data, processing_class=tokenizer)
    else:
        worse = {"role": "assistant", "content": "return"}  # shorter, so that rows are padded
        data = datasets.Dataset.from_list([{"prompt": [question], "chosen": [answer], "rejected": [worse]}] * 12)
        arguments = trl.DPOConfig(**options)
        trainer = trl.DPOTrainer(model(), model(), arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
