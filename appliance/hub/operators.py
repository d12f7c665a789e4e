"""Who may do what at the operators' door, and the command that makes their keys."""

from __future__ import annotations

SCOPES = ("read", "operate", "metrics", "admin")
"""`read` may look, `operate` may change what devices are and do, `metrics` may read `/metrics`, `admin` may do all."""

MAKE_KEY = "appliance hub api-keys create"
