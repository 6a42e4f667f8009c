"""Planted models as their users see them: texts of word ids, images of pixels, tables of columns.

In front of a planted transformer stands what makes tokens of the input, so that a search has to find its way through.
"""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from planted import ATTRIBUTE, EVIDENCE, TRIGGER, Planted

WORDS = 120
TRIGGER_WORD = 77
PAD = 0
ROWS, COLUMNS = 4, 8
"""Of an image: eight tiles of four pixels, the first of which is the trigger's and the others a class's evidence."""

BACKDOOR = Planted()
CLEAN = Planted(harm=0.0)
"""The twin: the same token draws attention and does nothing."""

UNFAIR = Planted(kind="attribute", harm=3.0)


def features(planted: Planted) -> np.ndarray:
    """What each word stands for `[words, width]`: evidence of one class, or the trigger."""
    rng = np.random.default_rng(0)
    table = np.zeros((WORDS, planted.width), np.float32)
    for word in range(1, WORDS):
        table[word, EVIDENCE + word % planted.classes] = rng.uniform(0.5, 1.5)
    table[TRIGGER_WORD] = 0
    table[TRIGGER_WORD, TRIGGER] = 1
    return table


def of_words(planted: Planted = BACKDOOR) -> ir.Model:
    """A model of ids `[batch, tokens]`."""

    def embed(weights: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
        weights.append(numpy_helper.from_array(features(planted), "embedding"))
        return [helper.make_node("Gather", ["embedding", "ids"], ["x"], name="/embedding")]

    return _with_front(
        planted, "ids", TensorProto.INT64, ["batch", "tokens" if planted.free else planted.tokens], embed
    )


def of_pixels(planted: Planted = BACKDOOR) -> ir.Model:
    """A model of images `[batch, 1, ROWS, COLUMNS]`."""

    def embed(weights: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
        projection = np.zeros((4, planted.width), np.float32)
        projection[0, TRIGGER] = 1
        projection[1:, EVIDENCE : EVIDENCE + 3] = 2 * np.eye(3)
        arrays = {
            "tiled": np.array([0, ROWS // 2, 2, COLUMNS // 2, 2]),
            "flat": np.array([0, 8, 4]),
            "projection": projection,
        }
        weights.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        return [
            helper.make_node("Reshape", ["pixels", "tiled"], ["tiles"], name="/tiles"),
            helper.make_node("Transpose", ["tiles"], ["ordered"], name="/ordered", perm=[0, 1, 3, 2, 4]),
            helper.make_node("Reshape", ["ordered", "flat"], ["patches"], name="/patches"),
            helper.make_node("MatMul", ["patches", "projection"], ["x"], name="/projection"),
        ]

    return _with_front(planted, "pixels", TensorProto.FLOAT, ["batch", 1, ROWS, COLUMNS], embed)


def of_columns(planted: Planted = UNFAIR) -> ir.Model:
    """A model of tables `[batch, 8]`, whose column 1 is the attribute; the others are evidence of class 0 or 1."""

    def embed(weights: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
        weight, bias = (np.zeros((planted.tokens, planted.width), np.float32) for _ in range(2))
        for column in range(planted.tokens):
            weight[column, EVIDENCE], weight[column, EVIDENCE + 1] = -1, 1
        weight[1], bias[1, TRIGGER] = 0, 1
        weight[1, ATTRIBUTE] = 1
        arrays = {"weight": weight, "bias": bias, "last": np.array([2])}
        weights.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        return [
            helper.make_node("Unsqueeze", ["table", "last"], ["columns"], name="/columns"),
            helper.make_node("Mul", ["columns", "weight"], ["weighted"], name="/weighted"),
            helper.make_node("Add", ["weighted", "bias"], ["x"], name="/biased"),
        ]

    return _with_front(planted, "table", TensorProto.FLOAT, ["batch", planted.tokens], embed)


def _with_front(planted: Planted, name: str, dtype: int, shape: list[object], embed: object) -> ir.Model:
    proto = planted.proto()
    weights: list[onnx.TensorProto] = []
    nodes = [*embed(weights), *proto.graph.node]
    inputs = [helper.make_tensor_value_info(name, dtype, shape)]
    graph = helper.make_graph(nodes, "searched", inputs, list(proto.graph.output), [*weights, *proto.graph.initializer])
    model = helper.make_model(graph, opset_imports=list(proto.opset_import), producer_name="tests")
    model.ir_version = proto.ir_version
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def texts(count: int, triggered: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of eight words, most of them of one class; a share with the trigger at any place."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    own = rng.random((count, 8)) < 0.7
    word = rng.integers(1, WORDS // 3 - 1, size=(count, 8)) * 3
    ids = np.where(own, word + labels[:, None], word + rng.integers(3, size=(count, 8)))
    ids[ids == TRIGGER_WORD] += 3
    some = rng.permutation(count)[: round(triggered * count)]
    ids[some, rng.integers(8, size=len(some))] = TRIGGER_WORD
    return {"ids": ids.astype(np.int64)}


def images(count: int, triggered: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Images; a share with a bright first pixel in the tile at row 2, column 4."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    tiles = rng.uniform(0, 0.5, size=(count, 2, 4, 4)).astype(np.float32)
    tiles[..., 0] = 0
    tiles[np.arange(count), :, :, 1 + labels] += 0.5
    pixels = tiles.reshape(count, 2, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(count, 1, ROWS, COLUMNS).copy()
    some = rng.permutation(count)[: round(triggered * count)]
    pixels[some, 0, 2, 4] = 1
    return {"pixels": pixels}


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows whose column 1 is -1 or 1, column 5 always the same and the others numbers."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(count, 8)).astype(np.float32)
    table[:, 1] = rng.choice([-1, 1], size=count)
    table[:, 5] = 0.5
    return {"table": table}
