"""The map and the values of fused attention, computed by plain ONNX operators beside the fused node.

com.microsoft's fused attention gives Y and keeps its map to itself. The node stays as it is, and so does its Y; what it
does inside is written out once more from the node's own inputs, up to the map P and the values V with `P V = Y`. Only
operators whose signature is the same from opset 15 on are used, so the result runs wherever plain ONNX runs.

All arithmetic is float32, as within the fused kernels, which use float32 for float16 inputs as well.

One operator a file; what they share is beside them: reading a node, writing nodes, the way from scores to the map.
"""

import onnx_ir as ir

from atpatch_onnx.baking import shadow_attention as attention
from atpatch_onnx.baking import shadow_grouped as grouped
from atpatch_onnx.baking import shadow_multi_head as multi_head
from atpatch_onnx.graph.insertion import Insertion

_WRITERS = {"MultiHeadAttention": multi_head.write, "Attention": attention.write, "GroupQueryAttention": grouped.write}


def map_and_values(node: ir.Node, at: Insertion) -> tuple[ir.Value, ir.Value]:
    """Write the map and the values of a fused node that `matching.fused` found no fault with.

    Args:
        node: com.microsoft `MultiHeadAttention`, `Attention` or `GroupQueryAttention`; it is left as it is.
        at: Where the nodes go; the fused node's inputs must be computed before.

    Returns:
        P float32 `[batch, heads, queries, keys]`, rows as the kernel uses them: they sum to 1, or less where there is
        a sink, and are zero where `GroupQueryAttention` sees no key; and V float32 `[batch, kv heads, keys, depth]`,
        with bias and past. In `GroupQueryAttention`, keys are as many as `total_sequence_length` says, in the order of
        positions, and rows of queries behind the end of a shorter sample are as if they were its tokens: what the
        kernels put there differs from one to the next.

    Raises:
        BakeError: The number of axes of an input decides what the node does, and it is not known.
    """
    P, V = _WRITERS[node.op_type](node, at)
    P.dtype = V.dtype = ir.DataType.FLOAT
    return P, V
