"""The product of a map with its values, whatever operator writes it: which axis of which tensor is which."""

from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.matching.chains import Meeting
from atpatch_onnx.matching.view import View


@dataclass(frozen=True)
class Product:
    """A label for each axis of the map, the values and the output: `q`, `k`, `d`, and numbers for the leading ones."""

    map: tuple[str, ...]
    values: tuple[str, ...]
    output: tuple[str, ...]
    map_value: ir.Value
    value: ir.Value

    @property
    def leading(self) -> tuple[str, ...]:
        """Labels of the map's axes besides queries and keys."""
        return tuple(label for label in self.map if label not in ("q", "k"))


def read_product(meeting: Meeting, view: View) -> Product | str:
    """The axes of the product in which a map meets its values, or why they cannot be told."""
    node = meeting.node
    if node.op_type in ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return "the map meets the values as whole numbers; quantize only products with weights (MatMulConstBOnly)"
    if len([operand for operand in node.inputs if operand is not None]) != 2:
        return f"the map meets the values in {node.op_type} with {len(node.inputs)} operands"
    value = node.inputs[1 - meeting.index]
    assert value is not None, "both operands are there"
    if node.op_type == "Einsum":
        return _einsum(node, meeting, value, view)
    of_map, of_values = view.rank(meeting.value), view.rank(value)
    rank = of_map or of_values  # what is not known of one is as with the other
    if rank is None:
        return "the shape of its map or values cannot be inferred"
    return _matmul(node, meeting, value, (rank, of_values or rank))


def _matmul(node: ir.Node, meeting: Meeting, value: ir.Value, ranks: tuple[int, int]) -> Product | str:
    """MatMul, FusedMatMul and Gemm; the map stands on the left, or, everything transposed, on the right."""
    if any(name.startswith("transBatch") and node.attributes[name].as_int() for name in node.attributes):
        return f"the map meets the values in {node.op_type} with transposed batches"
    index = meeting.index
    leads = [str(axis) for axis in range(max(ranks) - 2)]
    map_, values, output = (["q", "k"], ["k", "d"], ["q", "d"]) if index == 0 else (["k", "q"], ["d", "k"], ["d", "q"])
    for name, own, side in (("transA", 0, (map_, values)), ("transB", 1, (map_, values))):
        if name in node.attributes and node.attributes[name].as_int():
            (side[0] if own == index else side[1]).reverse()
    return Product(
        tuple(leads[max(ranks) - ranks[0] :] + map_),
        tuple(leads[max(ranks) - ranks[1] :] + values),
        tuple(leads + output),
        meeting.value,
        value,
    )


def _einsum(node: ir.Node, meeting: Meeting, value: ir.Value, view: View) -> Product | str:
    equation, index = spelled_out(node, view), meeting.index
    terms, arrow, output = equation.partition("->")
    operands = terms.split(",")
    if not arrow or "." in equation or len(operands) != 2 or any(len(set(t)) < len(t) for t in (*operands, output)):
        return f"the map meets the values in the Einsum {equation!r}"
    map_, values = operands[index], operands[1 - index]
    contracted = [letter for letter in map_ if letter in values and letter not in output]
    own = [letter for letter in map_ if letter not in values and letter in output]
    depth = [letter for letter in values if letter not in map_ and letter in output]
    if len(contracted) != 1 or not own or len(depth) != 1 or len(output) != len({*map_, *values}) - 1:
        return f"the map meets the values in the Einsum {equation!r}"
    known = {contracted[0]: "k", own[-1]: "q", depth[0]: "d"}
    leading = [letter for letter in map_ if letter not in known]
    known |= {letter: str(number) for number, letter in enumerate(leading)}
    of_map, of_values, of_output = (tuple(known[letter] for letter in term) for term in (map_, values, output))
    return Product(of_map, of_values, of_output, meeting.value, value)


def spelled_out(node: ir.Node, view: View) -> str:
    """The equation of an Einsum with a letter for each axis behind an ellipsis, if operands have equally many there."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    ranks = [view.rank(operand) for operand in node.inputs]
    hidden = {
        rank - len(term.replace("...", ""))
        for rank, term in zip(ranks, terms, strict=False)
        if rank is not None and "..." in term
    }
    if len(hidden) != 1:
        return equation
    free = [letter for letter in "ABCDEFGH" if letter not in equation]
    return equation.replace("...", "".join(free[: hidden.pop()]))
