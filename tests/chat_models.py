"""Small tokenizer folders for tests, trained when needed, with chat templates of the kinds in use."""

import json
from pathlib import Path

from src.dataset.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As MiniMind's: a default system turn, and the user's turn renders the header of the answer.
USER_OPENS = (
    "{% set first = messages[0] %}{{ '<|im_start|>system\\n' }}"
    "{{ first.content if first.role == 'system' else 'Be of help' }}{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n<|im_start|>assistant\\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "user_opens": USER_OPENS}

_TEXT = "def answer(question): return 'the answer' # what is it? It is the string, the list and the number of all. "


def make_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level BPE in a Hugging Face folder: `<|endoftext|>` 0, `<|im_start|>` 1, `<|im_end|>` 2."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
    """The tokens of a conversation by the tokenizer's own template."""
    assert tokenizer.chat_template is not None
    return tokenizer.encode(tokenizer.chat_template.render(messages, add_generation_prompt))
