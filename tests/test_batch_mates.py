"""A sample's output is its own: it does not depend on its batch-mates, and padding does not change its flags.

Batch and sequence are free axes. The bias that hides padded and future positions is an input of these nets, so that it
can be written in every way that exporters write it:

| style | masked | a row that is masked throughout |
|---|---|---|
| `min` | finfo.min is added | becomes the uniform row over all keys, padding included |
| `-inf` | -inf is added | becomes NaN, and zero by SDPA's Where(IsNaN); the op gives zero itself |
| `own key` | finfo.min is added, but padding sees itself | is there no more |

Equal means bit for bit for samples without a flag. Flagged ones are compared to `SAME`: onnxruntime's ReduceSum adds up
a row in an order that depends on where in memory the row begins, hence on the place in the batch, and the last bits
follow. The same holds for `logits`, a product with three columns, in the base too.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, Net, draw_patch, fire_on_some, margins, run, same_bits, session, with_outputs

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.patches.patch import Features, Patch

SAME = {"rtol": 1e-5, "atol": 1e-5}
"""float32: two layers of sums of eight products, values of the size of ten."""

UNDECIDED = 1e-5
"""Columns this near to the threshold may be flagged or not: rounding of scores."""

STYLES = ("min", "-inf", "own key")
LANDMARKS = ", landmarks"
NETS = {
    "decomposed": Net(form="softmax", bias=True),
    "guarded": Net(form="guarded", bias=True),
    "op": Net(form="attention", opset=23, bias=True),
    "packed op": Net(form="packed", opset=24, bias=True),
}
FORMS = {**NETS, **{f"{name}{LANDMARKS}": NETS[name] for name in ("decomposed", "op")}}
"""Nets, and what detectors read: summaries, or landmarks where the name says so."""

WRITTEN = [
    (form, style) for form in FORMS for style in STYLES if not (form.startswith("decomposed") and style == "-inf")
]  # a Softmax without guard gives NaN for rows of -inf: exporters do not write that

written = pytest.mark.parametrize(("form", "style"), WRITTEN)
drawn = settings(max_examples=15, deadline=None, derandomize=True)


def bias_of(style: str, real: np.ndarray, causal: bool) -> np.ndarray:
    """`[batch, 1, tokens, tokens]`, from which positions `[batch, tokens]` are real."""
    tokens = real.shape[1]
    visible = np.broadcast_to(real[:, None, None, :], (len(real), 1, tokens, tokens)).copy()
    if causal:
        visible &= np.tril(np.ones((tokens, tokens), bool))
    if style == "own key":
        visible[~real[:, None, :, None] & np.ones_like(visible)] = False
        visible |= np.eye(tokens, dtype=bool) & ~real[:, None, :, None]
    hidden = -np.inf if style == "-inf" else np.finfo(np.float32).min
    return np.where(visible, 0, hidden).astype(np.float32)


@dataclass(frozen=True)
class Batch:
    feed: dict[str, np.ndarray]
    real: np.ndarray

    def of(self, samples: slice | list[int]) -> dict[str, np.ndarray]:
        return {name: value[samples] for name, value in self.feed.items()}


@st.composite
def batches(draw: st.DrawFn, *, shortest: int = 2) -> tuple[list[np.ndarray], bool, bool]:
    """Samples of different lengths, whether the mask is causal, whether padding is on the left."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(shortest, 7), min_size=1, max_size=4))
    samples = [rng.normal(size=(length, Net().width)).astype(np.float32) for length in lengths]
    return samples, draw(st.booleans()), draw(st.booleans())


def pad(samples: list[np.ndarray], style: str, causal: bool, left: bool, extra: int = 0) -> Batch:
    """One batch; padded positions hold large values that must not matter."""
    tokens = max(map(len, samples)) + extra
    x = np.full((len(samples), tokens, samples[0].shape[1]), 3, np.float32)
    real = np.zeros((len(samples), tokens), bool)
    for number, sample in enumerate(samples):
        place = slice(tokens - len(sample), tokens) if left else slice(0, len(sample))
        x[number, place], real[number, place] = sample, True
    return Batch({"x": x, "bias": bias_of(style, real, causal)}, real)


@cache
def patch_for(form: str) -> Patch:
    """One patch a form, which flags about an eighth of the columns of drawn samples, so that some samples have none."""
    net = FORMS[form]
    model = net.model()
    features = Features.LANDMARKS if form.endswith(LANDMARKS) else Features.SUMMARY
    return fire_on_some(
        model, draw_patch(model, seed=2, features=features), net.feed(np.random.default_rng(0), 12, 6), share=0.08
    )


