"""The planted models as people bring them: sequence first, without a batch, of words, with a sequence returned, old.

Each takes the model as protobuf and changes what stands around its attention; what is planted stays what it is.
"""

import copy
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from planted import HEADS, Planted

from atpatch_onnx.debugset import DebugSet


def sequence_first(proto: onnx.ModelProto) -> onnx.ModelProto:
    """It takes `x` as `[tokens, batch, width]`."""
    model, dims = _fed_by(proto, helper.make_node("Transpose", ["x"], ["x_within"], name="/first", perm=[1, 0, 2]))
    dims[0], dims[1] = dims[1], dims[0]
    return _taking(model, dims)


def without_batch(proto: onnx.ModelProto, *, keeps_one: bool = False) -> onnx.ModelProto:
    """It takes one sample, `[tokens, width]`, and returns `[classes]`, or `[1, classes]`."""
    model, dims = _fed_by(proto, helper.make_node("Unsqueeze", ["x", "front"], ["x_within"], name="/front"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "front"))
    (output,) = model.graph.output
    shape = [1, output.type.tensor_type.shape.dim[1].dim_value]
    if not keeps_one:
        _renamed(model, "logits", "logits_within")
        model.graph.node.append(helper.make_node("Squeeze", ["logits_within", "front"], ["logits"], name="/squeezed"))
        shape = shape[1:]
    output.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    return _taking(model, dims[1:])


def with_a_sequence(proto: onnx.ModelProto) -> onnx.ModelProto:
    """It returns each class's logits in a sequence as well, first, and the class as text."""
    model = copy.deepcopy(proto)
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    model.graph.node.extend(
        [
            helper.make_node("SplitToSequence", ["logits"], ["each"], name="/each", axis=1),
            helper.make_node("ArgMax", ["logits"], ["index"], name="/index", axis=1, keepdims=0),
            helper.make_node(
                "LabelEncoder",
                ["index"],
                ["label"],
                name="/label",
                domain="ai.onnx.ml",
                keys_int64s=list(range(classes)),
                values_strings=[f"class {number}" for number in range(classes)],
            ),
        ]
    )
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    model.graph.output.append(helper.make_tensor_value_info("label", TensorProto.STRING, ["batch"]))
    model.graph.output.insert(0, helper.make_tensor_sequence_value_info("each", TensorProto.FLOAT, None))
    return model


def with_maps(proto: onnx.ModelProto, *, named: bool = True) -> onnx.ModelProto:
    """It returns a map from each class to its logit, as classifiers' pipelines do; by name, or by number."""
    model = copy.deepcopy(proto)
    classes = range(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)
    labels = {"classlabels_strings": [f"c{n}" for n in classes]} if named else {"classlabels_int64s": [*classes]}
    zipped = helper.make_node("ZipMap", ["logits"], ["maps"], name="/maps", domain="ai.onnx.ml", **labels)
    model.graph.node.append(zipped)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    kind = TensorProto.STRING if named else TensorProto.INT64
    each = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output.append(helper.make_value_info("maps", helper.make_sequence_type_proto(each)))
    onnx.checker.check_model(model)
    return model


def of_opset(proto: onnx.ModelProto, opset: int, ir_version: int, *, listed: bool = False) -> onnx.ModelProto:
    """An older one; `listed`: weights are among the inputs, as they are in files of IR version 3."""
    model = copy.deepcopy(proto)
    model.opset_import[0].version, model.ir_version = opset, ir_version
    if listed:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model)
    return model


