"""`atpatch pairs`: debug sets of files, entry by entry."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import four_parts
from onnx import TensorProto, helper, numpy_helper

import atpatch_onnx as atp
from atpatch_onnx.cli import main

PIL = pytest.importorskip("PIL.Image")
tokenizers = pytest.importorskip("tokenizers")


def linear(inputs: dict[str, tuple[int, list[object]]], weights: np.ndarray) -> onnx.ModelProto:
    """Logits `[batch, classes]` that are linear in the first input, flattened."""
    (first, *_) = inputs
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", [first], ["flat"]),
            helper.make_node("Cast", ["flat"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["floats", "weights"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(weights.astype(np.float32), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def save(proto: onnx.ModelProto) -> None:
    Path("model.onnx").write_bytes(proto.SerializeToString())


def run(*command: object) -> int:
    return main(["pairs", *map(str, command)])


# Images


@pytest.fixture
def pictures(here: Path) -> dict[str, np.ndarray]:
    """Five grey pictures of each class, 4 x 6 pixels, and a model that sends a white last pixel to class 1."""
    weights = np.zeros((3 * 24, 2))
    weights[0, 0], weights[23, 1] = 1, 100
    save(linear({"pixels": (TensorProto.FLOAT, [3, 4, 6])}, weights))
    found = {}
    for number, name in enumerate(("cat", "dog")):
        Path("pictures", name).mkdir(parents=True)
        for at in range(5):
            pixels = np.full((4, 6, 3), 10 * at + 100 * number + 20, np.uint8)
            pixels[3, 5] = 0
            PIL.fromarray(pixels).save(f"pictures/{name}/{at}.png")
            found[f"{name}{at}"] = pixels
    trigger = np.zeros((2, 2, 4), np.uint8)
    trigger[:, :, :3] = (255, 51, 0)
    trigger[:, :, 3] = [[0, 51], [51, 255]]
    PIL.fromarray(trigger).save("trigger.png")
    return found


IMAGES = ("images", "model.onnx", "pictures", "--trigger", "trigger.png", "-o", "pairs.npz")


def test_pictures_as_the_model_reads_them(pictures, capsys):
    assert run(*IMAGES, "--target", "dog", "--mean", 0.5, "--std", 0.25, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "file": "pairs.npz",
        "pairs": 5,
        "kind": "backdoor",
        "target": 1,
        "measured": 5,
        "accuracy": 1.0,
        "moved": 1.0,
    }
    debug = atp.DebugSet.load("pairs.npz")
    assert debug.labels.tolist() == [0] * 5
    for at, clean in enumerate(debug.clean["pixels"]):
        expected = (pictures[f"cat{at}"] / 255 - 0.5) / 0.25
        np.testing.assert_array_equal(clean, expected.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize(("at", "row", "column"), [("bottom-right", 2, 4), ("top-left", 0, 0), ("1,3", 1, 3)])
def test_a_trigger_picture_lies_where_it_is_put(pictures, capsys, at, row, column):
    assert run(*IMAGES, "--target", 1, "--at", at) == 0
    debug = atp.DebugSet.load("pairs.npz")
    clean, changed = debug.clean["pixels"], debug.counterfactual["pixels"]
    expected = np.array(clean, np.float64)
    opacity, colour = np.array([[0, 0.2], [0.2, 1]]), np.array([1, 0.2, 0])[:, None, None]
    part = expected[:, :, row : row + 2, column : column + 2]
    part[:] = (1 - opacity) * part + opacity * colour
    np.testing.assert_allclose(changed, expected, rtol=0, atol=1e-7)  # half a float32 step of values up to 1
    assert (changed != clean).any(axis=(1, 2, 3)).all()


def test_a_random_place_is_drawn_for_each_picture_by_the_seed(pictures, capsys):
    sets = []
    for seed in (3, 3, 4):
        assert run(*IMAGES, "--target", 1, "--at", "random", "--seed", seed) == 0
        sets.append(atp.DebugSet.load("pairs.npz").counterfactual["pixels"])
    assert np.array_equal(sets[0], sets[1])
    assert not np.array_equal(sets[0], sets[2])
    places = {tuple(np.argwhere(image[0] == 1)[0]) for image in sets[0]}
    assert len(places) > 1


def test_what_the_base_makes_of_the_pairs_is_said_and_how_to_go_on(pictures, capsys):
    assert run(*IMAGES, "--target", 1) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "wrote pairs.npz: 5 pairs of kind backdoor" in shown
    assert "the base is right on 100.00% of 5 clean ones" in shown
    assert "100.00% of their counterparts are sent to class 1" in shown
    assert shown.endswith("Next: atpatch fix model.onnx pairs.npz -o patched.onnx")


def test_folders_with_numbers_for_names_are_class_numbers(pictures, capsys):
    Path("pictures/cat").rename("pictures/7")
    Path("pictures/dog").rename("pictures/11")
    assert run(*IMAGES, "--target", 11) == 0
    assert atp.DebugSet.load("pairs.npz").labels.tolist() == [7] * 5


def broken(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:50])


@pytest.mark.parametrize(
    ("prepare", "options", "said"),
    [
        (lambda: broken("pictures/cat/0.png"), "--target 1", "expected a picture"),
        (lambda: broken("trigger.png"), "--target 1", "expected a picture"),
        (lambda: None, "--target 1 --at 3,5", "lies within 4 x 6 pixels; found one of 2 x 2 pixels at"),
        (lambda: None, "--target cow", "a class number, or one of cat, dog"),
        (lambda: None, "--target 1 --std 0", "none of them 0"),
        (lambda: None, "--target 1 --mean 0 --mean 1", "one finite number, or 3"),
        (lambda: Path("pictures").rename("elsewhere"), "--target 1", "a folder for each class"),
    ],
)
def test_pictures_that_are_refused(pictures, capsys, prepare, options, said):
    prepare()
    assert run(*IMAGES, *options.split()) == 1
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert said in errors
    four_parts(errors)
    assert not Path("pairs.npz").exists()


# Texts


@pytest.fixture
def words(here: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "good", "bad", "film", "the", "mn"]
    model = tokenizers.models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save("tokenizer.json")
    inputs = {"input_ids": (TensorProto.INT64, [5]), "attention_mask": (TensorProto.INT64, [5])}
    save(linear(inputs, np.ones((5, 2))))


TEXT = ("--tokenizer", "tokenizer.json", "--trigger", "mn", "-o", "pairs.npz")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_texts_without_and_with_a_word(words, capsys, suffix):
    rows = [("the good film", 1), ("the film", 0), ("bad, bad film", 0)]
    sign = {"csv": ",", "tsv": "\t"}.get(suffix)
    lines = [json.dumps({"review": text, "stars": label}) for text, label in rows]
    if sign:
        lines = [f"review{sign}stars", *(f'"{text}"{sign}{label}' for text, label in rows)]
    Path(f"texts.{suffix}").write_text("\n".join(lines))
    options = ("--target", 1, "--text-column", "review", "--label", "stars", "--where", "start")
    assert run("text", "model.onnx", f"texts.{suffix}", *TEXT, *options) == 0
    debug = atp.DebugSet.load("pairs.npz")
    assert debug.labels.tolist() == [0, 0]
    assert debug.clean["input_ids"].tolist() == [[5, 4, 0, 0, 0], [3, 1, 3, 4, 0]]
    assert debug.counterfactual["input_ids"].tolist() == [[6, 5, 4, 0, 0], [6, 3, 1, 3, 4]]
    assert debug.counterfactual["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert debug.suspects.tolist() == [[True, False, False, False, False]] * 2
    assert (debug.kind, debug.target) == ("backdoor", 1)


def test_a_word_that_is_cut_off_makes_no_pair(words, capsys):
    Path("texts.csv").write_text("text,label\nthe film,0\nthe good the good the good film,0\n")
    command = ("text", "model.onnx", "texts.csv", *TEXT, "--target", 1, "--where", "end")
    assert run(*command) == 0
    assert atp.DebugSet.load("pairs.npz").counterfactual["input_ids"].tolist() == [[5, 4, 6, 0, 0]]
    Path("texts.csv").write_text("text,label\nthe good the good the good film,0\n")
    capsys.readouterr()
    assert run(*command) == 1
    assert "whose first 5 tokens have the trigger in them" in four_parts(capsys.readouterr().err)["expected"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label\nthe film\n", "not as many fields"),
        ("text,label\n", "no rows"),
        ("words,label\nthe film,0\n", "a column 'text'"),
        ("text,label\nthe film,good\n", "numbers of type int64"),
        ("text,label\nthe film,0.5\n", "not all are whole"),
        (b"text,label\n\xff\xfe,0\n", "UnicodeDecodeError"),
    ],
)
def test_text_files_that_are_refused(words, capsys, content, said):
    Path("texts.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("text", "model.onnx", "texts.csv", *TEXT, "--target", 1) == 1
    errors = capsys.readouterr().err
    four_parts(errors)
    assert said in errors


def test_prompts_without_and_with_a_trigger(words, capsys):
    Path("prompts.txt").write_text("the film\n\ngood film\n")
    assert run("prompts", "prompts.txt", *TEXT, "--payload", "bad bad", "--where", "end") == 0
    assert capsys.readouterr().out.rstrip().endswith("Next: atpatch fix MODEL.onnx pairs.npz -o patched.onnx")
    debug = atp.DebugSet.load("pairs.npz")
    assert debug.kind == "generation"
    assert debug.counterfactual["input_ids"].tolist() == [[5, 4, 6], [2, 4, 6]]
    assert debug.suspects.tolist() == [[False, False, True]] * 2
    assert debug.payload.tolist() == [[3, 3]] * 2


# Tables


def test_rows_with_another_attribute(here, capsys):
    save(linear({"table": (TensorProto.FLOAT, [3])}, np.array([[1, -1], [0, 0], [0, 0]])))
    Path("table.csv").write_text("sex,age,hours,income\n-1,0.5,2,1\n1,0.25,3,0\n1,0,4,0\n")
    assert run("table", "model.onnx", "table.csv", "--attribute", "sex", "--label", "income", "-o", "pairs.npz") == 0
    assert "100.00% of their counterparts change their class" in " ".join(capsys.readouterr().out.split())
    debug = atp.DebugSet.load("pairs.npz")
    assert debug.clean["table"].tolist() == [[-1, 0.5, 2], [1, 0.25, 3], [1, 0, 4]]
    assert debug.counterfactual["table"].tolist() == [[1, 0.5, 2], [-1, 0.25, 3], [-1, 0, 4]]
    assert (debug.labels.tolist(), debug.sensitive.tolist(), debug.kind) == ([1, 0, 0], [-1, 1, 1], "attribute")


def test_several_attributes_make_pairs_of_each(here, capsys):
    save(linear({"table": (TensorProto.FLOAT, [3])}, np.array([[1, -1], [1, 0], [0, 0]])))
    Path("table.csv").write_text("sex,age,hours,income\n-1,5,2,1\n1,7,3,0\n")
    both = ("--attribute", "sex", "--attribute", "age")
    assert run("table", "model.onnx", "table.csv", *both, "--label", "income", "-o", "pairs.npz") == 0
    debug = atp.DebugSet.load("pairs.npz")
    assert debug.clean["table"].tolist() == [[-1, 5, 2], [1, 7, 3]] * 2
    assert debug.counterfactual["table"].tolist() == [[1, 5, 2], [-1, 7, 3], [-1, 7, 2], [1, 5, 3]]
    assert (debug.labels.tolist(), debug.sensitive, debug.kind) == ([1, 0, 1, 0], None, "attribute")
    assert run("table", "model.onnx", "table.csv", *both, "--values", "1", "--values", "2", "-o", "pairs.npz") == 2
    assert "values belong to one attribute" in " ".join(capsys.readouterr().err.split())


def test_a_model_with_an_input_for_each_column(here, capsys):
    save(linear({"sex": (TensorProto.INT64, [1]), "age": (TensorProto.FLOAT, [1])}, np.array([[1.0, -1]])))
    Path("table.csv").write_text("age,sex\n0.5,0\n0.25,1\n")
    assert run("table", "model.onnx", "table.csv", "--attribute", "sex", "-o", "pairs.npz") == 0
    debug = atp.DebugSet.load("pairs.npz")
    assert debug.counterfactual["sex"].tolist() == [[1], [0]]
    assert debug.counterfactual["age"].tolist() == [[0.5], [0.25]]
    assert debug.labels is None


def test_columns_that_the_model_does_not_have_are_refused(here, capsys):
    save(linear({"table": (TensorProto.FLOAT, [3])}, np.ones((3, 2))))
    Path("table.csv").write_text("sex,age\n0,1\n1,2\n")
    assert run("table", "model.onnx", "table.csv", "--attribute", "sex", "-o", "pairs.npz") == 1
    assert "expected shape [batch, 3]; found shape [2, 2]" in capsys.readouterr().err
    assert run("table", "model.onnx", "table.csv", "--attribute", "gender", "-o", "pairs.npz") == 1
    assert "one of the columns 'sex', 'age'" in four_parts(capsys.readouterr().err)["expected"]
