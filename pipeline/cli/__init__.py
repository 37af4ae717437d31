"""The command line: grammar, commands, what the terminal hears. Nothing else prints, nothing else makes exit codes."""

from edgepress.pipeline.cli.commands import main

__all__ = ["main"]
