"""From a checkpoint, float or packed, to ONNX."""
