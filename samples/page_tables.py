"""Tables and figures of the results page, as Markdown."""

from collections.abc import Iterable, Sequence

from atpatch_onnx.report.rows import percent
from samples.summary import Spread


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def named(numbers: Sequence[int]) -> str:
    """The seeds that figures are of, in words."""
    return f"the seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def share(found: Spread | None, digits: int = 2) -> str:
    """A share over seeds: mean, smallest and largest seed, 95 % interval of the mean."""
    if found is None:
        return "-"
    text = percent(found.mean, digits)
    if found.seeds > 1:
        text += f" [{percent(found.smallest, digits)}, {percent(found.largest, digits)}]"
    if found.low is not None and found.high is not None:
        text += f" ({percent(found.low, digits)}, {percent(found.high, digits)})"
    return text


def seeds(found: Spread | None) -> str:
    """How many seeds a figure is over."""
    return "-" if found is None else str(found.seeds)


def points(found: Spread | None) -> str:
    """A difference of shares over seeds, in points."""
    if found is None:
        return "-"
    text = f"{100 * found.mean:+z.2f}"
    if found.seeds > 1:
        text += f" [{100 * found.smallest:+z.2f}, {100 * found.largest:+z.2f}]"
    if found.low is not None and found.high is not None:
        text += f" ({100 * found.low:+z.2f}, {100 * found.high:+z.2f})"
    return text
