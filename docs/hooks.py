"""What ``mkdocs build`` does beside rendering: pages made from the program, formulas as MathML, links out of ``docs/``.

Everything is made at build, so that a built site needs no network and no script for its formulas.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import inspect
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from hf_fnl.cli import app
from hf_fnl.scripts import PROGRAMS

ROOT = Path(__file__).parents[1]
# Pages of the site that lie elsewhere in the repository.
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
    "launch.md": "run_scripts/launch/README.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the generated parts in their places, and lead links to pages of the site, or name the file they lead to."""
    for mark, generated in (("<!-- the commands -->", commands), ("<!-- the scripts -->", scripts)):
        if mark in markdown:
            markdown = markdown.replace(mark, "\n\n".join(generated()))
    here = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri in ELSEWHERE:  # whose pictures lie outside of the site
        markdown = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", r"\1 (`\2`)", markdown)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", lambda link: _link(link[1], link[2], here), markdown)


def _link(text: str, target: str, here: str) -> str:
    """A link of a file of the repository, as the site has it."""
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return f"[{text}]({target})"
    found = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    pages = {source: name for name, source in ELSEWHERE.items()} | {"README.md": "index.md"}
    name = pages.get(found) or (found.removeprefix("docs/") if found.startswith("docs/") else None)
    if name is not None:
        return f"[{text}]({name}{'#' * bool(anchor)}{anchor})"
    return text if f"`{found}`" in text else f"{text} (`{found}`)"


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML of formulas, and code of what docstrings have in the manner of reStructuredText."""
    content = content.replace("::</p>", ":</p>")
    content = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _formula, content, flags=re.DOTALL)
    return re.sub(r":(?:class|func|meth|mod|attr|obj):<code>~?([\w.]+?)</code>", _role, content)


def _formula(found: re.Match[str]) -> str:
    return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")


def _role(found: re.Match[str]) -> str:
    return f"<code>{found[1].rpartition('.')[2]}</code>"


def commands() -> Iterator[str]:
    """Each command of ``hf-fnl`` but those with options of their own: what it does, and its options by panel."""
    for command in app.registered_commands:
        if command.epilog is None or command.callback is None:
            continue
        example = command.epilog.removeprefix("Example: ")
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command.callback) or "")
        yield f"## hf-fnl {command.name or command.callback.__name__}\n\n{text}\n\n```bash\n{example}\n```"
        panels: dict[str, list[str]] = {}
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values():
            if infos := getattr(parameter.annotation, "__metadata__", ()):
                panel = infos[0].rich_help_panel or "Options"
                panels.setdefault(panel, []).append(_row(parameter, infos[0]))
        for panel, rows in panels.items():
            yield "\n".join([f"| {panel} | |", "|---|---|", *rows])


def _row(parameter: inspect.Parameter, info: Any) -> str:
    """An option or argument, what it takes, and its help."""
    if isinstance(info, typer.models.ArgumentInfo):
        return f"| `{info.metavar}` | {_escaped(info.help)} |"
    (kind,) = parameter.annotation.__args__
    flag = f"--{parameter.name.replace('_', '-')}"
    declared = [name for name in (info.default, *(info.param_decls or ())) if str(name).startswith("-")]
    names = ", ".join(f"`{name}`" for name in declared or [f"{flag}/--no-{flag[2:]}" if kind is bool else flag])
    takes = "" if kind is bool else " " + (info.metavar or re.findall(r"str|int|float|Path", str(kind))[0].upper())
    is_shown = parameter.default not in (None, "", inspect.Parameter.empty) and kind is not bool
    default = f" ({parameter.default})" if is_shown else ""
    required = " (required)" if parameter.default is inspect.Parameter.empty else ""
    return f"| {names}{takes} | {_escaped(info.help)}{default}{required} |"


def _escaped(text: str) -> str:
    return re.sub(r"([*_|<])", r"\\\1", " ".join(text.split()))


def scripts() -> Iterator[str]:
    """Each program with the text of its ``--help``."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, program in PROGRAMS.items():
        main = importlib.import_module(f"hf_fnl.scripts.{program.module}").main
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            main(["--help"])
        usage = re.sub(r"^usage: \S+", f"usage: hf-fnl {name}", text.getvalue().rstrip())
        file = f"In a checkout also `python run_scripts/{program.module}.py`."
        yield f"### hf-fnl {name}\n\n{program.summary} {file}\n\n```text\n{usage}\n```"
