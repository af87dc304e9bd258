"""Builds the demo data without a download: the sources of this Python's standard library, and a tokenizer for them.

Writes demo_tokenizer/ (a Hugging Face tokenizer folder: byte-level BPE, 6400 entries, ChatML), demo.bin/.idx and, with
about a tenth of the files, demo-heldout.bin/.idx. What is there and whole is kept: run again, it does nothing.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from data.train_tokenizer import train_tokenizer
from src.dataset import BinIdxWriter, MMapIndexedDataset
from src.dataset.standard_library import is_held_out, library_sources
from src.dataset.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 6400


def write_documents(texts: list[str], tokenizer: Tokenizer, prefix: Path) -> None:
    bar = tqdm(total=sum(map(len, texts)), desc=f"{prefix.name}.bin", unit="B", unit_scale=True)
    with BinIdxWriter(prefix, np.uint16) as out, bar:
        for start in range(0, len(texts), 32):  # enough at once to busy the cores
            some = texts[start : start + 32]
            for ids in tokenizer.encode_batch(some):
                out.add_document([*ids, 0])
            bar.update(sum(map(len, some)))


def is_whole(prefix: Path) -> bool:
    try:
        return MMapIndexedDataset(prefix).n_tokens > 0
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder (this one)")
    args = parser.parse_args()
    folder, train, heldout = args.out / "demo_tokenizer", args.out / "demo", args.out / "demo-heldout"
    try:
        if (folder / "tokenizer.json").is_file() and is_whole(train) and is_whole(heldout):
            print(f"The demo data is there: {os.path.relpath(train)}.bin/.idx, {heldout.name}.bin/.idx, {folder.name}/")
            return
        sources = library_sources()
        parts = {
            train: [text for name, text in sources.items() if not is_held_out(name)],
            heldout: [text for name, text in sources.items() if is_held_out(name)],
        }
        megabytes = sum(len(text) for text in sources.values()) / 1e6
        print(f"Python {sys.version.split()[0]}'s standard library: {len(sources)} files, {megabytes:.1f} MB")
        if not (folder / "tokenizer.json").is_file():
            print(f"Training a tokenizer of {VOCAB_SIZE} entries on it ...", flush=True)
            train_tokenizer(parts[train], folder, VOCAB_SIZE)
        tokenizer = load_tokenizer(folder)
        for prefix, texts in parts.items():
            if not is_whole(prefix):
                write_documents(texts, tokenizer, prefix)
    except ValueError as error:
        parser.error(str(error))
    for prefix in parts:
        data = MMapIndexedDataset(prefix)
        print(f"{os.path.relpath(data.bin_path)}: {len(data)} documents, {data.n_tokens} tokens")


if __name__ == "__main__":
    main()
