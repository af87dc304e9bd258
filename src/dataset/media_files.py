"""Pictures and sounds from files: decoded with limits, so that no file takes more memory than it may.

Pictures are read by Pillow, sounds by Python's `wave` (PCM) or, other formats, by soundfile. The UserErrors of
`MediaError` have a noun phrase as `problem`: the reason why a file is unusable.
"""

from __future__ import annotations

import base64
import io
import warnings
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from src.errors import UserError

IMAGE, SOUND = "image", "sound"
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 64 << 20  # 8192 x 8192: 192 MiB as RGB
MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz
MAX_CHANNELS = 64
# Those that Pillow reads with code of its own or of common libraries; not EPS, for which it starts a program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BLOCK_FRAMES = 1 << 16
_UNKNOWN_LENGTH = 0x7FFFF000  # bytes that a header claims which was written before the length was known


class MediaError(UserError):
    """A file that can't be used; its `problem` is the reason."""


class MissingPackageError(UserError):
    """A package that is needed to read such files isn't installed: not a matter of one file."""


@dataclass(frozen=True)
class Picture:
    """RGB, uint8 [height, width, 3]."""

    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sound:
    """One channel in [-1, 1], fp32 [n], n >= 1; `rate` in Hz."""

    samples: npt.NDArray[np.float32]
    rate: int


def read_medium(kind: str, source: Path | bytes, max_seconds: float) -> Picture | Sound:
    """The picture or sound in a file, or in its content. Raises MediaError, MissingPackageError."""
    content = source if isinstance(source, bytes) else _read(source, kind)
    if len(content) > MAX_FILE_BYTES:
        raise MediaError(f"{_article(kind)} of more than {MAX_FILE_BYTES >> 20} MiB")
    if not content:
        raise MediaError(f"an empty {kind} file")
    return read_picture(content) if kind == IMAGE else read_sound(content, max_seconds)


def _article(kind: str) -> str:
    return f"an {kind}" if kind == IMAGE else f"a {kind}"


def _read(path: Path, kind: str) -> bytes:
    try:
        is_there = path.is_file()  # not a device or a pipe, which would be read forever
        if is_there:
            with path.open("rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise MediaError(f"an unreadable {kind} file") from error
    raise MediaError(f"a missing {kind} file")


# ---- pictures --------------------------------------------------------------------------------------------------------


def read_picture(content: bytes) -> Picture:
    """The picture as a viewer shows it: turned as its EXIF says, transparent parts white, of an animation the first
    frame; 16 bits per channel become 8. Raises MediaError."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingPackageError("pictures need the package Pillow", advice="pip install pillow") from error
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            warnings.simplefilter("ignore")  # of tags that can't be read, which are of no use here
            width, height = image.size
            if width < 1 or height < 1:
                raise MediaError("an image without pixels")
            if width * height > MAX_PIXELS:  # before anything is decompressed
                raise MediaError(f"an image of more than {MAX_PIXELS >> 20} megapixels")
            image.load()
            return Picture(np.ascontiguousarray(_as_rgb(ImageOps.exif_transpose(image)), np.uint8))
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen types for damaged files
        if isinstance(error, Image.UnidentifiedImageError):
            raise MediaError("a file that is no image") from error
        if isinstance(error, Image.DecompressionBombError):
            raise MediaError(f"an image of more than {MAX_PIXELS >> 20} megapixels") from error
        raise MediaError("a damaged image") from error


def _as_rgb(image: Any) -> npt.NDArray[Any]:
    """uint8 [height, width, 3]."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits per pixel, of some formats in a container of 32
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise MediaError("an image of more than 16 bits per channel")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise MediaError("an image of floating point numbers")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba))[..., :3]
    return np.asarray(image.convert("RGB"))


def fit_picture(picture: Picture, height: int, width: int) -> Picture:
    """`picture` scaled to fit into height x width, its proportions kept, centred on black."""
    from PIL import Image

    have_height, have_width = picture.pixels.shape[:2]
    if (have_height, have_width) == (height, width):
        return picture
    scale = min(height / have_height, width / have_width)
    new_height, new_width = (max(1, round(side * scale)) for side in (have_height, have_width))
    image = Image.fromarray(picture.pixels)
    scaled = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    result = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    result[top : top + new_height, left : left + new_width] = scaled
    return Picture(result)


