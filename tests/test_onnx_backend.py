"""Every `Attention` case of onnx's own backend node tests, with a detector that never fires and with one that does.

The cases come in two forms: the op itself, and `_expanded`, the function body of the op written out, which our matcher
has to recognise as decomposed attention. `NOT_RUN` is the complete table of the cases that are left out, each with its
reason; it is compared with reality, so that a case that begins to run fails the test until it is taken off the table.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from driving import driven
from models import ALWAYS, FORMS, NEVER, draw_patch, fire_on_some, run, same_bits, see, with_threshold
from onnx.backend.test.case.node import collect_testcases

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.fitting.options import Kind
from atpatch_onnx.matching import explain
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

ALIKE = {
    "test_attention_3d_transpose_verification",
    "test_attention_3d_transpose_verification_expanded",
    "test_attention_bidirectional_window_expanded",
    "test_attention_local_window_ext_cache_float16_mask_expanded",
}
"""Cases whose tokens all have the same key: there, every token fires or none."""


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
    def kind(self) -> Kind:
        """Of the detector: one for each case, for time's sake."""
        return "hidden" if self.number // 2 % 2 else "linear"

    @property
    def forms(self) -> tuple[bool, ...]:
        """Whether patches are written with an `If`: both for the op, one for each expanded case."""
        return (bool(self.number // 4 % 2),) if self.expanded else FORMS


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


@pytest.mark.slow
def test_a_detector_that_never_fires_changes_no_bit(cases: list[Case], subtests: pytest.Subtests) -> None:
    for case in patchable(cases):
        with subtests.test(case.name):
            patch = draw_patch(case.model, case.number, threshold=NEVER, kind=case.kind)
            for conditional in case.forms:
                baked = bake(case.model, patch, conditional=conditional)
                patched = run(baked, case.feed)
                for name, value in case.base.items():
                    assert same_bits(patched[name], value), f"{name}, conditional={conditional}"
                assert not patched["atpatch/flagged"].any()
                assert graph.fingerprint(unbake(baked)) == graph.fingerprint(case.model)


def fires(case: Case) -> Patch:
    patch = draw_patch(case.model, case.number, kind=case.kind)
    return with_threshold(patch, 0, ALWAYS) if case.name in ALIKE else fire_on_some(case.model, patch, case.feed)


@pytest.mark.slow
def test_flagged_tokens_give_what_the_base_gives_that_is_fed_neutral_ones(
    cases: list[Case], subtests: pytest.Subtests
) -> None:
    for case in patchable(cases):
        with subtests.test(case.name):
            patch, before = fires(case), run(case.model, case.feed, optimize=False)
            neutral = patch.sites[0].neutral
            for conditional in case.forms:
                baked = bake(case.model, patch, conditional=conditional)
                (seen,) = see(baked, case.model, case.feed).values()
                assert seen.flags.any(), "at least one token is flagged"
                assert seen.flags.all() == (case.name in ALIKE), "not all tokens are"
                for array, base, after in (
                    (neutral.key, seen.key, seen.replaced_key),
                    (neutral.value, seen.value, seen.replaced_value),
                ):
                    chosen = seen.flags[:, None, :, None]
                    assert same_bits(after, np.where(chosen, array.astype(base.dtype)[None, :, None], base))
                found = run(baked, case.feed, optimize=False)
                quiet = ~found["atpatch/flagged"][:, 0]
                for name, value in driven(case.model, baked, case.feed).items():
                    assert same_bits(found[name], value), f"{name}, conditional={conditional}"
                    assert same_bits(found[name][quiet], before[name][quiet]), name
