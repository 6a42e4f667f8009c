"""What a site says of itself."""

from dataclasses import replace

import pytest
from models import Net

from atpatch_onnx.matching import explain
from atpatch_onnx.matching.sites import AttentionSite, Dim, Matches


def matches(**changes: object) -> Matches:
    """Two sites of one token axis; the first is changed."""
    first, second = explain(Net().model()).sites
    return Matches((replace(first, **changes), second), ())  # type: ignore[arg-type]


def note(**changes: object) -> str:
    found = matches(**changes)
    return found.carry_note(found.sites[0])


def test_flags_are_carried_among_the_sites_of_an_axis() -> None:
    assert note() == "carried among the 2 sites of axis_0 (self-attention)"
    assert note(self_attention=False) == (
        "carried among the 2 sites of axis_0 (its queries are not the positions of its keys)"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"token_axis": "axis_1"},
            "not carried: no other site's keys are known to be positions of this sequence (self-attention)",
        ),
        ({"parts": 16}, "not carried: 16 parts of a sample, such as windows or channels, attend on their own"),
        ({"parts": None}, "not carried: several parts of a sample, such as windows or channels, attend on their own"),
        (
            {"parts": 0, "token_axis": "axis_1"},
            "not carried: no other site's keys are known to be positions of this sequence (samples share one map)",
        ),
    ],
)
def test_what_breaks_a_token_axis_is_said(changes: dict[str, object], reason: str) -> None:
    assert note(**changes) == reason
    assert matches(**changes).to_json()["sites"][0]["carry"] == reason


@pytest.mark.parametrize(
    ("parts", "keys", "columns"),
    [(1, 5, 5), (1, "tokens", "tokens"), (4, 5, 20), (4, "tokens", None), (None, 5, None), (0, 5, None)],
)
def test_columns_of_a_sample(parts: Dim, keys: Dim, columns: Dim) -> None:
    site: AttentionSite = matches(parts=parts, keys=keys).sites[0]
    assert site.columns == columns
