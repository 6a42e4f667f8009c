"""`python -m atpatch_onnx`: the command line."""

import sys

from atpatch_onnx.cli import main

sys.exit(main())
