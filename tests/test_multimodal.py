"""Rows of embeddings in the place of tokens, encoders and projectors."""

import json
import math

import numpy as np
import pytest
import scipy.signal
import torch

from src.config import PLACEHOLDER
from src.dataset.media_files import Picture, Sound
from src.errors import UserError
from src.multimodal.config import MediaConfig
from src.multimodal.files import RECORD, MediaRecord, read_record, write_front_end
from src.multimodal.front_end import attach_front_end
from src.multimodal.hf_encoder import HfEncoder
from src.multimodal.logmel import LogMel
from src.multimodal.mel import MELS, N_FFT, RATE, log_mel, mel_filters, resample
from src.multimodal.patches import Patches
from src.multimodal.pooling import pool_frames, pool_grid
from src.multimodal.projector import PROJECTORS
from tests.random_model import random_model

VOCAB = 97


def small_model(dtype=torch.float32, n_embd=32):
    model = random_model(n_layer=2, n_embd=n_embd, vocab_size=VOCAB, head_size=16, kernel="reference").to(dtype)
    return model.requires_grad_(True)


def sound(seconds=0.5, rate=16_000, hertz=440.0):
    t = np.arange(int(seconds * rate)) / rate
    return Sound((0.5 * np.sin(2 * math.pi * hertz * t)).astype(np.float32), rate)


