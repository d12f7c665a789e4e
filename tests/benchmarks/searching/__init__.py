"""How fast and how well passages are found; `tests/benchmarks/retrieval` runs it."""
