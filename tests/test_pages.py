"""Every block of code on the site is run, or says that it is not; links lead somewhere; pages name what there is."""

import dataclasses
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import DOCS, PAGES, RUN, blocks, commands, run, trouble
from planted import Planted, fitted
from worlds import WORLDS

import atpatch_onnx as atp
from atpatch_onnx import errors
from atpatch_onnx.baking.metadata import PatchedLayer, PatchedSite
from atpatch_onnx.cli.root import COMMANDS
from atpatch_onnx.patches import file as patch_file
from atpatch_onnx.patches.patch import Detector, LayerEdit, Neutral, Patch, Places, SitePatch

ROOT = DOCS.parent
EVIDENCE = DOCS / "evidence"
WALKS = DOCS / "how-to" / "pairs.md"  # tests/test_walks.py runs it, and looks at what comes of it
WALKED = [
    (page, world) for page in PAGES if page != WALKS for world in dict.fromkeys(b.world for b in blocks(page) if b.runs)
]


@pytest.fixture(scope="session")
def fixed(tmp_path_factory) -> Path:
    """The world of a model that is fixed, once: its tests are one group, for one worker."""
    folder = tmp_path_factory.mktemp("fixed")
    WORLDS["fixed"](folder)
    return folder


def grouped(page: Path, world: str | None):
    group = {"demo": "demo", "fixed": "pages"}.get(world, f"{page.stem}-{world}")
    marks = [pytest.mark.slow, pytest.mark.xdist_group(group)]
    return pytest.param(page, world, marks=marks, id=f"{page.stem}-{world}")


@pytest.mark.parametrize(("page", "world"), [grouped(*one) for one in WALKED])
def test_the_code_of_a_page_runs(page, world, tmp_path, monkeypatch, request):
    pytest.importorskip("PIL")
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    if world == "demo":
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / "demo-out")
    elif world == "fixed":
        shutil.copytree(request.getfixturevalue("fixed"), tmp_path, dirs_exist_ok=True)
    else:
        WORLDS[world](tmp_path)
    names: dict = {}
    for block in blocks(page):
        if block.runs and block.world == world:
            run(block, names)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_a_block_is_run_or_says_that_it_is_not(page):
    for block in blocks(page):
        if not block.language and page.parent == EVIDENCE:
            continue  # commands of days, and what they print: the page is their output
        assert block.language, f"{block.where}: say what it is"
        known = block.runs or block.caption.startswith(("Output of `", "Not run here: ", "Equation", "Diagram"))
        assert known or (page.parent == EVIDENCE and block.language == "text"), block.where
        for named in re.findall(r"(?:tests|samples)/\w+\.py", block.caption):
            assert (ROOT / named).is_file(), (block.where, named)
        if block.caption.startswith("Not run here") and block.language == "python":
            compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_commands_are_those_that_there_are(page):
    for block in blocks(page):
        if block.language in ("", *RUN[1:]):
            lines = "\n".join(re.findall(r"^(?:atpatch|pip install|python -m|make) .*", block.text, re.M))
            for words, _ in commands(lines if not block.language else block.text):
                assert trouble(words) is None, (block.where, words, trouble(words))


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and link[0] != "#"]


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for link in links(page):
        assert (page.parent / link).exists(), link


def keys(page: str) -> dict[str, set[str]]:
    """The first cells in code of each table of a page, by the head of that column."""
    found: dict[str, set[str]] = {}
    head = None
    for line in (DOCS / page).read_text().splitlines():
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = line.split("|")[1].strip()
        else:
            found.setdefault(head, set()).update(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    return found


def test_the_page_on_patch_files_names_what_is_in_them():
    hidden = Detector(np.ones((4, 2), np.float32), np.ones(2, np.float32), np.ones(2, np.float32), threshold=1.0)
    neutral = Neutral(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    edit = LayerEdit("layer", np.array([0]), np.ones(1, np.float32), np.ones(1, np.float32))
    places = Places(np.ones(2, np.float32))
    patch = Patch("base", (SitePatch("site", hidden, neutral),), edits=(edit,))
    always = Patch("base", (SitePatch("site", places, neutral),))
    entry = json.loads(patch_file.header(patch, patch_id=patch.id))
    documented = keys("reference/patch-file.md")
    assert documented["key"] == set(entry)
    assert documented["key of a site"] == set(entry["sites"][0])
    assert documented["key of an edit"] == set(entry["edits"][0])
    assert {name.replace("N", "0") for name in documented["tensor"]} == {
        *patch_file.tensors(patch),
        *patch_file.tensors(always),
    }


def test_the_page_on_patched_models_names_what_is_in_them():
    planted = Planted()
    record = atp.bake(planted.model(), fitted(planted)).metadata_props
    documented = keys("reference/patched-model.md")
    assert documented["entry"] == {key for key in record if key.startswith("atpatch.")}
    assert documented["key of a site"] == {field.name for field in dataclasses.fields(PatchedSite)}
    assert documented["key of a layer"] == {field.name for field in dataclasses.fields(PatchedLayer)}


def test_every_error_has_an_entry():
    family = [name for name, value in vars(errors).items() if inspect.isclass(value)]
    assert re.findall(r"^## (\w+)$", (DOCS / "reference" / "errors.md").read_text(), re.M) == family


def test_the_page_on_commands_has_them_all(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS / "extensions")
    text = "\n".join(importlib.import_module("described").commands())
    for group in COMMANDS.values():
        for command in group:
            assert f"## atpatch {command.__name__.replace('_', '-')}\n" in text
    assert "## atpatch pairs images\n" in text
    assert "| `--target` |" in text


def test_every_page_is_in_the_contents():
    text = (DOCS / "index.md").read_text()
    listed = {line for toc in re.findall(r"```{toctree}(.*?)```", text, re.S) for line in toc.splitlines()}
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"} <= listed
