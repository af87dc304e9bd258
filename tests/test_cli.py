"""The flags: frozen names and defaults, faults of a command line, notations of existing scripts."""

import dataclasses
import pickle
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from src.cli import COMPATIBILITY_FLAGS, HARMLESS_TRAINER_FLAGS, interpret, parse, version_text
from src.config import ModelConfig, RunConfig, default_text, settings_with
from src.errors import UserError, UserErrors
from src.version import __version__

ROOT = Path(__file__).parents[1]
DATA = ["--data_file", "x"]

# The public interface: existing scripts pass these, and saved runs hold them. A change here breaks them.
FLAGS = {
    "train_stage": 0, "plan": -1.0, "plan_bandwidth": "450,50", "plan_gpu": "989,40", "plan_disks": "8,2",
    "plan_mtbf": 6000.0, "check": False, "dry_run": False, "proj_dir": "out", "load_model": "",
    "load_partial": False, "resize_vocab": False, "restart": False, "save_minutes": 15.0, "keep_resume": 2,
    "time_limit": 0.0, "max_bad_steps": 3, "random_seed": -1,
    "data_file": "", "data_type": "binidx", "tokenizer": "", "vocab_size": 0, "ctx_len": 1024,
    "document_states": False, "magic_prime": 0,
    "sft_loss": "answers", "packing": True, "truncate": "end", "special_tokens": "text", "think": "",
    "val_data_file": "",
    "val_every": "1", "val_windows": 512,
    "n_layer": 6, "n_embd": 512, "head_size": 64, "dim_ffn": 0, "d_decay_lora": 0, "d_aaa_lora": 0, "d_mv_lora": 0,
    "d_gate_lora": 0,
    "peft": "none", "lora_r": 32, "lora_alpha": 64.0, "lora_dropout": 0.0, "use_rslora": False,
    "lora_targets": "att.receptance,att.key,att.value,att.output,ffn.key,ffn.value", "lora_train": "",
    "train_type": "none", "quant": "none",
    "encoder": "", "projector": "mlp", "train_parts": "", "load_projector": "", "media_folder": "", "media_tokens": 0,
    "image_size": "64", "patch_size": 8, "encoder_dim": 128, "max_seconds": 30.0, "broken_media": "drop",
    "cache_features": False, "media_workers": -1,
    "micro_bsz": 12, "accumulate_grad_batches": 1, "my_exit_tokens": 0, "epochs": 1.0,
    "train_minutes": 0.0, "epoch_steps": 0,
    "epoch_save": 5, "epoch_begin": 0, "lr_init": 6e-4, "lr_final": 1e-5, "warmup_steps": -1,
    "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-18, "weight_decay": 0.0, "grad_clip": 1.0,
    "grad_cp": False, "head_chunk": 0, "chunk_ctx": 0, "bptt": -1, "kernel": "auto", "compile": "auto", "profile": 0,
    "cuda_graph": "auto",
    "accelerator": "auto", "devices": "1", "num_nodes": "1", "rdzv_endpoint": "", "dist_timeout": 600,
    "max_restarts": 3, "precision": "", "strategy": "auto", "context_parallel": 1,
    "ds_bucket_mb": 200,
    "wandb": "", "logger": "", "enable_progress_bar": "True",
}  # fmt: skip
# With another value of these it would be another run: without them a resumed run could mix two models or data orders.
FIXED = {
    *(
        "n_layer",
        "n_embd",
        "head_size",
        "dim_ffn",
        "d_decay_lora",
        "d_aaa_lora",
        "d_mv_lora",
        "d_gate_lora",
        "vocab_size",
    ),
    *("data_type", "tokenizer", "ctx_len", "magic_prime", "sft_loss", "packing", "truncate", "special_tokens"),
    "think",
    *("peft", "lora_r", "lora_alpha", "use_rslora", "lora_targets", "lora_train", "train_type", "quant"),
    *("encoder", "projector", "train_parts", "media_tokens", "image_size", "patch_size", "encoder_dim", "max_seconds"),
}
# These change how training goes on: a resumed run logs their change.
NOTED = {
    *("bptt", "document_states"),
    *("micro_bsz", "accumulate_grad_batches", "my_exit_tokens", "epoch_steps", "epoch_save", "precision"),
    *("lr_init", "lr_final", "warmup_steps", "beta1", "beta2", "adam_eps", "weight_decay", "grad_clip"),
    *("max_bad_steps", "val_data_file", "val_windows", "lora_dropout"),
}
EXISTING_SCRIPT = """
--load_model 0 --wandb "" --proj_dir out/L12-D768-x070 --my_testing x070 --ctx_len 512 --train_stage 3
--epoch_count 999999 --epoch_begin 0 --data_file data/minipile --my_exit_tokens 1498226207 --magic_prime 2926181
--num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --dim_att 768 --lr_init 6e-4 --lr_final 6e-5
--warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type binidx --vocab_size 65536
--weight_decay 0.001 --epoch_save 10 --head_size 64 --accelerator gpu --devices 1 --precision bf16
--strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True --ds_bucket_mb 2 --kernel @rwkv3 --compile 0
"""


