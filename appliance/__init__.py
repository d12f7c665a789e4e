"""AI appliance: models, retrieval and conversations behind the OpenAI API, from one process on the box.

The map, from the top floor down; imports point down only (see the contracts in `pyproject.toml`):

- `cli`       the command line: serve, models, keys, config, chat, doctor, bench
- `bench`     the figures that the appliance promises, measured from outside
- `compose`   the one file that knows every room: builds, connects, starts and stops them
- `api`       the HTTP door: OpenAI resources, health, metrics, OpenAPI document
- `fleet`     the door to a hub: identity, twin, commands, telemetry, signed updates over MQTT
- `hub`       the fleet's other end, a program of its own
- `serving`   the corridor: a request becomes engine work
- `engine`    GGUF models over llama.cpp and ONNX models over onnxruntime, one thread a model
- `registry`  the model catalog, downloads, content-addressed blobs, versions
- `retrieval` files, vector stores and hybrid search over them
- `sessions`  conversations and responses that outlive the process
- `agents`    the loop between a model and its tools, and the tools of the box
- `batches`   files of requests, worked off when nobody else needs the box
- `web`       what the HTTP doors of the box and of the hub have in common
- `security`  API keys and the audit trail
- `messaging` the MQTT connection of the fleet's two ends
- `store`     SQLite databases and their migrations
- `observe`   logs, metrics, machine resources
- `core`      types, errors, settings, clock
"""

__version__ = "0.1.0"
