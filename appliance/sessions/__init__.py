"""Conversations and responses that outlive the process: a ledger of items in SQLite, and what of it fits a prompt."""
