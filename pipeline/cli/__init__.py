"""The command line: grammar, commands, terminal. No other room prints for the user or chooses exit codes."""

from edgepress.pipeline.cli.commands import main

__all__ = ["main"]
