"""The grammar of everything that this package puts into a model: names under `atpatch/`, and the metadata beside them.

atpatch/<scope>/<name>     a node, value or weight of the patch; the scope is a site, a hidden layer, or another
atpatch/flagged, score     outputs over all sites; atpatch/<site>/flags that of one of them
atpatch.<entry>            metadata of a model, see `baking.metadata`, or of a node, see below
"""

MIN_OPSET = 13
"""Squeeze, Unsqueeze and ReduceSum take their axes as an input from opset 13 on, and Softmax has one axis."""

PREFIX = "atpatch/"
"""Every node, value and initializer that this package adds is named under this prefix."""

ENTRY = "atpatch."
"""What the metadata entries of a patched model begin with."""

SITE_KEY = f"{ENTRY}site"
"""Metadata of every node that this package adds: the site it belongs to."""

REPLACES_KEY = f"{ENTRY}replaces"
"""Metadata of a node of the patch whose result the base's nodes read in place of a value: the name of that value."""

FLAGGED = f"{PREFIX}flagged"
"""Monitoring output, bool `[batch, 1]`: whether any token of the sample was flagged."""

MONITOR = "monitor"
"""Where the names of what computes monitoring outputs lie, under `atpatch/`."""

SCORE = f"{PREFIX}score"
"""Monitoring output, float `[batch, 1]`: the sample's largest margin over a threshold; flagged where positive."""


def own_name(scope: str, name: str) -> str:
    """The name of a node, value or weight of the patch."""
    return f"{PREFIX}{scope}/{name}"


def flags_name(site: str) -> str:
    """The name of the output with the flags of a site."""
    return own_name(site, "flags")


def units_scope(layer: str) -> str:
    """Where the names of a layer's edits lie, under `atpatch/`: beside those of any site, even one of the same name."""
    return f"{layer}/units"
