"""The data of the demos with pictures and sounds, with scans that are made here in place of scikit-learn's."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from data import demo_media
from src.dataset.media_parts import OBJECT, take_media
from src.dataset.tokenizer import load_tokenizer


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Scan i is a square of brightness i + 1, of digit i % 10."""
    scans = np.arange(1, 101, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    monkeypatch.setattr(demo_media, "read_scans", lambda: (scans, np.arange(100) % 10))
    sizes = {"digits": {"heldout": 20, "single": 10, "train": 40}, "tones": {"heldout": 3, "train": 6}}
    monkeypatch.setattr(demo_media, "SIZES", sizes)

    def make(demo):
        monkeypatch.setattr(sys, "argv", ["demo_media.py", demo, "--out", str(tmp_path)])
        demo_media.main()
        return tmp_path / demo

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pictures_show_the_numbers_that_are_asked_for(small, capsys, monkeypatch):
    monkeypatch.setattr(demo_media, "deform", lambda scan, rng: scan)  # brightnesses tell which scan it is
    folder = small("digits")
    seen = {}
    for name in ("train", "single", "heldout"):
        lines = lines_of(folder / f"{name}.jsonl")
        shown = seen.setdefault(name, set())
        for line in lines:
            turns = [turn["value"].removeprefix("<image>\n") for turn in line["conversations"]]
            answers = dict(zip(turns[::2], turns[1::2], strict=True))
            picture = np.asarray(Image.open(folder / line["image"]))
            assert picture.shape == (demo_media.HEIGHT, demo_media.WIDTH)
            places = [column[column > 0].max(initial=0) for column in picture.T]
            # eight columns of each scan, from left to right; brightnesses tell which
            found = [places[i] for i in range(len(places)) if places[i] and places[i : i + 8] == [places[i]] * 8]
            scans = list(dict.fromkeys(found))
            shown |= set(scans)
            if demo_media.NUMBER in answers and len(scans) == len(answers[demo_media.NUMBER]):
                assert answers[demo_media.NUMBER] == "".join(str((int(scan) - 1) % 10) for scan in scans)
            if demo_media.DIGITS in answers:
                count = demo_media.COUNTS.index(answers[demo_media.DIGITS]) + 1
                assert (picture > 0).sum() == 64 * count
    assert not (seen["train"] | seen["single"]) & seen["heldout"]
    assert len(lines_of(folder / "heldout.jsonl")) == 60
    two = lines_of(folder / "two-digits.jsonl")
    assert two
    assert all(len(line["conversations"][1]["value"]) == 2 for line in two)
    # digits stay apart, so that numbers are read one by one
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    assert len(tokenizer.encode("1234")) == 4
    small("digits")
    assert "exist already" in capsys.readouterr().out


def test_scans_are_deformed_in_training_only(small):
    """A held-out picture has the values of its scans, which are uniform; a deformed one has others at its border."""
    folder = small("digits")

    def whole(name):
        """The share of scans that fill a square of their side."""
        pictures = [np.asarray(Image.open(path)) for path in (folder / "files").glob(f"{name}-*.png")]
        return np.mean([np.unique(p[p > 0], return_counts=True)[1].max() % 64 == 0 for p in pictures])

    assert whole("heldout") == 1
    assert whole("train") < 1


def test_a_deformed_scan_is_the_scan_a_little_changed():
    rng = np.random.default_rng(0)
    scan = np.zeros((8, 8), np.uint8)
    scan[2:6, 2:6] = 200
    versions = np.stack([demo_media.deform(scan, rng) for _ in range(200)]).astype(float)
    assert versions.shape == (200, 8, 8)
    assert len(np.unique(versions, axis=0)) == 200
    # around the same place, as large on average, and nowhere brighter
    np.testing.assert_allclose(versions.mean(0)[3:5, 3:5], 200, atol=2)
    assert abs(versions.sum((1, 2)).mean() / scan.sum() - 1) < 0.1
    centre = (versions * np.arange(8)).sum((1, 2)) / versions.sum((1, 2))
    assert abs(centre.mean() - 3.5) < 0.1
    assert centre.std() > 0.1
    assert versions.max() <= 200


def test_sounds_and_their_lines(small):
    folder = small("tones")
    for name in ("train", "heldout"):
        for line in lines_of(folder / f"{name}.jsonl"):
            entry, files = take_media(line, "sound")
            assert OBJECT in json.dumps(entry, ensure_ascii=False)
            assert all((folder / file).is_file() for file in files)
    even, faster, slower = (np.diff(demo_media.strike_times(4, rhythm)) for rhythm in demo_media.RHYTHMS)
    np.testing.assert_allclose(even, 1 / 3)
    np.testing.assert_allclose(faster[1:] / faster[:-1], 0.6)
    np.testing.assert_allclose(slower[1:] / slower[:-1], 1.6)
    rng = np.random.default_rng(0)
    for _ in range(5):
        samples, turns = demo_media.draw_sound(rng)
        assert np.abs(samples).max() <= 1
        power = np.abs(np.fft.rfft(samples)) ** 2
        assert power[: int(0.8 * demo_media.LOWEST * demo_media.SECONDS)].sum() < 0.02 * power.sum()
        assert [question for question, _ in turns] == [demo_media.CHORD, demo_media.BEATS, demo_media.RHYTHM]
