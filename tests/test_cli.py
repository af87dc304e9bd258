"""The flags: frozen names and defaults, words about mistakes, the habits of existing scripts."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.cli import HARMLESS_TRAINER_FLAGS, parse
from src.config import RunConfig

ROOT = Path(__file__).parents[1]
DATA = ["--data_file", "x"]

# the public interface: existing scripts pass these; a change here breaks them
FLAGS = """
accelerator accumulate_grad_batches adam_eps beta1 beta2 check compile ctx_len d_aaa_lora d_decay_lora d_gate_lora d_mv_lora
data_file data_type devices dim_att dim_ffn dry_run ds_bucket_mb enable_progress_bar epoch_begin epoch_count epoch_save epoch_steps epochs
grad_clip grad_cp head_chunk head_size keep_resume kernel load_model load_partial lr_final lr_init logger magic_prime max_bad_steps micro_bsz my_exit_tokens
my_testing n_embd n_layer num_nodes packing plan precision profile proj_dir random_seed restart save_minutes sft_loss strategy time_limit tokenizer train_stage truncate val_data_file val_every val_windows
vocab_size wandb warmup_steps weight_decay
""".split()
DEFAULTS = {
    "load_model": "", "wandb": "", "proj_dir": "out", "random_seed": -1, "data_type": "binidx", "vocab_size": 0,
    "ctx_len": 1024, "epoch_save": 5, "micro_bsz": 12, "n_layer": 6, "n_embd": 512, "lr_init": 6e-4, "lr_final": 1e-5,
    "warmup_steps": -1, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-18, "grad_cp": 0, "weight_decay": 0.0, "grad_clip": 1.0,
    "train_stage": 0, "head_size": 64, "head_chunk": 0, "load_partial": 0, "magic_prime": 0, "my_testing": "x070",
    "my_exit_tokens": 0, "accelerator": "auto", "devices": "1", "strategy": "auto",
}  # fmt: skip
EXISTING_SCRIPT = """
--load_model 0 --wandb "" --proj_dir out/L12-D768-x070 --my_testing x070 --ctx_len 512 --train_stage 3 --epoch_count 999999
--epoch_begin 0 --data_file data/minipile --my_exit_tokens 1498226207 --magic_prime 2926181 --num_nodes 1 --micro_bsz 16
--n_layer 12 --n_embd 768 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18
--data_type binidx --vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size 64 --accelerator gpu --devices 1
--precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True --ds_bucket_mb 2 --kernel @rwkv3
"""


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        parse(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_flags_are_frozen():
    assert sorted(field.name for field in dataclasses.fields(RunConfig)) == sorted(FLAGS)
    config, _ = parse(DATA)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_help_explains_every_flag_without_loading_torch():
    show = "import sys, train; sys.argv = ['train.py', '--help']\ntry: train.main()\nfinally: assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert set(re.findall(r"^  --(\w+)", shown.stdout, flags=re.M)) == set(FLAGS)


def test_existing_script_is_understood():
    config, notes = parse(EXISTING_SCRIPT.replace('""', "").replace("--wandb ", "").split())
    assert (config.load_model, config.kernel, config.strategy) == ("", "auto", "deepspeed_stage_2")
    assert (config.n_layer, config.lr_final, config.magic_prime) == (12, 6e-5, 2926181)
    assert [note for note in notes if "epoch_count" in note]


def test_empty_values_as_scripts_pass_them():
    config, _ = parse([*DATA, "--wandb", "", "--kernel", "", "--load_model", ""])
    assert (config.wandb, config.kernel, config.load_model) == ("", "auto", "")


def test_unknown_flag_names_the_nearest(capsys):
    assert "--ctx_len" in refused(capsys, *DATA, "--ctxlen", "5")


def test_a_prefix_is_not_a_flag(capsys):
    assert "--micro_bsz" in refused(capsys, *DATA, "--micro", "5")


@pytest.mark.parametrize("name", ["logger", "num_sanity_val_steps", "log_every_n_steps"])
def test_old_trainer_flags_that_change_nothing_are_noted(name):
    assert name in HARMLESS_TRAINER_FLAGS or name == "logger"  # which means something here, with another value
    _, notes = parse([*DATA, f"--{name}", "1"])
    assert name in notes[0]


def test_old_trainer_flags_that_would_change_the_run_are_refused(capsys):
    assert "--grad_clip" in refused(capsys, *DATA, "--gradient_clip_val", "1")
    assert "--my_exit_tokens" in refused(capsys, *DATA, "--max_steps=5")
    assert "--devices" in refused(capsys, *DATA, "--gpus", "8")


def test_all_faults_at_once(capsys):
    words = refused(
        capsys, *"--n_layer 0 --beta1 1.5 --lr_final 1 --precision int8 --nonsense 1 --ctx_len x --n_embd 100".split()
    )
    for name in ("n_layer", "beta1", "lr_final", "precision", "nonsense", "data_file", "ctx_len", "n_embd"):
        assert words.count(f"  --{name}") == 1, words


@pytest.mark.parametrize(
    "argv",
    [
        ["--dim_att", "256", "--n_embd", "512"],
        ["--devices", "many"],
        ["--lr_init", "nan"],
        ["stray"],
        ["--lr_init", "x"],
        ["--lr_init"],
        ["--n_embd", "40"],
        ["--load_partial", "1"],
        ["--epochs", "2", "--my_exit_tokens", "1000"],
        ["--proj_dir", ""],
        ["--random_seed", "4294967296"],
        ["--n_layer", "99999999999999999999"],
    ],
)
def test_impossible_values_are_refused(capsys, argv):
    assert refused(capsys, *DATA, *argv)


@pytest.mark.parametrize("argv", [["--random_seed", "-1"], ["--random_seed=-1"]])
def test_negative_numbers_are_values(argv):
    config, _ = parse([*DATA, *argv])
    assert config.random_seed == -1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--micro_bsz", "4", "8"], "'8'"),
        (["--logger", "True", "8", "--micro_bsz", "4"], "'8'"),
        (["--nonsense", "1", "--micro_bsz", "4", "8"], "'8'"),
        (["-micro_bsz", "4"], "two dashes: --micro_bsz"),
        (["--logger", "True", "-micro_bsz", "4"], "two dashes: --micro_bsz"),
        (["-mcro_bsz=4"], "nearest is --micro_bsz"),
        (["--micro_bsz", "--ctx_len", "8"], "--micro_bsz: its value is missing"),
    ],
    ids=" ".join,
)
def test_no_word_passes_silently(capsys, argv, words):
    assert words in refused(capsys, *DATA, *argv)


def test_the_last_of_equal_flags_counts():
    config, _ = parse([*DATA, "--micro_bsz", "4", "--micro_bsz", "8"])  # scripts append the user's flags to their own
    assert config.micro_bsz == 8


def test_a_flag_that_may_stand_alone():
    assert parse(["--plan", "--n_layer", "2"])[0].plan == 0.0
    assert parse(["--n_layer", "2", "--plan", "5e4"])[0].plan == 5e4


def test_stage_1_refuses_weights_that_it_would_ignore(capsys):
    assert "--load_model" in refused(capsys, *DATA, "--train_stage", "1", "--load_model", "base.pth")


@pytest.mark.parametrize(
    ("data", "held_out"),
    [("data/x", "data/x-heldout"), ("x.bin", "x-heldout.bin"), ("a.b/x.jsonl", "a.b/x-heldout.jsonl")],
)
def test_the_part_that_was_kept_aside_is_found_by_its_name(data, held_out):
    assert parse(["--data_file", data, "--val_data_file", "heldout"])[0].val_data_file == held_out


def test_the_home_folder_is_found_where_the_shell_has_not_found_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config, _ = parse(["--proj_dir=~/run", "--data_file", "~/text", "--load_model", "0"])
    assert (config.proj_dir, config.data_file) == ("/home/somebody/run", "/home/somebody/text")


def test_flags_of_earlier_rwkv_trainers_are_answered(capsys):
    assert "use --train_stage" in refused(capsys, *DATA, "--my_pile_stage", "3")
    assert "leave it out" in refused(capsys, *DATA, "--layerwise_lr", "1")
