"""Run the notebooks of docs/cookbook again, and keep what they show: `make docs` runs nothing.

    atpatch demo --out demo-out
    python -m samples.cookbook --demo demo-out

Each runs in a folder that is thrown away, in which `demo-out` is.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

BOOK = Path(__file__).parent.parent / "docs" / "cookbook"


def main(arguments: list[str] | None = None) -> int:
    """Run and keep; 1 where the demo's files are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="what `atpatch demo` left")
    parser.add_argument("--only", action="append", help="names of notebooks; all where none is given")
    options = parser.parse_args(arguments)
    if not (options.demo / "base.onnx").is_file():
        print(f"{options.demo} has no base.onnx: run atpatch demo --out {options.demo} first", file=sys.stderr)
        return 1
    for file in sorted(BOOK.glob("*.ipynb")):
        if options.only is None or file.stem in options.only:
            rerun(file, options.demo.resolve())
            print(f"wrote {file}")
    return 0


def rerun(file: Path, demo: Path) -> None:
    """The notebook with what it shows now, without times and machines."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo-out").symlink_to(demo)
        nbclient.NotebookClient(notebook, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, file)


if __name__ == "__main__":
    sys.exit(main())
