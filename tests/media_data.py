"""Pictures, sounds and conversations about them that tests share: tiny, written to real files."""

import io
import json
import wave

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder):
    """Bytes as tokens, with ChatML's three special ones first."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    raw.add_special_tokens(special)
    raw.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def wav(samples, rate=16_000, width=2):
    """The content of a WAV file; samples [n] or [n, channels] in [-1, 1]."""
    samples = np.asarray(samples, np.float64)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        if width == 1:
            out.writeframes(np.round(samples * 127 + 128).astype(np.uint8).tobytes())
        else:
            scaled = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
            out.writeframes(scaled.reshape(-1).view(np.uint8).reshape(-1, 4)[:, :width].tobytes())
    return file.getvalue()


COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}


def coloured(folder, count=24, side=16):
    """Pictures of one colour each, and LLaVA's lines that ask for it; the path of the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (side, side), COLOURS[name]).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
        lines.append({"id": i, "image": f"{i}.png", "conversations": turns})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tones(folder, count=12):
    """Sounds of one pitch each, and lines that ask whether it is high."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        name, hertz = (("low", 300), ("high", 2000))[i % 2]
        samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(2400 + 160 * i) / 16_000)
        (folder / f"{i}.wav").write_bytes(wav(samples))
        content = [{"type": "audio", "path": f"{i}.wav"}, {"type": "text", "text": "Pitch?"}]
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": name}]})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
