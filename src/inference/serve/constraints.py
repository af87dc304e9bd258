"""Answers that are JSON, or JSON of a schema: which tokens may come next is computed by the package llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from src.dataset.tokenizer import UNKNOWN, Tokenizer
from src.errors import UserError
from src.inference.serve.errors import ApiError
from src.inference.serve.schemas import ResponseFormat

MOST_SCHEMA_BYTES = 1 << 16
# Subtracted from logits; finite, since the sampler refuses logits that are not, and far below any that a model has.
OUT_OF_REACH = 1e30


class Vocabulary:
    """A tokenizer in the form that llguidance takes; `vocab_size` is that of the model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @cached_property
    def compiled(self) -> Any:
        """Made with the first constraint: it takes a moment, and memory."""
        try:
            import llguidance
        except ImportError as error:
            raise UserError("response_format needs the package llguidance", advice="pip install llguidance") from error
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(self._tokenizer, self._vocab_size)))


class _Tokens:
    """What `llguidance.TokenizerWrapper` reads: the bytes of each id, and which ids are no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        entries = [tokenizer.fixed_bytes(i) for i in range(vocab_size)]
        if not any(entries):
            raise UserError(
                "response_format needs a tokenizer of which each token has fixed bytes", given=tokenizer.name
            )
        self.tokens = [b"" if entry is None or entry == UNKNOWN else entry for entry in entries]
        self.eos_token_id = max(tokenizer.eos_ids)
        self.bos_token_id = None
        self.special_token_ids = sorted({*tokenizer.special_ids, *tokenizer.eos_ids})

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_as_text(text)


class JsonConstraint:
    """A `Constraint` for one answer. Ends it where its JSON is complete."""

    def __init__(self, vocabulary: Vocabulary, format: ResponseFormat, stop_ids: Collection[int]) -> None:
        """Raises ApiError for a schema that llguidance doesn't support."""
        compiled = vocabulary.compiled
        import llguidance

        schema = {"type": "object"} if format.type == "json_object" else (format.json_schema or {})["schema"]
        if len(json.dumps(schema)) > MOST_SCHEMA_BYTES:
            raise ApiError(400, f"the schema is larger than {MOST_SCHEMA_BYTES} bytes", "response_format.json_schema")
        try:
            # Without limits on white space a model may write it for ever.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
            self._matcher = llguidance.LLMatcher(compiled, grammar, log_level=0)
            problem = self._matcher.get_error()
        except (ValueError, TypeError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise ApiError(400, f"the schema can't be used: {problem}", "response_format.json_schema")
        self._stop_ids = frozenset(stop_ids)

    def restrict(self, logits: Tensor) -> Tensor:
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        size = logits.numel()
        mask = torch.zeros(size, dtype=torch.bool)
        mask[: allowed.numel()] = allowed[:size]
        return logits - OUT_OF_REACH * (~mask).to(logits)

    def accept(self, token: int) -> bool:
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
        return self._matcher.is_stopped()