def faults_of(*argv):
    return interpret([*DATA, *argv])[2]


def only_fault(*argv):
    (fault,) = faults_of(*argv)
    return fault


def text_of_refusal(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        parse([*DATA, *argv])
    assert exit_.value.code == 2
    return capsys.readouterr().err


# ---- the declarations ------------------------------------------------------------------------------------------------


def test_flags_and_defaults_are_frozen():
    config, notes = parse(DATA)
    defaults = dataclasses.asdict(config)
    assert {**defaults, "data_file": ""} == FLAGS
    assert {name: type(value) for name, value in defaults.items()} == {
        name: type(value) for name, value in FLAGS.items()
    }
    assert notes == []


def test_a_flag_declares_whether_it_may_change_within_a_run():
    fixed, free, noted = (set(settings_with(kind)) for kind in ("fixed", "free", "noted"))
    assert fixed == FIXED
    assert noted == NOTED
    assert free == set(FLAGS) - FIXED - NOTED


def test_settings_are_saved_as_earlier_runs_saved_them():
    """run.json of a run made before booleans were booleans compares equal, and so does what is written now."""
    settings = RunConfig(packing=True, grad_cp=False).as_settings()
    assert (settings["packing"], settings["grad_cp"]) == (1, 0)
    assert not any(isinstance(value, bool) for value in settings.values())
    assert RunConfig(**settings) == RunConfig(packing=1, grad_cp=0)


def test_the_device_decides_about_compiling_unless_the_flag_does():
    assert [RunConfig(compile=choice).compiles("cuda") for choice in ("auto", "0", "1")] == [True, False, True]
    assert [RunConfig(compile=choice).compiles("cpu") for choice in ("auto", "0", "1")] == [False, False, True]


def test_sizes_of_a_model_are_those_of_the_flags():
    sizes = {"n_layer": 3, "n_embd": 96, "head_size": 32, "dim_ffn": 200, "d_decay_lora": 8, "d_aaa_lora": 16}
    assert RunConfig(**sizes, grad_cp=True, kernel="reference").model_config(77) == ModelConfig(
        vocab_size=77, **sizes, grad_cp=True, kernel="reference"
    )


def test_a_model_lists_the_fault_of_each_size():
    with pytest.raises(UserErrors) as caught:
        ModelConfig(n_layer=0, n_embd=100, vocab_size=-1, d_mv_lora=-2, kernel="fast")
    assert {fault.flag: fault.given for fault in caught.value.faults} == {
        "n_layer": 0, "n_embd": 100, "vocab_size": -1, "d_mv_lora": -2, "kernel": "fast"
    }  # fmt: skip


def test_help_explains_every_flag_without_loading_torch():
    program = (
        "import sys, train; sys.argv = ['train.py', '--help']\n"
        "try: train.main()\nfinally: assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^  --(\w+)", done.stdout, flags=re.M)) == set(FLAGS)
    shown = dict(re.findall(r"^  --(\w+) .*(?:\n {10,}.*)*? \[([^]\n]*)\]$", done.stdout, flags=re.M))
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    assert shown == {name: text for name in FLAGS if (text := default_text(fields[name]))}
    assert (shown["packing"], shown["grad_cp"], shown["ctx_len"]) == ("1", "0", "1024")


