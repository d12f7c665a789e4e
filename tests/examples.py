"""The programs in models/examples as modules, and what a camera and a microphone would give them."""

from __future__ import annotations

import importlib.util
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parents[1] / "models" / "examples"
RATE = 16_000

Sound = npt.NDArray[np.float32]


def load(name: str) -> ModuleType:
    """Import a program without running it."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


# Pictures

STROKES = {
    "中": ((10, 20, 90, 20), (90, 20, 90, 60), (10, 60, 90, 60), (10, 20, 10, 60), (50, 0, 50, 100)),
    "田": ((12, 10, 88, 10), (88, 10, 88, 92), (12, 92, 88, 92), (12, 10, 12, 92), (50, 10, 50, 92), (12, 50, 88, 50)),
    "山": ((50, 5, 50, 90), (12, 35, 12, 90), (88, 35, 88, 90), (12, 90, 88, 90)),
    "王": ((12, 12, 88, 12), (18, 50, 82, 50), (6, 92, 94, 92), (50, 12, 50, 92)),
    "工": ((15, 15, 85, 15), (5, 88, 95, 88), (50, 15, 50, 88)),
    "口": ((15, 18, 85, 18), (85, 18, 85, 88), (15, 88, 85, 88), (15, 18, 15, 88)),
    "日": ((22, 6, 78, 6), (78, 6, 78, 95), (22, 95, 78, 95), (22, 6, 22, 95), (22, 50, 78, 50)),
}
"""Chinese characters of straight lines in a square of 100, so that no font is needed."""


def blank(width: int = 900, height: int = 600) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def write(picture: Image.Image, at: tuple[int, int], text: str, size: int = 48, colour: str = "black") -> None:
    """Write Latin text."""
    ImageDraw.Draw(picture).text(at, text, font=ImageFont.load_default(size), fill=colour)


def write_chinese(picture: Image.Image, at: tuple[int, int], text: str, size: int = 64) -> None:
    """Draw characters of `STROKES`."""
    draw = ImageDraw.Draw(picture)
    for place, character in enumerate(text):
        left, top = at[0] + place * size * 1.15, at[1]
        for stroke in STROKES[character]:
            points = [
                (left + x * size / 100, top + y * size / 100) for x, y in zip(stroke[::2], stroke[1::2], strict=True)
            ]
            draw.line(points, fill="black", width=size // 11)


def upside_down(text: str, size: int = 48) -> Image.Image:
    """Return a picture of a line that stands on its head."""
    line = blank(len(text) * size // 2 + 60, size + 30)
    write(line, (10, 8), text, size)
    return line.rotate(180)


# Sounds

_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""Resonances of the mouth in hertz: a, i, u, e, o."""
_WIDTHS = (60, 90, 150)


def silence(seconds: float, seed: int = 0) -> Sound:
    """Return the noise of a quiet room."""
    return (0.001 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def tone(seconds: float, hertz: float = 1000) -> Sound:
    """Return a whistle, which is no speech."""
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def voice(seconds: float, seed: int = 0) -> Sound:
    """Return something like a man's voice that babbles: the pulses of a throat through the resonances of a mouth."""
    random = np.random.default_rng(seed)
    pieces: list[npt.NDArray[np.float64]] = []
    while sum(map(len, pieces)) < seconds * RATE:
        pieces.append(_syllable(random))
        breath = int(random.uniform(0.03, 0.07) * RATE)
        pieces.append(0.08 * random.standard_normal(breath) * np.hanning(breath))
    return (0.4 * np.concatenate(pieces)[: int(seconds * RATE)]).astype(np.float32)


def _syllable(random: np.random.Generator) -> npt.NDArray[np.float64]:
    length = int(random.uniform(0.12, 0.22) * RATE)
    pitch = random.uniform(105, 150) * (1 + 0.08 * np.sin(np.linspace(0, np.pi, length)))
    pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) + 0.01 * random.standard_normal(length)
    for frequency, width in zip(_VOWELS[random.integers(len(_VOWELS))], _WIDTHS, strict=True):
        pulses = _resonated(pulses, frequency, width)
    result: npt.NDArray[np.float64] = pulses / np.abs(pulses).max() * np.hanning(length) ** 0.3
    return result


def _resonated(sound: npt.NDArray[np.float64], frequency: float, width: float) -> npt.NDArray[np.float64]:
    radius = np.exp(-np.pi * width / RATE)
    first, second = 2 * radius * np.cos(2 * np.pi * frequency / RATE), -radius * radius
    result = np.zeros_like(sound)
    before = last = 0.0
    for place, sample in enumerate(sound):
        before, last = last, (1 - first - second) * sample + first * last + second * before
        result[place] = last
    return result


def write_wav(path: Path, sounds: Sequence[Sound], *, rate: int = RATE, channels: int = 1) -> Path:
    """Write sounds one after another, the same on each channel, in 16 bits."""
    samples = (np.concatenate(list(sounds)) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, channels).tobytes())
    return path
