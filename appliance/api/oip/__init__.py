"""The Open Inference Protocol v2 (KServe, Triton): health, metadata, statistics, inference and the repository."""
