"""Fetches minipile, tokenized with the RWKV World vocabulary: minipile.bin (3.0 GB) and minipile.idx beside this file.

What was cut short is continued, and the sizes are checked. Files that are there and whole are kept: run again, it does nothing.
"""

import argparse
import shutil
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from src.dataset import MMapIndexedDataset

URL = "https://huggingface.co/datasets/BlinkDL/minipile-tokenized/resolve/main/rwkv_vocab_v20230424"
TOKENS = 1_498_226_207
BYTES_PER_TOKEN = 2  # u16
TRIES = 4  # per file, before a network that breaks off counts as one that refuses
PAUSE_SECONDS = 2.0  # before the second try, doubled for each further one
SILENCE_SECONDS = 30  # without a byte, and a try counts as failed
CHUNK = 1 << 20


def fetch(url: str, target: Path, n_bytes: int | None = None, pause: float = PAUSE_SECONDS) -> None:
    """The file at `url` under the name `target`, whole; until then it grows as `target`.part.

    Raises ValueError when the server's file doesn't have `n_bytes`, OSError when the network refuses.
    """
    part = target.with_name(target.name + ".part")
    for tries_left in reversed(range(TRIES)):
        try:
            _continue(url, part, n_bytes)
            break
        except (OSError, HTTPException) as error:
            if tries_left == 0 or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                raise
            print(f"{target.name}: {error}; trying again", file=sys.stderr)
            time.sleep(pause)
            pause *= 2
    part.replace(target)


def _continue(url: str, part: Path, n_bytes: int | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have == n_bytes:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answering = urllib.request.urlopen(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # there is nothing after it: whole already, or of another file
        return _continue(url, part, n_bytes)
    with answering as answer:
        if answer.status != 206:
            have = 0  # the server sends the whole file
        length = answer.headers["Content-Length"]
        if length is None:
            raise ValueError(
                f"{url}: the server doesn't say how long the file is, so a cut one couldn't be told; use another (--url)"
            )
        total = have + int(length)
        if n_bytes is not None and total != n_bytes:
            raise ValueError(f"{url} has {total:,} bytes, expected {n_bytes:,}: not the file that it should be")
        free = shutil.disk_usage(part.parent).free
        if free < total - have:
            raise ValueError(
                f"{part.parent}: {total - have:,} bytes are to come, {free:,} are free; make room and run this again"
            )
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    arrived = part.stat().st_size
    if arrived != total:
        raise OSError(f"broke off after {arrived:,} of {total:,} bytes")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder (this one)")
    parser.add_argument("--url", default=URL, help="where minipile.bin and .idx are (%(default)s)")
    args = parser.parse_args(argv)
    sizes = {"minipile.idx": None, "minipile.bin": TOKENS * BYTES_PER_TOKEN}
    try:
        for name, n_bytes in sizes.items():
            if not (args.out / name).exists():
                fetch(f"{args.url}/{name}", args.out / name, n_bytes)
        data = MMapIndexedDataset(args.out / "minipile")
        if data.n_tokens != TOKENS:
            raise ValueError(
                f"{data.bin_path} holds {data.n_tokens:,} tokens, minipile has {TOKENS:,}; move it away and run this again"
            )
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    except (OSError, HTTPException) as error:
        parser.exit(
            1,
            f"minipile could not be fetched ({error}). Run this again when the network is back: it goes on where it stopped. Or fetch\n"
            + "".join(f"  {args.url}/{name}\n" for name in sizes)
            + f"in another way (a browser; a mirror with --url) and put the two files into {args.out}\n",
        )
    print(f"minipile is there: {len(data):,} documents, {data.n_tokens:,} tokens")


if __name__ == "__main__":
    main()