def picture(height=16, width=24, seed=0):
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def noise_on_black(seed):
    picture_ = np.zeros((16, 24, 3), np.uint8)
    top, left = np.random.default_rng(seed).integers(0, (9, 17))
    picture_[top : top + 8, left : left + 8] = picture(8, 8, seed).pixels
    return Picture(picture_)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_rows_of_the_embedding_in_place_of_tokens_change_no_bit(packed):
    model = small_model()
    tokens = torch.randperm(VOCAB)[:24].view(1, 24) if packed else torch.randperm(VOCAB)[:24].view(2, 12)
    cu_seqlens = torch.tensor([0, 5, 24], dtype=torch.int32) if packed else None
    results = []
    for places in (torch.zeros_like(tokens, dtype=torch.bool), torch.rand(tokens.shape) < 0.5):
        model.zero_grad()
        embeds = model.emb(tokens[places]) if places.any() else None
        logits, state = model(tokens.masked_fill(places, PLACEHOLDER), cu_seqlens=cu_seqlens, embeds=embeds)
        logits.square().sum().backward()
        gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None]
        results.append([logits, *gradients, *(t for layer in state.layers for t in layer)])
    assert len(results[0]) == len(results[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_wrong_number_of_rows_is_refused():
    model = small_model()
    with pytest.raises(AssertionError, match="1 rows of embeddings for 2 places"):
        model(torch.tensor([[PLACEHOLDER, 3, PLACEHOLDER]]), embeds=torch.zeros(1, 32))


def test_a_sequence_with_rows_may_be_split_anywhere():
    model = small_model()
    tokens = torch.tensor([[1, PLACEHOLDER, PLACEHOLDER, 5, PLACEHOLDER, 7]])
    embeds = torch.randn(3, 32)
    whole, state = model(tokens, embeds=embeds)
    for split in range(1, 6):
        used = int((tokens[:, :split] == PLACEHOLDER).sum())
        first, carried = model(tokens[:, :split], embeds=embeds[:used])
        second, end = model(tokens[:, split:], carried, embeds=embeds[used:])
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end.layers[-1].wkv, state.layers[-1].wkv, rtol=1e-5, atol=1e-5)


# ---- encoders --------------------------------------------------------------------------------------------------------


def test_the_mel_filters_and_frames_are_whispers():
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    np.testing.assert_allclose(mel_filters().T, extractor.mel_filters, atol=1e-7)
    wave = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    expected = extractor(wave, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(log_mel(torch.from_numpy(wave)).t(), expected, atol=2e-5)


def test_the_power_of_a_frame_is_its_definition():
    wave = torch.from_numpy(sound(0.1).samples).double()
    n = torch.arange(N_FFT, dtype=torch.float64)
    window = torch.sin(math.pi * n / N_FFT).square()
    frame = wave[3 * 160 - N_FFT // 2 :][:N_FFT] * window  # frame 3, centred on its time
    power = torch.stack([(frame * torch.exp(-2j * math.pi * f * n / N_FFT)).sum().abs() ** 2 for f in range(201)])
    mel = (mel_filters().double() @ power).clamp(min=1e-10).log10()
    frames = log_mel(wave.float())
    kept = mel > mel.max() - 4  # above rounding
    torch.testing.assert_close(frames[3].double()[kept], ((mel + 4) / 4)[kept], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("rate", "new"), [(8_000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 16_000)])
def test_resampling_keeps_a_tone_and_removes_what_is_too_high(rate, new):
    tone = torch.from_numpy(sound(0.5, rate, 1000.0).samples)
    result = resample(tone, rate, new)
    assert len(result) == math.ceil(len(tone) * new / rate)
    expected = torch.from_numpy(sound(0.5, new, 1000.0).samples)[: len(result)]
    middle = slice(200, -200)
    torch.testing.assert_close(result[middle], expected[middle], atol=2e-3, rtol=0)
    if rate > new:
        high = torch.from_numpy(sound(0.5, rate, 0.45 * rate).samples)
        assert float(resample(high, rate, new)[middle].abs().max()) < 1e-2
        noise = np.random.default_rng(0).standard_normal(rate // 10)
        theirs = scipy.signal.resample_poly(noise, new, rate)
        ours = resample(torch.from_numpy(noise).float(), rate, new).numpy()
        # two filters of different sharpness: alike below the transition
        low = np.abs(np.fft.rfft(theirs))[: len(ours) // 3], np.abs(np.fft.rfft(ours))[: len(ours) // 3]
        assert np.corrcoef(*low)[0, 1] > 0.999


def test_resampling_between_rates_without_a_common_divisor_takes_little_memory(monkeypatch):
    products = []
    monkeypatch.setattr(torch, "sinc", lambda x, sinc=torch.sinc: products.append(x.numel()) or sinc(x))
    result = resample(torch.from_numpy(sound(0.1, 44_101, 1000.0).samples), 44_101, 16_000)
    expected = torch.from_numpy(sound(0.1, 16_000, 1000.0).samples)[: len(result)]
    torch.testing.assert_close(result[200:-200], expected[200:-200], atol=2e-3, rtol=0)
    assert max(products) < 1 << 16  # all phases over a whole repeat would be 716 million


SPECS = {
    "patches": (Patches(16, 24, 8, 12), picture()),
    "patches pooled": (Patches(32, 32, 8, 12, tokens=4), picture(32, 32)),
    "logmel": (LogMel(12), sound()),
    "logmel, 8 kHz": (LogMel(12), sound(0.33, 8_000)),
    "logmel pooled": (LogMel(12, tokens=5), sound(0.21)),
    "logmel, one sample": (LogMel(12), Sound(np.ones(1, np.float32), 16_000)),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_number_of_tokens_is_known_before(name):
    spec, medium = SPECS[name]
    torch.manual_seed(0)
    encoder = spec.build()
    prepared = spec.prepare(medium)
    rows = encoder(prepared, torch.tensor([len(prepared)]))
    assert rows.shape == (spec.count(medium), spec.width)
    # a medium's rows don't depend on its neighbours
    other = spec.prepare(medium)
    both = encoder(torch.cat([prepared, other]), torch.tensor([len(prepared), len(other)]))
    torch.testing.assert_close(both[: len(rows)], rows, rtol=1e-5, atol=1e-6)
    assert spec.prepare(medium).dtype == spec.blank().dtype


def test_pooling_is_the_mean_of_neighbours():
    x = torch.arange(16.0).view(1, 16, 1)
    assert pool_grid(x, 4, 4, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_frames(x, 2).flatten().tolist() == [3.5, 11.5]
    assert pool_grid(x, 4, 4, 0) is x


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("encoder", ["patches", "logmel"])
def test_gradients_of_projector_and_encoder_are_those_of_finite_differences(projector, encoder):
    model = small_model(torch.float64, n_embd=16)
    config = MediaConfig(encoder, projector, image_size=(16, 24), encoder_dim=8)
    front_end = attach_front_end(model, config).double()
    front_end.train()
    prepared = front_end.spec.prepare(picture() if encoder == "patches" else sound(0.3))
    lengths = torch.tensor([len(prepared)])
    places = front_end.spec.count(picture() if encoder == "patches" else sound(0.3))
    tokens = torch.tensor([[3, *[PLACEHOLDER] * places, 5, 7]])

    def loss():
        logits, _ = model(tokens, embeds=front_end(prepared, lengths))
        return torch.nn.functional.cross_entropy(logits[0, -3:-1], tokens[0, -2:])

    model.zero_grad()
    loss().backward()
    for name, parameter in front_end.named_parameters():
        direction = torch.nn.functional.normalize(torch.randn_like(parameter).flatten(), dim=0).view_as(parameter)
        h = 1e-5  # along a direction of length 1: with more elements it would be a longer step, and its error h^2
        with torch.no_grad():
            parameter += h * direction
            above = loss()
            parameter -= 2 * h * direction
            difference = (above - loss()) / (2 * h)
            parameter += h * direction
        slope = (parameter.grad * direction).sum()
        assert abs(float(slope - difference)) < 1e-6 * max(1e-2, abs(float(slope))), name


def test_a_batch_without_media_gives_gradients_of_zero_and_changes_nothing():
    model = small_model()
    front_end = attach_front_end(model, MediaConfig("patches", image_size=(16, 16), encoder_dim=8))
    tokens = torch.tensor([[1, 2, 3]])
    rows = front_end(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))
    logits, _ = model(tokens, embeds=rows)
    assert torch.equal(logits, model(tokens)[0])
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in front_end.parameters())


# ---- encoders of transformers ----------------------------------------------------------------------------------------


def tiny_encoder(kind, folder):
    """A folder with a tiny encoder of `transformers` with random weights, as `save_pretrained` writes it."""
    import transformers as t

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"image_size": 16, "patch_size": 4}
    size = {"height": 16, "width": 16}
    text = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "clip":
        config = t.CLIPConfig(vision_config={**vision, **image}, text_config={**vision, **text}, projection_dim=8)
        model = t.CLIPModel(config)
        processor = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    elif kind == "siglip":
        model = t.SiglipModel(t.SiglipConfig(vision_config={**vision, **image}, text_config={**vision, **text}))
        processor = t.SiglipImageProcessor(size=size)
    elif kind == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(**vision, **image))
        processor = t.BitImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    elif kind == "whisper":
        layers = {
            f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))
        }
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_mel_bins": 80}
        tokens = {
            "vocab_size": 99,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        }
        model = t.WhisperModel(t.WhisperConfig(**layers, **heads, **tokens, max_source_positions=50))
        processor = t.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    else:
        convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4)}
        positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
        model = t.WavLMModel(t.WavLMConfig(**vision, **convolutions, **positions))
        processor = t.Wav2Vec2FeatureExtractor(sampling_rate=16_000)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "whisper", "wavlm"])
