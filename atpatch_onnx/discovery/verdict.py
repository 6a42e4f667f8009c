"""What a search comes to: a verdict that a person can act on, the parts that were found, and what was searched."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.running.metrics import Difference, Rate


class Verdict(StrEnum):
    """In words."""

    CLEAN = "clean as far as this search sees"
    SUSPICIOUS = "suspicious"
    BACKDOORED = "backdoored"
    AUDITED = "audited"
    """A table none of whose columns was named as protected: nothing is judged."""


Box = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns of an image, each from the first to behind the last."""


@dataclass(frozen=True, eq=False)
class Part:
    """A small part of inputs that decides predictions."""

    what: str
    """In words: the tiles, the word pieces, the columns."""

    target: int
    """The class that inputs with it are sent to; of a language model, the first token that it is made to write."""

    success: Rate
    """Share of the inputs that it was put into that are sent there, of those of other classes."""

    chance: float
    """Probability of so large a share where a part may decide `decides` of the inputs, corrected for all that were
    tested."""

    share: float | None = None
    """Of the traffic that has it, at least; None where there was none."""

    tokens: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()
    """Numbers of inputs that have it."""

    shown: Mapping[str, Any] = field(default_factory=dict)
    """For a picture: one of the inputs that have it, by name."""

    boxes: tuple[Box, ...] = ()
    """Where it lies in an image."""

    writes: str | None = None
    """What a language model is made to write, in words; None of one that predicts classes."""

    @property
    def effect(self) -> str:
        """What it does, in words."""
        return f"class {self.target}" if self.writes is None else f"it writes {self.writes}"

    def to_json(self) -> dict[str, Any]:
        """All but the picture, as plain JSON types."""
        return {
            "what": self.what,
            "class": self.target,
            "writes": self.writes,
            "success": [self.success.value, self.success.low, self.success.high, self.success.count],
            "chance": self.chance,
            "share": self.share,
            "tokens": list(self.tokens),
            "examples": list(self.examples),
        }


@dataclass(frozen=True)
class Column:
    """What a model makes of one column of a table."""

    name: str
    index: int
    flips: Rate
    """Share of rows whose prediction changes with some other value that the table has in this column."""

    parity: Difference | None
    """Largest difference between two groups' shares of the class that is predicted most differently, groups being the
    column's values, or halves of its range; None where there is one group only."""

    protected: bool

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        parity = None if self.parity is None else [self.parity.value, self.parity.low, self.parity.high]
        flips = [self.flips.value, self.flips.low, self.flips.high, self.flips.count]
        return {"name": self.name, "index": self.index, "flips": flips, "parity": parity, "protected": self.protected}


@dataclass(frozen=True, eq=False)
class Search:
    """What a hunt or a scan found."""

    verdict: Verdict
    sentence: str
    """The verdict in a sentence, with class, part and share."""

    searched: tuple[str, ...]
    """What was searched, and with what power, a line each."""

    parts: tuple[Part, ...] = ()
    """Those first that decide most; of a scan, the most certain."""

    columns: tuple[Column, ...] = ()
    """Of a table, those that flip most first."""

    pairs: DebugSet | None = None
    """Ready for a fit; None where nothing was found."""

    passes: int = 0
    """Forward passes of one input each."""

    inputs: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    """More, as plain JSON types."""

    @property
    def alarmed(self) -> bool:
        """Whether somebody should look at it."""
        return self.verdict in (Verdict.SUSPICIOUS, Verdict.BACKDOORED)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pairs, as plain JSON types."""
        return {
            "verdict": self.verdict.value,
            "sentence": self.sentence,
            "searched": list(self.searched),
            "parts": [part.to_json() for part in self.parts],
            "columns": [column.to_json() for column in self.columns],
            "pairs": None if self.pairs is None else len(self.pairs),
            "passes": self.passes,
            "inputs": self.inputs,
            "passes_per_input": self.passes / max(self.inputs, 1),
            "figures": dict(self.figures),
        }
