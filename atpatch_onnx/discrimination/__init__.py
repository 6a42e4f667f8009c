"""Individual discrimination: inputs whose prediction changes with a protected attribute, searched for by gradients."""

from atpatch_onnx.discrimination.attributes import Attribute
from atpatch_onnx.discrimination.found import Discrimination
from atpatch_onnx.discrimination.search import SearchOptions, discriminatory_pairs

__all__ = ["Attribute", "Discrimination", "SearchOptions", "discriminatory_pairs"]
