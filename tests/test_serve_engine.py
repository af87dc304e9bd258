"""The server's engine: whatever else is in the batch, an answer is that of `generate`."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from chat_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.inference.decoder import Decoder, initial_state
from src.inference.generation import generate
from src.inference.sampling import Sampling
from src.inference.serve.engine import Engine
from src.inference.serve.fair_lock import FairLock
from src.inference.serve.prefix_cache import KnownText, PrefixCache, TextDigest
from src.inference.serve.request import (
    CANCELLED,
    FAILED,
    LENGTH,
    STOP,
    Processed,
    QueueFullError,
    Request,
    Start,
    TokenLogprobs,
)
from src.inference.serve.sequence import KEEP_EVERY, MOST_KEPT, Sequence, Ticket
from src.inference.serve.slots import Slots
from src.model import RWKV7, State

V = 400
GREEDY = Sampling(temperature=0.0)
# Without top_p, which sorts the tokens: differences of 1e-7 may swap two of them, and with them the draws of a seed.
SAMPLED = Sampling(temperature=1.2, top_p=1.0, presence_penalty=0.3, frequency_penalty=0.2)


class Recorder:
    """A consumer that keeps what it is told; `until(n)` ends the answer at its n-th token."""

    def __init__(self, until: Callable[[list[int]], bool] = lambda tokens: False) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.cached = -1
        self.reason = ""
        self.error: Exception | None = None
        self._until = until
        self._done = threading.Event()

    def started(self, cached_tokens: int) -> None:
        self.cached = cached_tokens

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.tokens.append(token)
        self.logprobs.append(logprobs)
        return self._until(self.tokens)

    def ended(self, reason: str, error: Exception | None = None) -> None:
        self.reason, self.error = reason, error
        self._done.set()

    def wait(self) -> "Recorder":
        assert self._done.wait(60), "the engine has not ended this request"
        return self


@pytest.fixture(scope="module")
def model() -> RWKV7:
    model = random_model(n_layer=2, n_embd=64, vocab_size=V)
    Decoder(model).step([0])  # compiles the kernels where they aren't yet; no answer has to wait for that
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def engine(model: RWKV7, tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    engine = Engine(model, tokenizer, max_batch=3, piece_tokens=5)
    yield engine
    engine.close()


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: RWKV7, prompt: list[int], count: int, sampling: Sampling, seed: int | None) -> list[int]:
    return list(generate(model, prompt, count, seed=seed, **asdict(sampling)))


def ask(engine: Engine, prompt: list[int], count: int = 8, **options: object) -> Recorder:
    recorder = options.pop("consumer", None) or Recorder()
    assert isinstance(recorder, Recorder)
    arguments = {"sampling": GREEDY} | options
    engine.submit(Request(prompt, max_new_tokens=count, **arguments), recorder)  # type: ignore[arg-type]
    return recorder


@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(st.integers(1, 24), st.integers(1, 12), st.sampled_from([None, 0, 1, 2])), min_size=1, max_size=7
    )
)
def test_answers_are_those_of_generate(
    model: RWKV7, tokenizer: Tokenizer, requests: list[tuple[int, int, int | None]]
) -> None:
    """Lengths of prompts and answers that make requests join and leave at different times; seed None: greedy."""
    engine = Engine(model, tokenizer, max_batch=3, piece_tokens=5)
    try:
        asked = [
            (prompt_of(length, i), count, GREEDY if seed is None else SAMPLED, seed)
            for i, (length, count, seed) in enumerate(requests)
        ]
        recorders = [ask(engine, p, count, sampling=sampling, seed=seed) for p, count, sampling, seed in asked]
        for recorder, arguments in zip(recorders, asked, strict=True):
            assert recorder.wait().tokens == expected(model, *arguments)
            assert recorder.reason == LENGTH
    finally:
        engine.close()


def test_rows_of_slots_have_the_logits_of_a_single_sequence(model: RWKV7) -> None:
    slots = Slots(model)
    singles: dict[int, Decoder] = {}  # by row
    generator = torch.Generator().manual_seed(0)
    for turn in range(30):
        leave = turn % 3 == 2 and slots.count > 1
        if leave:
            row = int(torch.randint(slots.count, (1,), generator=generator))
            slots.remove(row)
            last = singles.pop(slots.count)
            if row < slots.count:
                singles[row] = last
        else:
            single = Decoder(model, pack=False)
            single.prefill([prompt_of(5, turn)])
            singles[slots.add(single.state)] = single
        tokens = torch.randint(V, (slots.count,), generator=generator).tolist()
        logits = slots.step(tokens)
        for row, single in singles.items():
            torch.testing.assert_close(logits[row], single.step([tokens[row]])[0], rtol=0, atol=1e-5)
            for layer, same in zip(slots.state(row).layers, single.state.layers, strict=True):
                for tensor, other in zip(layer, same, strict=True):
                    torch.testing.assert_close(tensor, other, rtol=0, atol=1e-5)
    assert slots.capacity >= slots.count > 4


def test_a_known_prefix_is_not_processed_again(model: RWKV7, tokenizer: Tokenizer, engine: Engine) -> None:
    system, question = prompt_of(20, 1), prompt_of(17, 2)
    first = ask(engine, system + question, boundaries=(20,)).wait()
    assert first.cached == 0
    other = ask(engine, system + prompt_of(5, 3), boundaries=(20, 22)).wait()  # 22 is too close to the end to be kept
    assert other.cached == 20
    assert other.tokens == expected(model, system + prompt_of(5, 3), 8, GREEDY, None)
    again = ask(engine, system + question).wait()  # all of it is known: not even a token is processed
    assert again.cached == 37
    assert again.tokens == first.tokens
    # The conversation goes on: the question and the answer are known, but for the last token, which nobody processed.
    follow_up = system + question + first.tokens + prompt_of(4, 4)
    continued = ask(engine, follow_up).wait()
    assert continued.cached == 37 + 7
    assert continued.tokens == expected(model, follow_up, 8, GREEDY, None)


def test_what_is_known_depends_on_where_the_text_begins(model: RWKV7, tokenizer: Tokenizer, engine: Engine) -> None:
    decoder = Decoder(model)
    decoder.prefill([prompt_of(9, 5)])
    start = Start("tuned", decoder.state)
    prompt = prompt_of(12, 6)
    plain = ask(engine, prompt).wait()
    tuned = ask(engine, prompt, start=start).wait()
    assert tuned.cached == 0
    assert plain.tokens == expected(model, prompt, 8, GREEDY, None)
    assert tuned.tokens == list(generate(decoder, prompt, 8, temperature=0))
    assert ask(engine, prompt, start=start).wait().cached == 12


def test_special_tokens_and_their_spelling_are_different_texts(tokenizer: Tokenizer) -> None:
    special = tokenizer.encode("<|im_end|>")
    spelled = tokenizer.encode_as_text("<|im_end|>")
    assert tokenizer.decode_bytes(special) == tokenizer.decode_bytes(spelled)
    assert TextDigest(tokenizer).add_all(special)[-1] != TextDigest(tokenizer).add_all(spelled)[-1]


def test_a_text_is_known_however_it_was_tokenised(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("answer")
    letters = [i for letter in "answer" for i in tokenizer.encode(letter)]
    assert len(whole) < len(letters)
    assert TextDigest(tokenizer).add_all(whole)[-1] == TextDigest(tokenizer).add_all(letters)[-1]


def test_an_answer_ends_at_stop_ids_and_where_the_consumer_says(model: RWKV7, engine: Engine) -> None:
    prompt = prompt_of(6, 7)
    tokens = expected(model, prompt, 8, GREEDY, None)
    at = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 1)
    stopped = ask(engine, prompt, stop_ids=frozenset([tokens[at]])).wait()
    assert (stopped.tokens, stopped.reason) == (tokens[:at], STOP)
    said = ask(engine, prompt, consumer=Recorder(until=lambda tokens: len(tokens) == 3)).wait()
    assert (said.tokens, said.reason) == (tokens[:3], STOP)


def test_a_failing_request_leaves_the_others_alone(model: RWKV7, engine: Engine) -> None:
    def fail(tokens: list[int]) -> bool:
        if len(tokens) == 3:
            raise RuntimeError("the client's own mistake")
        return False

    prompt = prompt_of(6, 8)
    good, bad = ask(engine, prompt, 12), ask(engine, prompt_of(4, 9), 12, consumer=Recorder(until=fail))
    assert bad.wait().reason == FAILED
    assert "own mistake" in str(bad.error)
    assert good.wait().tokens == expected(model, prompt, 12, GREEDY, None)
    assert engine.statistics.failures == 1
    assert engine.statistics.running == 0


def test_a_cancelled_request_frees_its_place(model: RWKV7, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=1)
    try:
        endless = Recorder()
        ticket = engine.submit(Request(prompt_of(5, 10), GREEDY, 10**9), endless)
        waiting = ask(engine, prompt_of(5, 11))
        ticket.cancel()
        assert endless.wait().reason == CANCELLED
        assert waiting.wait().reason == LENGTH
    finally:
        engine.close()


def test_a_full_queue_refuses(model: RWKV7, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=1, max_waiting=2)
    tickets = []
    try:
        with pytest.raises(QueueFullError):  # one runs, two wait, or the first has not been admitted yet
            tickets.extend(engine.submit(Request(prompt_of(5, i), GREEDY, 10**9), Recorder()) for i in range(5))
    finally:
        engine.close()
    assert all(ticket.consumer.wait().reason == CANCELLED for ticket in tickets)  # type: ignore[attr-defined]
    with pytest.raises(QueueFullError):
        engine.submit(Request(prompt_of(5, 0), GREEDY, 1), Recorder())


def test_close_lets_answers_end(model: RWKV7, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    recorder = ask(engine, prompt_of(5, 12), 20)
    engine.close(drain_seconds=60)
    assert recorder.reason == LENGTH
    assert len(recorder.tokens) == 20


def test_logit_bias_and_logprobs(model: RWKV7, engine: Engine) -> None:
    prompt = prompt_of(6, 13)
    plain = ask(engine, prompt, 1, top_logprobs=3).wait()
    logits = model(torch.tensor([prompt]))[0][0, -1]
    exact = torch.log_softmax(logits, -1)
    assert plain.logprobs[0] is not None
    assert plain.logprobs[0].chosen == pytest.approx(float(exact[plain.tokens[0]]), abs=1e-4)
    assert [i for i, _ in plain.logprobs[0].top] == exact.topk(3).indices.tolist()
    assert ask(engine, prompt, 4, logit_bias={7: 1e6}).wait().tokens == [7] * 4
    banned = ask(engine, prompt, 1, logit_bias={plain.tokens[0]: -1e6}).wait()
    assert banned.tokens == [plain_second(exact)]


def plain_second(logprobs: torch.Tensor) -> int:
    return int(logprobs.topk(2).indices[1])


def test_the_cache_keeps_what_was_used_last_within_its_limit() -> None:
    sizes = random_model(n_layer=1, n_embd=64, vocab_size=V).config
    state = State.zeros(sizes, 1, torch.device("cpu"), torch.float32)
    one = KnownText(state).nbytes
    cache = PrefixCache(3 * one)
    for name in (b"a", b"b", b"c"):
        cache.store(name, KnownText(state))
    assert cache.longest([b"a", b"x"])[0] == 1  # used now
    cache.store(b"d", KnownText(state))
    assert cache.longest([b"b", b"x"]) == (0, None)
    assert [cache.longest([name, b"x"])[0] for name in (b"a", b"c", b"d")] == [1, 1, 1]
    assert cache.nbytes == 3 * one
    PrefixCache(one - 1).store(b"a", KnownText(state))
    # A whole prompt can only be used with the hidden vector that its logits come from.
    assert cache.longest([b"x", b"a"]) == (0, None)
    cache.store(b"a", KnownText(state, torch.zeros(64)))
    cache.store(b"a", KnownText(state))  # generated, without one
    assert cache.longest([b"x", b"a"])[0] == 2
    assert (len(cache), cache.nbytes) == (3, 3 * one)


def test_states_that_were_computed_together_share_no_memory(model: RWKV7, tokenizer: Tokenizer, engine: Engine) -> None:
    """Else one that is kept would keep those of all prompts that were processed with it."""
    requests = [Request(prompt_of(4, seed), max_new_tokens=1, sampling=GREEDY) for seed in (1, 2)]
    sequences = [Sequence(Ticket(request, Recorder(), tokenizer), initial_state(model, 1)) for request in requests]
    engine._advance([(sequence, 4) for sequence in sequences])
    tensors = [tensor for sequence in sequences for layer in sequence.state.layers for tensor in layer]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_a_text_is_processed_without_an_answer(model: RWKV7, engine: Engine) -> None:
    prompt = prompt_of(13, 14)
    hidden, state = model.hidden(torch.tensor([prompt]))
    ask(engine, prompt[:9], boundaries=(4,)).wait()
    for use_cache, tokens in ((False, hidden[0]), (True, hidden[0, 9:])):
        found: list[Processed] = []
        recorder = ask(engine, prompt, on_processed=found.append, use_cache=use_cache).wait()
        assert (recorder.reason, recorder.tokens, recorder.cached) == (STOP, [], 9 if use_cache else 0)
        torch.testing.assert_close(found[0].mean, tokens.mean(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(found[0].last, hidden[0, -1], rtol=0, atol=1e-4)
        for layer, same in zip(found[0].state.layers, state.layers, strict=True):
            for tensor, other in zip(layer, same, strict=True):
                torch.testing.assert_close(tensor, other, rtol=0, atol=1e-4)


def test_a_long_text_leaves_few_states(model: RWKV7, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, piece_tokens=1 << 20)
    try:
        ask(engine, prompt_of(40 * KEEP_EVERY, 15), 1).wait()
        assert engine.statistics.cached_states <= MOST_KEPT + 1
    finally:
        engine.close()


def test_a_fair_lock_is_given_in_order() -> None:
    lock, order, threads = FairLock(), [], []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while lock.asked < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(5))
