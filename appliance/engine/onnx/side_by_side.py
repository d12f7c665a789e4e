"""A quantised model beside its original in one process: the same inputs, turn about."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError
from appliance.engine.onnx.comparison import Comparison, ErrorSum, Footprint, judge
from appliance.engine.onnx.quantize import Say
from appliance.engine.onnx.trials import Trial
from appliance.engine.onnx.work import Arrays

ROUNDS = 5
"""Times that each model is run on each sample that is timed."""

TIMED_SAMPLES = 8


class Session:
    """A model on the CPU, with so many threads."""

    def __init__(self, graph: Path, threads: int) -> None:
        """Open it.

        Raises:
            ModelFileError: onnxruntime refuses it.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelFileError(f"onnxruntime cannot open {graph.name}: {error!s:.300}") from error
        self._outputs = [each.name for each in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Evaluate the model.

        Raises:
            InvalidRequestError: It fails on these inputs.
        """
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))
        except Exception as error:
            raise InvalidRequestError(
                f"The model fails on a sample: {error!s:.300}", param="samples", advice="Check the shapes."
            ) from error

    def can_run(self, inputs: Arrays) -> bool:
        """Tell whether the model runs with these inputs."""
        try:
            self.run(inputs)
        except InvalidRequestError:
            return False
        return True


def compare(
    original: Sequence[Path], quantised: Sequence[Path], trial: Trial, *, threads: int, is_static: bool, say: Say
) -> Comparison:
    """Run both models on the samples and return the figures.

    Args:
        original: The files of the model, its graph first.
        quantised: The same of the other.
        trial: What to compare them on.
        threads: CPU threads of each.
        is_static: For the advice.
        say: Told of each step.

    Raises:
        ModelFileError: The quantised model cannot be opened, or answers in another shape.
        EngineError: It answers with what is not a number.
        InvalidRequestError: The original fails on a sample.
    """
    before, after = Session(original[0], threads), Session(quantised[0], threads)
    say(f"measuring the error on {len(trial):,} runs")
    outputs, rows, lengths = _errors(before, after, trial)
    timed = [trial.samples[each] for each in range(min(TIMED_SAMPLES, len(trial)))]
    say(f"timing {ROUNDS * len(timed):,} runs of each")
    seconds = _seconds(before, after, timed)
    first, second = (
        Footprint(bytes=sum(each.stat().st_size for each in files), median_s=statistics.median(of_model))
        for files, of_model in ((original, seconds[0]), (quantised, seconds[1]))
    )
    errors = [each.total() for each in outputs.values()]
    return Comparison(
        data=trial.data,
        is_made_up=trial.is_made_up,
        runs=len(seconds[0]),
        rows=(min(rows), max(rows)),
        length=(min(lengths), max(lengths)) if lengths else None,
        original=first,
        quantised=second,
        outputs=errors,
        advice=judge(first, second, errors, is_static=is_static),
    )


def _errors(before: Session, after: Session, trial: Trial) -> tuple[dict[str, ErrorSum], list[int], list[int]]:
    outputs: dict[str, ErrorSum] = {}
    rows, lengths = [], []
    for index in range(len(trial)):
        inputs = trial.samples[index]
        shape = np.shape(next(iter(inputs.values())))
        rows.append(shape[0] if shape else 1)
        if trial.has_lengths:
            lengths.append(shape[1])
        wanted = trial.read(index, before.run(inputs))
        found = trial.read(index, after.run(inputs))
        for name, array in wanted.items():
            if array.dtype.kind in "biuf":
                _check_alike(name, array, found[name])
                outputs.setdefault(name, ErrorSum(name)).add(array, found[name])
    return outputs, rows, lengths


def _check_alike(name: str, wanted: NDArray[Any], found: NDArray[Any]) -> None:
    if wanted.shape != found.shape:
        raise ModelFileError(
            f"The output {name} of the quantised model is {list(found.shape)} where the original's is "
            f"{list(wanted.shape)}: it finds other things.",
            advice="Keep the original, or calibrate with more data: --static --samples.",
        )
    if not np.isfinite(found).all() and np.isfinite(wanted).all():
        raise EngineError(
            f"The output {name} of the quantised model is not a number.",
            advice="Keep the original, or calibrate with other data: --static --samples.",
            code="not_a_number",
        )


def _seconds(before: Session, after: Session, timed: Sequence[Arrays]) -> tuple[list[float], list[float]]:
    """Return the time of each run of both, whoever is first changing from round to round; both have run before."""
    seconds: tuple[list[float], list[float]] = ([], [])
    sessions = (before, after)
    for number in range(ROUNDS):
        for inputs in timed:
            for which in ((0, 1), (1, 0))[number % 2]:
                began = time.perf_counter()
                sessions[which].run(inputs)
                seconds[which].append(time.perf_counter() - began)
    return seconds
