"""Batches: files of requests, worked off line by line in the lowest tier, and resumed after a crash.

    create ─► validating ─► in_progress ─► finalizing ─► completed
                   │             │              ├──────► expired      past its time
                   │             │              └──────► failed       its input or its key is gone
                   │             └─► cancelling ───────► cancelled
                   └─► failed (lines that will not do)

`states` and `lines` decide, `ledger` keeps (`batches.db`), `runner` works, `output` writes the files.
"""
