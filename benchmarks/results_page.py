"""Write ``docs/results.md``: for each grid what the paper reports, what was expected, and what came out.

    python -m benchmarks.results_page [--results benchmarks/results/grids] [--docs docs]

It is written from the plans and from the ``result.json`` of each run alone, whose tables are written anew, so that no
figure in it is typed by hand. Curves that a plan names are drawn over the history of its runs: the mean over seeds, in
a band from the least to the largest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid_runs import Plan, folder_of, read_plan, read_result
from benchmarks.grid_tables import NOT_DECIDED, NOT_SEEN, SEEN, with_spread, write_tables, write_text

ROOT = Path(__file__).parents[1]
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by cell and seed
MEASURES = 4  # in the table of cells
HEAD = """# Results of the papers, repeated in small

What the two papers report, what would have counted as seeing it (written before the runs), and what came out: *seen*,
*not seen* or *not decided*, by the 95 % interval of the paired difference over seeds. K21 is Khodak et al. 2021, K22
Kamalakara et al. 2022. Data sets are small or incomplete and CIFAR-10 is stored as JPEG, so that figures compare with
each other, not with the papers'. `python -m benchmarks.results_page` wrote this page from `benchmarks/results/grids`.
"""


def results_of(plan: Plan, out: Path) -> Results:
    """Return the results of the runs of a plan that are done."""
    return {
        cell: {seed: found for seed in plan.seeds if (found := read_result(folder_of(out, plan, cell, seed)))}
        for cell in plan.cells
    }


def section(plan: Plan, results: Results, table: Mapping[str, Any], figure: str | None) -> str:
    """Return what the page says about one plan."""
    verdicts = {name: sum(pair["verdict"] == name for pair in table["pairs"]) for name in (NOT_SEEN, SEEN, NOT_DECIDED)}
    shown = ", ".join(f"{count} {name}" for name, count in verdicts.items() if count)
    ran = [result for seeds in results.values() for result in seeds.values()]
    devices = sorted({result["machine"]["device"] for result in ran})
    hours = sum(result["seconds"] for result in ran) / 3600
    came_out = (
        f"**Came out.** Of the expected differences {shown or 'none is tabulated'}; {table['done']} of {table['runs']} "
        f"runs are done ({hours:.1f} hours of runs on {', '.join(devices)}, several at once; "
        f"commit {', '.join(commit[:12] for commit in table['commits'])})."
    )
    parts = [
        f"## {plan.title}",
        f"**The paper.** {plan.paper.strip()}" if plan.paper else "",
        f"**Expected.** {plan.expect.strip()}",
        f"{came_out} {plan.remark.strip()}".strip(),
        f"![{', '.join(plan.curves)} over the training]({figure})" if figure else "",
        _cells(table["cells"]),
        _pairs(table["pairs"]),
        f"All measures: `benchmarks/results/grids/{plan.name}/table.md`.",
        f"```bash\npython -m benchmarks.grid {plan.name} --out runs/grids\n```",
    ]
    return "\n\n".join(part for part in parts if part)


def _cells(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A table of the first measures of the cells that ran: the mean, and the standard deviation over seeds."""
    found = {cell: measures for cell, measures in cells.items() if any(m["n"] for m in measures.values())}
    names = list(next(iter(found.values())))[:MEASURES] if found else []
    lines = [f"| cell | {' | '.join(names)} | n |", "|---" * (len(names) + 2) + "|"]
    for cell, measures in found.items():
        values = [with_spread(measures[name]) or "" for name in names]
        lines.append(f"| {cell} | {' | '.join(values)} | {measures[names[0]]['n']} |")
    return "\n".join(lines) if found else ""


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    """A table of the differences of which there is at least one; those against the expectation first."""
    order = (NOT_SEEN, SEEN, NOT_DECIDED)
    found = sorted((pair for pair in pairs if pair["n"]), key=lambda pair: order.index(pair["verdict"]))
    lines = ["| difference | of | expected | mean | std | n | t | verdict |", "|---|---|---|---|---|---|---|---|"]
    for pair in found:
        mean, std, t = ("" if (value := pair.get(key)) is None else f"{value:.3g}" for key in ("mean", "std", "t"))
        names = f"{pair['cell']} - {pair['other']} | {pair['measure']} | {pair['expected']}"
        lines.append(f"| {names} | {mean} | {std} | {pair['n']} | {t} | {pair['verdict']} |")
    return "\n".join(lines) if found else ""


def draw_curves(plan: Plan, results: Results, path: Path) -> bool:
    """Draw the curves of a plan, a plot for each quantity; returns whether there was something to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    histories = {cell: [result["history"] for result in seeds.values()] for cell, seeds in results.items() if seeds}
    if not (plan.curves and histories):
        return False
    with rc_context({"svg.hashsalt": "hf_fnl", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3.6 * len(plan.curves), 3.0), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(plan.curves), squeeze=False).flat, plan.curves, strict=True):
            for cell, of_seeds in histories.items():
                xs = [entry["epoch"] for entry in of_seeds[0] if name in entry]
                columns = list(zip(*([e[name] for e in h if name in e] for h in of_seeds), strict=True))
                (line,) = axis.plot(xs, [statistics.fmean(column) for column in columns], label=cell, linewidth=1.5)
                axis.fill_between(
                    xs,
                    *map(list, zip(*((min(c), max(c)) for c in columns), strict=True)),
                    color=line.get_color(),
                    alpha=0.2,
                    linewidth=0,
                )
            axis.set(xlabel="epoch", title=name.replace("_", " "))
            axis.set_yscale("log" if "step_size" in name else "linear")
            axis.grid(alpha=0.2)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, its figures, and the tables that it is written from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "grids")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    sections = []
    for folder in sorted(path for path in args.results.iterdir() if path.is_dir()):
        plan = read_plan(folder.name)
        results = results_of(plan, args.results)
        table = write_tables(folder, plan, results)
        figure = Path("figures", f"{plan.name}.svg")
        drawn = draw_curves(plan, results, args.docs / figure)
        sections.append(section(plan, results, table, figure.as_posix() if drawn else None))
    write_text(args.docs / "results.md", "\n\n".join([HEAD.strip(), *sections]) + "\n")


if __name__ == "__main__":
    main()