def test_version_is_shown_without_loading_torch(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == version_text()
    program = "import sys, src.cli; print(src.cli.version_text(), end=''); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"train.py {__version__} (torch {version('torch')})\n", done.stderr


@pytest.mark.skipif(not (ROOT / "CHANGELOG.md").exists(), reason="no CHANGELOG.md")
def test_version_is_the_newest_of_the_changelog():
    headings = re.findall(r"^## \[(\d[\w.]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == __version__


# ---- existing scripts ------------------------------------------------------------------------------------------------


def test_existing_script_is_understood():
    config, notes, faults = interpret(EXISTING_SCRIPT.replace('--wandb ""', "--wandb=").split())
    assert faults == []
    assert (config.load_model, config.kernel, config.strategy) == ("", "auto", "deepspeed_stage_2")
    assert (config.n_layer, config.lr_final, config.magic_prime) == (12, 6e-5, 2926181)
    assert (config.grad_cp, config.compile, config.wandb) == (True, "0", "")
    (note,) = notes
    assert "--epoch_count" in note


def test_empty_values_as_scripts_pass_them():
    config, _ = parse([*DATA, "--wandb", "", "--kernel", "", "--load_model", ""])
    assert (config.wandb, config.kernel, config.load_model) == ("", "auto", "")


def test_flags_without_effect_are_not_settings():
    assert set(COMPATIBILITY_FLAGS) == {"my_testing", "dim_att", "epoch_count"}
    assert not set(COMPATIBILITY_FLAGS) & set(FLAGS)
    for argv in (["--dim_att", "0"], ["--dim_att", "512"], ["--my_testing", "x070"], ["--epoch_count", "0"]):
        assert interpret([*DATA, *argv])[1:] == ([], [])


def test_epoch_count_is_the_length_of_a_command_of_rwkv_peft():
    length = ["--epoch_count", "3", "--epoch_steps", "200", "--ctx_len", "64", "--micro_bsz", "4", "--devices", "2"]
    lora = ["--load_model", "B.pth", "--peft", "lora", "--accumulate_grad_batches", "2"]
    config, notes, faults = interpret([*DATA, *lora, *length])
    assert config.batches == 3 * 200
    assert (len(notes), faults) == (1, [])
    for others in (["--epochs", "2"], ["--my_exit_tokens", "999"]):
        assert interpret([*DATA, *lora, *length, *others])[0].batches == 0
    config, (note,), _ = interpret([*DATA, *length])  # a script of RWKV-LM
    assert (config.batches, "is ignored" in note) == (0, True)
    assert interpret([*DATA, *lora, "--epoch_count", "many"])[2]


def faults_by_flag(*argv):
    return {fault.flag: str(fault) for fault in interpret([*DATA, "--load_model", "B.pth", *argv])[2]}


def settings_of(*argv):
    config, notes, faults = interpret([*DATA, "--load_model", "B.pth", *argv])
    assert not faults, list(map(str, faults))
    assert not notes
    return config


def test_adapters_in_the_notations_of_rwkv_peft():
    """Each flag means there what these say; the settings of a run are the plain ones."""
    peft_config = '{"r":8,"lora_alpha":32,"lora_dropout":0.05,"target_modules":["key","att.value"],"use_rslora":true}'
    config = settings_of("--peft", "lora", "--peft_config", peft_config, "--dataload", "get", "--merge", "0")
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 32.0, 0.05, True)
    assert (config.lora_targets, config.data_type) == ("key,att.value", "binidx")
    old = '{"lora_load":"","lora_r":16,"lora_alpha":32,"lora_dropout":0.0}'
    assert settings_of("--peft", "lora", "--lora_config", old).lora_r == 16
    disha = settings_of("--peft", "disha", "--disha_config", '{"mode":"bone","load":"","r":64}', "--quant", "4bit")
    assert (disha.peft, disha.lora_r, disha.quant) == ("miss", 64, "nf4")
    pissa = '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}'
    assert settings_of("--peft", "pissa", "--pissa_config", pissa).peft == "pissa"
    rows = settings_of("--train_type", "states", "--dataload", "pad", "--loss_mask", "pad", "--tokenizer", "world")
    assert (rows.train_type, rows.packing, rows.sft_loss, rows.data_type) == ("state", False, "text", "sft")
    assert settings_of("--train_type", "none", "--peft", "none").peft == "none"
    infctx = settings_of("--train_type", "infctx", "--ctx_len", "2048")
    assert (infctx.train_type, infctx.chunk_ctx, infctx.bptt) == ("none", 512, -1)
    assert settings_of("--train_type", "infctx", "--ctx_len", "2048", "--chunk_ctx", "1024").chunk_ctx == 1024


@pytest.mark.parametrize(
    ("argv", "flag", "message"),
    [
        ("--quant fp4 --peft lora", "quant", "there is nf4"),
        ("--quant fp8 --peft lora", "quant", "there is int8"),
        ("--quant nf4", "quant", "all weights are trained"),
        ("--train_type infctx --ctx_len 1000", "chunk_ctx", "for example 500"),
        ("--ctx_len 2048 --chunk_ctx 4096", "chunk_ctx", "for example 2048"),
        ("--bptt 2", "bptt", "needs --chunk_ctx"),
        ("--chunk_ctx 512 --bptt 0", "bptt", "-1 (all pieces)"),
        ("--ctx_len 1024 --context_parallel 3", "context_parallel", "a divisor of --ctx_len 1024"),
        ("--chunk_ctx 512 --context_parallel 3", "context_parallel", "a divisor of --chunk_ctx 512"),
        ("--context_parallel 2 --compile 1", "compile", "a compiled graph can't"),
        ("--data_type sft --tokenizer world --document_states 1", "document_states", "its own state in any case"),
        ("--context_parallel 2 --encoder siglip", "context_parallel", "aren't divided among processes"),
        ("--peft adalora", "peft", "expected one of none, lora, pissa, miss, dora"),
        ("--peft lora --train_type state", "peft", "leave one of them out"),
        ("--peft lora --lora_targets key,gate", "lora_targets", "gate matches nothing"),
        ("--peft lora --lora_targets ,", "lora_targets", "expected a list"),
        ("--peft lora --lora_train emb", "lora_train", "emb matches nothing"),
        ("--peft lora --lora_r 0", "lora_r", "at least 1"),
        ("--lora_r 8", "lora_r", "needs --peft"),
        ("--peft lora --train_stage 1", "train_stage", "whole weights"),
        ("--peft lora --loss_mask se", "loss_mask", "there are qa"),
        ("--peft lora --merge 1", "merge", "src.inference.export"),
        ("--peft lora --dataload get --data_type sft --tokenizer world", "dataload", "contradicts --data_type sft"),
        ("--peft lora --peft_config {", "peft_config", "a JSON object"),
        ('--peft lora --peft_config {"rank":8}', "peft_config", "has no 'rank'"),
        ('--peft lora --peft_config {"r":8.5}', "peft_config", "a whole number"),
        ('--peft lora --lora_r 4 --peft_config {"r":8}', "peft_config", "contradicts --lora_r 4"),
        ('--peft lora --lora_config {"lora_load":"x.pth"}', "lora_config", "lora_load isn't offered"),
        ('--peft miss --disha_config {"mode":"bat"}', "disha_config", "which is MiSS"),
    ],
)
def test_mistakes_of_adapters_name_what_is_there(argv, flag, message):
    assert message in faults_by_flag(*argv.split())[flag]


def test_an_adapter_needs_weights():
    assert "missing" in {f.flag: str(f) for f in interpret([*DATA, "--peft", "lora"])[2]}["load_model"]
    assert not interpret([*DATA, "--peft", "lora", "--plan"])[2]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("my_testing", "x060"), ("dim_att", "256"), ("dim_att", "wide"), ("epoch_count", "many"), ("epoch_count", None)],
)
def test_flags_without_effect_have_one_right_value(flag, value):
    argv = [f"--{flag}"] if value is None else [f"--{flag}", value]
    assert only_fault(*argv).flag == flag


