"""The operator domain of the functions that this package brings into a graph."""

DOMAIN = "atpatch"
DOMAIN_VERSION = 1

MIN_OPSET = 15
"""CastLike and Shape with a start came with opset 15."""
