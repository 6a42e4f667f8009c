"""What a patch does at its sites, held against the base.

Replaced tensors entry by entry, and outputs of the base that is given them. Neither has a tolerance: the base's own
operators do the rest.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.read_back import baked_weight
from atpatch_onnx.graph.insertion import replaced_value
from atpatch_onnx.graph.names import REPLACES_KEY, SITE_KEY, own_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.running.batching import AS_GIVEN, Batching
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Session


class Replaced:
    """One tensor of the base that a patched file replaces.

    Args:
        model: The patched model.
        node: Ours, whose result stands in for the tensor.
        site: At which it does.
    """

    def __init__(self, model: ir.Model, node: ir.Node, site: AttentionSite) -> None:
        value = replaced_value(node)
        assert value is not None, "a rule of every patched graph"
        self.site, self.base_name = site.name, str(node.metadata_props[REPLACES_KEY])
        self.value, self.result = str(value.name), str(node.outputs[0].name)
        kind = str(node.name).removeprefix(own_name(site.name, ""))
        self.place: Place = site.value if kind == "value" else site.key
        self.neutral = baked_weight(model, site.name, f"neutral_{kind}")
        together = kind == "key_value"  # which may be all that the tensor has
        some = own_name(site.name, "columns") in model.graph.initializers if together else not self.place.whole
        self.columns = baked_weight(model, site.name, "columns") if some else None

    def holds(self, before: Array, after: Array, margin: Array) -> bool:
        """Whether flagged tokens are neutral and all others keep their bits."""
        if margin.ndim != 3 or margin.shape[2] != 1:
            return False
        try:
            flags = self._laid_out(margin > 0, before.shape)
            chosen = flags if self.columns is None else flags & self.columns
            fits = np.broadcast_shapes(chosen.shape, self.neutral.shape, before.shape) == before.shape
        except ValueError:
            fits = False
        if not fits:  # the file was edited
            return False
        own = self.place.quantization
        neutral = self.neutral if own is None else own.quantized(self.neutral, before.dtype)
        expected = np.where(chosen, neutral, before)
        return expected.dtype == after.dtype and expected.shape == after.shape and expected.tobytes() == after.tobytes()

    def _laid_out(self, flags: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Flags `[maps, tokens, 1]` such that they broadcast to the tensor, of this shape.

        Raises:
            ValueError: They do not.
        """
        found = flags[..., 0].T if self.place.order == "kn" else flags[..., 0]
        return found.reshape([size if letters else 1 for letters, size in zip(self.place.axes, shape, strict=True)])


def replaced_in(model: ir.Model, sites: Sequence[AttentionSite]) -> list[Replaced]:
    """All tensors that a patched file replaces at these sites, in graph order."""
    by_name = {site.name: site for site in sites}
    nodes = [node for node in model.graph if REPLACES_KEY in node.metadata_props]
    chosen = [(node, by_name.get(node.metadata_props.get(SITE_KEY, ""))) for node in nodes]
    return [Replaced(model, node, site) for node, site in chosen if site is not None]


class Driven:
    """The base, given the tensors that a patched model replaces: the outputs must be those of the patched model."""

    def __init__(
        self,
        base: ir.Model,
        replaced: Sequence[Replaced],
        batching: Batching = AS_GIVEN,
        providers: Providers = ("cpu",),
    ) -> None:
        model = graphs.copy(base)
        self._fed: dict[str, str] = {}
        for number, (name, one) in enumerate(_last(replaced)):
            value = find_value(model.graph, name)
            dtype = ir.TensorType(ir.DataType[one.place.dtype])
            given = ir.Value(name=own_name("driven", str(number)), type=dtype, shape=value.shape)
            reader = None if one.place.reader is None else find_value(model.graph, one.place.reader).producer()
            for node, index in list(value.uses()):
                if reader in (None, node):
                    node.replace_input_with(index, given)
            for index, output in enumerate(model.graph.outputs):
                if output is value and reader is None:
                    value.name, given.name = own_name("driven", f"{number}/base"), value.name
                    model.graph.outputs[index] = given
            model.graph.inputs.append(given)
            self._fed[str(given.name)] = one.result
        self._session = Session(model, optimize=False, batching=batching, providers=providers)

    def run(self, inputs: Mapping[str, Array], inner: Mapping[str, Array]) -> dict[str, Array]:
        """The base's outputs, given the replaced tensors that the patched model computed for these inputs."""
        return self._session.run({**inputs, **{name: inner[result] for name, result in self._fed.items()}})


def _last(replaced: Sequence[Replaced]) -> list[tuple[str, Replaced]]:
    """What the base goes on with, and the name of what that is of the base: the last, where sites share a tensor."""
    names: dict[str, str] = {}
    for one in replaced:
        names[one.result] = names.get(one.base_name, one.base_name)
    return [(name, one) for (name, _), one in {(names[one.result], one.place.reader): one for one in replaced}.items()]