@pytest.mark.parametrize("name", ["logger", "num_sanity_val_steps", "log_every_n_steps"])
def test_old_trainer_flags_that_change_nothing_are_noted(name):
    assert name in HARMLESS_TRAINER_FLAGS or name == "logger"  # which has a meaning here, with another value
    _, (note,) = parse([*DATA, f"--{name}", "1"])
    assert f"--{name}" in note


@pytest.mark.parametrize(
    ("argv", "replacement"),
    [
        (["--gradient_clip_val", "1"], "--grad_clip"),
        (["--max_steps=5"], "--my_exit_tokens"),
        (["--gpus", "8"], "--devices"),
        (["--my_pile_stage", "3"], "--train_stage"),
        (["--layerwise_lr", "1"], "leave it out"),
    ],
)
def test_old_flags_that_would_change_the_run_are_refused(argv, replacement):
    fault = only_fault(*argv)
    assert argv[0].startswith(f"--{fault.flag}")
    assert replacement in fault.advice


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(RunConfig) if f.metadata["help"].startswith("sft: ")])
def test_flags_for_conversations_are_refused_with_token_files(field):
    """Those of --data_type sft would be ignored; scripts may pass their defaults along."""
    other = str(int(not field.default)) if isinstance(field.default, bool) else field.metadata["choices"][-1]
    fault = only_fault(f"--{field.name}", other)
    assert (fault.flag, str(fault.given)) == (field.name, other)
    assert "--data_type binidx" in fault.problem
    sft = ["--data_type", "sft", "--tokenizer", "world"]
    for argv in ([f"--{field.name}", other, *sft], [f"--{field.name}", str(FLAGS[field.name])]):
        assert interpret([*DATA, *argv])[2] == []


