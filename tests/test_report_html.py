import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import reports as r

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.measuring.examples import Story
from atpatch_onnx.report import images, pictures
from atpatch_onnx.report.html import render_html, write_report
from atpatch_onnx.report.rows import site_rows

NO_END = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The page's elements, their ids, sections and text; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.sections, self.text, self.links = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
            if tag == "section":
                self.sections.append(values["id"])
        self.links += [
            value for key, value in attributes if key in ("src", "href", "xlink:href", "action", "srcset", "data")
        ]
        assert not [key for key in values if key.startswith("on")]
        if tag not in NO_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in NO_END:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def render(**changes):
    options = {
        "title": "A report",
        "patch": r.patch(),
        "evaluation": r.evaluation(),
        "verification": r.verification(),
        "examples": [r.image_example(), r.text_example()],
        "seconds": 12.3,
    }
    return render_html(**(options | changes))


@pytest.fixture(scope="module")
def html():
    return render()


# The page


def test_everything_is_there(html):
    page = Page(html)
    assert page.sections == ["before-after", "examples", "detector", "sites", "checks", "identity", "glossary"]
    for phrase in (
        "Fix holds",
        "98.00%",
        "layer0",
        "sha256:" + "ab" * 32,
        "Neutral key and value",
        "12.3 s",
        "ASR above floor",
    ):
        assert phrase in page.words
    # two inputs of the image, two maps, two charts of received attention, the curve, the contributions
    assert page.tags.count("svg") == 2 + 2 + 2 + 1 + 1


def test_it_needs_nothing_beside_it(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert page.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.findall(r"url\((?!#)", html)
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"' <>]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "Content-Security-Policy\" content=\"default-src 'none';" in html


def test_ids_are_unique_and_every_reference_has_its_target(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", html)) != set()
    for pair in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", html):
        assert (pair[0] or pair[1]) in page.ids


def test_it_is_the_same_every_time(html):
    assert render() == html
    assert str(Path(__file__).parents[1]) not in html


def test_pictures_are_named_and_follow_the_theme(html):
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "metadata" not in svg
        assert not re.findall(r"#0[1-7]0[1-7]0[1-7]", svg)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ("evaluation", {"before-after", "detector"}),
        ("verification", {"checks"}),
        ("examples", {"examples"}),
    ],
)
def test_what_was_not_measured_is_left_out(html, missing, sections):
    page = Page(render(**{missing: None}))
    assert set(Page(html).sections) - set(page.sections) == sections


def test_a_bare_patch_has_a_report():
    record = PatchRecord("sha256:00", "feed", False, ("atpatch/flagged",), (), (), "00", {})
    page = Page(render_html(title="Bare", patch=record))
    assert page.sections == ["identity", "glossary"]
    assert "without If" in page.words
    assert "atpatch/flagged" in page.words


def test_a_missed_goal_is_marked_twice():
    words = Page(render(patch=r.patch(met=False), examples=())).words
    assert words.count("Goal missed") == 2
    assert words.count("13.00% over the bound of 1.00%") == 2
    assert "✕ MISSED" in words


def test_a_failed_check_is_said_in_words():
    words = Page(render(verification=r.verification("unbake"), examples=())).words
    assert "Do not ship" in words
    assert "✕ FAILED unbake" in words


def test_fairness():
    words = Page(render(patch=r.patch(kind="attribute"), evaluation=r.evaluation(kind="attribute"))).words
    assert "Flip rate (UF)" in words
    assert "leaning on a protected attribute" in words
    assert "Attack success" not in words


def test_names_cannot_reach_the_page():
    names = ("layer0", r.HOSTILE)
    failed = f"site {r.HOSTILE}, clean inputs, no optimization"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = render(
            title=r.HOSTILE,
            patch=r.patch(names=names[::-1]),
            verification=r.verification(failed, sites=names),
            examples=[r.image_example(sites=names), r.text_example(sites=names)],
        )
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert page.words.count("<script>alert(1)</script>") > 3


def test_a_clean_example_shows_one_side():
    page = Page(render(examples=[r.image_example(Story.UNTOUCHED)], evaluation=None, verification=None))
    assert "Left alone" in page.words
    assert page.tags.count("svg") == 1 + 1 + 1


