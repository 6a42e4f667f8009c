"""Other ways to redistribute, in the graph of a search: what the ablation compares neutral keys and values with.

None of them is in the product. Each takes the graph in which flagged tokens are neutral (`Switchboard`) and changes it.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.write import Written
from atpatch_onnx.graph.insertion import Insertion, hand_back
from atpatch_onnx.graph.names import REPLACES_KEY, own_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.layout import MAP

_HIDDEN = -1e9
_TINY = 1e-30


def key_alone(board: ir.Model, written: Sequence[Written]) -> None:
    """Flagged tokens show a neutral key and hand over their own value."""
    _own(board, "value")


def value_alone(board: ir.Model, written: Sequence[Written]) -> None:
    """Flagged tokens show their own key and hand over a neutral value."""
    _own(board, "key")


def masked_out(board: ir.Model, written: Sequence[Written]) -> None:
    """Flagged tokens are hidden from every query."""
    _own(board, "key")
    _own(board, "value")
    for step in written:
        softmax = _softmax(board, step)
        at, flags = _flags(board, step, before=softmax)
        scores = softmax.inputs[0]
        assert scores is not None, "a softmax has scores"
        hidden = at.constant("ablation/hidden", np.array(_HIDDEN, np.float32))
        softmax.replace_input_with(0, at.op("Where", flags, hidden, scores, name="ablation/scores"))


def benign_columns(board: ir.Model, written: Sequence[Written]) -> None:
    """Flagged columns of the map get the uniform share, the others are rescaled; values are neutral."""
    _own(board, "key")
    for step in written:
        _redistribute_columns(board, step)


def papers_columns(board: ir.Model, written: Sequence[Written]) -> None:
    """The paper's way: the same, and flagged tokens hand over their own value."""
    _own(board, "value")
    benign_columns(board, written)


def _own(board: ir.Model, which: str) -> None:
    """Let the base's nodes have their own keys, or values, back."""
    for node in [node for node in board.graph if REPLACES_KEY in node.metadata_props]:
        if str(node.name).endswith(f"/{which}"):
            hand_back(node)
            del node.metadata_props[REPLACES_KEY]


def _softmax(board: ir.Model, step: Written) -> ir.Node:
    """The softmax that makes a site's map."""
    node = _map(board, step).producer()
    while node is not None and node.op_type != "Softmax":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert node is not None, "maps of the samples come out of a softmax"
    return node


def _map(board: ir.Model, step: Written) -> ir.Value:
    assert step.site.map is not None
    assert step.site.map_layout == MAP, "maps of the samples are [samples, heads, queries, tokens]"
    return find_value(board.graph, step.site.map)


def _flags(board: ir.Model, step: Written, *, before: ir.Node) -> tuple[Insertion, ir.Value]:
    """The flags of a site where it is switched on, bool `[samples, 1, 1, tokens]`, just before a node."""
    source = before.inputs[0]
    assert source is not None
    at = Insertion(board.graph, step.site.name, anchor=source.producer())
    level = find_value(board.graph, own_name(step.site.name, "level"))
    flags = at.op("Greater", step.margin, level, name="ablation/flags")
    flags = at.op("Transpose", flags, name="ablation/rows", attributes=[ir.AttrInt64s("perm", [0, 2, 1])])
    return at, at.op("Unsqueeze", flags, at.constant("ablation/axis", np.array([1], np.int64)), name="ablation/columns")


def _redistribute_columns(board: ir.Model, step: Written) -> None:
    """`P' = M visible / n + (1 - M) P (1 - t) / r`, see `baking.reference.redistributed_columns`."""
    P = _map(board, step)
    product = find_value(board.graph, step.site.output).producer()
    assert product is not None
    at, flags = _flags(board, step, before=_softmax(board, step))
    at = Insertion(board.graph, step.site.name, anchor=P.producer())
    last = at.constant("ablation/last", np.array([-1], np.int64))
    zero, one, tiny = (
        at.constant(f"ablation/{name}", np.array([number], np.float32))
        for name, number in (("zero", 0.0), ("one", 1.0), ("tiny", _TINY))
    )

    def total(value: ir.Value, name: str) -> ir.Value:
        return at.op("ReduceSum", value, last, name=f"ablation/{name}", attributes=[ir.AttrInt64("keepdims", 1)])

    def op(op_type: str, *inputs: ir.Value, name: str) -> ir.Value:
        return at.op(op_type, *inputs, name=f"ablation/{name}")

    to = [ir.AttrInt64("to", ir.DataType.FLOAT)]
    m = at.op("Cast", flags, name="ablation/m", attributes=to)
    visible = at.op("Cast", op("Greater", P, zero, name="seen"), name="ablation/visible", attributes=to)
    share = op("Div", op("Mul", m, visible, name="flagged"), op("Max", total(visible, "n"), one, name="keys"), name="B")
    rest = op("Mul", P, op("Sub", one, m, name="benign"), name="R")
    r, t = total(rest, "r"), total(share, "t")
    scale = op("Div", op("Sub", one, t, name="left"), op("Max", r, tiny, name="mass"), name="scale")
    made = op("Add", share, op("Mul", rest, scale, name="rescaled"), name="made")
    result = op("Where", op("Greater", op("Mul", r, t, name="both"), tiny, name="some"), made, P, name="map")
    for index, value in enumerate(product.inputs):
        if value is P:
            product.replace_input_with(index, result)
