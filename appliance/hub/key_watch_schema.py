"""One row: the id of the director's key that has signed the jobs and desired twins that were sent.

Whoever notes that something was sent names the key that signed it: it counts only if that is still this one.
"""

from __future__ import annotations

STILL_SIGNS = "? = (SELECT key FROM signing_key)"

STATEMENTS = ("CREATE TABLE signing_key (key TEXT PRIMARY KEY) STRICT, WITHOUT ROWID",)
