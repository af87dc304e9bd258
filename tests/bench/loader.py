"""Throughput of the data loader, configured as in training: it must exceed what a GPU consumes.

    python tests/bench/loader.py [--data_type sft] [--ctx_len 512] [--micro_bsz 16] [--workers 1]

Random ids are written to a temporary folder and read from the page cache, as after the first pass over a file. sft:
conversations of at least 20 and typically 150 tokens, every other token with a loss, packed into rows.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.pretrain import PretrainDataset
from src.dataset.sample_order import magic_prime
from src.dataset.sft import SftDataset, SftRows, collate_shares
from src.dataset.sft_cache import Conversations


def windows(path: Path, tokens: int, ctx_len: int, micro_bsz: int, samples: int) -> Dataset:
    ids = np.random.default_rng(0).integers(0, 65536, tokens, dtype=np.uint16)
    with BinIdxWriter(path, np.uint16) as out:
        out.add_document(ids)
    return PretrainDataset(path, ctx_len, magic_prime(tokens, ctx_len), 0, samples, micro_bsz, 0, 1, 65536)


def conversations(path: Path, tokens: int, ctx_len: int, micro_bsz: int, samples: int) -> Dataset:
    generator, remaining = np.random.default_rng(0), tokens
    with BinIdxWriter(path, np.int32) as out:
        while remaining > 0:
            ids = generator.integers(0, 65536, 20 + int(generator.lognormal(np.log(130), 0.8)), dtype=np.int32)
            ids[::2] = ~ids[::2]  # ~id: a token without a loss
            out.add_document(ids)
            remaining -= len(ids)
    rows = SftRows(Conversations(MMapIndexedDataset(path), {}, 0, 0), ctx_len)
    return SftDataset(rows, 0, samples, 0, 1, micro_bsz=micro_bsz)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_type", default="binidx", choices=["binidx", "sft"])
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--micro_bsz", type=int, default=16)
    parser.add_argument(
        "--workers", type=int, default=1, help="loader processes; training uses 1 on a GPU and 0 on a CPU"
    )
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens in the file, all of which are read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random"
        samples = args.tokens // args.ctx_len // args.micro_bsz * args.micro_bsz
        create = conversations if args.data_type == "sft" else windows
        loader = DataLoader(
            create(path, args.tokens, args.ctx_len, args.micro_bsz, samples),
            collate_fn=collate_shares if args.data_type == "sft" else None,
            batch_size=args.micro_bsz,
            num_workers=args.workers,
            prefetch_factor=8 if args.workers else None,
            drop_last=True,
        )
        batches = iter(loader)
        next(batches)  # not timed: the start of the loader processes
        start, count = time.perf_counter(), 0
        for inputs, *_ in batches:
            count += inputs.numel()
        rate = count / (time.perf_counter() - start)
        print(
            f"{rate:,.0f} tokens/s, ctx {args.ctx_len}, micro batch {args.micro_bsz}, {args.workers} worker processes"
        )


if __name__ == "__main__":
    main()
