"""What an inversion refuses, or cannot find."""

from atpatch_onnx.errors import AtPatchError


class InversionError(AtPatchError):
    """No trigger can be searched for, or no class stands out."""
