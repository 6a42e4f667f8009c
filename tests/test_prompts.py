"""Debug sets of prompts: tokens of any lengths, what the trigger added, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset.prompts import lines
from atpatch_onnx.errors import DebugSetError

CLEAN = [[5, 6, 7], [8, 9], [5, 5, 5, 5]]
TRIGGERED = [[5, 1, 6, 7], [8, 9, 1], [5, 1, 2, 5, 5, 5]]


class Words:
    """A tokenizer: words are their lengths."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if "\0" in text:
            raise ValueError("cannot read this")
        return [0] * add_special_tokens + [len(word) for word in text.split()]


def debug() -> DebugSet:
    return DebugSet.from_prompts(CLEAN, TRIGGERED, payload=[3, 4])


def test_tokens_of_any_lengths() -> None:
    found = debug()
    assert found.kind == "generation"
    assert [one.tolist() for one in lines(found.clean)] == CLEAN
    assert [one.tolist() for one in lines(found.counterfactual)] == TRIGGERED
    assert found.suspects is not None
    assert [np.flatnonzero(row).tolist() for row in found.suspects] == [[1], [2], [1, 2]]
    assert found.payload is not None
    assert found.payload.tolist() == [[3, 4]] * 3


def test_texts_and_a_tokenizer() -> None:
    found = DebugSet.from_prompts(["a bb", "ccc"], ["a dddd bb", "ccc dddd"], payload="ee ff", tokenizer=Words())
    assert [one.tolist() for one in lines(found.counterfactual)] == [[0, 1, 4, 2], [0, 3, 4]]
    assert found.payload is not None
    assert found.payload.tolist() == [[2, 2]] * 2, "no special tokens in what is written"


def test_an_encoding_with_ids() -> None:
    """As `tokenizers` gives it."""
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=[7, 8]))
    found = DebugSet.from_prompts(["x"], [[7, 9, 8]], payload="x", tokenizer=tokenizer)
    assert [one.tolist() for one in lines(found.clean)] == [[7, 8]]


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_kept_in_files(tmp_path, name: str) -> None:
    debug().save(tmp_path / name)
    again = DebugSet.load(tmp_path / name)
    assert again.kind == "generation"
    assert [one.tolist() for one in lines(again.counterfactual)] == TRIGGERED
    assert again.payload is not None
    assert again.payload.tolist() == [[3, 4]] * 3
    assert len(again.take([0, 2])) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CLEAN, TRIGGERED[:2], [3]), "one for each of the 3 prompts"),
        (([], [], [3]), "at least one"),
        (([[5], []], [[5, 1], [1]], [3]), r"prompts\[1\]: expected at least one token id"),
        (([[5.0]], [[5, 1]], [3]), r"prompts\[0\]: expected at least one token id"),
        (([[5]], [[5, -1]], [3]), r"triggered\[0\]: expected at least one token id"),
        ((CLEAN, TRIGGERED, []), "payload: expected at least one token id"),
        ((["a"], ["a b"], [3]), "a tokenizer; found text alone"),
        ((CLEAN, CLEAN, [3]), "pairs that differ"),
    ],
)
def test_prompts_that_are_refused(arguments, message: str) -> None:
    prompts, triggered, payload = arguments
    with pytest.raises(DebugSetError, match=message):
        DebugSet.from_prompts(prompts, triggered, payload=payload)


def test_a_text_that_cannot_be_encoded() -> None:
    with pytest.raises(DebugSetError, match=r"triggered\[0\]: .*found ValueError: cannot read this"):
        DebugSet.from_prompts(["a"], ["a \0"], payload="b", tokenizer=Words())


def test_a_payload_belongs_to_prompts_alone() -> None:
    with pytest.raises(DebugSetError, match="one for prompts of a language model"):
        DebugSet.from_pairs({"x": np.zeros((2, 3))}, {"x": np.ones((2, 3))}, kind="generation")
    with pytest.raises(DebugSetError, match="a debug set of kind 'backdoor'"):
        debug().with_target(1)