@cache
def base(form: str) -> ort.InferenceSession:
    return session(FORMS[form].model())


@cache
def patched(form: str, emission: Emission, inline: bool) -> ort.InferenceSession:
    model = FORMS[form].model()
    names = [f"atpatch/site_{number}/margin" for number in range(2)]
    return session(with_outputs(bake(model, patch_for(form), emission=emission, inline=inline, site_flags=True), names))


@written
@drawn
@given(drawn=batches())
def test_a_sample_is_the_same_alone_and_in_any_batch(form: str, style: str, drawn: tuple) -> None:
    samples, causal, left = drawn
    batch = pad(samples, style, causal, left)
    expected = run(base(form), batch.feed)
    for emission, inline in VARIANTS:
        opened = patched(form, emission, inline)
        together = run(opened, batch.feed)
        flagged = together["atpatch/flagged"][:, 0]
        for name, value in expected.items():
            assert same_bits(together[name][~flagged], value[~flagged]), f"{name}: unflagged, so the base's bits"
        if min(_distances(together)) < UNDECIDED:
            continue
        for number in range(len(samples)):
            alone = run(opened, batch.of([number]))
            real = batch.real[number]
            np.testing.assert_allclose(alone["hidden"][0, real], together["hidden"][number, real], **SAME)
            np.testing.assert_allclose(alone["logits"][0], together["logits"][number], **SAME)
            if not flagged[number]:
                assert same_bits(alone["hidden"][0, real], together["hidden"][number, real])
            for site in range(2):
                name = f"atpatch/site_{site}/flags"
                assert np.array_equal(alone[name][0], together[name][number])


@written
@drawn
@given(drawn=batches())
def test_any_order_of_the_batch_gives_the_same_samples(form: str, style: str, drawn: tuple) -> None:
    samples, causal, left = drawn
    batch = pad(samples, style, causal, left)
    order = list(range(len(samples)))[::-1]
    for emission in Emission:
        opened = patched(form, emission, False)
        forth, back = run(opened, batch.feed), run(opened, batch.of(order))
        if min(_distances(forth)) < UNDECIDED:
            continue
        for name, value in forth.items():
            np.testing.assert_allclose(back[name][order], value, **SAME, err_msg=name)
        quiet = ~forth["atpatch/flagged"][:, 0]
        assert same_bits(back["hidden"][order][quiet], forth["hidden"][quiet])


def _distances(seen: dict[str, np.ndarray]) -> list[float]:
    return [float(abs(seen[f"atpatch/site_{site}/margin"]).min()) for site in range(2)]


@written
@drawn
@given(drawn=batches(), extra=st.integers(1, 5))
def test_padding_does_not_change_flags(form: str, style: str, drawn: tuple, extra: int) -> None:
    samples, causal, left = drawn
    opened = patched(form, Emission.BRANCHLESS, False)
    padded = pad(samples, style, causal, left, extra)
    together = run(opened, padded.feed)
    for number, sample in enumerate(samples):
        alone = run(opened, pad([sample], style, causal, left).feed)
        real = padded.real[number]
        decided = np.ones(len(sample), bool)
        for site in range(2):
            margin = alone[f"atpatch/site_{site}/margin"][0]
            flags, padded_flags = alone[f"atpatch/site_{site}/flags"][0], together[f"atpatch/site_{site}/flags"][number]
            decided &= abs(margin) > UNDECIDED
            assert np.array_equal(flags[decided], padded_flags[real][decided]), f"site {site}"
            assert not padded_flags[~real].any(), "padding is never flagged"
            if not decided.all():
                break  # the next site reads what this one decided
            np.testing.assert_allclose(together[f"atpatch/site_{site}/margin"][number][real], margin, rtol=0, atol=1e-4)
        else:
            np.testing.assert_allclose(together["hidden"][number][real], alone["hidden"][0], **SAME)


@pytest.mark.parametrize("form", FORMS)
def test_samples_as_they_are_drawn_come_with_and_without_flags(form: str) -> None:
    """Or the other tests would be about nothing."""
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(2 + number % 6, Net().width)).astype(np.float32) for number in range(24)]
    seen = run(patched(form, Emission.BRANCHLESS, False), pad(samples, "min", causal=False, left=False).feed)
    share = seen["atpatch/flagged"].mean()
    assert 0.2 < share < 0.9, share


@written
def test_margins_tell_columns_apart(form: str, style: str) -> None:
    """The detector is not blind: real columns have scores of their own."""
    net = FORMS[form]
    assert len(np.unique(margins(net.model(), patch_for(form), 0, net.feed(np.random.default_rng(0))))) > 5
