"""Places by hand: every way in which a tensor may hold the keys of a site, and tensors that do."""

from math import prod

import numpy as np
import onnx_ir as ir

from atpatch_onnx.matching.sites import Place

MAPS, TOKENS, HEADS, DEPTH = 4, 5, 2, 3
FEATURES = HEADS * DEPTH


def _place(
    axes: str,
    sizes: tuple[int, ...] = (FEATURES,),
    *,
    start: int = 0,
    steps: tuple[tuple[int, int], ...] = ((DEPTH, HEADS), (1, DEPTH)),
) -> Place:
    """A place with axes such as `n k . .`, where each point is an axis of features, of these sizes."""
    letters = tuple("" if axis == "." else axis for axis in axes.split())
    of_features = iter(sizes)
    own = tuple(1 if axis else next(of_features) for axis in letters)
    return Place("tensor", letters, own, HEADS, DEPTH, start, steps)


PLACES = {
    "a projection": _place("n k ."),
    "tokens first": _place("k n ."),
    "heads apart": _place("n k . .", (HEADS, DEPTH)),
    "heads before tokens": _place("n . k .", (HEADS, DEPTH)),
    "heads first": _place(". n k .", (HEADS, DEPTH)),
    "heads before tokens, tokens before maps": _place("k . n .", (HEADS, DEPTH)),
    "transposed": _place("n . . k", (HEADS, DEPTH)),
    "transposed, heads in one": _place("n . k"),
    "depth before heads": _place("n k . .", (DEPTH, HEADS), steps=((1, HEADS), (HEADS, DEPTH))),
    "maps and tokens in one": _place("nk ."),
    "tokens and maps in one": _place("kn ."),
    "maps and tokens in one, heads apart": _place("nk . .", (HEADS, DEPTH)),
    "maps and tokens in one, features first": _place(". nk"),
    "packed": _place("n k .", (3 * FEATURES,), start=FEATURES),
    "packed, tokens first": _place("k n .", (3 * FEATURES,), start=2 * FEATURES),
    "packed, stacked": _place("n k . .", (3, FEATURES), start=FEATURES),
    "packed by head": _place("n k . . .", (HEADS, 3, DEPTH), start=DEPTH, steps=((3 * DEPTH, HEADS), (1, DEPTH))),
    "packed by head in one": _place("n k .", (3 * FEATURES,), start=DEPTH, steps=((3 * DEPTH, HEADS), (1, DEPTH))),
    "packed, stacked first": _place(". n k .", (3, FEATURES), start=2 * FEATURES),
    "packed, maps and tokens in one": _place("nk .", (3 * FEATURES,), start=FEATURES),
    "packed, transposed": _place("n . k", (3 * FEATURES,), start=FEATURES),
}


def laid_out(keys: np.ndarray, place: Place, rng: np.random.Generator) -> np.ndarray:
    """A tensor that holds keys `[maps, heads, tokens, depth]` where a place says so, and noise elsewhere."""
    maps, heads, tokens, depth = keys.shape
    flat = rng.normal(size=(maps, tokens, prod(place.sizes))).astype(keys.dtype)
    flat[..., place.columns.reshape(-1)] = keys.transpose(0, 2, 1, 3).reshape(maps, tokens, heads * depth)
    axes = [letters for letters in place.axes if letters]
    if axes in (["k", "n"], ["kn"]):
        flat = flat.swapaxes(0, 1)
    features = [size for size, letters in zip(place.sizes, place.axes, strict=True) if not letters]
    lead = flat.shape[:2] if len(axes) == 2 else (maps * tokens,)
    found = flat.reshape(*lead, *features)
    order = [axis for axis, letters in enumerate(place.axes) if letters]
    order += [axis for axis, letters in enumerate(place.axes) if not letters]
    return np.ascontiguousarray(np.moveaxis(found, range(found.ndim), order))


def around(place: Place, dtype: ir.DataType = ir.DataType.FLOAT, bias: np.ndarray | None = None) -> ir.Model:
    """A graph without a node: samples, the tensor of a place, margins of its tokens, and an operator's own bias."""
    inputs = [
        _input("x", ir.DataType.FLOAT, 2),
        _input(place.value, dtype, len(place.axes)),
        _input("margin", ir.DataType.FLOAT, 3),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="around")
    if bias is not None:
        value = ir.Value(name="bias", const_value=ir.tensor(bias, name="bias"), type=ir.TensorType(ir.DataType.FLOAT))
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=8)


def _input(name: str, dtype: ir.DataType, rank: int) -> ir.Value:
    shape = ir.Shape([f"{name}_{axis}" for axis in range(rank)])
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
