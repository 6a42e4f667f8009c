"""Where keys and values are found: as far back as they are per token and per head, for each way to write them."""

import re
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
from models import FORMS, draw_patch, fire_on_some, run, same_bits, with_outputs
from nudge import assert_places, entries
from place_drafts import DEPTH, HEADS, KV_HEADS, KV_WIDTH, PAST, SAMPLES, TOKENS, Draft, Recipe, Written
from place_nets import NEARER, RECIPES, WIDE, never_apart, repeated
from test_matching_forms import text_model

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.read import own_bias
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.matching.sites import AttentionSite, Form, Place
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.verify import verify

ALL = {**RECIPES, **NEARER}
RUNNING = [name for name, recipe in ALL.items() if recipe.runs]


def site_of(recipe: Recipe) -> tuple[ir.Model, Written, AttentionSite]:
    model, written = recipe.written()
    matches = explain(model)
    assert [miss.reason for miss in matches.near_misses if miss.attention] == []
    (site,) = matches.sites
    return model, written, site


@pytest.mark.parametrize("name", ALL)
def test_keys_and_values_stand_where_the_recipe_says(name: str) -> None:
    recipe = ALL[name]
    _, written, site = site_of(recipe)
    depth = WIDE if "GroupQuery" in name else DEPTH
    assert (site.key.value, site.value.value) == (written.key, written.value)
    assert (site.key.axes, site.key.whole) == (recipe.axes, recipe.whole)
    for place in (site.key, site.value):
        assert (place.heads, place.depth) == (recipe.heads, depth)
        assert place.columns.shape == (recipe.heads, depth)
        assert len(np.unique(place.columns)) == place.features
        assert place.reader is None
    behind = name == "a cache behind new tokens"
    assert site.keys == (TOKENS + PAST if behind else TOKENS)
    assert (site.key.bias is not None) == (name == "MultiHeadAttention with bias")


def keys_at_product(model: ir.Model, site: AttentionSite, written: Written, recipe: Recipe) -> list[tuple]:
    """What the places hold and what the attention has, of keys and of values."""
    pairs = [(place, name) for place, name in ((site.key, written.keys), (site.value, written.values)) if name]
    shown = run(
        with_outputs(model, [name for place, name in pairs] + [place.value for place, _ in pairs]), recipe.feed()
    )
    return [(_own(model, place, shown[place.value]), shown[name]) for place, name in pairs]


def _own(model: ir.Model, place: Place, array: np.ndarray) -> np.ndarray:
    """`[maps, heads, tokens, depth]`, with what the operator adds by itself."""
    bias = own_bias(model.graph, place)
    return entries(array, place, SAMPLES) + (0 if bias is None else bias[None, :, None])


@pytest.mark.parametrize("name", RUNNING)
def test_they_are_what_the_attention_has(name: str) -> None:
    """Of keys that are turned or normed in between only the values; a nudge tells the rest, in the next test."""
    model, written, site = site_of(ALL[name])
    pairs = keys_at_product(model, site, written, ALL[name])
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        assert same_bits(found.astype(np.float32), wanted)
    turned = ("rotary", "norm of keys", "key norm", "scaled", "3-D")
    assert len(pairs) == 2 or any(word in name for word in turned)


@pytest.mark.parametrize("name", [name for name in RUNNING if "Query" not in name and "MultiHead" not in name])
def test_a_nudge_of_a_key_moves_its_own_column(name: str) -> None:
    recipe = ALL[name]
    model, _ = recipe.written()
    assert_places(model, recipe.feed())


