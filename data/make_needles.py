"""Makes token files that teach to remember: long documents that name a number once and ask for it again and again.

    python data/make_needles.py data/demo data/demo_tokenizer --length 256,1024,8192 --count 200 --out data/needles

The rest of each document is text of the token file FILLER. Short documents, in which answers are frequent, teach to
answer; long ones teach to remember. Of several lengths, each gets as many tokens; where they divide the --ctx_len of a
training, its windows begin with documents.

`python -m src.inference.evaluate MODEL --data FILLER --needle 256,4096` tests what was learned. Documents of one
--seed are the same every time; another one is for held-out data.
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
    parser.add_argument("--length", default="8192", metavar="N,...", help="tokens of a document [%(default)s]")
    parser.add_argument("--count", type=int, default=500, help="documents of the longest length [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other documents with another one [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.bin and OUT.idx")
    args = parser.parse_args(arguments)
    with exit_on_user_error(parser):
        if args.count < 1:
            raise UserError(flag="count", given=args.count, expected="at least 1")
        lengths = [int(part) if part.strip().isdecimal() else 0 for part in args.length.split(",")]
        if min(lengths) < 1:
            raise UserError(flag="length", given=args.length, expected="numbers of tokens, such as 256,8192")
        filler, tokenizer = MMapIndexedDataset(args.filler), load_tokenizer(args.tokenizer)
        maker = NeedleMaker(filler.tokens, tokenizer.encode_as_text, args.seed)
        with BinIdxWriter(args.out, np.uint16) as out:
            written = 0
            for _ in range(args.count):
                for length in lengths:
                    for _ in range(max(lengths) // length):
                        out.add_document([*maker.document(written, length - 1), 0])
                        written += 1
    print(f"{args.out}.bin: {written} documents of {args.length} tokens")


if __name__ == "__main__":
    main()
