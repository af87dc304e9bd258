"""Models of this project in EleutherAI's lm-evaluation-harness.

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
from src.inference.generation import generate_batch
from src.inference.sampling import Sampling
from src.inference.scoring import score_continuations
from src.model import RWKV7

BATCH = 32  # contexts decoded together
MAX_NEW_TOKENS = 256  # for tasks that don't set max_gen_toks, as in the harness's own Hugging Face models
# Put before every text, as in training: there a text follows the end of the previous document.
START = [0]


class HarnessMethods:
    """The three kinds of requests that the harness makes; its documentation lists the `args` of each."""

    def __init__(self, model: RWKV7, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.network, self.tokenizer = model, tokenizer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, greedy) of each continuation after its context."""
        pairs = [self._split(*request.args) for request in requests]
        return [(score.log_probability, score.greedy) for score in score_continuations(self.network, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in one window of any length: the state has constant size."""
        pairs = [(START, self.tokenizer.encode(request.args[0]) or START) for request in requests]
        return [score.log_probability for score in score_continuations(self.network, pairs)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first string in its settings' "until"."""
        answers: list[str] = []
        for settings, group in groupby(requests, key=lambda request: request.args[1]):
            contexts = [request.args[0] for request in group]
            for start in range(0, len(contexts), BATCH):
                answers += self._generate(contexts[start : start + BATCH], settings)
        return answers

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stop_strings = [until] if isinstance(until, str) else list(until)
        do_sample = settings.get("do_sample", False)
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if do_sample else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
        )

        def is_complete(answer: list[int]) -> bool:
            text = self.tokenizer.decode(answer)  # decoded as a whole: a stop string may span several tokens
            return any(stop in text for stop in stop_strings)

        generated = generate_batch(
            self.network,
            [self.tokenizer.encode(context) or START for context in contexts],
            int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
            sampling,
            seed=0,
            stop_ids=self.tokenizer.eos_ids,
            is_complete=is_complete,
        )
        return [_truncate(self.tokenizer.decode(answer), stop_strings) for answer in generated]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, with spaces at the context's end moved to the continuation."""
        # Tokenizers merge a space with the word after it: encoded apart, it would be a token that is rare in training.
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        return START + self.tokenizer.encode(context), self.tokenizer.encode(continuation)


def _truncate(text: str, stop_strings: list[str]) -> str:
    return min((text.partition(stop)[0] for stop in stop_strings), key=len, default=text)


def harness_model(model: RWKV7, tokenizer: Tokenizer) -> Any:
    """An `lm_eval.api.model.LM`. Raises UserError when the harness isn't installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError("the package lm-eval is missing", advice="pip install lm-eval") from error
    # The class is created here, because its base class exists only where the harness is installed.
    return type("RWKV7Harness", (HarnessMethods, LM), {})(model, tokenizer)
