"""ONNX graphs: written node by node, saved, and changed on the disk."""
