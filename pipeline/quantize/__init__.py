"""The quantize stage: one file a quantizer, each QuantizeJob -> {name: PackedLinear}."""
