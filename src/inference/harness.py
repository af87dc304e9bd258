"""EleutherAI's lm-evaluation-harness on our models.

import lm_eval
from src.inference.harness import harness_model
lm_eval.simple_evaluate(harness_model(model, tokenizer), tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.generate import generate_batch
from src.inference.sampling import Sampling
from src.inference.scoring import score_continuations
from src.model import RWKV7

DECODED_AT_ONCE = 32
MAX_NEW_TOKENS = 256  # where a task doesn't say
START = [0]  # what stands before a text: the end of the document before it


class Answers:
    """The three kinds of requests that the harness makes. A request's `args` are what its own documentation lists."""

    def __init__(self, model: RWKV7, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scored, self.tokenizer = model, tokenizer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, greedy) of each continuation after its context."""
        pairs = [self._split(*request.args) for request in requests]
        return [(score.log_probability, score.greedy) for score in score_continuations(self.scored, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text: a recurrent model needs no windows."""
        pairs = [(START, self.tokenizer.encode(request.args[0]) or START) for request in requests]
        return [score.log_probability for score in score_continuations(self.scored, pairs)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the strings that its settings list under "until"."""
        answers: list[str] = []
        for settings, group in groupby(requests, key=lambda request: request.args[1]):
            contexts = [request.args[0] for request in group]
            for start in range(0, len(contexts), DECODED_AT_ONCE):
                answers += self._generate(contexts[start : start + DECODED_AT_ONCE], settings)
        return answers

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        sampled = settings.get("do_sample", False)
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
        )

        def ended(answer: list[int]) -> bool:
            text = self.tokenizer.decode(answer)
            return any(end in text for end in ends)

        written = generate_batch(
            self.scored,
            [self.tokenizer.encode(context) or START for context in contexts],
            int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
            sampling,
            seed=0,
            stop_ids=self.tokenizer.eos_ids,
            ended=ended,
        )
        return [_before_any(self.tokenizer.decode(answer), ends) for answer in written]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their ids; blanks at the context's end belong to the continuation, as tokenizers see it."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        return START + self.tokenizer.encode(context), self.tokenizer.encode(continuation)


def _before_any(text: str, ends: list[str]) -> str:
    return min((text.partition(end)[0] for end in ends), key=len, default=text)


def harness_model(model: RWKV7, tokenizer: Tokenizer) -> Any:
    """An `lm_eval.api.model.LM`. ValueError when the harness is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError("the harness is missing: pip install lm-eval") from error
    return type("RWKV7Harness", (Answers, LM), {})(model, tokenizer)
