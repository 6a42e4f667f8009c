"""Put a patch into a graph and take it out again; the arithmetic as nodes and as numpy reference."""
