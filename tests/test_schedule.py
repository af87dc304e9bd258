"""Learning rate by step and the bounds of mini-epochs, compared with the published run and by their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.training.schedule import RunLength, learning_rate

# the published run: mini-epoch -> lr at its last step
PUBLISHED = {
    0: "0.00059975", 1: "0.00059899", 2: "0.00059773", 3: "0.00059597", 4: "0.00059371", 5: "0.00059096",
    6: "0.00058771", 7: "0.00058399", 8: "0.00057978", 9: "0.00057511", 10: "0.00056999", 11: "0.00056441",
}  # fmt: skip
MINIPILE = RunLength.of(exit_tokens=1_498_226_207, ctx_len=512, global_batch=16)


def minipile_lr(step, **changed):
    settings = {
        "lr_init": 6e-4,
        "lr_final": 6e-5,
        "warmup_steps": 10,
        "exit_tokens": MINIPILE.exit_tokens,
        "tokens_per_step": MINIPILE.tokens_per_step,
    }
    return learning_rate(step, **{**settings, **changed})


def test_published_learning_rates_to_the_last_digit():
    ends = [step for step in range(2520 * 12) if MINIPILE.ends_mini_epoch(step)]
    assert len(ends) == 12
    assert {MINIPILE.mini_epoch(s): f"{minipile_lr(s):.8f}" for s in ends} == PUBLISHED


def test_the_schedule_is_a_warmup_and_a_cosine():
    assert minipile_lr(0) == pytest.approx(6e-6)  # 1 % at the first step of the warm-up
    assert minipile_lr(5) == pytest.approx(6e-4 * (0.01 + 0.99 * 0.5))
    assert minipile_lr(10) == pytest.approx(6e-4)
    assert minipile_lr(MINIPILE.steps) == pytest.approx(6e-5)
    assert minipile_lr(10 * MINIPILE.steps) == pytest.approx(6e-5)
    values = [minipile_lr(s) for s in range(10, MINIPILE.steps, 997)]
    assert values == sorted(values, reverse=True)


def test_without_a_warmup_the_first_step_has_lr_init():
    assert minipile_lr(0, warmup_steps=0) == 6e-4


def train_temp_lr(step, *, lr_init, lr_final, warmup_steps, exit_tokens, tokens_per_step):
    """The official trainer's formula, from its description: -1 is neither clipped nor treated apart."""
    progress = (step - warmup_steps) * tokens_per_step / (exit_tokens - warmup_steps * tokens_per_step)
    factor = lr_final / lr_init
    lr = lr_init * (0.5 + factor / 2 + (0.5 - factor / 2) * math.cos(math.pi * max(0, min(1, progress))))
    return lr * (0.01 + 0.99 * step / warmup_steps) if step < warmup_steps else lr


@pytest.mark.parametrize("warmup_steps", [-1, 10])
def test_learning_rates_are_those_of_the_official_trainer(warmup_steps):
    settings = {"lr_init": 6e-4, "lr_final": 6e-5, "exit_tokens": 8192 * 1000, "tokens_per_step": 8192}
    for step in range(1001):
        expected = train_temp_lr(step, warmup_steps=warmup_steps, **settings)
        assert f"{learning_rate(step, warmup_steps=warmup_steps, **settings):.8f}" == f"{expected:.8f}"


def test_warmup_minus_one_is_a_cosine_that_is_one_step_ahead():
    longer = MINIPILE.exit_tokens + MINIPILE.tokens_per_step
    for step in (0, 1, 1000, MINIPILE.steps - 1):
        expected = minipile_lr(step + 1, warmup_steps=0, exit_tokens=longer)
        assert minipile_lr(step, warmup_steps=-1) == pytest.approx(expected, rel=1e-14)
    assert minipile_lr(0, warmup_steps=-1) < 6e-4
    assert minipile_lr(1000, warmup_steps=-1) != minipile_lr(1000, warmup_steps=0)
    start = 5000  # weights alone still get a warm-up
    restarted = minipile_lr(start, warmup_steps=-1, restarted_at=start)
    assert restarted == pytest.approx(0.01 * minipile_lr(start, warmup_steps=-1))


def test_resuming_from_weights_repeats_the_warmup_within_the_same_cosine():
    start = 5000
    assert minipile_lr(start, restarted_at=start) == pytest.approx(0.01 * minipile_lr(start))
    assert minipile_lr(start + 5, restarted_at=start) == pytest.approx((0.01 + 0.99 * 0.5) * minipile_lr(start + 5))
    assert minipile_lr(start + 10, restarted_at=start) == minipile_lr(start + 10)
    no_warmup = minipile_lr(start, warmup_steps=0, restarted_at=start)
    # MIN_RESTART_WARMUP_STEPS holds without --warmup_steps too
    assert no_warmup == pytest.approx(0.01 * minipile_lr(start, warmup_steps=0))


def test_a_run_may_be_as_short_as_its_warmup():
    for step in range(12):
        assert math.isfinite(minipile_lr(step, exit_tokens=MINIPILE.tokens_per_step * 10))


def test_the_published_run_has_2520_steps_per_mini_epoch():
    assert MINIPILE.mini_epoch_samples == 40320
    assert MINIPILE.step_after(0) == 2520
    assert MINIPILE.steps == math.ceil(1_498_226_207 / (512 * 16))


@given(
    exit_tokens=st.integers(1, 10**6),
    ctx_len=st.integers(1, 64),
    global_batch=st.integers(1, 300),
    epoch_steps=st.integers(0, 50),
)
def test_mini_epochs_cover_a_run_of_any_size(exit_tokens, ctx_len, global_batch, epoch_steps):
    length = RunLength.of(exit_tokens, ctx_len, global_batch, epoch_steps)
    assert (length.steps - 1) * length.tokens_per_step < exit_tokens <= length.steps * length.tokens_per_step
    assert length.ends_mini_epoch(length.steps - 1)
    last = length.mini_epoch(length.steps - 1)
    for n in {0, last // 2, last}:
        after = length.step_after(n)
        assert after == length.steps or after * global_batch >= (n + 1) * length.mini_epoch_samples
        assert (after - 1) * global_batch < (n + 1) * length.mini_epoch_samples
        if after < length.steps:
            assert length.ends_mini_epoch(after - 1)
            assert length.mini_epoch(after - 1) >= n
            assert length.mini_epoch(after) > n or length.mini_epoch_samples < global_batch


@given(
    batches=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40)), min_size=1, max_size=5),
    exit_tokens=st.integers(1, 20_000),
)
def test_no_sample_is_lost_or_repeated_when_the_batch_size_changes(batches, exit_tokens):
    """A run that is resumed several times with other global batches, as when the number of processes changes."""
    length = RunLength.of(exit_tokens, 8, 4, epoch_steps=7)
    step, samples, ended = 0, 0, []
    for global_batch, steps in [*batches, (16, 10**9)]:
        length = RunLength(exit_tokens, 8, global_batch, length.mini_epoch_samples, step, samples)
        for _ in range(min(steps, length.steps - step)):
            assert length.samples(step) == samples
            if length.ends_mini_epoch(step):
                ended.append(length.mini_epoch(step))
                before, after = (n // length.mini_epoch_samples for n in (samples, samples + global_batch))
                assert after == before or ended[-1] == after - 1  # of several that it ends, the last
            step, samples = step + 1, samples + global_batch
    assert step == length.steps
    assert (samples - length.global_batch) * 8 < exit_tokens + 100 * 8
    assert samples * 8 >= exit_tokens
    assert ended == sorted(set(ended))
