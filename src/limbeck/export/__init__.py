"""What a device runs: a plain Hugging Face folder with its card, ONNX in fp32 and in int8."""
