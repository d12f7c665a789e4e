"""MLServer's runtime for an ONNX file, as its manual tells to write one; it runs in MLServer's environment.

The file, the session's threads and how many evaluations there may be at once come from `model-settings.json`.
Evaluation is left to threads, so that the event loop can take the next requests meanwhile.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):  # type: ignore[misc]
    """Serves one graph."""

    async def load(self) -> bool:
        """Open the session."""
        path, extra = self.settings.parameters.uri, self.settings.parameters.extra
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = extra["threads"]
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [each.name for each in self._session.get_outputs()]
        self._lanes = ThreadPoolExecutor(extra["lanes"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Evaluate a request, or several that MLServer made one of."""
        feed = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        names = [each.name for each in payload.outputs] if payload.outputs else self._outputs
        arrays = await asyncio.get_running_loop().run_in_executor(self._lanes, self._session.run, names, feed)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(names, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
