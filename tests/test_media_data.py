"""Pictures and sounds from files and in conversations: decoding with limits, formats of lines, packing."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from media_data import byte_tokenizer, coloured, wav
from PIL import Image

from src.config import PLACEHOLDER
from src.dataset import media_files
from src.dataset.media_files import MediaError, read_picture, read_sound
from src.dataset.media_parts import OBJECT, take_media
from src.dataset.media_reader import MediaReader, UnusableMediaError
from src.dataset.media_tokens import whole_media
from src.dataset.sft import SftRows, collate
from src.dataset.sft_cache import open_conversations
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.multimodal.config import MediaConfig, reader_of
from src.multimodal.media_input import MediaInput

# ---- files -----------------------------------------------------------------------------------------------------------

GRADIENT = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    """A PNG that claims to have so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9000))
        + chunk(b"IEND", b"")
    )


def test_pictures_are_read_as_they_are_shown():
    image = Image.fromarray(GRADIENT)
    np.testing.assert_array_equal(read_picture(encoded(image)).pixels, GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise to be shown
    turned = read_picture(encoded(image, exif=exif)).pixels
    np.testing.assert_array_equal(turned, np.rot90(GRADIENT, -1))
    deep = Image.fromarray((np.arange(54).reshape(6, 9) * 1000).astype(np.uint16))
    np.testing.assert_array_equal(read_picture(encoded(deep)).pixels[..., 1], np.arange(54).reshape(6, 9) * 1000 >> 8)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    first = read_picture(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).pixels
    assert first[0, 0].tolist() == [255, 0, 0]
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (read_picture(encoded(Image.fromarray(clear))).pixels == 255).all()
    cmyk = read_picture(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")).pixels
    assert cmyk[0, 0, 0] > 200
    assert cmyk[0, 0, 1:].max() < 60
    for mode in ("1", "L", "LA", "P", "RGBA"):
        assert read_picture(encoded(image.convert(mode))).pixels.shape == (6, 9, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bomb(100_000, 100_000), "more than 64 megapixels"),
        (bomb(8192, 8193), "more than 64 megapixels"),
        (bomb(60, 60)[:40], "no image"),
        (encoded(Image.fromarray(GRADIENT), "JPEG")[:200], "damaged image"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating point"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (b"GIF89a", "no image"),
        (wav(np.zeros(9)), "no image"),
    ],
)
def test_pictures_that_cannot_be_used_have_a_reason(content, reason):
    with pytest.raises(MediaError, match=reason):
        read_picture(content)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_are_read_in_any_width_and_number_of_channels(width):
    samples = np.stack([np.linspace(-1, 1, 50), np.zeros(50)], axis=1)
    sound = read_sound(wav(samples, 8000, width), 30)
    assert sound.rate == 8000
    np.testing.assert_allclose(sound.samples, samples.mean(axis=1), atol=2.0 ** (1 - 8 * width) + 1e-6)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wav(np.zeros(16_000 * 2)), "more than 1 seconds"),
        (wav(np.zeros(400))[:300], "damaged sound"),
        (wav(np.zeros(400))[:30], "damaged sound"),
        (wav(np.zeros(0)), "without samples"),
        (wav(np.zeros(9), rate=100), "sampling rate"),
        (encoded(Image.fromarray(GRADIENT)), "no sound"),
    ],
)
def test_sounds_that_cannot_be_used_have_a_reason(content, reason):
    with pytest.raises(MediaError, match=reason):
        read_sound(content, 1)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(media_files.MissingPackageError, match="pip install soundfile"):
        read_sound(b"fLaC" + b"\0" * 100, 30)


# ---- lines -----------------------------------------------------------------------------------------------------------

ANSWER = {"from": "gpt", "value": "a cat"}


def asked(value, **fields):
    return {**fields, "conversations": [{"from": "human", "value": value}, ANSWER]}


def question(entry):
    turn = entry.get("conversations", entry.get("messages"))[0]
    return turn.get("value", turn.get("content"))


