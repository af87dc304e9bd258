"""Builds the demo data without a download: the sources of this Python's standard library, and a tokenizer for them.

Writes demo_tokenizer/ (a Hugging Face tokenizer folder: byte-level BPE, 6400 entries, ChatML), demo.bin/.idx and, with
about a tenth of the files, demo-heldout.bin/.idx. Complete files are kept, so a second run does nothing.
"""

import os
import sys
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from src.dataset import BinIdxWriter, MMapIndexedDataset
from src.dataset.corpus.bpe import train_bpe
from src.dataset.corpus.command_line import add_output_folder, create_parser, exit_on_user_error
from src.dataset.corpus.standard_library import is_held_out, library_sources
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.errors import UserError

VOCAB_SIZE = 6400  # as MiniMind's tokenizer: small enough that the embeddings don't dominate a small model
BATCH = 32  # texts per call of the tokenizer, which encodes them in parallel


def write_documents(texts: list[str], tokenizer: Tokenizer, prefix: Path) -> None:
    progress = tqdm(total=sum(map(len, texts)), desc=f"{prefix.name}.bin", unit="B", unit_scale=True)
    with BinIdxWriter(prefix, np.uint16) as out, progress:
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            for ids in tokenizer.encode_batch_as_text(batch):
                out.add_document([*ids, 0])
            progress.update(sum(map(len, batch)))


def is_complete(prefix: Path) -> bool:
    try:
        return MMapIndexedDataset(prefix).n_tokens > 0
    except UserError:
        return False


def main() -> None:
    parser = create_parser(__doc__)
    add_output_folder(parser, Path(__file__).resolve().parent)
    args = parser.parse_args()
    folder, train, heldout = args.out / "demo_tokenizer", args.out / "demo", args.out / "demo-heldout"
    with exit_on_user_error(parser):
        if (folder / "tokenizer.json").is_file() and is_complete(train) and is_complete(heldout):
            files = f"{os.path.relpath(train)}.bin/.idx, {heldout.name}.bin/.idx, {folder.name}/"
            print(f"The demo data exists already: {files}")
            return
        sources = library_sources()
        parts = {
            train: [text for name, text in sources.items() if not is_held_out(name)],
            heldout: [text for name, text in sources.items() if is_held_out(name)],
        }
        megabytes = sum(len(text) for text in sources.values()) / 1e6
        print(f"Standard library of Python {sys.version.split()[0]}: {len(sources)} files, {megabytes:.1f} MB")
        if not (folder / "tokenizer.json").is_file():
            print(f"Training a tokenizer with {VOCAB_SIZE} entries on it ...", flush=True)
            # On the training part only: the held-out loss must not profit from tokens of held-out texts.
            train_bpe(parts[train], folder, VOCAB_SIZE)
        tokenizer = load_tokenizer(folder)
        # In the order of the library rather than shuffled: the magic prime shuffles the windows.
        for prefix, texts in parts.items():
            if not is_complete(prefix):
                write_documents(texts, tokenizer, prefix)
    for prefix in parts:
        data = MMapIndexedDataset(prefix)
        print(f"{os.path.relpath(data.bin_path)}: {len(data)} documents, {data.n_tokens} tokens")


if __name__ == "__main__":
    main()
