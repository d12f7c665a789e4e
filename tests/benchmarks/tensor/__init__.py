"""The tensor side against its peers: raw onnxruntime and MLServer, by one load driver.

`tests/benchmarks/tensors` is the command. What it shares with `tests/benchmarks/engine` is in `tests.benchmarks`.
"""
