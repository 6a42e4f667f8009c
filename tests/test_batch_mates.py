"""A sample's output is its own: it does not depend on its batch-mates, and padding does not change its flags.

Batch and sequence are free axes. The bias that hides padded and future positions is an input of these nets, so that it
can be written in every way that exporters write it:

| style | masked | a row that is masked throughout |
|---|---|---|
| `min` | finfo.min is added | becomes the uniform row over all keys, padding included |
| `-inf` | -inf is added | becomes NaN, and zero by SDPA's Where(IsNaN); the op gives zero itself |
| `own key` | finfo.min is added, but padding sees itself | is there no more |

Equal means bit for bit, flagged or not: a detector reads a token's own key, and the attention is the base's. Only where
sequences are of another length does the base itself add up in another order.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FORMS, Net, draw_patch, fire_on_some, margins, run, same_bits, session, with_outputs

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.patches.patch import Patch

SAME = {"rtol": 1e-5, "atol": 1e-5}
"""float32: two layers of sums of eight products, values of the size of ten."""

UNDECIDED = 1e-5
"""Tokens this near to the threshold may be flagged or not where lengths differ: rounding of scores."""

STYLES = ("min", "-inf", "own key")
NETS = {
    "decomposed": Net(form="softmax", bias=True),
    "guarded": Net(form="guarded", bias=True),
    "op": Net(form="attention", opset=23, bias=True),
    "packed op": Net(form="packed", opset=24, bias=True),
}
KINDS = ("linear", "hidden")

WRITTEN = [(form, style) for form in NETS for style in STYLES if not (form == "decomposed" and style == "-inf")]
# a Softmax without guard gives NaN for rows of -inf: exporters do not write that

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
def batches(draw: st.DrawFn, *, shortest: int = 2, fewest: int = 0) -> tuple[list[np.ndarray], bool, bool]:
    """Samples of different lengths, or none; whether the mask is causal, whether padding is on the left."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(shortest, 7), min_size=fewest, max_size=4))
    samples = [rng.normal(size=(length, Net().width)).astype(np.float32) for length in lengths]
    return samples, draw(st.booleans()), draw(st.booleans())


def pad(samples: list[np.ndarray], style: str, causal: bool, left: bool, extra: int = 0) -> Batch:
    """One batch; padded positions hold large values that must not matter."""
    tokens = max(map(len, samples), default=3) + extra
    x = np.full((len(samples), tokens, Net().width), 3, np.float32)
    real = np.zeros((len(samples), tokens), bool)
    for number, sample in enumerate(samples):
        place = slice(tokens - len(sample), tokens) if left else slice(0, len(sample))
        x[number, place], real[number, place] = sample, True
    return Batch({"x": x, "bias": bias_of(style, real, causal)}, real)


@cache
def patch_for(form: str, kind: str) -> Patch:
    """One patch a form and kind of detector, which flags few tokens of drawn samples: some samples have none."""
    net = NETS[form]
    model = net.model()
    return fire_on_some(
        model, draw_patch(model, seed=4, kind=kind), net.feed(np.random.default_rng(0), 12, 6), share=0.06
    )


@cache
def base(form: str) -> ort.InferenceSession:
    return session(NETS[form].model())


@cache
def patched(form: str, kind: str, conditional: bool) -> ort.InferenceSession:
    model = NETS[form].model()
    baked = bake(model, patch_for(form, kind), conditional=conditional, site_flags=True)
    return session(with_outputs(baked, [margin_of(number) for number in range(2)]))


def margin_of(site: int) -> str:
    return f"atpatch/site_{site}/{'carried' if site else 'margin'}"


def runs(form: str, batch: Batch) -> bool:
    """Of no sample onnxruntime's operator makes an error by itself; then there is nothing to say of a patch."""
    return bool(len(batch.real)) or form in ("decomposed", "guarded")


