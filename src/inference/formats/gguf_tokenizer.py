"""A tokenizer as metadata of a GGUF file, and back: the World vocabulary, and byte-level BPE of Hugging Face folders.

llama.cpp splits text before BPE by a rule that it chooses by name, so only tokenizers with exactly the rule of such a
name can be stored. What is written is read back and compared on TEXTS.

Source: llama.cpp's src/llama-vocab.cpp, conversion/base.py (_set_vocab_rwkv_world).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.dataset.tokenizer import FolderTokenizer, Tokenizer, WorldTokenizer
from src.errors import UserError
from src.inference.formats.gguf_file import read_gguf_file
from src.inference.formats.hf_tokenizer import END_OF_TEXT

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.h: LLAMA_TOKEN_TYPE_...
PREFIX = "tokenizer.ggml."
WORLD_END_OF_TURN = 261  # "\n\n"
# GPT-2's rule without cleaning of spaces in decoded text, which its own name "gpt-2" has: "a . b" would become "a. b".
PRE_TOKENIZER = "trillion"
# Names under which llama.cpp has GPT-2's rule: files with them are read.
GPT2_RULES = ("gpt-2", "trillion", "granite-docling", "mpt", "olmo", "jais", "exaone4", "a.x-4.0", "mellum", "phi-2")
# What a tokenizer must treat alike: languages, code, numbers, spaces, emoji of several characters, control characters.
TEXTS = (
    "The history of the bridge (1873) isn't told in we'll, they've, I'm; it'd be long. THEY'RE",
    "他们说：“今天天气很好。”\n日本語のテキスト、한국어 텍스트; Ελληνικά, русский, العربية, हिन्दी",
    "def area(r: float) -> float:\n\treturn 3.14159 * r ** 2  # m²\n\n\nif __name__ == 'main':\n    print(2.5)\r\n",
    "  leading, trailing  \n \n\t\ttabs\u00a0no-break\u3000wide   end   ",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301 \ufb01 ٣٤ Ⅷ 1234567890 ½²",
    '{"a": [1, 2.5e-3, null], "b": "c\\n"} <html>&amp;</html> <s></s> [PAD7] <|x|> \\x41 a . b \' s , ? !',
    "\x00\x01\x7f\ufeff\u2028",
)


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys `tokenizer.*` for a model of `vocab_size` rows. Raises UserError when it can't be stored."""
    metadata = _world(tokenizer) if isinstance(tokenizer, WorldTokenizer) else _byte_level(tokenizer)
    tokens, types = metadata[f"{PREFIX}tokens"], metadata[f"{PREFIX}token_type"]
    for i in range(len(tokens), vocab_size):
        tokens.append(f"[PAD{i}]")
        types.append(UNUSED)
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.portable_source
    _check_equal(tokenizer, tokenizer_from_metadata(metadata, Path(tokenizer.name)))
    return metadata


def _world(tokenizer: Tokenizer) -> dict[str, Any]:
    # END_OF_TEXT is no text that anybody writes. Converters name id 0 "<s>", which llama.cpp then finds in text.
    tokens = [END_OF_TEXT, *(_world_text(tokenizer, i) for i in range(1, tokenizer.largest_id + 1))]
    assert tokenizer.decode_bytes([WORLD_END_OF_TURN]) == b"\n\n"
    return {
        f"{PREFIX}model": "rwkv",
        f"{PREFIX}tokens": tokens,
        f"{PREFIX}token_type": [CONTROL] + [NORMAL] * (len(tokens) - 1),
        f"{PREFIX}bos_token_id": 0,
        f"{PREFIX}eos_token_id": 0,
        f"{PREFIX}eot_token_id": WORLD_END_OF_TURN,  # without it llama.cpp answers on and on
    }


def _world_text(world: Tokenizer, i: int) -> str:
    """The text of a token: Python's for its bytes. llama.cpp undoes \\n \\t \\r \\xHH, and takes others literally."""
    return repr(world.decode_bytes([i]))[2:-1]


