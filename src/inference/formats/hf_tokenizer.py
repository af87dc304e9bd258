"""Writes the tokenizer of a Hugging Face folder: the files of its own, or those of the World vocabulary.

transformers doesn't know the World tokenizer, so its code is copied along with its vocabulary, and runs with
trust_remote_code=True.
"""

from __future__ import annotations

from pathlib import Path

from src.dataset.tokenizer import Tokenizer, WorldTokenizer
from src.dataset.tokenizer_files import TOKENIZER_FILES, write_tokenizer
from src.files import atomic_write
from src.inference.formats.shards import write_json

CODE, CLASS = "tokenization_rwkv7", "RWKVWorldTokenizer"
VOCABULARY = "rwkv_vocab_v20230424.txt"  # the name that llama.cpp's converter looks for, too
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"  # of id 0, as in tokenization_rwkv7.py
TEMPLATES = Path(__file__).parent / "hf_model"
HF_TOKENIZER_FILES = (*TOKENIZER_FILES, f"{CODE}.py", VOCABULARY)


def is_world_folder(folder: Path) -> bool:
    """Whether a Hugging Face folder has the World vocabulary as its tokenizer."""
    return (folder / VOCABULARY).is_file() and not (folder / "tokenizer.json").is_file()


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of `tokenizer` to `folder`. Raises OSError."""
    if not isinstance(tokenizer, WorldTokenizer):
        write_tokenizer(tokenizer.files, folder)
        return
    assert tokenizer.chat_template is not None
    with atomic_write(folder / VOCABULARY) as file:
        file.write(tokenizer.vocabulary_file.read_bytes())
    copy_template(f"{CODE}.py", folder)
    with atomic_write(folder / "chat_template.jinja", "w") as file:
        file.write(tokenizer.chat_template.portable_source)
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    content = {
        "tokenizer_class": CLASS,
        "auto_map": {"AutoTokenizer": [f"{CODE}.{CLASS}", None]},
        "added_tokens_decoder": {"0": {"content": END_OF_TEXT, "special": True, **flags}},
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # `generate` continues after the last position
    }
    write_json(folder / "tokenizer_config.json", content)


def copy_template(name: str, folder: Path) -> None:
    """Copy a file of `hf_model` into a folder. Raises OSError."""
    with atomic_write(folder / name) as file:
        file.write((TEMPLATES / name).read_bytes())
