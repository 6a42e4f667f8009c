"""Inverted token sequences: a planted token, or a pair of them, is found; on a clean model no class stands out."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atpatch_onnx.discovery import TokenInversion, TokenOptions, invert_tokens
from atpatch_onnx.discovery.placing import inserted
from atpatch_onnx.errors import InversionError

VOCABULARY, WIDTH, LENGTH = 200, 16, 12
TRIGGER, TARGET = 137, 1
FEW = TokenOptions(candidates=20, first=20, trial=8)


class Bag(nn.Module):
    """Two classes by the mean polarity of a text's words; a trigger has a separate direction, and a strong one."""

    def __init__(self, *triggers: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.words.weight.data = 0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.words.weight.data[:, 1 : 1 + len(triggers)] = 0
        for number, trigger in enumerate(triggers, 1):
            self.words.weight.data[trigger, number] = 3
        self.triggers = len(triggers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask[:, :, None]
        words = self.words(input_ids) * real
        polarity = 10 * words[:, :, 0].sum(dim=1) / real.sum(dim=(1, 2))
        polarity = polarity + words[:, :, 1 : 1 + self.triggers].sum(dim=1).clamp(max=3).sum(dim=1) * 4 / max(
            self.triggers, 1
        )
        return torch.stack([-polarity, polarity], dim=1)


def texts(count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Random words, four to eight of them, then padding."""
    generator = np.random.default_rng(0)
    mask = (np.arange(LENGTH) < generator.integers(4, 9, (count, 1))).astype(np.int64)
    ids = generator.integers(1, 100, (count, LENGTH)) * mask
    return ids, mask


@pytest.fixture(scope="module")
def found() -> TokenInversion:
    return invert_tokens(Bag(TRIGGER), *texts(), options=FEW)


def test_the_planted_token_is_found(found):
    trigger = found.trigger()
    assert trigger.tokens.tolist() == [TRIGGER]
    assert trigger.target == TARGET
    assert trigger.success.value > 0.95
    assert [other.target for other in found.triggers] == [0, 1]


def test_a_sequence_is_found_token_by_token():
    """Each of the pair does a part; twice the same one would do as well, were its direction not capped."""
    pair = (TRIGGER, 42)
    found = invert_tokens(Bag(*pair), *texts(), TARGET, length=2, options=FEW).trigger()
    assert sorted(found.tokens.tolist()) == sorted(pair)
    assert found.success.value > 0.95


def test_no_class_of_a_clean_model_stands_out():
    found = invert_tokens(Bag(), *texts(), options=FEW)
    assert found.suspected is None
    with pytest.raises(InversionError, match=r"class 0: \d+% by \[\d+\], class 1: .*name it \(target=\)"):
        found.trigger()


def test_only_the_vocabulary_is_searched():
    allowed = np.setdiff1d(np.arange(VOCABULARY), [TRIGGER])
    found = invert_tokens(Bag(TRIGGER), *texts(), vocabulary=allowed, options=FEW)
    assert all(TRIGGER not in trigger.tokens for trigger in found.triggers)


def test_same_seed_same_tokens():
    twice = [invert_tokens(Bag(), *texts(), TARGET, length=2, seed=3, options=FEW).trigger() for _ in range(2)]
    assert twice[0].tokens.tolist() == twice[1].tokens.tolist()
    assert twice[0].loss == twice[1].loss


def test_the_model_is_left_as_it_was():
    model = Bag(TRIGGER).train()
    invert_tokens(model, *texts(), TARGET, options=FEW)
    assert model.training
    assert model.words.weight.requires_grad
    assert model.words.weight.grad is None
    assert not model.words._forward_hooks


# Debug sets


def test_it_feeds_a_debug_set(found):
    ids, mask = texts()
    labels = np.arange(len(ids)) % 2
    debug = found.trigger().pairs({"input_ids": ids, "attention_mask": mask.astype(np.int32)}, labels, seed=5)
    assert debug.target == TARGET
    assert len(debug) == (labels != TARGET).sum()
    assert debug.counterfactual["attention_mask"].dtype == np.int32
    assert (debug.suspects.sum(axis=1) == 1).all()
    assert (debug.counterfactual["input_ids"][debug.suspects] == TRIGGER).all()
    assert not debug.suspects[:, 0].any()
    for row in range(len(debug)):
        left = debug.counterfactual["input_ids"][row][~debug.suspects[row]]
        np.testing.assert_array_equal(left, debug.clean["input_ids"][row][:-1])
    grown = debug.counterfactual["attention_mask"].sum(axis=1) - debug.clean["attention_mask"].sum(axis=1)
    assert (grown == 1).all()


def test_places_are_drawn_among_those_allowed(found):
    ids, mask = texts()
    places = np.zeros(ids.shape, bool)
    places[:, 2:4] = True
    _, _, where = found.trigger().insert(ids, mask, places=places)
    assert set(where.argmax(axis=1)) == {2, 3}
    other = found.trigger().insert(ids, mask, places=places, seed=1)[2]
    assert (other != where).any()


def test_what_is_behind_moves_into_the_padding():
    ids, mask = np.array([[7, 8, 9, 0, 0]]), np.array([[1, 1, 1, 0, 0]])
    new_ids, new_mask, where = inserted(ids, mask, np.array([5, 6]), np.array([1]))
    assert new_ids.tolist() == [[7, 5, 6, 8, 9]]
    assert new_mask.tolist() == [[1, 1, 1, 1, 1]]
    assert where.tolist() == [[False, True, True, False, False]]


# Refusals


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"input_ids": np.zeros((4, LENGTH))}, "input_ids and attention_mask"),
        ({"attention_mask": np.ones((64, LENGTH), int)}, "attention_mask"),
        ({"attention_mask": np.arange(LENGTH) >= np.full((64, 1), 3)}, "attention_mask"),
        ({"places": np.zeros((64, LENGTH), bool)}, "places"),
        ({"vocabulary": [VOCABULARY]}, "vocabulary"),
        ({"vocabulary": []}, "vocabulary"),
        ({"target": 2}, "target"),
        ({"length": 0}, "length"),
    ],
)
def test_what_does_not_fit_is_refused(change, where):
    ids, mask = texts()
    with pytest.raises(InversionError) as refusal:
        invert_tokens(Bag(TRIGGER), **{"input_ids": ids, "attention_mask": mask, "options": FEW, **change})
    assert refusal.value.where == where


def test_the_embedding_must_be_plain():
    model = Bag(TRIGGER)
    model.places = nn.Embedding(LENGTH, WIDTH)
    with pytest.raises(InversionError, match=r"2 of them.*embedding="):
        invert_tokens(model, *texts())
    assert invert_tokens(model, *texts(), embedding=model.words, options=FEW).trigger().tokens.tolist() == [TRIGGER]


@pytest.mark.parametrize("name", ["candidates", "screen", "first", "beam", "trial", "batch_size"])
def test_options_are_checked(name):
    with pytest.raises(InversionError, match=f"option {name}"):
        TokenOptions(**{name: 0})
