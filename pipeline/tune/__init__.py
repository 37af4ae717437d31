"""tune: train what stays float of a quantized model, its scales, norms and biases, towards the original's predictions."""
