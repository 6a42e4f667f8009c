"""Every `Attention` case of onnx's own backend node tests, with a detector that never fires and with one that does.

The cases come in two forms: the op itself, and `_expanded`, the function body of the op written out, which our matcher
has to recognise as decomposed attention. `NOT_RUN` is the complete table of the cases that are left out, each with its
reason; it is compared with reality, so that a case that begins to run fails the test until it is taken off the table.
"""

import warnings
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import (
    ALWAYS,
    NEVER,
    VARIANTS,
    draw_patch,
    fire_on_some,
    run,
    same_bits,
    with_outputs,
)
from onnx import helper
from onnx.backend.test.case.node import collect_testcases

from atpatch_onnx.baking import reference as redistribution
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.matching import explain
from atpatch_onnx.matching.layout import canonical
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Patch

BF16 = "bfloat16: onnxruntime 1.31 does not run it on the CPU"
OPSET_25 = "opset 25 windows: onnxruntime 1.31 does not know these attributes"
MASK_SHORTER = "the mask has 4 columns for 6 keys, which opset 24 allows and onnxruntime 1.31 refuses"

NOT_RUN = {
    "test_attention_4d_causal_bf16": BF16,
    "test_attention_4d_causal_bf16_expanded": BF16,
    "test_attention_4d_padded_kv_bf16": BF16,
    "test_attention_4d_padded_kv_bf16_expanded": BF16,
    "test_attention_4d_causal_padded_kv_bf16": BF16,
    "test_attention_4d_causal_padded_kv_bf16_expanded": BF16,
    "test_attention_4d_attn_mask_causal_bf16": BF16,
    "test_attention_4d_attn_mask_causal_bf16_expanded": BF16,
    "test_attention_3d_causal_bf16": BF16,
    "test_attention_3d_causal_bf16_expanded": BF16,
    "test_attention_4d_diff_heads_mask4d_padded_kv": MASK_SHORTER,
    "test_attention_local_window": OPSET_25,
    "test_attention_bidirectional_window": OPSET_25,
    "test_attention_local_window_default": OPSET_25,
    "test_attention_local_window_rank1_boolean_mask": OPSET_25,
    "test_attention_local_window_with_past": OPSET_25,
    "test_attention_local_window_ext_cache_rank3_head_mask": OPSET_25,
    "test_attention_local_window_ext_cache_rank4_batch_mask": OPSET_25,
    "test_attention_local_window_ext_cache_rank2_mask": OPSET_25,
    "test_attention_local_window_ext_cache_float16_mask": OPSET_25,
    "test_attention_3d_local_window": OPSET_25,
    "test_attention_local_window_gqa_rank4_mask": OPSET_25,
}
"""Cases that onnxruntime does not run unpatched: name -> reason."""

REFUSED: dict[str, str] = {}
"""Cases that onnxruntime runs and our matcher refuses: name -> the matcher's reason."""

ALIKE = "all inputs are alike, and so are the columns"
ONE_VISIBLE = "only one column is ever visible"

ONE_SCORE = {
    "test_attention_3d_transpose_verification": ALIKE,
    "test_attention_3d_transpose_verification_expanded": ALIKE,
    "test_attention_causal_boolmask_nan_robustness": ONE_VISIBLE,
    "test_attention_causal_boolmask_nan_robustness_expanded": ONE_VISIBLE,
}
"""Cases without two columns to tell apart: every visible column fires there; name -> why."""

BETAS = (0.0, 0.5, 1.0, "profile")
SPECS = tuple((neutral, beta) for neutral in (True, False) for beta in BETAS)


