"""Trains byte-level BPE tokenizers with the package `tokenizers`, written as Hugging Face tokenizer folders."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2; token 0 ends documents
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # every byte, so that any text can be encoded

# ChatML. The generation blocks mark what the assistant writes, which is what fine-tuning trains.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_bpe(texts: Iterable[str], folder: Path, vocab_size: int) -> int:
    """Trains a tokenizer on `texts` and writes it to `folder`.

    Returns the number of entries, which is below `vocab_size` if the text has too few different byte pairs.
    """
    # Imported here: the command line is checked, and --help shown, without the package.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        # Sorted, because the package returns the alphabet without an order, and the ids must be reproducible.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # tokenizer.json is written last and renamed, so a folder that has it is complete.
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    part = folder / "tokenizer.json.part"
    tokenizer.save(str(part))
    part.replace(folder / "tokenizer.json")
    return tokenizer.get_vocab_size()
