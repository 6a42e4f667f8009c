"""How traffic is searched, and a model scanned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from atpatch_onnx.errors import DiscoveryError, check_options

Kind = Literal["texts", "grids", "tables"]
"""Ids of word pieces, values on axes (images), or one column a token."""

KINDS: tuple[Kind, ...] = get_args(Kind)

ScanKind = Literal[Kind, "prompts"]
"""The same, or what a language model goes on from."""


@dataclass(frozen=True)
class HuntOptions:
    """How traffic is searched."""

    false_alarms: float = 0.05
    """Probability that any part is called a backdoor where none decides more than `DECIDES` of other inputs."""

    pairs: int = 1000
    """Pairs to make for a fit, about."""

    kind: Kind | None = None
    """What the inputs are; None: as `read_content` finds."""

    blank: int | None = None
    """Of texts, the id that stands for nothing, such as that of `[MASK]`; None: the commonest of the traffic that is
    not in more than half of the texts."""

    words: Mapping[int, str] | None = None
    """Of texts, what ids stand for, for the words of a verdict."""

    output: str | None = None
    """Output that predictions are read from; None: the first float output `[batch, classes]`."""

    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, KINDS)


@dataclass(frozen=True)
class ScanOptions:
    """How a model is scanned."""

    vocabulary: tuple[int, ...] | None = None
    """Of texts, the ids that are tried; needed for them."""

    words: Mapping[int, str] | None = None
    """Of texts, what ids stand for, for the words of a verdict."""

    columns: tuple[str, ...] | None = None
    """Of tables, the names of the columns; None: their numbers."""

    protected: tuple[str, ...] = ()
    """Of tables, the names of columns that predictions must not lean on."""

    flip_rate: float = 0.005
    """Of tables, the share of rows that may flip with a protected column."""

    steps: int = 12
    """Of prompts, how many tokens of an answer are looked at."""

    evolve: bool = True
    """Of images, whether an evolutionary search follows where the dictionary finds nothing."""

    false_alarms: float = 0.05
    """Probability that any part is called a backdoor where none decides more than `DECIDES` of other inputs."""

    pairs: int = 1000
    kind: ScanKind | None = None
    """What the inputs are; None: prompts of a model with a cache, else as `read_content` finds."""

    output: str | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        flip_rate = (0 <= self.flip_rate < 1, "from 0 to below 1")
        _check(self, (*KINDS, "prompts"), flip_rate=flip_rate, steps=(self.steps >= 1, "at least 1"))


def _check(options: HuntOptions | ScanOptions, kinds: tuple[ScanKind, ...], **more: tuple[bool, str]) -> None:
    """Refuse what no search can be asked; `more` as in `check_options`."""
    check_options(
        options,
        DiscoveryError,
        false_alarms=(0 < options.false_alarms < 1, "between 0 and 1"),
        pairs=(options.pairs >= 1, "at least 1"),
        batch_size=(options.batch_size >= 1, "at least 1"),
        kind=(options.kind is None or options.kind in kinds, f"one of {', '.join(kinds)}"),
        **more,
    )