@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("1", True), ("False", False), ("true", True), ("2", None), ("", None)]
)
def test_booleans_are_0_or_1(text, value):
    config, _, faults = interpret([*DATA, "--grad_cp", text])
    if value is None:
        assert [fault.flag for fault in faults] == ["grad_cp"]
    else:
        assert faults == []
        assert config.grad_cp is value


def test_the_last_of_equal_flags_counts():
    config, _ = parse([*DATA, "--micro_bsz", "4", "--micro_bsz", "8"])  # scripts append the user's flags to their own
    assert config.micro_bsz == 8


def test_flags_that_need_no_value():
    assert parse(["--plan", "--n_layer", "2"])[0].plan == 0.0
    assert parse(["--n_layer", "2", "--plan", "5e4"])[0].plan == 5e4
    assert parse([*DATA, "--check"])[0].check is True
    assert parse([*DATA, "--check", "0"])[0].check is False


@pytest.mark.parametrize("argv", [["--random_seed", "-1"], ["--random_seed=-1"]])
def test_negative_numbers_are_values(argv):
    config, _ = parse([*DATA, *argv])
    assert config.random_seed == -1


@pytest.mark.parametrize(
    ("data", "held_out"),
    [("data/x", "data/x-heldout"), ("x.bin", "x-heldout.bin"), ("a.b/x.jsonl", "a.b/x-heldout.jsonl")],
)
def test_held_out_part_is_found_by_its_name(data, held_out):
    assert parse(["--data_file", data, "--val_data_file", "heldout"])[0].val_data_file == held_out


def test_the_home_folder_is_expanded_where_the_shell_does_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config, _ = parse(["--proj_dir=~/run", "--data_file", "~/text", "--load_model", "0"])
    assert (config.proj_dir, config.data_file) == ("/home/somebody/run", "/home/somebody/text")


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misspelt", "suggestions"),
    [
        ("lr", ["--lr_init", "--lr_final"]),
        ("micro", ["--micro_bsz"]),
        ("epoch", ["--epochs", "--epoch_steps", "--epoch_save", "--epoch_begin"]),
        ("ctxlen", ["--ctx_len"]),
        ("n_layers", ["--n_layer"]),
        ("d", []),  # eleven flags begin with it
        ("xyzzy", []),
    ],
)
def test_a_misspelt_flag_proposes_prefix_matches_then_the_most_similar(misspelt, suggestions):
    fault = only_fault(f"--{misspelt}", "3")
    assert fault.flag == misspelt
    assert re.findall(r"--\w+", fault.advice) == suggestions


def test_all_faults_at_once(capsys):
    argv = "--n_layer 0 --beta1 1.5 --lr_final 1 --precision int8 --nonsense 1 --ctx_len x --n_embd 100 --dim_att 5"
    text = text_of_refusal(capsys, *argv.split(), "--data_file", "")
    for name in ("n_layer", "beta1", "lr_final", "precision", "nonsense", "data_file", "ctx_len", "n_embd", "dim_att"):
        assert text.count(f"\n  --{name}") == 1, text
    assert len(text.splitlines()) == 11
    assert text.endswith("python train.py --help\n")