def test_lines_of_llava_and_of_content_parts():
    entry, names = take_media(asked("<image>\nWhat?", image="a.jpg", id=3), "image")
    assert (question(entry), names) == (f"{OBJECT}\nWhat?", ["a.jpg"])
    assert "image" not in entry
    entry, names = take_media(asked("<image> and <image>", image=["a", "b"]), "image")
    assert (question(entry), names) == (f"{OBJECT} and {OBJECT}", ["a", "b"])
    assert take_media(asked("What?", images=["a", "b"]), "image")[1] == ["a", "b"]
    assert question(take_media(asked("What?", image="a"), "image")[0]) == f"{OBJECT}\nWhat?"
    assert question(take_media(asked("an <image> tag of HTML"), "image")[0]) == "an <image> tag of HTML"
    parts = [{"type": "image", "path": "x.png"}, {"type": "text", "text": "What?"}, {"type": "image"}]
    entry, names = take_media({"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["y"]}, "image")
    assert names == ["x.png", "y"]
    assert [part["text"] for part in question(entry)] == [OBJECT, "What?", OBJECT]
    entry, names = take_media(asked("<audio> Who?", audio="a.wav"), "sound")
    assert (question(entry), names) == (f"{OBJECT} Who?", ["a.wav"])


@pytest.mark.parametrize(
    ("entry", "kind", "reason"),
    [
        (asked("<image>", image=["a", "b"]), "image", "a number of <image> tags"),
        (asked("<image><image>", image="a"), "image", "a number of <image> tags"),
        (asked("What?", image={"bytes": "x"}), "image", "is not the name of a file"),
        (asked(f"{OBJECT} What?"), "image", "U\\+FFFC"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "path": "a"}]}]}, "image", "of type sound"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image", "path": "a"}]}]}, "image", "an answer with"),
    ],
)
def test_lines_whose_media_have_no_clear_place(entry, kind, reason):
    with pytest.raises(UserError, match=reason):
        take_media(entry, kind)


# ---- conversations ---------------------------------------------------------------------------------------------------

SMALL = MediaConfig("patches", image_size=(16, 16), patch_size=8, encoder_dim=8)  # 4 tokens a picture


def opened(path, tokenizer, **changed):
    reader = reader_of(SMALL, str(path.parent), **changed)
    return open_conversations(str(path), str(tokenizer), workers=1, reader=reader), MediaInput(SMALL, reader)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_media_tokens_are_counted_and_belong_to_their_conversation(tmp_path, tokenizer):
    path = coloured(tmp_path, 6)
    conversations, source = opened(path, tokenizer)
    ids, is_answer = conversations.read(0)
    assert (ids == PLACEHOLDER).sum() == 4
    assert not is_answer[ids == PLACEHOLDER].any()
    assert load_tokenizer(tokenizer).decode(ids[is_answer].tolist()) == "red<|im_end|>"
    assert conversations.media_of(3) == [("3.png", 4)]
    assert conversations.largest_id() < 300
    rows = SftRows(conversations, 256, media=source)
    row = rows.row(0)
    media, lengths = row.media
    assert media.shape == (6, 3, 16, 16)
    assert lengths.tolist() == [1] * 6
    assert (row.inputs == PLACEHOLDER).sum() == 24
    batch = collate([row, row])
    assert batch.media[0].shape == (12, 3, 16, 16)
    # from the cache the same
    again, _ = opened(path, tokenizer)
    assert again.media_of(3) == [("3.png", 4)]
    assert torch.equal(SftRows(again, 256, media=source).row(0).media[0], media)


def test_broken_files_leave_their_conversation_out_and_are_listed(tmp_path, tokenizer):
    path = coloured(tmp_path, 6)
    (tmp_path / "1.png").unlink()
    (tmp_path / "4.png").write_bytes(b"no picture")
    conversations, _ = opened(path, tokenizer)
    assert len(conversations.data) == 4
    assert conversations.left_out == {"a missing image file": 1, "a file that is no image": 1}
    listed = (tmp_path / "data.jsonl.sft-broken.txt").read_text().splitlines()
    assert [line.rpartition("/")[2] for line in listed] == [
        "1.png: a missing image file",
        "4.png: a file that is no image",
    ]
    path.touch()
    with pytest.raises(UnusableMediaError, match="missing image file"):
        opened(path, tokenizer, is_strict=True)


def test_a_picture_is_never_cut(tmp_path, tokenizer):
    ids = np.array([5, 6, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, 7, 8])
    assert [whole_media(ids, [2, 2], n) for n in range(1, 8)] == [
        (1, 0),
        (2, 0),
        (2, 0),
        (4, 1),
        (4, 1),
        (6, 2),
        (7, 2),
    ]
    assert whole_media(np.array([3, 4]), [], 1) == (1, 0)
    # two pictures, the second question behind the cut
    path = coloured(tmp_path, 1)
    turns = [{"from": who, "value": v} for who, v in (("human", "<image>a"), ("gpt", "b")) * 2]
    path.write_text(json.dumps({"image": ["0.png", "0.png"], "conversations": turns}) + "\n")
    conversations, source = opened(path, tokenizer)
    length = len(conversations.data[0])
    for ctx_len in range(length // 2 + 8, length):
        row = SftRows(conversations, ctx_len, media=source).row(0)
        assert int((row.inputs == PLACEHOLDER).sum()) == 4 * len(row.media[1])
        assert int((row.targets >= 0).sum()) > 0


def test_a_reader_is_handed_in_and_passes_to_processes(tmp_path):
    import pickle

    reader = reader_of(SMALL, str(coloured(tmp_path, 1).parent))
    copy = pickle.loads(pickle.dumps(reader))
    assert isinstance(copy, MediaReader)
    assert copy.count(copy.read("0.png")) == 4
