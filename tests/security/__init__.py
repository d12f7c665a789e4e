"""Tests of the vault: API keys and the audit."""
