"""The command line: parses, calls, prints. One file a command; nothing heavy is imported before a command runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the command ``secateur``."""
    from secateur.cli.app import run

    run()


__all__ = ["main"]
