"""The stages, the runner and the command line."""
