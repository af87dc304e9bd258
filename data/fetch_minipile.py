"""Downloads minipile, tokenized with the RWKV World vocabulary: minipile.bin (3.0 GB) and minipile.idx.

Interrupted downloads are resumed and sizes are checked. Complete files are kept, so a second run does nothing.
"""

import shutil
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from src.dataset import MMapIndexedDataset
from src.dataset.corpus.command_line import add_output_folder, create_parser
from src.errors import UserError

URL = "https://huggingface.co/datasets/BlinkDL/minipile-tokenized/resolve/main/rwkv_vocab_v20230424"
TOKENS = 1_498_226_207  # of this data set, as in RWKV-LM's training command (--my_exit_tokens)
BYTES_PER_TOKEN = 2  # uint16
MAX_ATTEMPTS = 4  # per file
PAUSE_SECONDS = 2.0  # before the second attempt, doubled for each further one
TIMEOUT_SECONDS = 30  # without receiving a byte
CHUNK_BYTES = 1 << 20


def fetch(url: str, target: Path, n_bytes: int | None = None, pause: float = PAUSE_SECONDS) -> None:
    """Downloads `url` to `target`; until it is complete, the data is in `target`.part.

    UserError when the server's file doesn't have `n_bytes`, OSError or HTTPException when the network fails.
    """
    part = target.with_name(target.name + ".part")
    for attempts_left in reversed(range(MAX_ATTEMPTS)):
        try:
            _download(url, part, n_bytes)
            break
        except (OSError, HTTPException) as error:
            # 4xx won't change by repeating; 5xx and broken connections may be temporary.
            if attempts_left == 0 or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                raise
            print(f"{target.name}: {error}; retrying", file=sys.stderr)
            time.sleep(pause)
            pause *= 2
    part.replace(target)


def _download(url: str, part: Path, n_bytes: int | None) -> None:
    """Appends the missing rest of `url` to `part`, or downloads all of it where the server can't resume."""
    have = part.stat().st_size if part.exists() else 0
    if have == n_bytes:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: range not satisfiable
            raise
        # `part` has the length of the file or more; without `n_bytes` it is unknown whether it is the right one.
        part.unlink()
        return _download(url, part, n_bytes)
    with response:
        if response.status != 206:  # 206: partial content; otherwise the server sends the whole file
            have = 0
        length = response.headers["Content-Length"]
        if length is None:
            raise UserError(
                "the server doesn't send a Content-Length, so a truncated file could not be detected",
                given=url,
                advice="use another server (--url)",
            )
        total = have + int(length)
        if n_bytes is not None and total != n_bytes:
            raise UserError(
                f"has {total:,} bytes", given=url, expected=f"{n_bytes:,} bytes", advice="use another server (--url)"
            )
        free = shutil.disk_usage(part.parent).free
        if free < total - have:
            raise UserError(
                f"{free:,} bytes are free, the download needs {total - have:,}",
                given=part.parent,
                advice="free disk space and run this again",
            )
        progress = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with open(part, "ab" if have else "wb") as file, progress:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
    received = part.stat().st_size
    if received != total:
        # OSError: an interrupted connection, which `fetch` retries.
        raise OSError(f"the connection ended after {received:,} of {total:,} bytes")


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__)
    add_output_folder(parser, Path(__file__).resolve().parent)
    parser.add_argument("--url", default=URL, help="address of the folder with minipile.bin and .idx [%(default)s]")
    args = parser.parse_args(argv)
    # The index first: it is small, so a wrong --url fails before the download of gigabytes.
    sizes = {"minipile.idx": None, "minipile.bin": TOKENS * BYTES_PER_TOKEN}
    try:
        for name, n_bytes in sizes.items():
            if not (args.out / name).exists():
                fetch(f"{args.url}/{name}", args.out / name, n_bytes)
        data = MMapIndexedDataset(args.out / "minipile")
        if data.n_tokens != TOKENS:
            raise UserError(
                f"contains {data.n_tokens:,} tokens",
                given=data.bin_path,
                expected=f"{TOKENS:,} tokens",
                advice="move the file and run this again",
            )
    except UserError as error:
        parser.exit(1, f"{error}\n")
    except (OSError, HTTPException) as error:
        parser.exit(
            1,
            f"minipile could not be downloaded ({error}). Run this again to resume, or download\n"
            + "".join(f"  {args.url}/{name}\n" for name in sizes)
            + f"in another way (a browser, or a mirror with --url) and put the two files into {args.out}\n",
        )
    print(f"minipile is complete: {len(data):,} documents, {data.n_tokens:,} tokens")


if __name__ == "__main__":
    main()
