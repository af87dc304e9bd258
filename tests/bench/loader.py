"""Tokens per second that the pretraining loader can give, with the DataLoader that training uses: it must never be what a GPU waits for.

    python tests/bench/loader.py [--ctx_len 512] [--micro_bsz 16] [--workers 1]

Data of random ids is written to a temporary folder first and read from the page cache, as after the first pass over a file.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.dataset.binidx import BinIdxWriter
from src.dataset.pretrain import PretrainDataset
from src.dataset.sampling import magic_prime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--micro_bsz", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes; training takes 1 on a GPU and 0 on a CPU")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="in the file, and read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random"
        ids = np.random.default_rng(0).integers(0, 65536, args.tokens, dtype=np.uint16)
        with BinIdxWriter(path, np.uint16) as out:
            out.add_document(ids)
        samples = args.tokens // args.ctx_len // args.micro_bsz * args.micro_bsz
        prime = magic_prime(args.tokens, args.ctx_len)
        dataset = PretrainDataset(path, args.ctx_len, prime, 0, samples, args.micro_bsz, 0, 1, 65536)
        loader = DataLoader(
            dataset,
            batch_size=args.micro_bsz,
            num_workers=args.workers,
            prefetch_factor=8 if args.workers else None,
            drop_last=True,
        )
        batches = iter(loader)
        next(batches)  # the workers' start
        start, count = time.perf_counter(), 0
        for inputs, _ in batches:
            count += inputs.numel()
        rate = count / (time.perf_counter() - start)
        print(
            f"{rate:,.0f} tokens/s, ctx {args.ctx_len}, micro batch {args.micro_bsz}, {args.workers} worker processes"
        )


if __name__ == "__main__":
    main()