@pytest.mark.parametrize("name", ["MultiHeadAttention, packed", "MultiHeadAttention, keys and values packed"])
def test_packed_heads_are_stacked_before_their_depth(name: str) -> None:
    """onnxruntime's CPU has no kernel for these, so this is held against the documented `[..., heads, 3, depth]`."""
    model, _, site = site_of(RECIPES[name])
    packed = site.key.sizes[-1] // site.key.features
    array = np.arange(SAMPLES * TOKENS * site.key.heads * packed * DEPTH).reshape(SAMPLES, TOKENS, -1, packed, DEPTH)
    for place, index in ((site.key, packed - 2), (site.value, packed - 1)):
        flat = array.reshape(SAMPLES, TOKENS, -1)
        assert np.array_equal(entries(flat, place, SAMPLES), array[..., index, :].swapaxes(1, 2))
    assert find_sites(model)[0].form is Form.FUSED


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("conditional", FORMS, ids=["if", "where"])
def test_a_patch_there_is_exact(name: str, conditional: bool) -> None:
    recipe = ALL[name]
    model, written, _ = site_of(recipe)
    patch = fire_on_some(model, draw_patch(model), recipe.feed(), share=0.2)
    baked = bake(model, patch, conditional=conditional)
    result = verify(model, baked, DebugSet.from_pairs(recipe.feed(2), recipe.feed(3)), batch_size=SAMPLES)
    assert result.passed, result.failures
    moved = [
        name if name != own else None for name, own in ((written.keys, written.key), (written.values, written.value))
    ]
    names = [name for name in moved if name is not None]
    (record,) = read_record(baked).sites
    found = run(with_outputs(baked, [*names, record.margin]), recipe.feed())
    flags = found[record.margin][..., 0] > 0
    assert 0 < flags.mean() < 1
    for at, neutral in zip(moved, (patch.sites[0].neutral.key, patch.sites[0].neutral.value), strict=True):
        if at is not None:  # what the attention has of a flagged token is neutral
            own = found[at].swapaxes(1, 2)[flags]
            # float32 rounding of a bias that is taken off and added again
            np.testing.assert_allclose(own, np.broadcast_to(neutral, own.shape), atol=1e-6)


@pytest.mark.parametrize("name", ["a cache", "op Attention with a past"])
def test_a_cache_keeps_the_neutral_token(name: str) -> None:
    """So the fix lasts through decoding, and what was cached before stays."""
    recipe = RECIPES[name]
    model, written, _ = site_of(recipe)
    patch = fire_on_some(model, draw_patch(model), recipe.feed(), share=0.2)
    baked = bake(model, patch)
    (record,) = read_record(baked).sites
    base, found = run(model, recipe.feed()), run(with_outputs(baked, [record.margin]), recipe.feed())
    flags = found[record.margin][..., 0] > 0
    assert flags.shape == (SAMPLES, TOKENS)
    neutral = patch.sites[0].neutral
    for present, own in zip(written.extra, (neutral.key, neutral.value), strict=True):
        assert same_bits(found[present][:, :, :PAST], base[present][:, :, :PAST])
        new = np.where(flags[:, None, :, None], own[None, :, None], base[present][:, :, PAST:])
        assert same_bits(found[present][:, :, PAST:], new)


def test_cuts_that_others_read_leave_what_only_the_attention_reads() -> None:
    model, written = Recipe(never_apart).written()
    (site,) = find_sites(model)
    producers = {value.name: node.op_type for node in model.graph for value in node.outputs}
    assert producers[site.key.value] == producers[site.value.value] == "Reshape"
    more = written.extra[0]
    recipe = Recipe(never_apart)
    patch = fire_on_some(model, draw_patch(model), recipe.feed(), share=0.2)
    base, found = run(model, recipe.feed()), run(bake(model, patch), recipe.feed())
    assert same_bits(base[more], found[more]), "what others read stays"
    assert not same_bits(base["out"], found["out"])


WINDOWS = (
    "flat = Reshape (x, rows) {q} {k} {v} "
    "kg = Reshape (k, grid) kt = Transpose <perm = [0, 1, 3, 2, 4, 5]> (kg) kw = Reshape (kt, windows) "
    "qg = Reshape (q, grid) qt = Transpose <perm = [0, 1, 3, 2, 4, 5]> (qg) qw = Reshape (qt, windows) "
    "vg = Reshape (v, grid) vt = Transpose <perm = [0, 1, 3, 2, 4, 5]> (vg) vw = Reshape (vt, windows) "
    "ktt = Transpose <perm = [0, 2, 1]> (kw) s = MatMul (qw, ktt) p = Softmax <axis = -1> (s) y = MatMul (p, vw)"
)


def test_windows_that_are_cut_behind_the_projection_stand_behind_the_cut() -> None:
    """In the projection's rows maps and tokens alternate: rows of windows, rows, windows, columns."""
    constants = (
        "rows = Constant <value_ints = [-1, 12]> () grid = Constant <value_ints = [-1, 2, 2, 2, 2, 12]> () "
        "windows = Constant <value_ints = [-1, 4, 12]> ()"
    )
    layers = {name: f"{name} = MatMul (flat, w_{name})" for name in "qkv"}
    body = f"{constants} {WINDOWS.format(**layers)}"
    weights = ", ".join(f"float[12,12] w_{name}" for name in "qkv")
    model = text_model(body, f"float[3,16,12] x, {weights}", "float[12,4,12] y")
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.normal(size=(12, 12)).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    (site,) = find_sites(model)
    assert (site.key.value, site.value.value, site.parts, site.keys) == ("kw", "vw", 4, 4)
    assert_places(model, {"x": (rng.normal(size=(3, 16, 12)) / 4).astype(np.float32)})


