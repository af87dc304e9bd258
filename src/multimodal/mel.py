"""Log-mel frames of a sound, as Whisper's, and a sound at another sampling rate: the mathematics alone.

    S[t, f] = |sum_n w[n] x[t hop + n - n_fft / 2] e^(-2 pi i f n / n_fft)|^2    w: Hann window, x mirrored at its ends
    M = log10(max(S F^T, 1e-10));   frames = (max(M, max(M) - 8) + 4) / 4        F: triangles on the mel scale

The mel scale is Slaney's: linear below 1 kHz (3 mel per 200 Hz), logarithmic above (27 mel per factor 6.4). Each
triangle has the area of 1 (norm "slaney").
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

RATE, N_FFT, HOP, MELS = 16_000, 400, 160, 80  # of Whisper: 25 ms windows every 10 ms
_LINEAR_HZ, _LINEAR_MEL, _LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27
_RESAMPLE_ZEROS = 16  # zero crossings of the sinc on each side
_PHASES, _WINDOWS = 32, 4096  # of outputs that are computed in one product


def hz_of_mel(mel: Tensor) -> Tensor:
    return torch.where(
        mel < _LINEAR_MEL,
        mel * (_LINEAR_HZ / _LINEAR_MEL),
        _LINEAR_HZ * torch.exp(_LOG_STEP * (mel - _LINEAR_MEL)),
    )


def mel_of_hz(hz: float) -> float:
    linear = hz * _LINEAR_MEL / _LINEAR_HZ
    return linear if hz < _LINEAR_HZ else _LINEAR_MEL + math.log(hz / _LINEAR_HZ) / _LOG_STEP


@lru_cache(4)
def mel_filters(rate: int = RATE, n_fft: int = N_FFT, mels: int = MELS) -> Tensor:
    """F, fp32 [mels, n_fft // 2 + 1]: triangles between 0 Hz and half the rate, evenly spaced on the mel scale."""
    frequencies = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    corners = hz_of_mel(torch.linspace(0, mel_of_hz(rate / 2), mels + 2, dtype=torch.float64))
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (corners[2:] - corners[:-2]))[:, None]).float()


def frame_count(samples: int) -> int:
    """Frames of a sound of so many samples at RATE; at least 1."""
    return max(1, samples // HOP)


def log_mel(samples: Tensor) -> Tensor:
    """fp32 [n] at RATE -> fp32 [frame_count(n), MELS]."""
    # the window is mirrored at both ends, for which it takes more samples than half a window
    padded = torch.nn.functional.pad(samples, (0, max(0, N_FFT - len(samples))))
    window = torch.hann_window(N_FFT, device=samples.device)
    spectrum = torch.stft(padded, N_FFT, HOP, window=window, return_complex=True)  # [n_fft // 2 + 1, 1 + n // hop]
    power = spectrum[:, : frame_count(len(samples))].abs().square()
    log = (mel_filters().to(samples.device) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8).t() + 4) / 4


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """fp32 [n] at `rate` -> fp32 [ceil(n new / rate)] at `new_rate`: a sinc filter with a Hann window.

    y[m] = sum_n x[n] h(m / new - n / rate), h a low-pass below half of the lower rate.
    """
    common = math.gcd(rate, new_rate)
    old, new = rate // common, new_rate // common
    if old == new:
        return samples
    length = -(-len(samples) * new // old)
    cutoff = min(old, new) / old  # of half the old rate
    reach = math.ceil(_RESAMPLE_ZEROS / cutoff)  # samples on each side
    # `new` phases repeat: output m = k new + p lies p old / new samples after input k old. Neighbouring phases share
    # the samples around them, a narrow window: rates without a common divisor have thousands of phases, far apart.
    repeats = -(-length // new)
    padded = torch.nn.functional.pad(samples, (reach, repeats * old + 2 * reach + _PHASES * old // new + 2))
    outputs = []
    for phases in torch.arange(min(new, length)).split(_PHASES):
        first, last = (int(phase) * old // new for phase in (phases[0], phases[-1]))
        offsets = torch.arange(first - reach, last + reach + 2, dtype=torch.float64)
        distance = (offsets - phases[:, None].double() * old / new).clamp(-reach, reach)
        kernel = cutoff * torch.sinc(distance * cutoff) * torch.cos(distance * math.pi / (2 * reach)).square()
        windows = padded[first:].unfold(0, len(offsets), old)[:repeats]
        matrix = kernel.float().t().to(samples.device)
        outputs.append(torch.cat([part @ matrix for part in windows.split(_WINDOWS)]))
    return torch.cat(outputs, 1).flatten()[:length]
