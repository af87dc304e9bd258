"""What `--plan` and the simulation say of clusters: communication, states, failures."""

import math
import random
import subprocess
from pathlib import Path

import pytest

from src.config import RunConfig
from src.training.preflight import goodput, traffic
from src.training.preflight.cluster_plan import describe_communication, describe_states
from src.training.preflight.model_sizes import read_sizes, settings_of_size
from src.training.simulate import Policy, draw_failures, main, play

ROOT = Path(__file__).parents[1]


def test_time_of_a_ring():
    assert traffic.seconds(900.0, 8, 1, within=450.0, between=50.0) == 2
    assert traffic.seconds(900.0, 8, 4, within=450.0, between=50.0) == 900 / 400  # eight links between two machines
    assert traffic.seconds(900.0, 1, 4, within=450.0, between=50.0) == 900 / 50
    assert traffic.seconds(900.0, 1, 1, within=450.0, between=50.0) == 0
    assert traffic.Traffic(all_reduce=10, reduce_scatter=20, all_gather=30).sent(4) == 0.75 * 70
    assert traffic.mfu_range(40.0, 3.0, 1.0) == (30.0, 40.0)
    assert traffic.mfu_range(40.0, 3.0, 5.0) == (15.0, 20.0)


def test_lines_of_a_large_run():
    config = RunConfig(plan=0, my_exit_tokens=1, **settings_of_size("7b"))
    assert config.faults() == []
    model = config.model_config(config.vocab_size)
    lines = list(describe_communication(config, model, 16, 2))
    count = 7_199_932_416
    rows = {line.lstrip("> ").split()[0]: line.split() for line in lines[3:]}
    sent = 15 / 16 * count * 2 / 1e9
    for name, times in (("ddp", 2), ("deepspeed_stage_1", 3), ("deepspeed_stage_2", 3), ("deepspeed_stage_3", 3)):
        assert float(rows[name][-5]) == pytest.approx(times * sent, rel=0.01)
    [marked] = [line for line in lines if line.startswith(">")]
    assert "deepspeed_stage_2" in marked
    state, progress = describe_states(config, model, 16)
    assert f"{12 * count / 1e9:.1f} GB" in state
    assert "--save_minutes 15 and a failure every 3,000 hours" in progress


@pytest.mark.parametrize("flag", ["plan_bandwidth", "plan_gpu", "plan_disks"])
@pytest.mark.parametrize("value", ["900", "900,x", "0,5", "1,2,3", ""])
def test_a_pair_that_is_none_is_named(flag, value):
    [fault] = [fault for fault in RunConfig(plan=0, my_exit_tokens=1, **{flag: value}).faults() if fault.flag == flag]
    assert "two numbers above 0, such as" in str(fault)


# ---- states and failures ---------------------------------------------------------------------------------------------


def stretch_by_steps(policy, start, end):
    """Steps and saves of an uninterrupted stretch, one step after another, as the trainer takes them."""
    now, steps, whole, writing, saved_at, written_at, is_due, saves = start, 0, 0, 0, start, start, False, 0
    while now + policy.step <= end:
        now, steps = now + policy.step, steps + 1
        if is_due:
            now = max(now, written_at)
            if now + policy.saved.stop > end:
                break
            whole, writing, saves = writing, steps, saves + 1
            now = saved_at = now + policy.saved.stop
            written_at, is_due = now + policy.saved.write, False
        elif policy.interval and now - saved_at >= policy.interval:
            is_due = True
    return (writing if end >= written_at else whole), steps, saves


@pytest.mark.parametrize("seed", range(40))
def test_a_run_is_played_as_step_by_step(seed):
    draw = random.Random(seed)
    saved = goodput.Saving(draw.choice([0, 1, 3]), draw.choice([1, 30, 500]), draw.choice([8, 60]))
    policy = Policy(draw.choice([1, 4]), draw.choice([0, 16, 100, 300]), saved, draw.choice([0, 1, 3]), 90)
    failures = [float(round(time)) for time in draw_failures(1 / 400, 3999, seed)]  # no rounding within
    course = play(policy, failures, 4000)
    now, restarts, kept, lost, saves = 0.0, 0, 0, 0, 0
    for time in [*failures, 4000]:
        if time >= now:
            whole, steps, written = stretch_by_steps(policy, now, time)
            saves += written
            if time == 4000:
                kept += steps
                break
            kept, lost = kept + whole, lost + steps - whole
        elif time == 4000:
            break
        waits = restarts == policy.max_restarts
        now, restarts = time + 90 * waits + saved.restart, 0 if waits else restarts + 1
    assert (course.kept, course.lost, course.saves, course.failures) == (kept, lost, saves, len(failures))


def test_the_formula_of_the_goodput_is_that_of_many_runs():
    saved, rate, end = goodput.Saving(2, 60, 180), 1 / 400_000, 60 * 86400
    for interval in (120.0, goodput.best_interval(saved, rate), 7200.0):
        policy = Policy(1.0, interval, saved, 10**9, 0)
        kept = [play(policy, draw_failures(rate, end, seed), end).kept for seed in range(20)]
        assert sum(kept) / 20 / end == pytest.approx(goodput.goodput(saved, interval, rate), abs=0.002)
    best = goodput.best_interval(saved, rate)
    assert all(
        goodput.goodput(saved, best, rate) >= goodput.goodput(saved, best * factor, rate) for factor in (0.7, 1.4)
    )
    assert math.isinf(goodput.best_interval(saved, 0.0))


def test_simulation_from_the_command_line(capsys):
    assert main(["--size", "13b", "--days", "3", "--runs", "2", "--plan_mtbf", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("L61-D4096 on 32 GPUs, deepspeed_stage_2: ")
    assert sum(line.strip().startswith(("1 ", "15 ", "120 ")) for line in lines) == 3
    with pytest.raises(SystemExit):
        main(["--size", "8b"])
    assert "--size 8b: expected one of 3b, 7b, 13b, 30b, 70b" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("size", read_sizes())
def test_the_script_takes_the_size(size, monkeypatch):
    for name, value in {"SIZE": size, "N_NODE": "2", "GPU_PER_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    command = ["sh", "demo-training-run.sh", "cluster", "--plan", "--my_exit_tokens", "1000000"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    row = read_sizes()[size]
    assert f"L{row.n_layer}-D{row.n_embd}, " in output
    w, a, v, g = row.low_rank
    assert f"low-rank sizes w {w}, a {a}, v {v}, g {g}" in output
    assert f"16, bf16, micro batch {row.micro_bsz} x 4096" in output
    assert f">          deepspeed_stage_{row.stage}" in output
