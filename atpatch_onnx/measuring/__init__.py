"""Hold a patched model against its base: structure, numbers, time; and every kind of fix against the others."""
