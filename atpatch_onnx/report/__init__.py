"""Results to tables on the terminal (`text`) and to one HTML file (`html`): pure rendering, nothing is measured here.

`text` needs nothing but rich. `html` and `pictures` need the extra `report`. All are imported by name:

    from atpatch_onnx.report.html import render_html, write_report
"""