def data_url(picture: Picture, largest_side: int) -> str:
    """The picture as a PNG in a data URL, scaled down to `largest_side`."""
    from PIL import Image

    image = Image.fromarray(picture.pixels)
    image.thumbnail((largest_side, largest_side))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---- sounds ----------------------------------------------------------------------------------------------------------


def read_sound(content: bytes, max_seconds: float) -> Sound:
    """The sound, its channels averaged. Raises MediaError."""
    channels, rate = _read_pcm(content, max_seconds) or _read_other(content, max_seconds)
    if not len(channels):
        raise MediaError("a sound without samples")
    samples = channels.mean(axis=1, dtype=np.float64).astype(np.float32)
    if not np.isfinite(samples).all():
        raise MediaError("a sound with values that are not finite")
    return Sound(samples, rate)


def _check_sound(rate: int, channels: int, frames: int, max_seconds: float) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise MediaError(f"a sound with a sampling rate that is not {MIN_RATE} to {MAX_RATE} Hz")
    if not 1 <= channels <= MAX_CHANNELS:
        raise MediaError("a sound with too many channels")
    if frames > max_seconds * rate:
        raise MediaError(f"a sound of more than {max_seconds:g} seconds (--max_seconds)")


def _read_pcm(content: bytes, max_seconds: float) -> tuple[npt.NDArray[Any], int] | None:
    """(fp32 [n, channels], rate) of a WAV file of integers; None where it isn't one."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    try:
        with wave.open(io.BytesIO(content)) as file:
            rate, channels, size, frames = (
                file.getframerate(),
                file.getnchannels(),
                file.getsampwidth(),
                file.getnframes(),
            )
            is_open_ended = frames * size * channels >= _UNKNOWN_LENGTH  # as programs write it into a pipe
            _check_sound(rate, channels, 0 if is_open_ended else frames, max_seconds)
            data = file.readframes(int(max_seconds * rate) + 1)
    except wave.Error as error:
        if "unknown" in str(error):  # of floats, or compressed; soundfile may know it
            return None
        raise MediaError("a damaged sound") from error
    except MediaError:
        raise
    except Exception as error:  # EOFError, struct.error, ...
        raise MediaError("a damaged sound") from error
    frame_bytes = size * channels
    if size not in (1, 2, 3, 4) or (not is_open_ended and len(data) < frames * frame_bytes):
        raise MediaError("a damaged sound")  # shorter than its header says
    data = data[: len(data) // frame_bytes * frame_bytes]
    _check_sound(rate, channels, len(data) // frame_bytes, max_seconds)
    return _integers(data, size).reshape(-1, channels), rate


def _integers(data: bytes, size: int) -> npt.NDArray[Any]:
    """Little-endian samples of `size` bytes in [-1, 1); those of one byte are unsigned."""
    if size == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if size == 3:  # the missing lowest byte is 0
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, size = padded.tobytes(), 4
    return np.frombuffer(data, f"<i{size}").astype(np.float32) / float(1 << (8 * size - 1))


def _read_other(content: bytes, max_seconds: float) -> tuple[npt.NDArray[np.float32], int]:
    """(fp32 [n, 1], rate) of what libsndfile reads: FLAC, OGG, MP3, AIFF, WAV of floats. The channels are averaged
    block by block: a compressed file of a few kB may hold gigabytes of them."""
    try:
        import soundfile
    except ImportError as error:
        if not _is_sound(content):
            raise MediaError("a file that is no sound") from error
        raise MissingPackageError(
            "sounds other than WAV files of integers need the package soundfile", advice="pip install soundfile"
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_sound(file.samplerate, file.channels, file.frames, max_seconds)
            most = int(max_seconds * file.samplerate) + 1
            blocks = file.blocks(_BLOCK_FRAMES, frames=most, dtype="float32", always_2d=True)
            parts = [block.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32) for block in blocks]
            data = np.concatenate([np.zeros((0, 1), np.float32), *parts])
            _check_sound(file.samplerate, file.channels, len(data), max_seconds)
            return data, file.samplerate
    except UserError:
        raise
    except Exception as error:
        raise MediaError("a damaged sound" if _is_sound(content) else "a file that is no sound") from error


def _is_sound(content: bytes) -> bool:
    """Whether the first bytes are those of a format of sounds."""
    if content[:4] in (b"RIFF", b"FORM"):
        return content[8:12] in (b"WAVE", b"AIFF", b"AIFC")
    return content[:4] in (b"fLaC", b"OggS") or content[:3] == b"ID3" or content[:2] in (b"\xff\xfb", b"\xff\xf3")