def test_tokens_are_numbered_and_marked_in_words():
    words = Page(render(examples=[r.text_example()], evaluation=None, verification=None)).words
    assert "4 777 flagged" in words


# Pictures


def test_matplotlib_is_left_as_it_was():
    before = dict(matplotlib.rcParams)
    pictures.precision_recall(r.evaluation(), "a")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import reports as r, sys; from atpatch_onnx.report.html import render_html;"
        "render_html(title='t', patch=r.patch(), evaluation=r.evaluation(), examples=[r.image_example()]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_the_maps_share_one_scale_and_say_what_is_flagged():
    example = r.image_example()
    picture = pictures.attention_maps(example.counterfactual.sites[0], example.counterfactual.flags, "map")
    assert "flagged tokens: 16" in picture.alt
    assert picture.svg.count("<image") == 3  # before, after, one scale


def test_long_inputs_are_drawn_as_lines():
    short = pictures.received_attention(r.text_example(), 0, "a").svg
    long = pictures.received_attention(r.text_example(80, 5), 0, "a").svg
    assert "stroke-dasharray" not in short
    assert "stroke-dasharray" in long


def test_nothing_to_compare_is_no_picture():
    elements = [element for site in site_rows(r.figures(met=False)) for element in site.elements]
    assert elements
    assert pictures.contributions(elements, 0.1, 0.01, "ASR above floor", "c") is None


def test_contributions_name_every_element():
    elements = [element for site in site_rows(r.figures()) for element in site.elements]
    picture = pictures.contributions(elements, 0.002, 0.01, "ASR above floor", "c")
    assert picture is not None
    assert picture.alt == (
        "ASR above floor without each element: the whole patch 0.2%;"
        " detect at layer0 99.5%; redistribute at layer0 31.0%."
    )


# Inputs


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (17, (8, 8), images.Grid(4, 4, 1)),
        (16, (8, 8), images.Grid(4, 4, 0)),
        (18, (8, 8), images.Grid(4, 4, 2)),
        (197, (224, 224), images.Grid(14, 14, 1)),
        (33, (16, 32), images.Grid(4, 8, 1)),
        (12, (8, 8), None),
        (10, (8, 8), None),
        (1, (8, 8), None),
    ],
)
def test_the_grid_of_an_image(tokens, size, grid):
    assert images.infer_grid(tokens, *size) == grid


def test_which_input_is_an_image():
    image = np.zeros((3, 8, 8))
    assert images.find_image({"mask": np.ones(17), "pixels": image}, 17) == ("pixels", images.Grid(4, 4, 1))
    assert images.find_image({"pixels": np.zeros((7, 8, 8))}, 17) is None


def test_pixels_share_a_scale_and_are_thinned_out():
    clean, other = np.full((3, 600, 600), -1.0), np.full((3, 600, 600), 3.0)
    assert images.to_pixels(clean, other).max() == 0
    assert images.to_pixels(other, clean).shape == (200, 200, 3)
    assert images.to_pixels(clean[:1]).shape == (200, 200)


def test_a_long_strip_is_cut_around_what_is_marked():
    flags = np.arange(200) == 100
    chips = images.strip({"input_ids": np.arange(200)}, flags, flags, np.arange(200) < 150)
    assert [chip.position for chip in chips if not chip.left_out] == [*range(8), *range(97, 104)]
    assert [chip.left_out for chip in chips if chip.left_out] == [89, 46]
    assert [chip.label for chip in chips if chip.flagged] == ["100"]


def test_tokens_without_values_have_positions():
    none = np.zeros(3, bool)
    chips = images.strip({"x": np.zeros((3, 8))}, none, none, ~none)
    assert [(chip.position, chip.label) for chip in chips] == [(0, ""), (1, ""), (2, "")]


# The file


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    with pytest.raises(AtPatchError, match="Choose another path"):
        write_report(tmp_path / "missing" / "report.html", "x")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(package):
    code = (
        "import sys; sys.path.insert(0, '.'); import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)\n"
        "import reports as r; from atpatch_onnx.errors import MissingExtraError\n"
        "from atpatch_onnx.report.html import render_html\n"
        "try: render_html(title='t', patch=r.patch())\n"
        "except MissingExtraError as error: sys.exit(0 if 'atpatch-onnx[report]' in str(error) else 1)\n"
        "sys.exit(2)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
