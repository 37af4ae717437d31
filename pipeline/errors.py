"""What can go wrong, as a tree. The command line turns every one into one line and exit code 2.

::

    EdgepressError
      InputError           a folder, model or text that cannot be used
        ModelError         not a causal language model that edgepress can read
        TextError          a text that is missing, empty or too short
      OptionError          an option or recipe that makes no sense
      OutputError          the output cannot be written (occupied, read-only, disk full)
      MissingPackageError  an optional package is not installed; the message names the pip command
      ProofError           a result failed its own check and was thrown away
      WorkerError          a measuring process crashed or was killed
"""

from __future__ import annotations

__all__ = [
    "EdgepressError",
    "InputError",
    "MissingPackageError",
    "ModelError",
    "OptionError",
    "OutputError",
    "ProofError",
    "TextError",
    "WorkerError",
]


class EdgepressError(Exception):
    """Base of every error that edgepress raises on purpose; its text is one line for the user."""


class InputError(EdgepressError):
    """A folder, model or text that cannot be used."""


class ModelError(InputError):
    """Not a causal language model that edgepress can read."""


class TextError(InputError):
    """A text that is missing, empty or too short."""


class OptionError(EdgepressError):
    """An option or recipe that makes no sense."""


class OutputError(EdgepressError):
    """The output cannot be written."""


class MissingPackageError(EdgepressError):
    """An optional package is not installed."""


class ProofError(EdgepressError):
    """A result failed its own check and was thrown away."""


class WorkerError(EdgepressError):
    """A measuring process crashed or was killed."""
