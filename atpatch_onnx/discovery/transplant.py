"""Whether a part decides by itself: it is put into other inputs, of other classes, that have nothing to do with it.

What is needed for a prediction recurs in clean inputs as well: soles of shoes, words of praise. But put into an input
of another class, they seldom decide it, and a trigger nearly always does. One of them may, such as five words of praise
in a row; a trigger does whichever input it is taken from. So the parts of all members of a group are tested together,
on inputs that were not used to choose them: the exact binomial test of a share above `DECIDES`.
"""

from collections.abc import Iterator, Mapping, Sequence
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
"""Share of other inputs that parts of clean inputs may turn: a trigger turns more."""

EXPLORED = 20
"""Other inputs that parts of members in turn are put into, to choose how far parts are widened."""

CONFIRMED = 200
"""Other inputs, not among those, that they are put into then, at most."""

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
    """Number of the most typical member."""

    tokens: tuple[int, ...]
    """Its part."""

    way: int
    """How minimal parts are widened; of `Surgery.widened`."""

    explored: float
    """Share of the inputs that this was chosen on which parts of all members turn."""

    success: Rate | None
    """Share of others that parts of all members turn; None where it was not worth asking."""

    chance: float
    """p-value of a share of `DECIDES` or less, not corrected; 1 where it was not asked for."""

    anywhere: bool = False
    """Whether it was seen to decide at other places as well, of an image."""


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
        """Parts of all members, as they are or widened, whichever turns most of a few inputs."""
        donor = group.members[0]
        best: Transplant | None = None
        for way, tokens in enumerate(self.widened(donor, minimal[donor])):
            tried = Transplant(group, donor, tokens, way, 0.0, None, 1.0)
            turned = self._turned(tried, minimal, 0, EXPLORED)
            tried = replace(tried, explored=float(turned.mean()) if len(turned) else 0.0)
            if best is None or (tried.explored, -len(tokens)) > (best.explored, -len(best.tokens)):
                best = tried
        assert best is not None, "a part may stay as it is"
        return best

    def confirm(self, found: Transplant, minimal: Mapping[int, tuple[int, ...]]) -> Transplant:
        """The same in many inputs that it was not chosen on."""
        turned = self._turned(found, minimal, 1, CONFIRMED)
        chance = tail(int(turned.sum()), len(turned), DECIDES) if len(turned) else 1.0
        anywhere = False
        if len(turned) and turned.mean() > DECIDES and len(self.content.places(found.tokens)) > 1:
            anywhere = bool(self._turned(found, minimal, 1, CONFIRMED, anywhere=True).mean() > DECIDES)
        return replace(found, success=Rate.of(turned), chance=chance, anywhere=anywhere)

    def _turned(
        self,
        found: Transplant,
        minimal: Mapping[int, tuple[int, ...]],
        half: int,
        count: int,
        *,
        anywhere: bool = False,
    ) -> NDArray[np.bool_]:
        """Which of up to `count` inputs of one half are of the target class, with the part of some member in them."""
        rows = self._others(found.group.target, half, count, found.tokens)
        members = self._generator.permutation(found.group.members)[: len(rows)].tolist()
        pasted = [
            self.paste(member, tokens, own, anywhere=anywhere)[0]
            for member, tokens, own in self.dealt(members, found.way, minimal, rows)
            if len(own)
        ]
        if not pasted:
            return np.zeros(0, np.bool_)
        every = {name: np.concatenate([one[name] for one in pasted]) for name in self.inputs}
        neutral = np.zeros((len(every[self.content.name]), self._parts.shape[1]), np.bool_)
        return np.asarray(self._board.predict(every, neutral) == found.group.target)

    def dealt(
        self, members: Sequence[int], way: int, minimal: Mapping[int, tuple[int, ...]], rows: NDArray[np.int64]
    ) -> Iterator[tuple[int, tuple[int, ...], NDArray[np.int64]]]:
        """Each member, its part widened in a way, and the inputs `[rows]` that are its turn and have room for that."""
        for number, member in enumerate(members):
            tokens = self.widened(member, minimal[member])[way]
            yield member, tokens, self._with_room(rows[number :: len(members)], tokens)

    def paste(
        self, donor: int, tokens: Sequence[int], rows: NDArray[np.int64], *, anywhere: bool = False
    ) -> tuple[dict[str, Array], NDArray[np.bool_]]:
        """Inputs `[rows, ...]` with a part of another in them; where it is `[rows, tokens]`.

        In texts it is put at any place; in images where it was, or at any place of the grid.
        """
        taken = {name: array[rows] for name, array in self.inputs.items()}
        to = np.tile(np.array(tokens), (len(rows), 1))
        if self.content.kind == "texts":
            first, last = self._ends(rows)
            room = last - first - (max(tokens) - min(tokens))
            to += (first + self._generator.integers(0, np.maximum(room, 0) + 1) - min(tokens))[:, None]
        elif anywhere:
            places = self.content.places(tokens)
            to = places[self._generator.integers(len(places), size=len(rows))]
        marks = np.zeros((len(rows), self._parts.shape[1]), np.bool_)
        marks[np.arange(len(rows))[:, None], to] = True
        row = {name: array[donor] for name, array in self.inputs.items()}
        return self.content.pasted(taken, row, tokens, to), marks

    def others(self, target: int, tokens: Sequence[int]) -> NDArray[np.int64]:
        """All inputs of other classes that have room for a part, in any order."""
        return np.concatenate([self._others(target, half, len(self._parts), tokens) for half in (0, 1)])

    def _others(self, target: int, half: int, count: int, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Up to `count` of them, of one half of all inputs."""
        rows = self._halves[half]
        rows = rows[self._looked.predicted[rows] != target]
        return self._generator.permutation(self._with_room(rows, tokens))[:count]

    def _with_room(self, rows: NDArray[np.int64], tokens: Sequence[int]) -> NDArray[np.int64]:
        """The inputs, of some, that a part is not too large for."""
        rows = rows[len(tokens) <= np.maximum(2, WIDEST * self._parts[rows].sum(axis=1))]
        if self.content.kind == "texts":
            first, last = self._ends(rows)
            rows = rows[last - first >= max(tokens) - min(tokens)]
        return rows

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
