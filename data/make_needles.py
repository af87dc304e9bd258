"""Makes token files that teach to remember: long documents that name a number once and ask for it again and again.

    python data/make_needles.py data/demo data/demo_tokenizer --length 8192 --count 500 --out data/needles

The rest of each document is text of the token file FILLER. `python -m src.inference.evaluate MODEL --data FILLER
--needle 256,4096` tests what was learned. Documents of one --seed are the same every time; another one is for
held-out data.
"""

import sys
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from src.dataset import BinIdxWriter, MMapIndexedDataset
from src.dataset.corpus.command_line import create_parser, exit_on_user_error
from src.dataset.needle import NeedleMaker
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser(__doc__)
    parser.add_argument("filler", metavar="FILLER", help="token file (X, X.bin) whose text fills the documents")
    parser.add_argument("tokenizer", metavar="TOKENIZER", help='that of FILLER: "world" or a Hugging Face folder')
    parser.add_argument("--length", type=int, default=8192, help="tokens of a document [%(default)s]")
    parser.add_argument("--count", type=int, default=500, help="documents [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other documents with another one [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.bin and OUT.idx")
    args = parser.parse_args(arguments)
    with exit_on_user_error(parser):
        for name in ("length", "count"):
            if getattr(args, name) < 1:
                raise UserError(flag=name, given=getattr(args, name), expected="at least 1")
        filler, tokenizer = MMapIndexedDataset(args.filler), load_tokenizer(args.tokenizer)
        maker = NeedleMaker(filler.tokens, tokenizer.encode_as_text, args.seed)
        with BinIdxWriter(args.out, np.uint16) as out:
            for number in range(args.count):
                out.add_document([*maker.document(number, args.length - 1), 0])
    print(f"{args.out}.bin: {args.count} documents of {args.length} tokens")


if __name__ == "__main__":
    main()
