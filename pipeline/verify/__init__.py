"""Checks of a finished artifact, wherever it was copied to."""
