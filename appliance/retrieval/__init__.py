"""Files, vector stores and hybrid search: the truth in SQLite, the indexes derived from it."""
