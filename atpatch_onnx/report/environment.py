"""How pages are filled in: whatever is put into one is escaped, and nothing that is missing is passed over."""

import jinja2

from atpatch_onnx.report.rows import decimal, percent, shown


def environment() -> jinja2.Environment:
    """The templates of this room, with the filters for numbers and names."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("atpatch_onnx.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "decimal": decimal, "shown": shown}
    return made
