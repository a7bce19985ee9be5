"""The report itself: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_fnl.report.chapters import Chapter, Section, make_chapters
from hf_fnl.report.drawing import draw_svg, require_matplotlib
from hf_fnl.report.inspection import Progress, describe
from hf_fnl.report.panels import INK, PALETTE, Key
from hf_fnl.report.sources import Source, read_sources
from hf_fnl.report.style import STYLE
from hf_fnl.report.summary import summarize
from hf_fnl.utils.files import check_writable, write_text
from hf_fnl.utils.suggest import printable

_ABSENT = "-"
_PAPERS = (
    "K21: Khodak, Tenenholtz, Mackey, Fusi, Initialization and Regularization of Factorized Neural Layers, ICLR 2021. "
    "K22: Kamalakara et al., Exploring Low Rank Training of Deep Neural Networks, 2022."
)
_COLUMNS = {
    "matrix": "name",
    "kind": "kind",
    "shape": "shape",
    "rank": "rank",
    "parameters": "parameters",
    "FLOPs per token or position": "flops",
    "‖W‖<sub>F</sub>": "frobenius_norm",
    "‖W‖<sub>*</sub>": "nuclear_norm",
    "effective rank": "effective_rank",
    "rank for 90 % of ‖W‖<sub>F</sub>²": "rank_90",
    "energy kept": "energy",
}


def write_report(sources: Sequence[str | Path], target: str | Path, *, progress: Progress | None = None) -> Path:
    """Write one page about a run or a model, or one that compares several.

    Args:
        sources: Folders of runs or of models, or ids of models on the Hub; see :func:`~.sources.read_sources`.
        target: HTML file to write; one that exists is replaced, once the new one is complete.
        progress: Called while the matrices of each model are decomposed, with how many are done and how many there are.

    Raises:
        FileNotFoundError: If a source is neither a run nor a model.
        ValueError: If there is no source, one is given twice, there are more than can be told apart, or a file is
            damaged.
        ImportError: If matplotlib is not installed.
        OSError: If ``target`` is a folder or cannot be written to.
    """
    require_matplotlib()
    if Path(target).is_dir():
        raise IsADirectoryError(f"{target} is a folder, and a report is a file, such as {Path(target, 'report.html')}")
    check_writable("out", Path(target).parent)
    if len(sources) > len(PALETTE):
        raise ValueError(f"a report compares up to {len(PALETTE)} runs or models, got {len(sources)}")
    return write_text(target, printable(make_page(read_sources(sources, progress))))


def make_page(sources: Sequence[Source]) -> str:
    """The page about sources that were read."""
    *first, last = (source.name for source in sources)
    names = f"{', '.join(first)} and {last}" if first else last
    numbers = itertools.count(1)
    title = escape(f"Comparison: {names}" if len(sources) > 1 else names)
    body = [
        f"<header><h1>{title}</h1>{_places(sources)}</header>",
        *_chosen_chapter(sources),
        *_figures_chapter(sources),
        *(part for chapter in make_chapters(sources) for part in _chapter(chapter, numbers)),
        *_tables_chapter(sources),
        *_defaults_chapter(sources),
        f"<footer><p>{_PAPERS}</p></footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _places(sources: Sequence[Source]) -> str:
    items = (
        f"<li><b>{escape(source.name)}</b>: {escape(summarize(source))} <code>{escape(source.place)}</code></li>"
        for source in sources
    )
    return f"<ul class=places>{''.join(items)}</ul>"


def _figures_chapter(sources: Sequence[Source]) -> Iterator[str]:
    names = dict.fromkeys(name for source in sources for name in source.figures)
    if names:
        rows = ([name.replace("_", " "), *(source.figures.get(name) for source in sources)] for name in names)
        yield f"<section><h2>Figures</h2>{_table(_header(sources), rows)}</section>"


def _chapter(chapter: Chapter, numbers: Iterator[int]) -> Iterator[str]:
    yield f"<section><h2>{chapter.heading}</h2>"
    for section in chapter.sections:
        yield from _section(section, numbers, heading=section.heading != chapter.heading)
    yield "</section>"


def _section(section: Section, numbers: Iterator[int], heading: bool) -> Iterator[str]:
    if heading:
        yield f"<h3>{section.heading}</h3>"
    yield f"<p>{section.meaning}</p><ul class=legend>{''.join(map(_key, section.legend))}</ul><div class=panels>"
    for panel in section.panels:
        wide = " class=wide" if panel.wide else ""
        yield f"<figure{wide}><figcaption>{escape(panel.title)}</figcaption>{draw_svg(panel, next(numbers))}</figure>"
    yield "</div>"


def _key(key: Key) -> str:
    swatch = "band" if key.band else "dashed" if key.dashed else "solid"
    colour = "currentColor" if key.colour == INK else key.colour
    return f'<li><i class={swatch} style="color:{colour}"></i>{escape(key.label)}</li>'


def _tables_chapter(sources: Sequence[Source]) -> Iterator[str]:
    models = [source for source in sources if source.spectra]
    if not models:
        return
    yield "<section><h2>All matrices</h2>"
    yield (
        "<p>Figures of an attention are means over its heads. Every weight is counted once. Operations of a "
        "convolution are those for one position of its output.</p>"
    )
    for source in models:
        rows = [describe(spectrum, source.energies.get(spectrum.name)) for spectrum in source.spectra]
        table = _table(list(_COLUMNS), ([getattr(row, key) for key in _COLUMNS.values()] for row in rows))
        yield f"<details><summary>{escape(source.name)}: {len(rows)} matrices</summary>{table}</details>"
    yield "</section>"


def _chosen_chapter(sources: Sequence[Source]) -> Iterator[str]:
    """The settings that somebody chose: those in which sources differ, or that are not at their defaults."""
    names = dict.fromkeys(name for source in sources for name in source.settings)
    values = {name: [_setting(source, name) for source in sources] for name in names}
    if len(sources) > 1:
        shown, heading = {name: row for name, row in values.items() if len(set(row)) > 1}, "Settings that differ"
    else:
        shown = {name: row for name, row in values.items() if name not in sources[0].defaults}
        heading = "Settings"
    if shown:
        table = _table(_header(sources), ([name, *row] for name, row in shown.items()))
        yield f"<section><h2>{heading}</h2>{table}</section>"


def _defaults_chapter(sources: Sequence[Source]) -> Iterator[str]:
    """The settings of a single source that are at their defaults."""
    if len(sources) == 1 and sources[0].defaults:
        names = sorted(sources[0].defaults)
        table = _table(_header(sources), ([name, _setting(sources[0], name)] for name in names))
        summary = f"<summary>{len(names)} settings</summary>"
        yield f"<section><h2>Settings at their defaults</h2><details>{summary}{table}</details></section>"


def _setting(source: Source, name: str) -> str | None:
    return json.dumps(source.settings[name], ensure_ascii=False, default=str) if name in source.settings else None


def _header(sources: Sequence[Source]) -> list[str]:
    return ["", *(_name(source.name) for source in sources)]


def _name(text: str) -> str:
    """A name that may be broken where it has a dot, a slash or an underscore."""
    return re.sub(r"[./_]", r"\g<0><wbr>", escape(text))


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column holds names; ``header`` is HTML."""
    head = "".join(f"<th scope=col>{name}</th>" for name in header)
    lines = (
        f"<tr><th scope=row>{_name(name)}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<div class=table><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
