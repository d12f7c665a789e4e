"""The engine against its peers: llama-server and llama-cpp-python's packaged server, by one load driver.

`tests/benchmarks/engine` is the command. `appliance.bench` measures a server over HTTP and knows no peer; this package
knows them, and what is promised beside them.
"""
