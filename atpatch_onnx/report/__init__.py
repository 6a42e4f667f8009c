"""Results to tables on the terminal (`text`) and to one HTML file (`html`): pure rendering, nothing is measured here.

`text` needs nothing but rich. `html` and `pictures` need the extra `report` and are imported by name:

    from atpatch_onnx.report.html import render_html, write_report
"""

from atpatch_onnx.report.text import (
    benchmark_table,
    edits_table,
    evaluation_table,
    fit_summary,
    fit_table,
    ladder_table,
    layers_table,
    near_misses_table,
    sites_table,
    verification_table,
)

__all__ = [
    "benchmark_table",
    "edits_table",
    "evaluation_table",
    "fit_summary",
    "fit_table",
    "ladder_table",
    "layers_table",
    "near_misses_table",
    "sites_table",
    "verification_table",
]
