"""The dense indexes: nearest vectors of each store, derived from the truth in SQLite and made anew on any doubt.

policy*      which kind of index, when to compact, how to search under a filter, which store to close
truth        what is asked of the database
native       faiss, loaded when it is first needed
coding       training, merging and reading faiss indexes
generation   one immutable index file, mapped into memory
snapshot     a generation, the vectors since, and what was removed: what one search sees
folder       the files of a store: written aside, synced, renamed, and flipped by a manifest
indexes      all stores under one memory cap
"""

from appliance.retrieval.vectors.indexes import VectorIndexes
from appliance.retrieval.vectors.truth import VectorTruth

__all__ = ["VectorIndexes", "VectorTruth"]
