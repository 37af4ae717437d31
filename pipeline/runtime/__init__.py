"""Running an artifact: the light base, which needs onnxruntime and no torch."""
