"""The code of the documentation's pages: what stands in them, of which kind, and how it is run.

- ` ```python `: run, all of a page in one namespace for each world.
- ` ```console `: commands, run one by one: `atpatch` with exit code 0, or the one that a comment says. Lines that
  install are read: the extra must exist.
- `{code-block}` with a caption: `Output of ...` names the command that wrote it; `Not run here: ...` says why. Commands
  in the latter are held against the command line, Python is compiled.

`<!-- run on: NAME -->` says which of `worlds.WORLDS` the code below is run on, the reader's model and files.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer.main
from markdown_it import MarkdownIt

from atpatch_onnx.cli import main
from atpatch_onnx.cli.root import app

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "pieces" not in page.parts)
RUN = ("python", "console")
_WORLD = re.compile(r"<!-- run on: (\w+) -->")
_CODE = re.compile(r"\{code-block\} (\w+)")
_DIRECTIVES = ("{toctree}", "{public-names}", "{commands}", "{eval-rst}")
PROGRAMS = ("openssl", "model_signing")
"""Other programs that a page's commands may call; where one is not installed, its line is passed over."""


@dataclass(frozen=True)
class Block:
    """One block of code."""

    page: Path
    line: int
    language: str
    """As it is written; empty where the block is only indented."""

    caption: str
    text: str
    world: str | None

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.page.relative_to(DOCS)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether tests run it."""
        return self.language in RUN and not self.caption


def blocks(page: Path) -> Iterator[Block]:
    """The code of a page, but for directives without code."""
    world = None
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block" and (found := _WORLD.search(token.content)):
            world = found[1]
        if token.type not in ("fence", "code_block") or token.info.startswith(_DIRECTIVES):
            continue
        language, caption, text = token.info, "", token.content
        if directive := _CODE.fullmatch(token.info):
            head, _, text = text.partition("\n\n")
            language, caption = directive[1], head.removeprefix(":caption: ")
        yield Block(page, token.map[0] + 1, language, caption, text, world)


def run(block: Block, names: dict) -> None:
    """Run a block in the present folder."""
    if block.language == "python":
        exec(compile(block.text, block.where, "exec"), names)
        return
    for words, code in commands(block.text):
        if words[0] == "atpatch":
            assert main(words[1:]) == code, (block.where, words)
        elif words[0] in PROGRAMS and shutil.which(words[0]):
            subprocess.run(words, check=True, capture_output=True)


def commands(text: str) -> Iterator[tuple[list[str], int]]:
    """The words of each command, and the exit code that its comment promises."""
    for line in text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("  #")
        code = re.search(r"exit code (\d)", comment)
        if words := shlex.split(command):
            yield words, int(code[1]) if code else 0


def trouble(words: list[str]) -> str | None:
    """What is wrong with a command that is not run, or installs; None where nothing is."""
    if words[:2] == ["pip", "install"]:
        return None if all(_installable(word) for word in words[2:]) else "an extra that there is not"
    if words[:2] == ["python", "-m"] and words[2].startswith("samples."):
        return None if (DOCS.parent / f"{words[2].replace('.', '/')}.py").is_file() else "a sample that there is not"
    if words[0] == "make":
        known = re.findall(r"^([a-z]+):", (DOCS.parent / "Makefile").read_text(), re.M)
        return None if set(words[1:2]) <= set(known) else "a target that there is not"
    if words[0] != "atpatch":
        return None
    command = typer.main.get_command(app)
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        if rest[0] not in command.commands:
            return None if rest[0].startswith("--") else f"a command {rest[0]} that there is not"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if re.fullmatch(r"--?[a-z][\w-]*", word) and word not in known]
    return f"options that there are not: {unknown}" if unknown else None


def _installable(word: str) -> bool:
    found = re.fullmatch(r"atpatch-onnx(?:\[([\w,]+)\])?", word)
    if found is None:
        return not word.startswith("atpatch")
    text = (DOCS.parent / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    return set((found[1] or "all").split(",")) <= set(re.findall(r"^(\w+) = \[", text, re.M))
