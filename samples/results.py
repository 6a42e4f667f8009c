"""Run every task with three seeds, and write `results.json`, `results.md` and its pictures into `docs/evidence`.

    python -m samples.results              # everything
    python -m samples.results --fast       # the small forms, one seed; docs/ is not touched

Figures are kept in `--out`, piece by piece (see `samples.pieces`). AtPatch beside neuron edits is `samples.comparison`.
"""

import sys
from collections.abc import Iterator

from samples.pieces import SEEDS, Piece, command

INVERTED = ("vit/badnets-fixed", "minilm/token")
"""Cases that are fixed once more as if the trigger were not known."""

ABLATED = ("vit/badnets-fixed", "minilm/token", "adult/sex")
"""Cases that the ablations are made on, with the first seed."""


def chain(task: str, seed: int) -> Iterator[Piece]:
    """The pieces of one task and seed, in order."""
    from samples.tasks import TASKS

    for case in TASKS[task].CASES:
        yield Piece(case, seed, "trained")
        yield Piece(case, seed, "measured")
        if case in INVERTED:
            yield Piece(case, seed, "inverted")
        if case in ABLATED and seed == SEEDS[0]:
            yield Piece(case, seed, "ablated")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the page; 1 where a piece failed."""
    from samples.results_page import write_page

    return command(__doc__, chain, write_page, arguments)


if __name__ == "__main__":
    sys.exit(main())
