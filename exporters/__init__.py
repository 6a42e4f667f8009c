"""Front ends: from a transformers model, a torch module or an `.onnx` file to a patched artifact."""
