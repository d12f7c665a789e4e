"""ONNX models over onnxruntime: one thread a session, batches cut by rows or by padded tokens."""
