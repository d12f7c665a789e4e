"""Find speech in a WAV file: a microphone's sound through the model silero-vad on an appliance.

    appliance models pull silero-vad
    pip install 'tritonclient[http]' numpy
    python detect_speech.py recording.wav

The sound must have 16,000 samples a second; `ffmpeg -i any.mp3 -ar 16000 -ac 1 recording.wav` makes such a file.
"""

from __future__ import annotations

import argparse
import sys
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray

Sound = NDArray[np.float32]

RATE = 16_000
WINDOW = 512
"""Samples that the model judges at once: 32 ms."""
CONTEXT = 64
"""Samples before each window that it wants to hear again."""

SPEECH = 0.5
"""Probability from which on a window is speech; what has begun goes on until it falls below `SILENCE`."""
SILENCE = 0.35
LEAST_SPEECH = RATE // 4
LEAST_SILENCE = RATE // 10
MARGIN = RATE * 3 // 100
"""Samples that are added to each end, so that no breath is cut off."""


def read_wav(path: Path) -> Sound:
    """Return the sound from -1 to 1, its channels mixed into one."""
    with wave.open(str(path)) as file:
        if file.getframerate() != RATE or file.getsampwidth() != 2:
            sys.exit(
                f"{path} has {file.getframerate():,} samples a second of {file.getsampwidth() * 8} bits; it must "
                f"have {RATE:,} of 16. Convert it: ffmpeg -i {path} -ar {RATE} -ac 1 -sample_fmt s16 new.wav"
            )
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
    sound: Sound = (samples.mean(axis=1) / 32768).astype(np.float32)
    return sound


def windows(sound: Sound) -> Iterator[Sound]:
    """Yield each window behind the last samples of the one before; the last one is filled up with silence."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound, np.zeros(-len(sound) % WINDOW, np.float32)])
    for start in range(0, len(padded) - CONTEXT, WINDOW):
        yield padded[start : start + CONTEXT + WINDOW]


def probabilities(client: Any, model: str, sound: Sound) -> list[float]:
    """Return how likely each window is speech. The model's memory is a tensor that goes from call to call."""
    found = []
    state = np.zeros((2, 1, 128), np.float32)
    for window in windows(sound):
        given = {"input": window[np.newaxis], "state": state, "sr": np.array(RATE)}
        result = client.infer(model, [tensor(name, array) for name, array in given.items()])
        found.append(float(result.as_numpy("output")[0, 0]))
        state = result.as_numpy("stateN")
    return found


def tensor(name: str, array: NDArray[Any]) -> Any:
    """Return an array as the protocol sends it, in binary."""
    datatype = {"float32": "FP32", "int64": "INT64"}[str(array.dtype)]
    wrapped = triton.InferInput(name, list(array.shape), datatype)
    wrapped.set_data_from_numpy(array)
    return wrapped


def segments(found: Sequence[float], length: int) -> list[tuple[int, int]]:
    """Return the first sample of each stretch of speech, and the one behind its last."""
    spoken: list[tuple[int, int]] = []
    begin = quiet = None
    for place, probability in enumerate(found):
        at = place * WINDOW
        if probability >= SPEECH:
            begin, quiet = at if begin is None else begin, None
        elif probability < SILENCE and begin is not None:
            quiet = at if quiet is None else quiet
            if at - quiet >= LEAST_SILENCE:
                spoken.append((begin, quiet))
                begin = quiet = None
    if begin is not None:
        spoken.append((begin, length))
    spoken = [each for each in spoken if each[1] - each[0] > LEAST_SPEECH]
    return [(max(0, begin - MARGIN), min(length, end + MARGIN)) for begin, end in spoken]


def main() -> None:
    """Print the seconds of speech in a file."""
    parser = argparse.ArgumentParser(description="Find speech in a WAV file, with silero-vad on an appliance.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--server", default="127.0.0.1:8080", help="address of the appliance")
    parser.add_argument("--model", default="silero-vad")
    arguments = parser.parse_args()
    sound = read_wav(arguments.file)
    with triton.InferenceServerClient(arguments.server) as client:
        found = probabilities(client, arguments.model, sound)
    for begin, end in segments(found, len(sound)):
        print(f"{begin / RATE:8.2f} s to {end / RATE:8.2f} s")


if __name__ == "__main__":
    main()
