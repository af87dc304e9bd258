"""Builds the data of the demos `digits` and `tones` without a download.

    python data/demo_media.py digits     pictures of two to four handwritten digits at random places: scikit-learn's
                                         1,797 scans of 8 x 8 pixels, which are in the package
    python data/demo_media.py tones      sounds of a chord that is struck two to four times, computed here

Writes digits/ or tones/: files, train.jsonl, heldout.jsonl and tokenizer/; of the digits also single.jsonl, to begin
with, and two-digits.jsonl, held-out numbers. Held-out pictures are made of scans that no training picture has, held-out
sounds of other voices and tunings. What is complete is kept: a second run does nothing.
"""

import io
import json
import os
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from src.dataset.corpus.bpe import train_bpe
from src.dataset.corpus.command_line import add_output_folder, create_parser, exit_on_user_error
from src.errors import UserError
from src.files import atomic_write

VERSION = "2"  # of the examples: raised with every change of them
VOCAB_SIZE = 400  # at most; the words of the questions are a token each, and digits stay apart
COUNTS = ("one", "two", "three", "four")
TEXTS_FOR_TOKENIZER = 1000  # there are few different sentences
HELD_OUT, SINGLE, TRAIN = "heldout", "single", "train"  # names of sets
# how many pictures and sounds each has
SIZES = {"digits": {HELD_OUT: 600, SINGLE: 10_000, TRAIN: 16_000}, "tones": {HELD_OUT: 300, TRAIN: 5_000}}

HEIGHT, WIDTH, SIDE = 16, 48, 8  # of a picture, and side of a scan
# Of each training scan, at random: without, a model read 98 % of the numbers that it was trained on and 87 % of others.
VARIANTS, DEFORMATION, SHIFT = 10, 0.1, 0.5  # how many, changes of the matrix's entries, and pixels
HELD_OUT_SHARE = 5  # one scan of so many is held out
NUMBER, DIGITS, LARGER = "Which number is this?", "How many digits?", "Which is larger, first or last?"

RATE, SECONDS, STRIKE = 16_000, 1.2, 0.4  # Hz, and the length of a sound and of what is heard of a strike
CHORDS = {"major": (0, 4, 7), "minor": (0, 3, 7), "diminished": (0, 3, 6), "augmented": (0, 4, 8)}  # semitones
LOWEST, ROOTS = 659.26, 4  # Hz of the lowest root, an E, and semitones above it
CHORD, BEATS, RHYTHM = "Which chord is this?", "How many beats?", "Which rhythm is it?"
RHYTHMS = ("even", "faster", "slower")
Turns = list[tuple[str, str]]  # questions and answers


class Example(NamedTuple):
    """Content and ending of a file, and what is asked about it."""

    content: bytes
    ending: str
    turns: Turns


# ---- digits ----------------------------------------------------------------------------------------------------------


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


