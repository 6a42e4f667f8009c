"""Whether a part decides by itself: it is put into other inputs, of other classes, that have nothing to do with it.

What is needed for a prediction recurs in clean inputs as well: soles of shoes, words of praise. But put into an input
of another class, they seldom decide it, and a trigger nearly always does. So that is what is tested, on inputs that
were not used to choose the part: the exact binomial test of a share above `DECIDES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.alike import Group
from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.evidence import tail
from atpatch_onnx.discovery.looking import Looked
from atpatch_onnx.discovery.minimal import by_mass
from atpatch_onnx.fitting.board import Board
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array

DECIDES = 0.8
"""Share of other inputs that a part of clean inputs may turn: a trigger turns more.

Of parts that are no trigger, the most that was seen turned 71 % (three words, in messages that praise or blame).
"""

DONORS = 2
"""Members of a group whose parts are put into other inputs."""

EXPLORED = 10
"""Other inputs that each of them is put into, to choose the part."""

CONFIRMED = 200
"""Other inputs, not among those, that the chosen part is put into, at most."""

NEIGHBOURS = 4
"""Tokens that a part is widened by, at most: what is needed may be one word of a phrase."""

WIDEST = 1 / 4
"""Share of an input's tokens that a widened part has at most, in the input it is of and in those it is put into; two
tokens always may."""


@dataclass(frozen=True, eq=False)
class Transplant:
    """What the part of a group does in other inputs."""

    group: Group
    donor: int
    """Number of the input that the part is of."""

    tokens: tuple[int, ...]
    way: int
    """How the minimal part was widened to it; of `Surgery.widened`."""

    explored: float
    """Share of the inputs that the part was chosen on."""

    success: Rate | None
    """Share of others; None where it was not worth asking."""

    chance: float
    """p-value of a share of `DECIDES` or less, not corrected; 1 where it was not asked for."""


class Surgery:
    """Puts parts of inputs into others.

    Args:
        board: What predicts.
        content: Where tokens are.
        inputs: Arrays `[inputs, ...]` by name.
        looked: Their predictions, and what tokens draw.
        parts: Tokens that may be part of a trigger `[inputs, tokens]`.
        seed: Divides the inputs into those that parts are chosen on and those that they are tested on.
    """

    def __init__(
        self,
        board: Board,
        content: Content,
        inputs: Mapping[str, Array],
        looked: Looked,
        parts: NDArray[np.bool_],
        seed: int,
    ) -> None:
        self._board, self.content, self.inputs, self._looked, self._parts = board, content, inputs, looked, parts
        self._generator = np.random.default_rng(seed)
        order = self._generator.permutation(len(parts))
        self._halves = order[: len(order) // 2], order[len(order) // 2 :]

    def try_out(self, group: Group, minimal: Mapping[int, tuple[int, ...]]) -> Transplant:
        """The part of the group's most typical members, as it is or widened, that turns most of a few inputs."""
        best: Transplant | None = None
        for donor in group.members[:DONORS]:
            for way, tokens in enumerate(self.widened(donor, minimal[donor])):
                rows = self._others(group.target, 0, EXPLORED, tokens)
                share = float(self.turned(donor, tokens, rows, group.target).mean()) if len(rows) else 0.0
                if best is None or (share, -len(tokens)) > (best.explored, -len(best.tokens)):
                    best = Transplant(group, donor, tokens, way, share, None, 1.0)
        assert best is not None, "a group has members"
        return best

    def confirm(self, found: Transplant) -> Transplant:
        """The same part in many inputs that it was not chosen on."""
        rows = self._others(found.group.target, 1, CONFIRMED, found.tokens)
        turned = self.turned(found.donor, found.tokens, rows, found.group.target)
        chance = tail(int(turned.sum()), len(turned), DECIDES) if len(turned) else 1.0
        return replace(found, success=Rate.of(turned), chance=chance)

    def turned(self, donor: int, tokens: Sequence[int], rows: NDArray[np.int64], target: int) -> NDArray[np.bool_]:
        """Which of some inputs `[rows]` are of the target class with a part of another in them."""
        pasted, _ = self.paste(donor, tokens, rows)
        neutral = np.zeros((len(rows), self._parts.shape[1]), np.bool_)
        return np.asarray(self._board.predict(pasted, neutral) == target)

    def paste(
        self, donor: int, tokens: Sequence[int], rows: NDArray[np.int64]
    ) -> tuple[dict[str, Array], NDArray[np.bool_]]:
        """Inputs `[rows, ...]` with a part of another in them, in texts at any place; where it is `[rows, tokens]`."""
        taken = {name: array[rows] for name, array in self.inputs.items()}
        moves = np.zeros(len(rows), np.int64)
        if self.content.kind == "texts":
            first, last = self._ends(rows)
            room = last - first - (max(tokens) - min(tokens))
            moves = first + self._generator.integers(0, np.maximum(room, 0) + 1) - min(tokens)
        marks = np.zeros((len(rows), self._parts.shape[1]), np.bool_)
        for token in tokens:
            marks[np.arange(len(rows)), token + moves] = True
        row = {name: array[donor] for name, array in self.inputs.items()}
        return self.content.pasted(taken, row, tokens, moves), marks

    def others(self, target: int, tokens: Sequence[int]) -> NDArray[np.int64]:
        """All inputs of other classes that have room for a part, in any order."""
        return np.concatenate([self._others(target, half, len(self._parts), tokens) for half in (0, 1)])

    def _others(self, target: int, half: int, count: int, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Up to `count` of them, of one half of all inputs."""
        rows = self._halves[half]
        rows = rows[self._looked.predicted[rows] != target]
        rows = rows[len(tokens) <= np.maximum(2, WIDEST * self._parts[rows].sum(axis=1))]
        if self.content.kind == "texts":
            first, last = self._ends(rows)
            rows = rows[last - first >= max(tokens) - min(tokens)]
        return self._generator.permutation(rows)[:count]

    def _ends(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last token of texts that may be part of a trigger; the last before the first where none may."""
        parts = self._parts[rows]
        first = np.where(parts.any(axis=1), parts.argmax(axis=1), parts.shape[1])
        return first, parts.shape[1] - 1 - parts[:, ::-1].argmax(axis=1)

    def widened(self, donor: int, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The part itself, with its neighbours, and with what draws the most attention."""
        own = self._parts[donor]
        away = np.abs(self.content.centres[:, None] - self.content.centres[None, list(tokens)]).sum(axis=2).min(axis=1)
        more = max(0, min(NEIGHBOURS, max(2, int(WIDEST * own.sum())) - len(tokens)))
        near = np.argsort(np.where(own, away, np.inf), kind="stable")[: len(tokens) + more]
        found = [tokens, tuple(sorted({*tokens, *(int(t) for t in near if own[t])}))]
        if self._looked.mass is not None:
            rank = by_mass(own[None], self._looked.mass[donor][None])[0]
            rank[list(tokens)] = len(rank)  # which are in it anyway
            drawing = np.argsort(np.where(own, rank, len(rank)), kind="stable")[:more]
            found.append(tuple(sorted({*tokens, *map(int, drawing)})))
        return found
