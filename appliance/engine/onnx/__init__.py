"""ONNX models over onnxruntime: one worker a session with its lanes, batches cut by rows or by padded tokens."""
