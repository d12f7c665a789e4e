"""`python -m appliance` and the `appliance` command."""

from __future__ import annotations

from appliance.core.exits import leave_memory_to_the_system


def main() -> None:
    """Run the command line; exits the process."""
    from appliance.cli import appliance  # noqa: PLC0415  (keeps `import appliance` free of the command line)

    leave_memory_to_the_system()
    appliance()


if __name__ == "__main__":
    main()
