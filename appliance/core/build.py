"""When this version of the program was made: no honest clock shows an earlier time."""

from __future__ import annotations

BUILT = 1_795_305_600.0
"""Unix seconds; raised with each release of the program."""
