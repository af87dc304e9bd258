"""Models of this project in EleutherAI's lm-evaluation-harness.

import lm_eval
from src.inference.harness import harness_model
lm_eval.simple_evaluate(harness_model(model, tokenizer), tasks=["lambada_openai"])
lm_eval.simple_evaluate(harness_model(model, tokenizer), tasks=["gsm8k"], apply_chat_template=True)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from src.dataset.answer_format import MARK, AnswerFormat, answer_format
from src.dataset.chat_template import ChatTemplate
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.answer_stream import AnswerStream
from src.inference.generation import generate_batch
from src.inference.sampling import Sampling
from src.inference.scoring import score_continuations
from src.model import RWKV7

BATCH = 32  # contexts decoded together
MAX_NEW_TOKENS = 256  # for tasks that don't set max_gen_toks, as in the harness's own Hugging Face models
# Put before every text, as in training: there a text follows the end of the previous document.
START = [0]


class HarnessMethods:
    """The methods of an `lm_eval.api.model.LM`: three kinds of requests, whose `args` its documentation lists, and the
    chat template for `apply_chat_template=True`."""

    def __init__(self, model: RWKV7, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        super().__init__()
        self.network, self.tokenizer = model, tokenizer
        self.template = template or tokenizer.chat_template
        self._answers = answer_format(self.template) if self.template else AnswerFormat()

    # ---- conversations ---------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer and a hash of its template, for the harness's files of rendered prompts."""
        source = self.template.source if self.template else ""
        content = "\0".join([self.tokenizer.name, source, *map(str, self.tokenizer.specials.items())])
        digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
        return f"{Path(self.tokenizer.name).name}-{digest}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the chat template, which the harness writes to its results; "" where none is applied."""
        return self.template.source if self.template and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the model writes: after the header of an answer, or, without
        `add_generation_prompt`, after what the last message begins.

        Raises UserError when there is no template, or when it rejects the conversation.
        """
        template = self.template
        if template is None:
            raise UserError(
                "this tokenizer has no chat template",
                given=self.tokenizer.name,
                advice="leave apply_chat_template out, or pass a ChatTemplate to harness_model",
            )
        try:
            return self._render(template, chat_history, add_generation_prompt)
        except UserError as error:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            # As the harness's Hugging Face models do: a task's description is rendered as a system turn.
            logging.getLogger(__name__).warning("the system turn is left out: %s", error)
            return self._render(template, without_system, add_generation_prompt)

    def _render(self, template: ChatTemplate, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not add_generation_prompt and messages[-1]["role"] == "assistant":
            last = {**messages[-1], "content": messages[-1]["content"] + MARK}
            beginning, mark, _ = template.render([*messages[:-1], last]).rpartition(MARK)
            if not mark:
                raise UserError("a chat template that does not copy the beginning of an answer (gen_prefix)")
            return beginning
        prompt = template.render(messages, add_generation_prompt)
        # With the separator, because the harness puts a choice right after the prompt: "Assistant: A".
        with_separator = prompt + self._answers.separator
        return with_separator if add_generation_prompt and self._answers.ends(with_separator) else prompt

    # ---- requests --------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, greedy) of each continuation after its context."""
        pairs = [self._split(*request.args) for request in requests]
        return [(score.log_probability, score.greedy) for score in score_continuations(self.network, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in one window of any length: the state has constant size."""
        pairs = [(START, self.tokenizer.encode(request.args[0]) or START) for request in requests]
        return [score.log_probability for score in score_continuations(self.network, pairs)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first string in its settings' "until"; of a conversation that
        ends where an answer begins, the answer."""
        answers: list[str] = []
        keys = [(request.args[1], self._answers.ends(request.args[0])) for request in requests]
        for (settings, is_answer), group in groupby(zip(keys, requests, strict=True), key=lambda pair: pair[0]):
            contexts = [request.args[0] for _, request in group]
            for start in range(0, len(contexts), BATCH):
                answers += self._generate(contexts[start : start + BATCH], settings, is_answer)
        return answers

    def _generate(self, contexts: list[str], settings: dict[str, Any], is_answer: bool) -> list[str]:
        until = settings.get("until") or []
        stop_strings = [until] if isinstance(until, str) else list(until)
        separator = self._answers.separator if is_answer else ""
        if is_answer:
            # The model writes the separator, with the word that follows it, and ends the answer as it was trained to.
            stop_strings += self._answers.stop_strings
        do_sample = settings.get("do_sample", False)
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if do_sample else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
        )

        def text_of(answer: list[int]) -> str:
            return self.tokenizer.decode(answer).removeprefix(separator)

        def is_complete(answer: list[int]) -> bool:
            return divided(answer).reached

        def divided(answer: list[int]) -> AnswerStream:
            # Decoded as a whole: a stop string may span several tokens.
            stream = AnswerStream(stop_strings, self._answers.begun if is_answer else "")
            stream.feed(text_of(answer))
            return stream

        def text_before_end(answer: list[int]) -> str:
            stream = divided(answer)
            stream.finish()
            return stream.text.removeprefix(self._answers.begun if is_answer else "")

        generated = generate_batch(
            self.network,
            [self.tokenizer.encode(context.removesuffix(separator)) or START for context in contexts],
            int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
            sampling,
            seed=0,
            stop_ids=self.tokenizer.eos_ids,
            is_complete=is_complete,
        )
        return [text_before_end(answer) for answer in generated]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, with spaces at the context's end moved to the continuation."""
        # A conversation begins with an empty state, in fine-tuning and in the chat.
        start = [] if self._answers.ends(context) else START
        # Tokenizers merge a space with the word after it: encoded apart, it would be a token that is rare in training.
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        return start + self.tokenizer.encode(context), self.tokenizer.encode(continuation)


def harness_model(model: RWKV7, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> Any:
    """An `lm_eval.api.model.LM`, whose chat template is `template` or else that of the tokenizer.

    Raises UserError when the harness isn't installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError("the package lm-eval is missing", advice="pip install lm-eval") from error
    # The class is created here, because its base class exists only where the harness is installed.
    return type("RWKV7Harness", (HarnessMethods, LM), {})(model, tokenizer, template)
