"""Text that a model itself writes, to calibrate on: sampled once, kept in the cache folder."""
