"""A static page on which a patched model runs in the browser."""
