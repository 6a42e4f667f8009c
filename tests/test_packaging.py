"""What the package says of itself is said alike everywhere."""

import tomllib
from pathlib import Path

import pytest

import atpatch_onnx as atp

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_and_one_license():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"] == atp.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["keywords"] == PROJECT["keywords"]
    assert {author["name"] for author in cited["authors"]} == {author["name"] for author in PROJECT["authors"]}


def test_the_versions_of_python_that_are_named_are_those_that_are_tested():
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["fast"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_what_ci_calls_is_there():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    calls = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    for call in calls:
        name, *rest = call.split()
        assert (name == "make" and rest[0] in targets) or (ROOT / name).is_file(), call