@pytest.mark.parametrize(
    ("argv", "flag", "given"),
    [
        (["--devices", "many"], "devices", "many"),
        (["--num_nodes", "4:2"], "num_nodes", "4:2"),
        (["--num_nodes", "0"], "num_nodes", "0"),
        (["--num_nodes", "2:"], "num_nodes", "2:"),
        (["--rdzv_endpoint", "node0"], "rdzv_endpoint", "node0"),
        (["--rdzv_endpoint", "node0:70000"], "rdzv_endpoint", "node0:70000"),
        (["--rdzv_endpoint", "fd00::1:29500"], "rdzv_endpoint", "fd00::1:29500"),
        (["--lr_init", "nan"], "lr_init", "nan"),
        (["--lr_init", "x"], "lr_init", "'x'"),
        (["--lr_init"], "lr_init", "None"),
        (["--lr_init", "0", "--lr_final", "0"], "lr_init", "0.0"),
        (["--n_embd", "40"], "n_embd", "40"),
        (["--head_size", "24"], "head_size", "24"),
        (["--load_partial", "1"], "load_partial", "1"),
        (["--resize_vocab", "1"], "resize_vocab", "1"),
        (["--epochs", "2", "--my_exit_tokens", "1000"], "epochs", "2.0"),
        (["--train_minutes", "5", "--peft", "lora", "--load_model", "x.pth"], "train_minutes", "5.0"),
        (["--train_minutes", "5", "--plan"], "train_minutes", "5.0"),
        (["--epochs", "0"], "epochs", "0.0"),
        (["--proj_dir", ""], "proj_dir", ""),
        (["--random_seed", "4294967296"], "random_seed", "4294967296"),
        (["--n_layer", "99999999999999999999"], "n_layer", "99999999999999999999"),
        (["--train_stage", "1", "--load_model", "base.pth"], "load_model", "base.pth"),
        (["--epoch_begin", "3"], "epoch_begin", "3"),
        (["--dry_run", "--train_stage", "1"], "dry_run", "None"),
        (["--dry_run", "--profile", "5"], "profile", "5"),
        (["--check", "--plan"], "check", "None"),
        (["--data_type", "sft"], "tokenizer", "None"),
        (["--val_every", "often"], "val_every", "often"),
        (["--compile", "2"], "compile", "2"),
        (["--cuda_graph", "1"], "cuda_graph", "1"),
        (["--data_file", ""], "data_file", "None"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_values_are_refused(argv, flag, given):
    fault = only_fault(*argv)
    assert (fault.flag, str(fault.given)) == (flag, given)
    assert fault.problem or fault.expected


def test_a_size_that_is_wrong_by_itself_is_one_fault():
    """The flag's bounds and the model both refuse it."""
    assert only_fault("--n_embd", "0").flag == "n_embd"
    assert only_fault("--kernel", "fast").flag == "kernel"


@pytest.mark.parametrize(
    ("argv", "flag", "given"),
    [
        (["--micro_bsz", "4", "8"], "", "'8'"),
        (["stray"], "", "'stray'"),
        (["--logger", "True", "8", "--micro_bsz", "4"], "", "'8'"),
        (["-micro_bsz", "4"], "micro_bsz", None),
        (["--logger", "True", "-micro_bsz", "4"], "micro_bsz", None),
        (["-mcro_bsz=4"], "mcro_bsz", None),
        (["--micro_bsz", "--ctx_len", "8"], "micro_bsz", None),
        (["--"], "", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_argument_is_a_flag_a_value_or_a_fault(argv, flag, given):
    fault = only_fault(*argv)
    assert (fault.flag, fault.given) == (flag, given)


def test_every_stray_value_is_a_fault():
    flags_and_values = [(fault.flag, fault.given) for fault in faults_of("--nonsense", "1", "--micro_bsz", "4", "8")]
    assert flags_and_values == [("nonsense", None), ("", "'8'")]


def test_errors_make_a_sentence_of_their_parts():
    assert str(UserError("no such file", flag="load_model", given="x.pth", advice="leave it out")) == (
        "--load_model x.pth: no such file; leave it out"
    )
    assert str(UserError(flag="proj_dir", given="", expected="a folder")) == '--proj_dir "": expected a folder'
    assert str(UserError("out of memory")) == "out of memory"


def test_errors_travel_between_processes():
    errors = UserErrors([UserError(flag="n_embd", given=40, expected="a multiple of 64"), UserError("no data")])
    copy = pickle.loads(pickle.dumps(errors))
    assert isinstance(copy, UserErrors)
    assert [vars(fault) for fault in copy.faults] == [vars(fault) for fault in errors.faults]
    assert str(copy) == str(errors) == "--n_embd 40: expected a multiple of 64\nno data"
