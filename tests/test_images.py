"""Tokens that are rows and columns of an image in every tensor that has them are replaced there, however many."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from form_nets import DEPTH, HEADS, WIDTH, Sketch, convolved
from models import FORMS, draw_patch, fire_on_some, run, same_bits
from nudge import assert_places
from onnx import TensorProto, helper

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.matching import explain
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.verify import verify

ROWS, COLUMNS = 3, 4


@dataclass(frozen=True)
class Image:
    """One layer on `[batch, width, rows, columns]`, heads folded into the batch where queries and keys meet."""

    sides: tuple[int | str, int | str] = (ROWS, COLUMNS)
    """Rows and columns; as text where they are free."""

    channels_last: bool = False
    heads_apart: bool = False
    """Whether heads stand on an axis where tokens are still an image."""

    batch: int | str = "batch"

    @property
    def axes(self) -> tuple[str, ...]:
        channels = ("", "") if self.heads_apart else ("",)
        return ("n", "k", "k", *channels) if self.channels_last else ("n", *channels, "k", "k")

    @property
    def shape(self) -> list[int | str]:
        return [self.batch, *self.sides, WIDTH] if self.channels_last else [self.batch, WIDTH, *self.sides]

    def model(self) -> ir.Model:
        s = Sketch()
        q, k, v = (self._projected(s) for _ in range(3))
        q, k, v = (self._folded(s, y) for y in (q, k, v))
        y = s.attend(s.transpose(q, 0, 2, 1), k, s.transpose(v, 0, 2, 1))
        y = s.transpose(s.op("Reshape", s.transpose(y, 0, 2, 1), self._as_input(s)), *self._back)
        s.nodes.append(helper.make_node("Add", ["x", y], ["out"], name="node/out"))
        made = helper.make_graph(
            s.nodes,
            "image",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, self.shape)],
            s.weights,
        )
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], producer_name="tests")
        proto.ir_version = 8
        onnx.checker.check_model(proto, full_check=True)
        return ir.from_proto(proto)

    def feed(self, samples: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
        sides = [size if isinstance(size, int) else own for size, own in zip(self.sides, (ROWS, COLUMNS), strict=True)]
        shape = [samples, *sides, WIDTH] if self.channels_last else [samples, WIDTH, *sides]
        return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}

    @property
    def _back(self) -> tuple[int, ...]:
        """From `[batch, width, rows, columns]`."""
        return (0, 2, 3, 1) if self.channels_last else (0, 1, 2, 3)

    def _projected(self, s: Sketch) -> str:
        """As `axes` says."""
        y = s.linear("x") if self.channels_last else convolved(s, "x")
        if not self.heads_apart:
            return y
        if self.channels_last:
            return s.op("Relu", s.reshape(y, 0, 0, 0, HEADS, DEPTH))
        own = s.op("Concat", s.sizes(-1, HEADS, DEPTH), self._sides(s), axis=0)
        return s.op("Relu", s.op("Reshape", y, own))

    def _folded(self, s: Sketch, y: str) -> str:
        """`[batch * heads, depth, tokens]`."""
        if self.channels_last:
            y = s.transpose(y, 0, 3, 4, 1, 2) if self.heads_apart else s.transpose(y, 0, 3, 1, 2)
        count = s.op("Mul", *(self._side(s, which) for which in (0, 1)))
        return s.op("Reshape", y, s.op("Concat", s.sizes(-1, DEPTH), count, axis=0))

    def _as_input(self, s: Sketch) -> str:
        return s.op("Concat", s.sizes(-1, WIDTH), self._sides(s), axis=0)

    def _sides(self, s: Sketch) -> str:
        return s.op("Concat", self._side(s, 0), self._side(s, 1), axis=0)

    def _side(self, s: Sketch, which: int) -> str:
        size, first = self.sides[which], 1 if self.channels_last else 2
        if isinstance(size, int):
            return s.sizes(size)
        return s.op("Shape", "x", start=first + which, end=first + which + 1)


IMAGES = {
    "channels first": Image(),
    "channels last": Image(channels_last=True),
    "channels first, heads apart": Image(heads_apart=True),
    "channels last, heads apart": Image(channels_last=True, heads_apart=True),
    "of any height": Image(sides=("rows", COLUMNS)),
    "of any size": Image(sides=("rows", "columns")),
    "of any size, channels last": Image(sides=("rows", "columns"), channels_last=True),
    "of any size, one sample": Image(sides=("rows", "columns"), batch=1),
    "square, one sample": Image(sides=(ROWS, ROWS), batch=1),
}
images = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())


def samples_of(image: Image, most: int) -> int:
    return image.batch if isinstance(image.batch, int) else most


@images
def test_they_are_where_a_site_says(image: Image) -> None:
    model = image.model()
    matches = explain(model)
    assert [miss.reason for miss in matches.near_misses] == []
    (site,) = matches.sites
    assert (site.key.heads, site.key.whole, site.value.whole) == (HEADS, True, True)
    assert site.key.axes == site.value.axes == (image.axes if image.batch != 1 else ("", "", "nk"))
    assert_places(model, image.feed(samples_of(image, 3)))


@images
def test_a_patch_there_is_exact(image: Image) -> None:
    result = rehearse(image.model(), image.feed(samples_of(image, 8)))
    assert result.passed, result.failures


@pytest.mark.parametrize("name", [name for name, image in IMAGES.items() if image.batch != 1])
def test_a_batch_of_none_runs_as_it_does_in_the_base(name: str) -> None:
    image = IMAGES[name]
    model, feed = image.model(), image.feed(0)
    for conditional in FORMS:
        found = run(bake(model, draw_patch(model), conditional=conditional, site_flags=True), feed)
        assert same_bits(found["out"], run(model, feed)["out"])
        assert found["atpatch/flagged"].shape == found["atpatch/score"].shape == (0, 1)
        assert len(found["atpatch/site_0/flags"]) == 0


@pytest.mark.parametrize("name", [name for name, image in IMAGES.items() if image.batch != 1])
def test_it_verifies(name: str) -> None:
    image = IMAGES[name]
    model = image.model()
    patch = fire_on_some(model, draw_patch(model), image.feed(12), share=0.05)
    result = verify(model, bake(model, patch), DebugSet.from_pairs(image.feed(6, 2), image.feed(6, 3)), batch_size=4)
    assert result.passed, result.failures


def test_flags_of_a_sample_are_those_of_its_pixels_row_by_row() -> None:
    image = Image()
    model = image.model()
    patch = fire_on_some(model, draw_patch(model), image.feed(12), share=0.05)
    found = run(bake(model, patch, site_flags=True), image.feed(12))
    flags = found["atpatch/site_0/flags"]
    assert flags.shape == (12, ROWS * COLUMNS)
    assert flags.any()
    sample, token = np.argwhere(flags)[0]
    feed = image.feed(12)
    alone = {"x": np.zeros_like(feed["x"])}
    alone["x"][sample, :, token // COLUMNS, token % COLUMNS] = feed["x"][sample, :, token // COLUMNS, token % COLUMNS]
    others = run(bake(model, patch, site_flags=True), alone)["atpatch/site_0/flags"]
    assert others[sample, token]
