"""A camera and a microphone: the programs in models/examples with the real models on a real server, over /v2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import tritonclient.http as triton

from appliance.core.settings import Settings
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests import examples
from tests.examples import FOLDER, RATE, Sound
from tests.journeys.processes import ServerProcess, server_process

pytestmark = [pytest.mark.journey, pytest.mark.slow]

speech = examples.load("detect_speech")
WINDOW, CONTEXT = 512, 64


@pytest.fixture(scope="module")
def server(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(real_data, tmp_path_factory.mktemp("server"), "--model", "") as subject:
        subject.wait_until_listening()
        yield subject


@pytest.fixture(scope="module")
def detector(real_data: Path) -> Any:
    """The voice detector's file in an onnxruntime session of the test's own."""
    database = Database(real_data / "appliance.db", read_only=True)
    path = open_registry(Settings(data_dir=real_data), database).resolve("silero-vad").files[0].path
    database.close()
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(program: str, file: Path, server: ServerProcess) -> list[str]:
    """Run an example as a user would, and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{program}.py"), str(file), "--server", f"127.0.0.1:{server.port}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr + server.log[-2000:]
    return done.stdout.splitlines()


# The camera


def read(picture: Any, folder: Path, server: ServerProcess) -> list[str]:
    picture.save(folder / "picture.png")
    return [line.split(maxsplit=5)[5] for line in run("detect_text", folder / "picture.png", server)]


def test_words_in_a_picture_are_read(server: ServerProcess, tmp_path: Path) -> None:
    picture = examples.blank()
    examples.write(picture, (40, 40), "Pump 7 stopped at 03:14")
    examples.write(picture, (40, 160), "Pressure 4.2 bar", colour="navy")
    examples.write(picture, (520, 160), "HIGH", colour="crimson")
    examples.write(picture, (40, 300), "Call the night shift", size=32)
    picture.paste((0, 0, 0), (0, 400, 900, 500))
    examples.write(picture, (40, 420), "white on black", colour="white")
    assert read(picture, tmp_path, server) == [
        "Pump 7 stopped at 03:14",
        "Pressure 4.2 bar",
        "HIGH",
        "Call the night shift",
        "white on black",
    ]


def test_chinese_in_a_picture_is_read(server: ServerProcess, tmp_path: Path) -> None:
    picture = examples.blank(900, 300)
    examples.write_chinese(picture, (40, 40), "中山工口")
    examples.write_chinese(picture, (480, 160), "王田日中", size=56)
    assert read(picture, tmp_path, server) == ["中山工口", "王田日中"]


def test_a_line_on_its_head_is_turned_before_it_is_read(server: ServerProcess, tmp_path: Path) -> None:
    picture = examples.blank(900, 400)
    examples.write(picture, (40, 40), "This way up")
    picture.paste(examples.upside_down("Valve closed"), (40, 250))
    assert read(picture, tmp_path, server) == ["This way up", "Valve closed"]


def test_more_lines_than_share_a_request_are_read(server: ServerProcess, tmp_path: Path) -> None:
    picture = examples.blank(700, 900)
    wanted = [f"Line {number} of the list" for number in range(1, 11)]
    for number, line in enumerate(wanted):
        examples.write(picture, (40, 30 + 85 * number), line, size=40)
    assert read(picture, tmp_path, server) == wanted


def test_an_empty_picture_has_no_text(server: ServerProcess, tmp_path: Path) -> None:
    assert read(examples.blank(), tmp_path, server) == []


# The microphone


def reference_probabilities(detector: Any, sound: Sound) -> npt.NDArray[np.float32]:
    """Return what silero's own pipeline does: windows behind the end of the one before, the state carried on."""
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32)
    found = []
    for start in range(0, len(sound), WINDOW):
        window = np.zeros((1, WINDOW), np.float32)
        piece = sound[start : start + WINDOW]
        window[0, : len(piece)] = piece
        heard = np.concatenate([context, window], axis=1)
        output, state = detector.run(["output", "stateN"], {"input": heard, "state": state, "sr": np.array(RATE)})
        context = heard[:, -CONTEXT:]
        found.append(output[0, 0])
    return np.array(found)


def reference_segments(found: Sequence[float]) -> list[tuple[float, float]]:
    """Return seconds of speech, step by step as silero's own pipeline does with its defaults."""
    spoken: list[tuple[int, int]] = []
    triggered, start, temporary_end = False, 0, 0
    for number, probability in enumerate(found):
        at = number * WINDOW
        if probability >= 0.5:
            temporary_end = 0
            if not triggered:
                triggered, start = True, at
        elif probability < 0.35 and triggered:
            temporary_end = temporary_end or at
            if at - temporary_end >= 0.1 * RATE:
                spoken.append((start, temporary_end))
                triggered, temporary_end = False, 0
    if triggered:
        spoken.append((start, len(found) * WINDOW))
    return [(start / RATE - 0.03, end / RATE + 0.03) for start, end in spoken if end - start > 0.25 * RATE]


def test_speech_is_found_where_it_is(server: ServerProcess, detector: Any, tmp_path: Path) -> None:
    quiet = examples.silence
    sounds = [quiet(1), examples.voice(1.5, 1), quiet(1), examples.voice(2, 2), quiet(0.8)]
    path = examples.write_wav(tmp_path / "talk.wav", sounds)
    found = [(float(line.split()[0]), float(line.split()[3])) for line in run("detect_speech", path, server)]
    for (begin, end), (real_begin, real_end) in zip(found, [(1, 2.5), (3.5, 5.5)], strict=True):
        assert abs(begin - real_begin) < 0.1
        assert abs(end - real_end) < 0.15
    wanted = reference_segments(list(reference_probabilities(detector, np.concatenate(sounds))))
    assert np.abs(np.array(found) - np.array(wanted)).max() < 0.006, "they are printed to a hundredth"


def test_the_server_computes_what_onnxruntime_does(server: ServerProcess, detector: Any) -> None:
    sound = np.concatenate([examples.silence(0.3), examples.voice(1.2, 3), examples.tone(0.5), examples.voice(0.7, 4)])
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        found = speech.probabilities(client, "silero-vad", sound)
    wanted = reference_probabilities(detector, sound)
    assert np.abs(np.array(found) - wanted).max() < 1e-4
    assert max(wanted) > 0.9


def test_neither_a_quiet_room_nor_a_whistle_is_speech(server: ServerProcess, tmp_path: Path) -> None:
    path = examples.write_wav(tmp_path / "room.wav", [examples.silence(1), examples.tone(1), examples.silence(0.5)])
    assert run("detect_speech", path, server) == []