@written
@drawn
@given(drawn=batches(), kind=st.sampled_from(KINDS))
def test_a_sample_is_the_same_alone_and_in_any_batch(form: str, style: str, drawn: tuple, kind: str) -> None:
    samples, causal, left = drawn
    batch = pad(samples, style, causal, left)
    if not runs(form, batch):
        return
    expected = run(base(form), batch.feed)
    for conditional in FORMS:
        opened = patched(form, kind, conditional)
        together = run(opened, batch.feed)
        flagged = together["atpatch/flagged"][:, 0]
        for name, value in expected.items():
            assert same_bits(together[name][~flagged], value[~flagged]), f"{name}: unflagged, so the base's bits"
        for number in range(len(samples)):
            alone = run(opened, batch.of([number]))
            assert alone["atpatch/flagged"][0] == flagged[number]
            for site in range(2):
                for name in (f"atpatch/site_{site}/flags", margin_of(site)):
                    assert same_bits(alone[name][0], together[name][number]), name
            assert same_bits(alone["hidden"][0], together["hidden"][number])
            np.testing.assert_allclose(alone["logits"][0], together["logits"][number], **SAME)  # so it is in the base


@written
@drawn
@given(drawn=batches(), kind=st.sampled_from(KINDS))
def test_any_order_of_the_batch_gives_the_same_samples(form: str, style: str, drawn: tuple, kind: str) -> None:
    samples, causal, left = drawn
    batch = pad(samples, style, causal, left)
    if not runs(form, batch):
        return
    order = list(range(len(samples)))[::-1]
    for conditional in FORMS:
        opened = patched(form, kind, conditional)
        forth, back = run(opened, batch.feed), run(opened, batch.of(order))
        for name, value in forth.items():
            if name == "logits":
                np.testing.assert_allclose(back[name][order], value, **SAME, err_msg=name)
            else:
                assert same_bits(back[name][order], value), name


@written
@drawn
@given(drawn=batches(), kind=st.sampled_from(KINDS), extra=st.integers(1, 5))
def test_padding_does_not_change_flags_of_tokens(form: str, style: str, drawn: tuple, kind: str, extra: int) -> None:
    """Nor their results, whether padding itself is flagged or not: nobody attends to it."""
    samples, causal, left = drawn
    opened = patched(form, kind, False)
    padded = pad(samples, style, causal, left, extra)
    if not runs(form, padded):
        return
    together = run(opened, padded.feed)
    for number, sample in enumerate(samples):
        alone = run(opened, pad([sample], style, causal, left).feed)
        real = padded.real[number]
        for site in range(2):
            margin = alone[margin_of(site)][0, :, 0]
            flags, padded_flags = alone[f"atpatch/site_{site}/flags"][0], together[f"atpatch/site_{site}/flags"][number]
            decided = abs(margin) > UNDECIDED
            assert np.array_equal(flags[decided], padded_flags[real][decided]), f"site {site}"
            if not decided.all():
                break  # the next site reads what this one decided
            np.testing.assert_allclose(together[margin_of(site)][number][real][:, 0], margin, rtol=0, atol=1e-4)
        else:
            np.testing.assert_allclose(together["hidden"][number][real], alone["hidden"][0], **SAME)


@pytest.mark.parametrize("form", NETS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_at_padded_positions_does_not_matter(form: str, kind: str) -> None:
    """Flagged or not, they are hidden from all real tokens; so that is the same bit for bit."""
    rng = np.random.default_rng(3)
    samples = [rng.normal(size=(length, Net().width)).astype(np.float32) for length in (3, 5, 7)]
    batch = pad(samples, "min", causal=False, left=False)
    opened = patched(form, kind, True)
    first = run(opened, batch.feed)
    x = np.where(batch.real[..., None], batch.feed["x"], rng.normal(size=batch.feed["x"].shape)).astype(np.float32)
    second = run(opened, {**batch.feed, "x": x})
    assert same_bits(first["hidden"][batch.real], second["hidden"][batch.real])
    for site in range(2):
        name = f"atpatch/site_{site}/flags"
        assert np.array_equal(first[name][batch.real], second[name][batch.real])


@pytest.mark.parametrize("form", NETS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_as_they_are_drawn_come_with_and_without_flags(form: str, kind: str) -> None:
    """Or the other tests would be about nothing."""
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(2 + number % 6, Net().width)).astype(np.float32) for number in range(24)]
    seen = run(patched(form, kind, False), pad(samples, "min", causal=False, left=False).feed)
    share = seen["atpatch/flagged"].mean()
    assert 0.2 < share < 0.9, share


@pytest.mark.parametrize("form", NETS)
@pytest.mark.parametrize("kind", KINDS)
def test_margins_tell_tokens_apart(form: str, kind: str) -> None:
    """The detector is not blind: tokens have separate scores."""
    net = NETS[form]
    assert len(np.unique(margins(net.model(), patch_for(form, kind), 0, net.feed(np.random.default_rng(0))))) > 5