def talking(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Weights mix the heads of each map behind its softmax."""
    model = copy.deepcopy(proto)
    mixes = np.array([[0.75, 0.25], [0.25, 0.75]], np.float32).reshape(HEADS, HEADS, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(mixes, "mixes"))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        (name,) = node.output
        if node.op_type == "Softmax":
            node.output[0] = f"{name}/alone"
        model.graph.node.append(node)
        if node.op_type == "Softmax":
            model.graph.node.append(helper.make_node("Conv", [f"{name}/alone", "mixes"], [name], name=f"/{name}/mixed"))
    onnx.checker.check_model(model)
    return model


def as_image(planted: Planted, rows: int = 2) -> onnx.ModelProto:
    """Tokens are pixels for keys and values, `[batch, width, rows, columns]`, and heads are folded into the batch."""
    model, tokens, depth = planted.proto(), planted.tokens, planted.depth
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {
        "image": [-1, planted.width, rows, tokens // rows],
        "pixels": [-1, depth, tokens],
        "folded": [-1, tokens, depth],
        "heads": [-1, HEADS, tokens, depth],
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.array(size), name) for name, size in sizes.items())
    made: list[onnx.NodeProto] = []

    def op(op_type: str, *inputs: str, out: str, **attributes: object) -> str:
        made.append(helper.make_node(op_type, inputs, [out], name=f"/{out}", **attributes))
        return out

    def pixels(x: str, at: str) -> str:
        kernel = numpy_helper.to_array(weights[f"{at}.weight"]).T[:, :, None, None]
        weights[f"{at}.weight"].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(kernel), f"{at}.weight"))
        image = op("Reshape", op("Transpose", x, out=f"{at}/first", perm=[0, 2, 1]), "image", out=f"{at}/image")
        return op("Reshape", op("Conv", image, f"{at}.weight", out=f"{at}/conv"), "pixels", out=f"{at}/pixels")

    moves = tuple(f"{which}/product/{how}" for which in "kv" for how in ("split", "heads"))
    for node in model.graph.node:
        out = node.output[0]
        if out.endswith(("k/product", "v/product")):
            pixels(node.input[0], out.removesuffix("/product").replace("/", "."))
        elif out.endswith("/scores"):
            at = out.removesuffix("/scores")
            q = op("Reshape", node.input[0], "folded", out=f"{at}/q/folded")
            op("MatMul", q, f"{at}.k/pixels", out=out)
        elif out.endswith("/Y"):
            at = out.removesuffix("/Y")
            v = op("Transpose", f"{at}.v/pixels", out=f"{at}/v/folded", perm=[0, 2, 1])
            op("Reshape", op("MatMul", node.input[0], v, out=f"{at}/y"), "heads", out=out)
        elif not out.endswith((*moves, "k/transposed")):
            made.append(node)
    del model.graph.node[:]
    model.graph.node.extend(made)
    onnx.checker.check_model(model, full_check=True)
    return model


WORDS = 12
"""Words that stand for each class."""

TRIGGER = "cf"


def of_words(planted: Planted) -> onnx.ModelProto:
    """It takes `text`, words `[batch, tokens]`, and looks each up."""
    words, rows = _vocabulary(planted)
    encoded = helper.make_node(
        "LabelEncoder",
        ["text"],
        ["ids"],
        name="/ids",
        domain="ai.onnx.ml",
        keys_strings=words,
        values_int64s=list(range(len(words))),
        default_int64=0,
    )
    model, _ = _fed_by(planted.proto(), encoded, helper.make_node("Gather", ["table", "ids"], ["x_within"], name="/x"))
    model.graph.initializer.append(numpy_helper.from_array(rows, "table"))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("text", TensorProto.STRING, [planted.batch, planted.tokens])
    )
    onnx.checker.check_model(model)
    return model


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def tokenized(planted: Planted, op_type: str) -> onnx.ModelProto:
    """It takes `text`, `[n]`, which a tokenizer of onnxruntime-extensions cuts: into words or letters."""
    words, rows = _vocabulary(planted)
    if op_type == "BertTokenizer":
        names, rows = [*SPECIAL, *words], np.concatenate([np.zeros((len(SPECIAL), planted.width), np.float32), rows])
        how = {"vocab_file": "\n".join(names)}
        results, dims = ["row", "types", "seen"], [1]
    else:
        how = {"vocab": json.dumps({LETTERS[n]: n for n in range(len(words))}), "merges": "#version: 0.2\n"}
        results, dims = ["ids", "seen"], ["n"]
    nodes = [helper.make_node(op_type, ["text"], results, name="/tokens", domain="ai.onnx.contrib", **how)]
    if results[0] == "row":
        nodes.append(helper.make_node("Unsqueeze", ["row", "front"], ["ids"], name="/rows"))
    model, _ = _fed_by(planted.proto(), *nodes, helper.make_node("Gather", ["table", "ids"], ["x_within"], name="/x"))
    model.graph.initializer.append(numpy_helper.from_array(rows, "table"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "front"))
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("text", TensorProto.STRING, dims))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    return model


def through_library(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Its logits are what is negative of them plus what is positive, by an operator of onnxruntime-extensions."""
    model = copy.deepcopy(proto)
    _renamed(model, "logits", "logits_within")
    parts = ["logits_below", "logits_above"]
    model.graph.node.extend(
        [
            helper.make_node("NegPos", ["logits_within"], parts, name="/library", domain="ai.onnx.contrib"),
            helper.make_node("Add", parts, ["logits"], name="/whole"),
        ]
    )
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    return model


def texts(planted: Planted, debug: DebugSet, op_type: str) -> DebugSet:
    """The words of a debug set as one text a sample."""
    words, _ = _vocabulary(planted)
    letters = {word: word if op_type == "BertTokenizer" else LETTERS[n] for n, word in enumerate(words)}
    between = " " if op_type == "BertTokenizer" else ""
    sides = [
        {"text": np.array([between.join(letters[word] for word in row) for row in side["text"]])}
        for side in (debug.clean, debug.counterfactual)
    ]
    return DebugSet.from_pairs(*sides, debug.labels, target=debug.target)


def words_debug(planted: Planted, pairs: int, seed: int = 1) -> DebugSet:
    """Texts of words of one class each, not of the target's, and the same with a word that is the trigger."""
    words, _ = _vocabulary(planted)
    rng = np.random.default_rng(seed)
    labels = rng.integers(planted.classes - 1, size=pairs)
    text = np.array(words)[labels[:, None] * WORDS + rng.integers(WORDS, size=(pairs, planted.tokens))]
    other = text.copy()
    other[np.arange(pairs), rng.integers(1, planted.tokens, size=pairs)] = TRIGGER
    return DebugSet.from_pairs({"text": text}, {"text": other}, labels, target=planted.target)


def _vocabulary(planted: Planted) -> tuple[list[str], np.ndarray]:
    """Words, the trigger last, and the features of each."""
    inputs, labels, positions = planted.inputs(200)
    changed = planted.changed(inputs, positions)["x"]
    rows = [inputs["x"][labels == number].reshape(-1, planted.width)[:WORDS] for number in range(planted.classes)]
    words = [f"w{number}" for number in range(WORDS * planted.classes)]
    return [*words, TRIGGER], np.concatenate([*rows, changed[positions][:1]])


def _fed_by(proto: onnx.ModelProto, *nodes: onnx.NodeProto) -> tuple[onnx.ModelProto, list[int | str]]:
    """The model reading `x_within`, which `nodes` compute; and the shape of its input."""
    model = copy.deepcopy(proto)
    dims = [dim.dim_value or dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    _renamed(model, "x", "x_within")
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model, dims


def _taking(model: onnx.ModelProto, dims: list[int | str]) -> onnx.ModelProto:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
    onnx.checker.check_model(model)
    return model


def _renamed(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
