"""One quantizer a file; each returns PackedLinear."""