ADVICE = "it projects queries, keys and values itself; fuse the model without it"


def test_an_operator_that_projects_keys_itself_is_refused_with_its_advice() -> None:
    body = "y = com.microsoft.Attention <num_heads = 4> (x, w, b)"
    model = text_model(body, "float[2,6,16] x, float[16,48] w, float[48] b", "float[2,6,16] y")
    matches = explain(model)
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    assert ADVICE in miss.reason
    assert "--use_multi_head_attention" in miss.reason


def test_a_bias_that_is_computed_is_refused() -> None:
    """What an operator adds to keys must be known, to be taken off the neutral ones."""
    body = "c = Relu (b) y = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, c)"
    inputs = ", ".join(f"float[2,6,16] {name}" for name in "qkv")
    (miss,) = explain(text_model(body, f"{inputs}, float[48] b", "float[2,6,16] y")).near_misses
    assert "its bias is computed" in miss.reason


def test_keys_that_are_weights_are_refused() -> None:
    """The same for every input: there is no token to flag."""
    body = "s = MatMul (q, kt) p = Softmax <axis = -1> (s) y = MatMul (p, v)"
    model = text_model(body, "float[2,4,5,8] q, float[2,4,8,7] kt, float[2,4,7,8] v", "float[2,4,5,8] y")
    kt = model.graph.inputs.pop(1)
    kt.const_value = ir.tensor(np.ones((2, 4, 8, 7), np.float32), name="kt")
    model.graph.register_initializer(kt)
    (miss,) = explain(model).near_misses
    assert miss.attention
    assert "its keys do not stand token by token" in miss.reason


def later_values(s: Draft, *, normed: tuple[str, ...]) -> Written:
    """With a cache; a mean over tokens stops the way back behind it, for keys or for values."""
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    found = {}
    for name, y in (("key", k), ("value", v)):
        found[name] = s.op("Concat", f"past_{name}", s.apart(y, KV_HEADS), axis=2)
        if name in normed:
            found[name] = s.op("Div", found[name], s.op("ReduceMean", s.op("Abs", found[name]), s.sizes(2), keepdims=1))
    y = s.attention(s.apart(q), repeated(s, found["key"]), repeated(s, found["value"]))
    return Written(y, found["key"], found["value"])


@pytest.mark.parametrize("normed", [("key",), ("key", "value")], ids=["keys", "both"])
def test_values_are_replaced_with_the_tokens_that_the_keys_have(normed: tuple[str, ...]) -> None:
    """Where keys stand behind a cache, so do values, although the way back leads on: flags are of all tokens."""
    recipe = Recipe(partial(later_values, normed=normed), ("n", "", "k", ""), heads=KV_HEADS, cache=True)
    model, written, site = site_of(recipe)
    assert (site.key.value, site.value.value) == (written.key, written.value)
    assert site.keys == TOKENS + PAST
    assert_places(model, recipe.feed())
    result = rehearse(model, recipe.feed())
    assert result.passed, result.failures


def test_values_without_the_tokens_that_the_keys_have_are_refused() -> None:
    matches = explain(Recipe(partial(later_values, normed=("value",)), heads=KV_HEADS, cache=True).written()[0])
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    assert "its values do not stand token by token in any tensor with the tokens that" in miss.reason


def choosing(s: Draft) -> Written:
    """Keys, their heads folded into the batch, are read for something else as well, as where they choose queries."""
    q, k, v = (s.reshape(s.apart(s.linear("x")), -1, TOKENS, DEPTH) for _ in range(3))
    scores = s.op("MatMul", q, s.transpose(k, 0, 2, 1))
    y = s.op("MatMul", s.op("Softmax", scores, axis=-1), v)
    y = s.reshape(s.transpose(s.reshape(y, -1, HEADS, TOKENS, DEPTH), 0, 2, 1, 3), 0, -1, HEADS * DEPTH)
    return Written(y, "", "", extra=(s.op("Abs", k),))


def test_keys_that_are_read_for_more_are_refused_with_the_tensor() -> None:
    model, _ = Recipe(choosing).written()
    matches = explain(model)
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    (keys,) = re.findall("in any tensor that is read for it alone: (.*) is read for more$", miss.reason)
    (transposed,) = [node for node in model.graph if node.outputs[0].name == keys]
    assert transposed.op_type == "Transpose"
