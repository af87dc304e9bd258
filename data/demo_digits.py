"""Builds the data of the demo `digits` without a download: pictures of handwritten digits, questions and answers.

The digits are scikit-learn's (1,797 scans of 8 x 8 pixels, in the package), two to four of them at random places of a
picture. Held-out pictures are made of scans that no training picture has. Writes digits/: train.jsonl, heldout.jsonl,
pictures/ and tokenizer/. What is complete is kept, so a second run does nothing.
"""

import json
import os
import sys
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from src.dataset.corpus.bpe import train_bpe
from src.dataset.corpus.command_line import add_output_folder, create_parser, exit_on_user_error
from src.errors import UserError
from src.files import atomic_write

HEIGHT, WIDTH, SIDE = 24, 56, 8  # of a picture, and side of a scan
TRAINING_PICTURES, HELD_OUT_PICTURES = 12_000, 300
HELD_OUT_SHARE = 5  # one scan of so many is held out
VOCAB_SIZE = 320
COUNTS = ("two", "three", "four")
NUMBER, COUNT, LARGER = "Which number is this?", "How many digits?", "Which is larger, the first digit or the last?"


def read_scans() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(pictures [n, 8, 8] from 0 to 255, digits [n]). Raises UserError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits are those of the package scikit-learn", advice="pip install scikit-learn"
        ) from error
    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


def compose(
    scans: npt.NDArray[np.uint8], digits: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], str]:
    """A picture [HEIGHT, WIDTH] of two to four scans from left to right, and the number that it shows."""
    count = int(rng.integers(2, 5))
    chosen = rng.integers(0, len(scans), count)
    # what is left of the width is shared out as gaps: scans don't overlap
    gaps = np.diff(np.sort(rng.integers(0, WIDTH - SIDE * count + 1, count)), prepend=0)
    picture = np.zeros((HEIGHT, WIDTH), np.uint8)
    left = 0
    for scan, gap in zip(chosen, gaps, strict=True):
        left += int(gap)
        top = int(rng.integers(0, HEIGHT - SIDE + 1))
        picture[top : top + SIDE, left : left + SIDE] = scans[scan]
        left += SIDE
    return picture, "".join(str(digit) for digit in digits[chosen])


def questions(number: str) -> list[tuple[str, str]]:
    """(question, answer) about a picture of `number`."""
    first, last = number[0], number[-1]
    larger = "the first" if first > last else "the last" if last > first else "neither"
    return [(NUMBER, number), (COUNT, COUNTS[len(number) - 2]), (LARGER, larger)]


def conversation(name: str, turns: list[tuple[str, str]]) -> str:
    """A line in LLaVA's form: the picture belongs to the first question."""
    values = [value for turn in turns for value in turn]
    values[0] = f"<image>\n{values[0]}"
    roles = ("human", "gpt") * len(turns)
    return json.dumps(
        {
            "id": Path(name).stem,
            "image": name,
            "conversations": [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)],
        }
    )


def write(folder: Path) -> None:
    scans, digits = read_scans()
    rng = np.random.default_rng(0)
    is_held_out = rng.permutation(len(scans)) % HELD_OUT_SHARE == 0
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, count, part in (
        ("heldout", HELD_OUT_PICTURES, is_held_out),
        ("train", TRAINING_PICTURES, ~is_held_out),
    ):
        lines = []
        for i in tqdm(range(count), desc=f"pictures of {name}"):
            picture, number = compose(scans[part], digits[part], rng)
            file = f"pictures/{name}-{i}.png"
            Image.fromarray(picture).save(folder / file)
            turns = questions(number)
            if name == "train":  # all questions in one conversation, in any order
                lines.append(conversation(file, [turns[k] for k in rng.permutation(len(turns))]))
            else:  # each alone
                lines += [conversation(file, [turn]) for turn in turns]
        with atomic_write(folder / f"{name}.jsonl", "w") as out:
            out.write("\n".join(lines) + "\n")
    # a tokenizer of these words; numbers of several digits are too rare to become tokens
    texts = [value for line in lines[:2000] for value in (turn["value"] for turn in json.loads(line)["conversations"])]
    train_bpe(texts, folder / "tokenizer", VOCAB_SIZE)


def main() -> None:
    parser = create_parser(__doc__)
    add_output_folder(parser, Path(__file__).resolve().parent)
    folder = parser.parse_args().out / "digits"
    with exit_on_user_error(parser):
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            print(f"The data of the demo exist already: {os.path.relpath(folder)}/")
            return
        write(folder)
    print(f"{os.path.relpath(folder)}: {TRAINING_PICTURES:,} pictures, {HELD_OUT_PICTURES} held out")


if __name__ == "__main__":
    main()
