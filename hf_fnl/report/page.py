"""The report itself: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_fnl.report.drawing import describe, draw, require_matplotlib
from hf_fnl.report.sections import PALETTE, Section, make_chapters
from hf_fnl.report.sources import Source, read_sources
from hf_fnl.utils.files import check_writable, write_text
from hf_fnl.utils.suggest import printable

_PAPERS = (
    "K21: Khodak, Tenenholtz, Mackey, Fusi, Initialization and Regularization of Factorized Neural Layers, ICLR 2021. "
    "K22: Kamalakara et al., Exploring Low Rank Training of Deep Neural Networks, 2022."
)
_COLUMNS = {
    "name": "matrix",
    "kind": "kind",
    "shape": "shape",
    "rank": "rank",
    "parameters": "parameters",
    "flops": "FLOPs per token or position",
    "frobenius_norm": "‖W‖<sub>F</sub>",
    "nuclear_norm": "‖W‖<sub>*</sub>",
    "effective_rank": "effective rank",
    "rank_90": "rank for 90 % of ‖W‖<sub>F</sub>²",
    "energy": "energy kept",
}
_STYLE = """
main { max-width: 76rem; margin: auto; padding: 1rem; font: 1rem/1.55 system-ui, sans-serif; }
h1, code { overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; }
p { max-width: 46rem; color: #555; }
img { display: block; max-width: 100%; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child { text-align: left; font-weight: 400; }
summary { cursor: pointer; }
"""


def write_report(sources: Sequence[str | Path], target: str | Path) -> Path:
    """Write one page about a run or a model, or one that compares several.

    Args:
        sources: Folders of runs or of models, or ids of models on the Hub; see :func:`~.sources.read_sources`.
        target: HTML file to write; one that exists is replaced, once the new one is complete.

    Raises:
        FileNotFoundError: If a source is neither a run nor a model.
        ValueError: If there is no source, one is given twice, there are more than can be told apart, or a file is
            damaged.
        ImportError: If matplotlib is not installed.
        OSError: If ``target`` is a folder or cannot be written to.
    """
    require_matplotlib()
    target = Path(target).expanduser()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder, and a report is a file, such as {Path(target, 'report.html')}")
    check_writable("out", target.parent)
    if len(sources) > len(PALETTE):
        raise ValueError(f"a report compares up to {len(PALETTE)} runs or models, got {len(sources)}")
    return write_text(target, printable(make_page(read_sources(sources))))


def make_page(sources: Sequence[Source]) -> str:
    """Return the page about sources that were read."""
    title = escape(", ".join(source.name for source in sources))
    found = (f"<li><code>{escape(source.name)}</code>: {escape(summarize(source))}</li>" for source in sources)
    body = [
        f"<h1>{title}</h1><ul>{''.join(found)}</ul>",
        *_figures(sources),
        *(part for heading, sections in make_chapters(sources).items() for part in _chapter(heading, sections)),
        *_matrices(sources),
        *_settings(sources),
        f"<footer><p>{_PAPERS}</p></footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def summarize(source: Source) -> str:
    """Return a sentence on a run, a model or both: its size, and how its losses went."""
    total, dense = (source.figures.get(f"parameters / {name}") for name in ("total", "dense_equivalent"))
    parts = []
    if source.model and total is not None:
        left = f", {total / dense:.1%} of the dense model's {dense:,.0f}" if dense and dense != total else ""
        parts.append(f"{source.model} with {total:,.0f} parameters{left}, in {len(source.matrices)} matrices")
    for kind, points in source.losses.items():
        broken = next((step for step, value in points if not math.isfinite(value)), None)
        change = f"from {points[0][1]:.4g} to {points[-1][1]:.4g} in {points[-1][0]:,} steps"
        parts.append(f"{kind} loss {change if broken is None else f'first not finite at step {broken:,}'}")
    return "; ".join(parts)


def _figures(sources: Sequence[Source]) -> Iterator[str]:
    names = dict.fromkeys(name for source in sources for name in source.figures)
    if names:
        rows = ([name.replace("_", " "), *(source.figures.get(name) for source in sources)] for name in names)
        yield f"<h2>Figures</h2>{_table(_header(sources), rows)}"


def _chapter(heading: str, sections: Sequence[Section]) -> Iterator[str]:
    yield f"<h2>{heading}</h2>"
    for section in sections:
        picture = base64.b64encode(draw(section.panels)).decode()
        words = escape(" ".join(map(describe, section.panels)))
        yield f"<h3>{section.heading}</h3><p>{section.meaning}</p>"
        yield f'<img alt="{words}" src="data:image/svg+xml;base64,{picture}">'


def _matrices(sources: Sequence[Source]) -> Iterator[str]:
    models = [source for source in sources if source.matrices]
    if not models:
        return
    yield (
        "<h2>All matrices</h2><p>Figures of an attention are means over its heads. Every weight is counted once. "
        "Operations of a convolution are those for one position of its output.</p>"
    )
    for source in models:
        found = [matrix.figures(source.energies.get(matrix.name)) for matrix in source.matrices]
        table = _table(list(_COLUMNS.values()), ([figures[key] for key in _COLUMNS] for figures in found))
        yield f"<details><summary>{escape(source.name)}: {len(found)} matrices</summary>{table}</details>"


def _settings(sources: Sequence[Source]) -> Iterator[str]:
    """The settings of one source, or those in which several differ."""
    names = dict.fromkeys(name for source in sources for name in source.settings)
    values = {name: [_setting(source, name) for source in sources] for name in names}
    several = len(sources) > 1
    if shown := {name: row for name, row in values.items() if not several or len(set(row)) > 1}:
        table = _table(_header(sources), ([name, *row] for name, row in shown.items()))
        yield f"<h2>{'Settings that differ' if several else 'Settings'}</h2>"
        yield f"<details{' open' * several}><summary>{len(shown)} settings</summary>{table}</details>"


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
        return "-"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
