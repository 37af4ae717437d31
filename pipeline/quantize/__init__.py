"""The quantize stage: one file per quantizer, each QuantizeJob -> {name: PackedLinear}."""
