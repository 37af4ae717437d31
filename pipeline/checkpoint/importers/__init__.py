"""Readers of third-party quantized checkpoints: one format a file, each a mapping of module name -> PackedLinear."""
