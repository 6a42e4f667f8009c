"""Directives of the site that read what they describe: the public names, and the command line."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import typer.main
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import atpatch_onnx
from atpatch_onnx.cli.root import app


class PublicNames(SphinxDirective):
    """Every name of `atpatch_onnx.__all__`, by autodoc."""

    def run(self) -> list[nodes.Node]:
        """The nodes of one reStructuredText block a name, classes with their members."""
        text = "\n".join(_autodoc(name) for name in atpatch_onnx.__all__)
        return self.parse_text_to_nodes(f"```{{eval-rst}}\n{text}\n```")


def _autodoc(name: str) -> str:
    value = getattr(atpatch_onnx, name)
    kind = "class" if inspect.isclass(value) else "function" if inspect.isfunction(value) else "data"
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""  # reference/errors.md has the whole family
    if kind == "data":  # its docstring stands where it is defined
        return f".. autodata:: atpatch_onnx.{atpatch_onnx._HOMES[name]}.{name}\n   :no-value:\n\n"
    return f".. auto{kind}:: atpatch_onnx.{name}\n" + ("   :members:\n\n" if kind == "class" else "\n")


class Commands(SphinxDirective):
    """Every command of `atpatch`: what it does, its arguments, its options by group."""

    def run(self) -> list[nodes.Node]:
        """A section a command."""
        return self.parse_text_to_nodes("\n".join(commands()), allow_section_headings=True)


def commands() -> Iterator[str]:
    """Markdown of the whole command line, a heading a command."""
    for name, command in _walked(typer.main.get_command(app), "atpatch"):
        yield f"## {name}\n\n{_plain(command.help)}\n"
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        yield f"    {' '.join([name, *(one.metavar or one.name.upper() for one in arguments), '[OPTIONS]'])}\n"
        rows = [(f"`{one.metavar or one.name.upper()}`", _plain(one.help), "") for one in arguments]
        yield _table("argument", rows) if rows else ""
        groups: dict[str, list[Any]] = {}
        for one in command.params:
            if one.param_type_name == "option" and not one.hidden:
                groups.setdefault(one.rich_help_panel or "option", []).append(one)
        for group, options in groups.items():
            yield _table(group, [(_spelt(one), _plain(one.help), _default(one)) for one in options])


def _walked(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, one in getattr(command, "commands", {}).items():
        yield from _walked(one, f"{name} {key}")
    if not hasattr(command, "commands"):
        yield name, command


def _spelt(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    shown = option.show_default and option.default is not None and not option.is_flag
    return f"`{option.default}`" if shown else ""


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").split())


def _table(head: str, rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"| {head} | what | default |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
