"""Put a patch into a graph and take it out again; the arithmetic as onnxscript functions and as numpy reference."""
