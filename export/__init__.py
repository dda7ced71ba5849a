"""Export of a story model to ONNX and TensorRT (installed as fastory.export)."""
