"""Style sheet of a report: one column on a phone, plots side by side on a desk, light or dark as the reader has it."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #5c636b; --paper: #fff; --card: #f6f7f9; --line: #dcdfe4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --quiet: #a0a7b0; --paper: #15171a; --card: #1d2024; --line: #363b42; }
}
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 72rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 0; }
p { margin: .3rem 0; max-width: 46rem; color: var(--quiet); }
.places, .legend { list-style: none; padding: 0; margin: .6rem 0; }
.places li { margin: .4rem 0; }
.places code { color: var(--quiet); overflow-wrap: anywhere; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .875rem; }
.legend i { display: inline-block; width: 1.8rem; margin-right: .5rem; vertical-align: middle; border-top: 3px solid; }
.legend i.dashed { border-top-style: dashed; }
.legend i.band { border-top-width: .8rem; opacity: .25; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem .8rem .4rem; background: var(--card); border-radius: .5rem; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: .875rem; font-weight: 600; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; font-size: 9px; }
figure svg * { stroke-linejoin: round; }
.table { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 400; }
summary { cursor: pointer; padding: .4rem 0; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: .875rem; }
"""