def _byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    assert isinstance(tokenizer, FolderTokenizer)
    content = json.loads(tokenizer.to_json())
    if reason := _unsupported(content):
        raise UserError(
            f"llama.cpp can't reproduce this tokenizer: {reason}",
            flag="tokenizer",
            given=tokenizer.name,
            expected="byte-level BPE with GPT-2's pre-tokenizer, or world",
        )
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * len(tokens)
    for text, i in content["model"]["vocab"].items():
        tokens[i], types[i] = text, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = content["model"]["merges"]
    end = max(tokenizer.eos_ids)
    metadata = {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": PRE_TOKENIZER,
        f"{PREFIX}tokens": tokens,
        f"{PREFIX}token_type": types,
        f"{PREFIX}merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        f"{PREFIX}eos_token_id": end,
        f"{PREFIX}eot_token_id": min(tokenizer.eos_ids),  # both end an answer
        f"{PREFIX}add_bos_token": False,
        f"{PREFIX}add_eos_token": False,
    }
    if (bos := tokenizer.specials.get("bos_token")) in tokens:
        metadata[f"{PREFIX}bos_token_id"] = tokens.index(bos)
    return metadata


def _unsupported(content: dict[str, Any]) -> str:
    """Why llama.cpp can't have the tokenizer in a tokenizer.json, as a clause; "" where it can."""
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    if splitter.get("type") == "Sequence" and len(splitter["pretokenizers"]) == 1:
        splitter = splitter["pretokenizers"][0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}"
    if content.get("normalizer"):
        return f"its normalizer is {content['normalizer'].get('type')}"
    if any(splitter.get(key, True) != value for key, value in byte_level.items()):
        return f"its pre_tokenizer is {json.dumps(splitter)[:200]}"
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        return f"its decoder is {(content.get('decoder') or {}).get('type')}"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(option):
            return f"its option {option} is {model[option]}"
    for added in content["added_tokens"]:
        for option in ("lstrip", "rstrip", "single_word"):
            if added.get(option):
                return f"its token {added['content']} has {option}"
    if not model["merges"]:
        return "it has no merges"
    return ""


def _check_equal(tokenizer: Tokenizer, stored: Tokenizer) -> None:
    """Raises UserError for the first of TEXTS, or of texts with its special tokens, that `stored` encodes otherwise."""
    special = tokenizer.special_tokens
    for text in (*TEXTS, *(f"a{token}b {token}\n{token}" for token in special), "".join(special)):
        if tokenizer.encode(text) != stored.encode(text) or tokenizer.encode_as_text(text) != stored.encode_as_text(
            text
        ):
            raise UserError(
                f"read back from GGUF, it encodes {text[:60]!r} otherwise",
                flag="tokenizer",
                given=tokenizer.name,
                advice="use --format fla, which keeps its files",
            )


def tokenizer_of_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file. Raises UserError when it is of a kind that isn't read, or damaged."""
    metadata = read_gguf_file(path).metadata
    try:
        return tokenizer_from_metadata(metadata, path)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # keys that are missing or of another type
        raise UserError(
            f"its tokenizer can't be used ({type(error).__name__}: {error})",
            given=path,
            advice="name the model's --tokenizer",
        ) from error


def tokenizer_from_metadata(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that the keys `tokenizer.*` describe; `path` is its name. Raises UserError."""
    model, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre")
    if model == "rwkv":
        return _read_world(metadata[f"{PREFIX}tokens"], path)
    if model != "gpt2" or pre not in GPT2_RULES:
        raise UserError(
            f"its tokenizer is {model} with the pre-tokenizer {pre}",
            given=path,
            expected="rwkv, or gpt2 with GPT-2's pre-tokenizer",
            advice="name the model's --tokenizer",
        )
    return FolderTokenizer(path, _files(metadata))


def _read_world(tokens: list[str], path: Path) -> Tokenizer:
    world = WorldTokenizer()
    for i in range(1, world.largest_id + 1):
        if i >= len(tokens) or tokens[i] != _world_text(world, i):
            raise UserError(
                f"its token {i} isn't that of the World vocabulary", given=path, advice="name the model's --tokenizer"
            )
    return world


def _files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE."""
    tokens, types = metadata[f"{PREFIX}tokens"], [int(kind) for kind in metadata[f"{PREFIX}token_type"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": i, "content": tokens[i], "special": kind == CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
            "merges": [merge.split(" ", 1) for merge in metadata[f"{PREFIX}merges"]],
        },
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos"):
        if (i := metadata.get(f"{PREFIX}{name}_token_id")) is not None:
            config[f"{name}_token"] = tokens[i]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }
