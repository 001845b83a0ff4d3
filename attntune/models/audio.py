"""Sound in: WAV files, resampling, and the log-mel spectrogram that Whisper reads.

Sources: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), section 2.2; the mel scale
and its triangular filters of equal area are those of M. Slaney, "Auditory Toolbox" (1998).
"""

from __future__ import annotations

import math
import wave
from functools import lru_cache
from pathlib import Path

import numpy as np

from attntune.errors import InputError

SAMPLE_RATE = 16000
"""Hz."""
WINDOW = 400
"""Samples of one transform."""
HOP = 160
"""Samples from one frame to the next."""
SECONDS = 30
"""What Whisper hears at once."""


def read_wav(path: str | Path, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Samples (samples,) float32 in [-1, 1] of a PCM WAV file, channels averaged, resampled to ``rate`` Hz.

    Raises:
        InputError: the file is absent or no PCM WAV of 8, 16, 24 or 32 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise InputError(f"expected a WAV file at {path}, which does not exist") from None
    except (wave.Error, EOFError) as error:
        raise InputError(f"{path} is not a PCM WAV file: {error}") from None
    if width == 1:
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128.0) / 128.0
    elif width == 2:
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768.0
    elif width == 4:
        samples = (np.frombuffer(data, "<i4") / 2.0**31).astype(np.float32)
    elif width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    else:
        raise InputError(f"{path} has {8 * width} bits a sample; expected 8, 16, 24 or 32")
    return resample(samples.reshape(-1, channels).mean(axis=1), found, rate)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples (samples,) at ``rate`` Hz → float32 at ``wanted`` Hz, by a polyphase low-pass filter."""
    if rate == wanted:
        return np.asarray(samples, np.float32)
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(samples, wanted // common, rate // common), np.float32)


def mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1,000 Hz (200/3 Hz a mel), then 27 mels for each factor of 6.4."""
    hz = np.asarray(hz, np.float64)
    with np.errstate(divide="ignore"):
        high = 15.0 + 27.0 * np.log(hz / 1000.0) / np.log(6.4)
    return np.where(hz < 1000.0, hz * 3.0 / 200.0, high)


def hertz(mels: np.ndarray) -> np.ndarray:
    """Inverse of :func:`mel`."""
    mels = np.asarray(mels, np.float64)
    return np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))


@lru_cache(maxsize=4)
def mel_filters(bins: int, rate: int = SAMPLE_RATE, window: int = WINDOW) -> np.ndarray:
    """Triangular filters (bins, window // 2 + 1) float32 from 0 Hz to half of ``rate``, each of area 1 over Hz."""
    frequencies = np.fft.rfftfreq(window, 1.0 / rate)
    edges = hertz(np.linspace(0.0, mel(np.array(rate / 2.0)), bins + 2))
    widths = np.diff(edges)
    rising = (frequencies[None, :] - edges[:-2, None]) / widths[:-1, None]
    falling = (edges[2:, None] - frequencies[None, :]) / widths[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None], np.float32)


def log_mel(samples: np.ndarray, bins: int = 80, seconds: float = SECONDS) -> np.ndarray:
    """Whisper's input (bins, frames) float32 of samples (samples,) at 16 kHz, padded with silence or cut to seconds.

    Power of a Hann-windowed transform each 10 ms, through :func:`mel_filters`, as log10, floored 8 below the loudest,
    then (x + 4) / 4.
    """
    from scipy.fft import rfft
    from scipy.sparse import csr_array

    count = round(seconds * SAMPLE_RATE)
    padded = np.zeros(count, np.float32)
    heard = np.asarray(samples, np.float32).reshape(-1)[:count]
    padded[: len(heard)] = heard
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    # A periodic Hann window; the last frame, centred on the end, is left out, as in the paper's code.
    hann = (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: count // HOP]
    spectrum = rfft(frames * hann, axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    # A filter has a dozen frequencies. And no BLAS: its threads would wait, spinning, beside the encoder's.
    energies = csr_array(mel_filters(bins)) @ power.T
    decibels = np.log10(np.maximum(energies, 1e-10))
    decibels = np.maximum(decibels, decibels.max() - 8.0)
    return np.ascontiguousarray((decibels + 4.0) / 4.0, np.float32)
