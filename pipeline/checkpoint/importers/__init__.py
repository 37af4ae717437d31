"""Checkpoints that others quantized, read as they are: one format a file, each a mapping of module name -> PackedLinear."""
