"""The grammar of everything that this package puts into a model: names under `atpatch/`, and the metadata beside them.

atpatch/<scope>/<name>     a node, value or weight of ours; the scope is a site's name, a hidden layer's, or another
atpatch/<scope>/base       what the base computes, where a value of ours has taken its name
atpatch/flagged, score     outputs over all sites; atpatch/<site>/flags that of one of them
atpatch.<entry>            metadata of a model, see `baking.metadata`, or of a node, see below
"""

DOMAIN = "atpatch"
"""The operator domain of the functions that this package brings into a graph."""

DOMAIN_VERSION = 1

MIN_OPSET = 15
"""CastLike and Shape with a start came with opset 15."""

PREFIX = "atpatch/"
"""Every node, value and initializer that this package adds is named under this prefix."""

ENTRY = "atpatch."
"""What the metadata entries of a patched model begin with."""

SITE_KEY = f"{ENTRY}site"
"""Metadata of every node that this package adds: the site it belongs to."""

OUTPUTS_KEY = f"{ENTRY}outputs"
"""Metadata of a base node that was asked for more outputs: how many it had."""

MODE_KEY = f"{ENTRY}mode"
"""Metadata of a base node that was asked for its map: the mode that it stated before, if it did."""

FLAGGED = f"{PREFIX}flagged"
"""Monitoring output, bool `[batch, 1]`: whether any column of the sample was flagged."""

SCORE = f"{PREFIX}score"
"""Monitoring output, float `[batch, 1]`: the sample's largest margin over a threshold; flagged where positive."""


def own_name(scope: str, name: str) -> str:
    """The name of a node, value or weight of ours."""
    return f"{PREFIX}{scope}/{name}"


def base_name(scope: str) -> str:
    """The name of the base's value, where one of ours has taken its own."""
    return own_name(scope, "base")


def flags_name(site: str) -> str:
    """The name of the output with the flags of a site."""
    return own_name(site, "flags")


def units_scope(layer: str) -> str:
    """Where the names of a layer's edits lie, under `atpatch/`: beside those of any site, even one of the same name."""
    return f"{layer}/units"


# The values of a joint decision: its own, those of its detection, and those of its second pass

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
