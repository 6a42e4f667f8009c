"""What is known of one attention computation: `AttentionSite`, and `NearMiss` for what was refused, with the reason.

The axis glossary, used by every room:

| name    | meaning                                                             |
|---------|---------------------------------------------------------------------|
| batch   | samples; one sample's result never depends on another               |
| heads   | attention heads of the map; `kv_heads` of them share keys and values |
| queries | rows of the map: the positions that attend                          |
| keys    | columns of the map: the positions that are attended to              |
| depth   | the width of one head's value vector                                |
| column  | one key position: `P[b, :, :, j]`                                   |
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Form(StrEnum):
    """How the graph writes the attention down."""

    SOFTMAX = "softmax"
    """Decomposed: a Softmax whose result is multiplied with the values."""

    ATTENTION = "Attention"
    """The ONNX op `Attention` (opset 23 and later)."""


class Layout(StrEnum):
    """How values and output are laid out."""

    HEADS = "heads"
    """`[batch, heads, positions, depth]`."""

    PACKED = "packed"
    """`[batch, positions, heads * depth]`."""


Dim = int | str | None
"""A static size, a symbolic name, or None where shape inference could not tell."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention computation of a graph; the unit that is patched.

    Values are referred to by name: names are unique in a graph, nodes may have none.
    """

    name: str
    """Stable and recognisable, e.g. `vit.layers.3.attention`; else `site_3`."""

    index: int
    """Position among the graph's sites, in the graph's node order."""

    form: Form
    layout: Layout

    map: str | None
    """Name of the attention map `P` `[batch, heads, queries, keys]` where it meets the values; None in a fused op."""

    value: str
    """Name of the values `V` that meet the map."""

    output: str
    """Name of `Y = P V`, the result of the site."""

    heads: Dim
    kv_heads: Dim
    queries: Dim
    keys: Dim
    depth: Dim

    dtype: str
    """Element type of the output, as ONNX names it: FLOAT, FLOAT16, ..."""

    masked: bool
    """Whether a mask, a bias or causality can make weights of the map zero."""

    self_attention: bool
    """Whether queries and keys are positions of the same sequence."""

    token_axis: str
    """The sequence that the keys are positions of; flags are carried between sites of one token axis."""

    nodes: tuple[str, ...]
    """The nodes from the product of Q and K to the product with V, for people to find the place."""

    def to_json(self) -> dict[str, Any]:
        """The site as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like attention and was refused."""

    nodes: tuple[str, ...]
    reason: str

    attention: bool = False
    """Whether this is attention, in a form that is not supported; else it is e.g. a softmax over classes."""

    def to_json(self) -> dict[str, Any]:
        """The near miss as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Matches:
    """Everything that matching found out about a graph."""

    sites: tuple[AttentionSite, ...]
    near_misses: tuple[NearMiss, ...]

    def to_json(self) -> dict[str, Any]:
        """Both lists as plain JSON types."""
        return {
            "sites": [site.to_json() for site in self.sites],
            "near_misses": [miss.to_json() for miss in self.near_misses],
        }
