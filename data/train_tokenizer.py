"""Trains a tokenizer on your own text, in any language: a Hugging Face folder that --tokenizer takes, for pretraining and for chat.

    python data/train_tokenizer.py FILE.jsonl --out data/my_tokenizer --vocab_size 8000

It is byte-level BPE, so it can spell everything. Id 0, <|endoftext|>, ends documents; its chat template is ChatML.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from src.dataset.documents import read_documents
from src.dataset.text_input import ENDINGS, check_inputs, read_pieces

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
LEAST = 256 + len(SPECIALS)  # every byte and the specials

# ChatML; the marks tell what the assistant writes, which is what fine-tuning counts.
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


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> int:
    """Writes the tokenizer of `texts` to `folder`; the number of its entries, fewer than `vocab_size` where there is too little text."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    rust.train_from_iterator(texts, trainer)
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
    # tokenizer.json comes last and whole: where it stands, the folder is complete.
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    part = folder / "tokenizer.json.part"
    rust.save(str(part))
    part.replace(folder / "tokenizer.json")
    return rust.get_vocab_size()


def texts_of(path: str, field: str, most_bytes: float) -> Iterator[str]:
    """The documents of a file, broken lines left out, until they have so many bytes."""
    taken = 0
    for piece in read_pieces([path], field):
        for _, text in read_documents(piece, field):
            if isinstance(text, str):
                taken += len(text.encode())
                yield text
            if taken >= most_bytes:
                return


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=f"{' '.join(ENDINGS)}, as for make_data.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the tokenizer's folder, a new one")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=8000,
        help="entries; more make texts shorter and the model larger [%(default)s]",
    )
    parser.add_argument("--field", default="text", help="the text's field or column [text]")
    parser.add_argument(
        "--megabytes",
        type=float,
        default=200.0,
        help="text that is looked at, from the beginning of each file: more takes longer and changes little [%(default)s]",
    )
    args = parser.parse_args(arguments)
    if args.vocab_size < LEAST:
        parser.error(
            f"--vocab_size {args.vocab_size}: expected at least {LEAST}, for 256 bytes and {len(SPECIALS)} special tokens"
        )
    if args.megabytes <= 0:
        parser.error(f"--megabytes {args.megabytes}: expected more than 0")
    if (args.out / "tokenizer.json").exists():
        parser.error(f"--out {args.out}: holds a tokenizer already, and models may know it; name another folder")
    try:
        check_inputs(args.inputs)
        share = args.megabytes * 1e6 / len(args.inputs)
        texts = (text for name in args.inputs for text in texts_of(name, args.field, share))
        first = next(texts, None)
        if first is None:
            raise ValueError(f'no text in {" ".join(args.inputs)}; expected lines like {{"{args.field}": "..."}}')
        bar = tqdm(chain([first], texts), desc="reading", unit=" documents", unit_scale=True)
        entries = train_tokenizer(bar, args.out, args.vocab_size)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{parser.prog}: {error.filename or args.out}: {error.strerror}")
    if entries < args.vocab_size:
        print(f"note: {entries} entries: there is too little text for {args.vocab_size}")
    print(f"--tokenizer {args.out}")


if __name__ == "__main__":
    main()
