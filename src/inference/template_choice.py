"""The chat template that the flags --chat_template and --think of a program name."""

from __future__ import annotations

from pathlib import Path

from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError


def find_template(
    name: str, tokenizer: Tokenizer, pretrained_only: bool = False, think: str = ""
) -> ChatTemplate | None:
    """The chat template that --chat_template names, set to --think; None: the model continues text.

    name   "none"; "tokenizer": the tokenizer's own; "rwkv"; or a file
           "": the tokenizer's own, but none for a model that is known to be trained on plain text only
           (`pretrained_only`)

    Raises UserError when there is no such template, or none to think with.
    """
    template = _named_template(name, tokenizer, pretrained_only)
    if not think:
        return template
    if template is None:
        advice = "use --chat_template rwkv, tokenizer or a Jinja file"
        raise UserError("needs a chat template", flag="think", given=think, advice=advice)
    return template.thinking(think)


def _named_template(name: str, tokenizer: Tokenizer, pretrained_only: bool) -> ChatTemplate | None:
    expected = "none, tokenizer, rwkv, or a file with a Jinja template"
    if name == "none" or (not name and pretrained_only):
        return None
    if not name:  # of a World model that is the "rwkv" template, in which the released ones chat
        return tokenizer.chat_template
    if name == "tokenizer":
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer {tokenizer.name} has none",
                flag="chat_template",
                given=name,
                expected="none, rwkv or a Jinja file",
            )
        return tokenizer.chat_template
    if name == "rwkv":
        return ChatTemplate(RWKV_TEMPLATE, {})
    path = Path(name)
    if not path.is_file():
        raise UserError("no such file", flag="chat_template", given=name, expected=expected)
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer.specials)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't be read as UTF-8 text ({error})", flag="chat_template", given=name) from error
