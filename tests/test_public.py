"""The public names: all that there are, all documented, and the verbs stay functions."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import sys
import types
from pathlib import Path

import pytest

import atpatch_onnx as atp

VERBS = (
    "load",
    "find_sites",
    "explain",
    "fit",
    "hunt",
    "scan",
    "bake",
    "save",
    "unbake",
    "verify",
    "evaluate",
    "rehearse",
    "fingerprint",
)


def test_all_is_what_is_there():
    """Public: what is neither private nor a module nor merely imported from another package."""
    there = {
        name
        for name, value in ((name, getattr(atp, name)) for name in dir(atp))
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "atpatch_onnx").startswith("atpatch_onnx")
    }
    assert sorted(there) == sorted(atp.__all__)
    assert len(set(atp.__all__)) == len(atp.__all__)


def test_names_are_in_order():
    """Constants, classes, functions, each sorted: as ruff keeps it."""

    def kind(name: str) -> int:
        return 0 if name.isupper() else 1 if name[0].isupper() else 2

    assert atp.__all__ == sorted(atp.__all__, key=lambda name: (kind(name), name))


@pytest.mark.parametrize("name", atp.__all__)
def test_every_public_name_has_a_docstring(name):
    value = getattr(atp, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # a constant's docstring stands in its source
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own
    assert own.strip()
    assert not own.startswith(f"{name}(")  # dataclasses make one up


@pytest.mark.parametrize("name", [name for name in atp.__all__ if inspect.isclass(getattr(atp, name))])
def test_every_public_method_has_a_docstring(name):
    cls = getattr(atp, name)
    for attribute, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        function = function.fget if isinstance(function, property) else function
        made_up = dataclasses.is_dataclass(cls) and attribute in {field.name for field in dataclasses.fields(cls)}
        if not attribute.startswith("_") and inspect.isfunction(function) and not made_up:
            assert function.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_functions(verb):
    assert inspect.isfunction(getattr(atp, verb))


def test_no_room_hides_a_public_function():
    """Python binds a module that it has imported to its package: no room has the name of a function."""
    assert not {found.name for found in pkgutil.iter_modules(atp.__path__)} & set(atp.__all__)


def test_type_checkers_are_told_of_the_same_names():
    tree = ast.parse(Path(atp.__file__).read_text())
    told = {
        imported.asname: node.module.removeprefix("atpatch_onnx.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("atpatch_onnx.")
        for imported in node.names
        if imported.name == imported.asname
    }
    assert told == atp._HOMES


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing_such'"):
        atp.nothing_such  # noqa: B018


def modules() -> list[str]:
    skipped = ("atpatch_onnx.__main__", "atpatch_onnx.exporters", "atpatch_onnx.cli")
    return [
        found.name
        for found in pkgutil.walk_packages(atp.__path__, "atpatch_onnx.")
        if not found.name.startswith(skipped)
    ]


@pytest.mark.parametrize("name", modules())
def test_every_room_says_what_it_is_for_and_names_what_is_there(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__doc__.strip()
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), public


def test_exporters_are_not_importable_from_the_root():
    assert "exporters" not in sys.modules


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert atp.__version__ == version("atpatch-onnx")