@dataclass
class Case:
    name: str
    number: int
    proto: onnx.ModelProto
    feed: dict[str, np.ndarray]
    model: ir.Model | None = None
    base: dict[str, np.ndarray] = field(default_factory=dict)
    site: AttentionSite | None = None
    error: str | None = None
    refusal: str | None = None

    @property
    def expanded(self) -> bool:
        return self.name.endswith("_expanded")

    @property
    def half(self) -> bool:
        assert self.site is not None
        return self.site.dtype == "FLOAT16"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """All cases, run unpatched and matched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # onnx computes its expected outputs with inf and NaN
        collected = collect_testcases("Attention")
    found = []
    for number, collected_case in enumerate(collected):
        proto = collected_case.model
        inputs = collected_case.data_sets[0][0]
        names = [value.name for value in proto.graph.input]
        case = Case(collected_case.name, number, proto, dict(zip(names, inputs, strict=True)))
        try:
            case.base = run(proto, case.feed)
        except Exception as error:
            case.error = str(error)
        else:
            case.model = ir.from_proto(proto)
            matches = explain(case.model)
            if len(matches.sites) == 1:
                case.site = matches.sites[0]
            else:
                case.refusal = "; ".join(miss.reason for miss in matches.near_misses)
        found.append(case)
    return found


def patchable(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.site is not None]


def test_the_tables_are_complete_and_true(cases: list[Case]) -> None:
    failed = {case.name: case.error for case in cases if case.error is not None}
    assert failed.keys() == NOT_RUN.keys()
    for name, reason in NOT_RUN.items():
        print(f"not run: {name}: {reason} ({failed[name][:120]!r})")  # noqa: T201 - the table, with pytest -s
    assert {case.name: case.refusal for case in cases if case.refusal is not None} == REFUSED
    assert len(patchable(cases)) == len(cases) - len(NOT_RUN) - len(REFUSED)
    ops = [case for case in patchable(cases) if not case.expanded]
    assert len(ops) >= 76, "the cases of the op that onnxruntime 1.31 runs"


def never(case: Case) -> Patch:
    return draw_patch(case.model, case.number, threshold=NEVER)


@pytest.mark.slow
def test_a_detector_that_never_fires_changes_no_bit(cases: list[Case], subtests: pytest.Subtests) -> None:
    for case in patchable(cases):
        with subtests.test(case.name):
            patch = never(case)
            for emission, inline in VARIANTS[:: 3 if case.expanded else 1]:
                patched = run(bake(case.model, patch, emission=emission, inline=inline), case.feed)
                for name, value in case.base.items():
                    assert same_bits(patched[name], value), f"{name}, {emission}, inline={inline}"
                assert not patched["atpatch/flagged"].any()


def reference(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The map `[maps, heads, queries, keys]` and the values `[maps, kv heads, keys, depth]` of the unpatched case."""
    site = case.site
    heads = {"h": site.kv_heads}
    if case.expanded:
        seen = run(with_outputs(case.model, [site.map, site.value], site.dtype), case.feed)
        return canonical(seen[site.map], site.map_layout, heads), canonical(seen[site.value], site.value_layout, heads)
    proto = onnx.ModelProto()
    proto.CopyFrom(case.proto)
    (node,) = (node for node in proto.graph.node if node.op_type == "Attention")
    kept = [attribute for attribute in node.attribute if attribute.name != "qk_matmul_output_mode"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("qk_matmul_output_mode", 3)])
    past = len(node.input) > 5 and node.input[5]
    outputs = [node.output[0], "present_key_" if past else "", "present_value_" if past else "", "map_"]
    del node.output[:]
    node.output.extend(outputs)
    kind = proto.graph.output[0].type.tensor_type.elem_type
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in outputs if name)
    seen = run(proto, case.feed)
    V = seen["present_value_"] if past else canonical(case.feed[node.input[2]], site.value_layout, heads)
    return seen["map_"], V


def tolerance(case: Case, V: np.ndarray) -> dict[str, float]:
    """How far a patched output may be from the reference in float64.

    float32: the arithmetic differs by rounding only; 1e-5 is about 50 roundings of values of the size of one.
    float16: the result is rounded to float16 (2**-11 of its size), and onnxruntime may keep the map of a decomposed
    attention in float32 where the reference reads it rounded to float16 (2**-11 of the largest value).
    """
    if case.half:
        return {"rtol": 2**-11, "atol": 1e-5 + 2**-11 * float(np.abs(V).max())}
    return {"rtol": 0, "atol": 1e-5}


@pytest.mark.slow
def test_chosen_columns_give_what_the_reference_gives(cases: list[Case], subtests: pytest.Subtests) -> None:
    for case in patchable(cases):
        with subtests.test(case.name):
            site = case.site
            P, V = reference(case)
            threshold = ALWAYS
            if case.name not in ONE_SCORE:
                threshold = fire_on_some(case.model, never(case), case.feed).sites[0].detector.threshold
            rng = np.random.default_rng(case.number)
            profile = rng.random((site.heads, P.shape[2], 1)).astype(np.float32)
            Y = run(with_outputs(case.model, [site.output], site.dtype), case.feed)[site.output]
            laid_out = partial(canonical, pattern=site.output_layout, sizes={"h": site.heads})
            for step, (neutral, beta) in enumerate(SPECS):
                if (step + case.number // 2) % (4 if case.expanded else 2):
                    continue  # for time's sake; the other settings come with the other cases
                emission, inline = VARIANTS[(step + case.number) % len(VARIANTS)]
                patch = draw_patch(
                    case.model,
                    case.number,
                    threshold=threshold,
                    neutral=neutral,
                    beta=profile if beta == "profile" else beta,
                )
                baked = bake(case.model, patch, emission=emission, inline=inline, site_flags=True)
                patched = run(with_outputs(baked, [site.output], site.dtype), case.feed)
                M = patched[f"atpatch/{site.name}/flags"]
                assert M.any(), "at least one column is flagged"
                if case.name not in ONE_SCORE:
                    assert not M.all(), "not all columns are flagged"
                redistribution_ = patch.sites[0].redistribution
                wanted = redistribution.redistributed_output(
                    P, V, laid_out(Y), M, redistribution_.beta, redistribution_.neutral
                )
                where = f"{emission}, inline={inline}, neutral={neutral}, beta={beta}"
                found = laid_out(patched[site.output])
                np.testing.assert_allclose(found, wanted, **tolerance(case, V), err_msg=where)
                still = ~M.any(-1)
                assert same_bits(patched[site.output][still], Y[still]), where
                for name in list(case.base)[1:]:  # the first is Y, or computed from it in the expanded cases
                    assert same_bits(patched[name], case.base[name]), f"{name}, {where}"
