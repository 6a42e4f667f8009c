"""The only room that imports onnxruntime: sessions, inputs, predictions, their rates, and times."""
