"""Embeddings of GGUF encoders and decoders over llama.cpp, in a context and a thread of their own.

A chat's KV cells are never touched: even where a chat model is asked to embed, only its weights are shared.

- `batcher`  which inputs are evaluated together (pure)
- `pooling`  how a model's states become one vector, and which inputs it can take (pure)
- `context`  batches of inputs become vectors
- `worker`   the thread
- `engine`   the event loop's side of the thread
"""
