"""What a patched file is made of, and who says so: its manifest, a statement, a bill of materials, a signature."""
