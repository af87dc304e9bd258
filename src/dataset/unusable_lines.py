"""Messages about the lines of a file of conversations that are unusable, by reason."""

from collections import Counter
from collections.abc import Mapping

from src.dataset.conversations import MARK_ADVICE
from src.dataset.corpus.documents import EMPTY_LINE

_MAX_UNUSABLE = 0.1  # share of the lines above which a warning is due: the file is probably of another format
_SHOWN_REASONS = 3  # the most frequent ones; with the advice, a message stays at two lines


def by_reason(left_out: Mapping[str, int]) -> str:
    """The most frequent reasons and their counts."""
    most_common = Counter(left_out).most_common(_SHOWN_REASONS)
    return ", ".join(f"{count:,} {'line' if count == 1 else 'lines'} with {reason}" for reason, count in most_common)


def advice(left_out: Mapping[str, int]) -> str:
    """What to do about unusable lines, by their most frequent reason."""
    reasons = Counter({reason: count for reason, count in left_out.items() if reason != EMPTY_LINE})
    # One reason, because each has another remedy, and a rare one must not decide.
    reason = reasons.most_common(1)[0][0] if reasons else ""
    # By beginnings and ends: in between may be names from the file.
    if reason.endswith(("the chat template has no place", "the chat template leaves out")):
        # {% generation %} can't help here: what has no place in the text is not in a block either.
        what, it = ("the field from the turns", "it") if reason.startswith("'") else ("them from the lines", "them")
        return f"use a tokenizer with a chat template that writes {it}, or remove {what}"
    if reason.startswith("a conversation that the chat template rejects"):
        return "use a tokenizer with a chat template that accepts them"
    if reason.startswith(("answers that", "weights of answers", "a chat template whose")):
        return f"use a tokenizer with another chat template, or in the template {MARK_ADVICE}"
    return "convert them to one of the formats that docs/fine-tuning.md lists"


def unusable_warning(left_out: Mapping[str, int], usable: int) -> str:
    """A warning with advice if more than a tenth of the lines, empty ones excepted, is unusable, else ""."""
    reasons = {reason: count for reason, count in left_out.items() if reason != EMPTY_LINE}
    unusable = sum(reasons.values())
    if unusable <= _MAX_UNUSABLE * (unusable + usable):
        return ""
    return (
        f"WARNING: {unusable:,} of {unusable + usable:,} lines {'is' if unusable == 1 else 'are'} unusable: "
        f"{by_reason(reasons)}.\n"
        f"  Training uses the other lines only. To use these too, {advice(reasons)}."
    )
