"""How `make docs` builds the site; what it says of code and commands is read from them (`extensions/described.py`)."""

import sys
from pathlib import Path

import atpatch_onnx

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "atpatch-onnx"
author = "The atpatch-onnx maintainers"
release = version = atpatch_onnx.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "described"]
exclude_patterns = ["evidence/results/pieces"]

nb_execution_mode = "off"  # tests run the notebooks and the pages' code (tests/test_pages.py, tests/test_cookbook.py)
nb_merge_streams = True
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"atpatch-onnx {release}"
html_show_sphinx = False
html_show_copyright = False