def deform(scan: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The scan [SIDE, SIDE] a little larger or smaller, turned, slanted and moved by fractions of a pixel: as somebody
    else might have written it."""
    from PIL import Image

    matrix = np.eye(2) + rng.uniform(-DEFORMATION, DEFORMATION, (2, 2))
    middle = np.full(2, SIDE / 2)
    shift = middle - matrix @ middle + rng.uniform(-SHIFT, SHIFT, 2)
    places = np.column_stack([matrix, shift]).ravel().tolist()
    image = Image.fromarray(scan).transform((SIDE, SIDE), Image.Transform.AFFINE, places, Image.Resampling.BILINEAR)
    return np.asarray(image)


def draw_digits(
    scans: npt.NDArray[np.uint8], digits: npt.NDArray[np.int64], count: int, rng: np.random.Generator, step: int = 1
) -> tuple[npt.NDArray[np.uint8], str]:
    """A picture [HEIGHT, WIDTH] of `count` scans from left to right, at multiples of `step` pixels, and the number that
    it shows."""
    chosen = rng.integers(0, len(scans), count)
    # what is left of the width is shared out as gaps: scans don't overlap
    gaps = step * np.diff(np.sort(rng.integers(0, (WIDTH - SIDE * count) // step + 1, count)), prepend=0)
    picture = np.zeros((HEIGHT, WIDTH), np.uint8)
    left = 0
    for scan, gap in zip(chosen, gaps, strict=True):
        left += int(gap)
        top = step * int(rng.integers(0, (HEIGHT - SIDE) // step + 1))
        picture[top : top + SIDE, left : left + SIDE] = scans[scan]
        left += SIDE
    return picture, "".join(str(digit) for digit in digits[chosen])


def digit_questions(number: str) -> Turns:
    first, last = number[0], number[-1]
    larger = "first" if first > last else "last" if last > first else "neither"
    return [(NUMBER, number), (DIGITS, COUNTS[len(number) - 1]), (LARGER, larger)]


def digit_examples(name: str, size: int) -> Iterator[Example]:
    """Of SINGLE: one digit, which number it is, half of them in the middle of a patch. A model that has to learn what
    digits look like at any place, and which of them to name first, learns neither for a long time."""
    from PIL import Image

    scans, digits = read_scans()
    part = (np.random.default_rng(0).permutation(len(scans)) % HELD_OUT_SHARE == 0) == (name == HELD_OUT)
    rng = np.random.default_rng(size)
    scans, digits = scans[part], digits[part]
    if name != HELD_OUT:
        scans = np.stack([deform(scan, rng) for _ in range(VARIANTS) for scan in scans])
        digits = np.tile(digits, VARIANTS)
    for i in range(size):
        count = 1 if name == SINGLE else int(rng.integers(2, 5))
        step = SIDE if name == SINGLE and i % 2 else 1
        picture, number = draw_digits(scans, digits, count, rng, step)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="PNG", compress_level=1)
        turns = digit_questions(number)
        is_number_alone = name == SINGLE or (name == TRAIN and i % 2)
        yield Example(file.getvalue(), "png", turns[:1] if is_number_alone else turns)


# ---- tones -----------------------------------------------------------------------------------------------------------


def strike_times(count: int, rhythm: str) -> npt.NDArray[np.float64]:
    """When a chord is struck `count` times, in seconds from the first one: each gap is 1, 0.6 or 1.6 times the one
    before."""
    gaps = np.cumprod([1.0, *[{"even": 1.0, "faster": 0.6, "slower": 1.6}[rhythm]] * (count - 1)])[:-1]
    return np.concatenate([[0.0], np.cumsum(gaps / gaps.sum())])


def draw_sound(rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], Turns]:
    """SECONDS of a chord that is struck two to four times, [-1, 1], and what is asked about it."""
    chord, count = str(rng.choice(list(CHORDS))), int(rng.integers(2, 5))
    # of two beats there is one gap, which is neither
    rhythm = str(rng.choice(RHYTHMS)) if count > 2 else "even"
    root = LOWEST * 2 ** ((rng.integers(ROOTS) + rng.uniform(-0.2, 0.2)) / 12)
    frequencies = root * 2 ** (np.array(CHORDS[chord]) / 12)
    overtones = np.arange(1, 4)
    loudness = rng.uniform(0.2, 1.0, (len(frequencies), 1)) * overtones ** -rng.uniform(1.0, 3.0)
    phases = rng.uniform(0, 2 * np.pi, loudness.shape)
    begin, length = rng.uniform(0, 0.1), rng.uniform(0.65, 0.85)
    time = np.arange(int(RATE * STRIKE)) / RATE
    angles = np.multiply.outer(2 * np.pi * time, np.outer(frequencies, overtones)) + phases
    tone = (loudness * np.sin(angles)).sum((1, 2)) * np.exp(-time / 0.08)
    samples = rng.uniform(0, 0.02) * rng.standard_normal(int(RATE * SECONDS))
    for strike in begin + length * strike_times(count, rhythm):
        at = int(RATE * strike)
        samples[at : at + len(tone)] += tone[: len(samples) - at]
    turns = [(CHORD, chord), (BEATS, COUNTS[count - 1]), (RHYTHM, rhythm)]
    return samples / np.abs(samples).max() * rng.uniform(0.2, 0.9), turns


def tone_examples(name: str, size: int) -> Iterator[Example]:
    rng = np.random.default_rng(size)
    for _ in range(size):
        samples, turns = draw_sound(rng)
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((1, 1, RATE, 0, "NONE", ""))
            out.writeframes(np.round(samples * 127 + 128).astype(np.uint8).tobytes())
        yield Example(file.getvalue(), "wav", turns)


# ---- files -----------------------------------------------------------------------------------------------------------


def picture_line(name: str, turns: Turns) -> dict[str, Any]:
    """In LLaVA's form: the picture belongs to the first question."""
    values = [value for turn in turns for value in turn]
    values[0] = f"<image>\n{values[0]}"
    roles = ("human", "gpt") * len(turns)
    conversation = [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)]
    return {"id": Path(name).stem, "image": name, "conversations": conversation}


def sound_line(name: str, turns: Turns) -> dict[str, Any]:
    """In parts."""
    values: list[Any] = [value for turn in turns for value in turn]
    values[0] = [{"type": "audio", "path": name}, {"type": "text", "text": values[0]}]
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": value} for role, value in zip(roles, values, strict=True)]}


DEMOS = {"digits": (digit_examples, picture_line), "tones": (tone_examples, sound_line)}


def write(demo: str, folder: Path) -> None:
    examples, line_of = DEMOS[demo]
    (folder / "files").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for name, size in SIZES[demo].items():
        lines = []
        for i, example in enumerate(tqdm(examples(name, size), desc=f"{demo}, {name}", total=size)):
            file = f"files/{name}-{i}.{example.ending}"
            (folder / file).write_bytes(example.content)
            if name == HELD_OUT:  # each question alone
                lines += [line_of(file, [turn]) for turn in example.turns]
                texts += [text for turn in example.turns for text in turn if not text.isdigit()]
            else:  # all in one conversation, in any order
                lines.append(line_of(file, [example.turns[k] for k in rng.permutation(len(example.turns))]))
        _write_lines(folder / f"{name}.jsonl", lines)
        if demo == "digits" and name == HELD_OUT:
            numbers = [line for line in lines if line["conversations"][0]["value"].endswith(NUMBER)]
            two = [line for line in numbers if len(line["conversations"][1]["value"]) == 2]
            _write_lines(folder / "two-digits.jsonl", two)
    # written last: a folder that has it is complete
    train_bpe([*texts[:TEXTS_FOR_TOKENIZER], *["user", "assistant"] * 99], folder / "tokenizer", VOCAB_SIZE)


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    with atomic_write(path, "w") as out:
        out.write("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("demo", choices=DEMOS)
    add_output_folder(parser, Path(__file__).resolve().parent)
    options = parser.parse_args()
    folder = options.out / options.demo
    with exit_on_user_error(parser):
        version = folder / "version"
        if version.is_file() and version.read_text() == VERSION:
            print(f"The data of the demo exist already: {os.path.relpath(folder)}/")
            return
        if folder.is_dir():
            print(f"{os.path.relpath(folder)}/ is not complete or of another version of the demo: made anew")
        write(options.demo, folder)
        version.write_text(VERSION)  # last: what is there is complete
    print(f"wrote {os.path.relpath(folder)}/")


if __name__ == "__main__":
    main()
