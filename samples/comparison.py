"""AtPatch beside edits of hidden units on three cases: `neuron_edits.json` and `neuron_edits.md` in `docs/evidence`.

    python -m samples.comparison              # three seeds
    python -m samples.comparison --fast       # the small forms, one seed; docs/ is not touched

Figures are kept in `--out`, piece by piece (see `samples.pieces`); bases that `samples.results` trained are used again.
"""

import sys
from collections.abc import Iterator

from samples.compared import EFFORTS
from samples.pieces import Piece, command


def chain(task: str, seed: int) -> Iterator[Piece]:
    """The pieces of one task and seed."""
    from samples.tasks import TASKS

    return (Piece(case, seed, "compared") for case in TASKS[task].CASES if case in EFFORTS)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the page; 1 where a piece failed."""
    from samples.compared_page import write_page

    return command(__doc__, chain, write_page, arguments)


if __name__ == "__main__":
    sys.exit(main())