def test_encoders_of_transformers(kind, tmp_path):
    folder = tiny_encoder(kind, tmp_path)
    medium = sound(0.4, 8_000) if kind in ("whisper", "wavlm") else picture(30, 20)
    for tokens in (0, 4):
        spec = HfEncoder(str(folder), tokens)
        assert (spec.kind, spec.width) == ("sound" if kind in ("whisper", "wavlm") else "image", 16)
        encoder = spec.build().eval()
        prepared = spec.prepare(medium)
        lengths = torch.tensor([len(prepared)] * 2)
        rows = encoder(torch.cat([prepared, prepared]), lengths)
        assert rows.shape == (2 * spec.count(medium), 16)
        torch.testing.assert_close(rows[: len(rows) // 2], rows[len(rows) // 2 :])
    assert spec.count(medium) == 4
    rows = encoder(spec.blank(), torch.tensor([len(spec.blank())]))
    assert len(rows) == 4


def test_what_is_no_encoder_is_refused(tmp_path):
    import transformers as t

    from src.errors import UserError

    with pytest.raises(UserError, match="no such encoder"):
        HfEncoder(str(tmp_path / "none")).kind  # noqa: B018
    t.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a model of type gpt2"):
        HfEncoder(str(tmp_path)).kind  # noqa: B018


@pytest.mark.parametrize("encoder", ["patches", "logmel"])
def test_media_stay_apart_while_a_model_learns_what_they_are_not_needed_for(encoder):
    """A step of Adam has the size of the learning rate in every weight, however small the gradient: what pulls all rows
    in one direction must not leave them alike."""
    torch.manual_seed(0)
    spec = Patches(16, 24, 8, 64) if encoder == "patches" else LogMel(64)
    # maxima over neighbouring places make pictures of noise alike: these have a piece of it somewhere on black
    media = [noise_on_black(i) if encoder == "patches" else sound(0.2, hertz=300.0 * 1.03**i) for i in range(64)]
    prepared = [spec.prepare(medium) for medium in media]
    network, projector = spec.build(), PROJECTORS["linear"](64, 32)
    torch.nn.init.orthogonal_(projector.output.weight)
    features = network(torch.cat(prepared), torch.tensor([len(part) for part in prepared])).detach()
    optimizer = torch.optim.Adam(projector.parameters(), lr=3e-3)
    direction = torch.randn(32)

    def share():
        """Of the squares of rows, after a norm as ln0: what differs between media in the same place."""
        with torch.no_grad():
            rows = torch.nn.functional.layer_norm(projector(features), (32,)).unflatten(0, (len(media), -1))
            return float((rows - rows.mean(0)).square().mean() / rows.square().mean())

    assert share() > 0.35
    if encoder == "logmel":  # of tones without beginning and end the tokens have nearly all in common
        return
    for _ in range(60):
        optimizer.zero_grad()
        (projector(features) @ direction).mean().backward()
        optimizer.step()
    assert share() > 0.2


def test_tokens_follow_the_longer_side_of_a_picture():
    numbers = torch.arange(6.0).view(1, 6, 1)
    wide, high, square = (Patches(h, w, 8, 12).build() for h, w in ((16, 24), (24, 16), (24, 24)))
    assert wide._in_order(numbers).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert high._in_order(numbers).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert square._in_order(torch.arange(9.0).view(1, 9, 1)).flatten().tolist() == list(range(9))


@pytest.mark.parametrize(("encoder", "is_read"), [("hf:clip", True), ("patches", False), ("logmel", False)])
def test_encoders_whose_parameters_have_changed_are_told_from_those_of_earlier_versions(tmp_path, encoder, is_read):
    record = MediaRecord(MediaConfig(encoder))
    write_front_end(tmp_path, record, {})
    assert read_record(tmp_path) == record
    content = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**content, "version": 1}))
    if is_read:
        assert read_record(tmp_path) == record
    else:
        with pytest.raises(UserError, match="train it again"):
            read_record(tmp_path)
