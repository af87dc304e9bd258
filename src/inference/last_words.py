"""Prediction of the last words of texts (LAMBADA)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.scoring import score_continuations
from src.model import RWKV7

# exp overflows float64 above 709.
MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class LastWords:
    """`accuracy`: share of texts whose last word greedy decoding predicts; `perplexity` of these words, per word."""

    accuracy: float
    perplexity: float
    texts: int


def last_words(model: RWKV7, tokenizer: Tokenizer, texts: Iterable[str]) -> LastWords:
    """Prediction of each text's last word from the words before it (LAMBADA). Raises UserError for a single word."""
    pairs = []
    # As LAMBADA is scored elsewhere: the space belongs to the word, and a text starts after the end of a document (0).
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        if not context or not word:
            raise UserError("the text has a single word", flag="last_word", given=repr(text))
        pairs.append(([0, *tokenizer.encode_as_text(context)], tokenizer.encode_as_text(" " + word)))
    if not pairs:
        raise UserError("the file contains no texts", flag="last_word")
    scores = score_continuations(model, pairs)
    # Perplexity per word, as LAMBADA's is given: a word may consist of several tokens.
    mean_loss = -sum(score.log_probability for score in scores) / len(scores)
    accuracy = sum(score.greedy for score in scores) / len(scores)
    return LastWords(accuracy, math.exp(min(mean_loss, MAX_EXPONENT)), len(scores))
