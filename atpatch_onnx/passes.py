"""How the values of a joint decision are named: its own, those of its detection, and those of its second pass."""

from atpatch_onnx.graph import PREFIX

SCOPE = "joint"
"""Where the joint decision's names lie, under `atpatch/`."""

AGAIN = f"{PREFIX}again"
"""What the nodes of the second pass are marked as, and where their names lie; no site can have this name."""


def again(name: str) -> str:
    """The name of a value in the second pass."""
    return f"{AGAIN}/{name.removeprefix(PREFIX)}"


def first_name(name: str) -> str:
    """The name in the first pass of what `again` named; a name of the first pass stays as it is."""
    return name.removeprefix(f"{AGAIN}/")


def detection_scope(site: str) -> str:
    """Where the names of a site's detection lie, under `atpatch/`, if it is part of a joint decision."""
    return f"{site}/detection"


def output_scope(number: int) -> str:
    """Where the names of the chosen output of this number lie, under `atpatch/`."""
    return f"{SCOPE}/{number}"
