"""A thousand damaged, huge, wrong, animated and unusual pictures and sounds: each is read right, or has a reason."""

import io
import random
from collections import Counter

import numpy as np
import pytest
from media_data import wav
from PIL import Image

from src.dataset.media_files import IMAGE, MAX_PIXELS, SOUND, MediaError, MissingPackageError, read_medium

MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("P", "RGB")}
MODES |= {"WEBP": ("RGB", "RGBA"), "BMP": ("1", "L", "RGB"), "TIFF": ("L", "RGB", "CMYK", "I;16", "F"), "PPM": ("RGB",)}


def pictures(rng):
    """(content, whether it is whole) of pictures of every kind."""
    for kind, modes in MODES.items():
        for mode in modes:
            side = rng.randrange(1, 40), rng.randrange(1, 40)
            image = Image.new("RGB", side, tuple(rng.randrange(256) for _ in range(3)))
            image = Image.new("F", side, 0.5) if mode == "F" else image.convert("L" if mode == "I;16" else mode)
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
            options = {}
            if kind in ("GIF", "WEBP", "TIFF"):
                options = {"save_all": True, "append_images": [image.copy() for _ in range(rng.randrange(3))]}
            if kind == "JPEG":
                exif = Image.Exif()
                exif[0x0112] = rng.randrange(10)
                options["exif"] = exif
            file = io.BytesIO()
            image.save(file, format=kind, **options)
            yield file.getvalue(), mode != "F", image.size, options


def sounds(rng):
    for width in (1, 2, 3, 4):
        for channels in (1, 2, 6):
            yield wav(np.zeros((rng.randrange(1, 4000), channels)), rng.choice((8000, 44100)), width)


def damaged(content, rng):
    data = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        choice = rng.randrange(5)
        at = rng.randrange(len(data))
        if choice == 0:
            data[at] = rng.randrange(256)
        elif choice == 1:
            data = data[: max(1, at)]
        elif choice == 2:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
        elif choice == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
        else:
            del data[at : at + rng.randrange(1, 50)]
        data = data or bytearray(b"\0")
    return bytes(data)


@pytest.mark.slow
def test_a_thousand_files_are_read_right_or_have_a_reason():
    rng = random.Random(0)
    results: Counter[str] = Counter()
    for _ in range(9):
        for content, is_whole, size, _ in pictures(rng):
            if is_whole:
                pixels = read_medium(IMAGE, content, 30).pixels
                assert sorted(pixels.shape[:2]) == sorted(size)
                results["a whole picture"] += 1
            for kind, source in ((IMAGE, damaged(content, rng)), (SOUND, content), (IMAGE, damaged(content, rng))):
                results[outcome(kind, source)] += 1
        for content in sounds(rng):
            assert read_medium(SOUND, content, 30).samples.size
            for kind, source in ((SOUND, damaged(content, rng)), (IMAGE, content)):
                results[outcome(kind, source)] += 1
    assert results.total() >= 1000
    print(results)


def outcome(kind, content):
    try:
        medium = read_medium(kind, content, 30)
    except (MediaError, MissingPackageError) as error:
        return error.problem
    if kind == IMAGE:
        assert medium.pixels.dtype == np.uint8
        assert medium.pixels.ndim == 3
        assert 0 < medium.pixels.size <= 3 * MAX_PIXELS
    else:
        assert np.isfinite(medium.samples).all()
        assert 0 < len(medium.samples) <= 30 * medium.rate
    return f"read as a {kind}"
