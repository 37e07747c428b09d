#!/usr/bin/env python3
"""Draws CPU per call, relative to nginx, as SVG on standard output.

    docs/images/chart.py docs/images/cpu-per-call.json > docs/images/cpu-per-call.svg

The file is what a benchmark with nginx among its subjects writes: `medians` has CPU microseconds per call of each subject.
`ratios` adds subjects of other runs, by their ratio to nginx in that run.
"""

import json
import sys

WIDTH, LABEL, BAR, GAP, TOP = 720, 190, 26, 12, 44


def svg(figures):
    nginx = figures["medians"]["nginx"]["cpu_us"]
    ratios = {name: row["cpu_us"] / nginx for name, row in figures["medians"].items()} | figures.get("ratios", {})
    rows = sorted(ratios.items(), key=lambda row: row[1])
    scale = (WIDTH - LABEL - 70) / rows[-1][1]
    height = TOP + len(rows) * (BAR + GAP)
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="CPU per call">'
    yield (
        "<style>text{font:14px system-ui,sans-serif;fill:#1f2933}.bar{fill:#9aa5b1}.own{fill:#2456c4}"
        "@media(prefers-color-scheme:dark){text{fill:#e4e7eb}.bar{fill:#616e7c}.own{fill:#7ea6ff}}</style>"
    )
    yield f'<text x="0" y="18">CPU per call, nginx = 1 ({figures["workload"]} response, {figures["connections"]} connections)</text>'
    for place, (name, ratio) in enumerate(rows):
        y = TOP + place * (BAR + GAP)
        kind = "own" if name == "gateway" else "bar"
        yield f'<text x="{LABEL - 10}" y="{y + 18}" text-anchor="end">{name}</text>'
        yield f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{ratio * scale:.1f}" height="{BAR}" rx="3"/>'
        yield f'<text x="{LABEL + ratio * scale + 8:.1f}" y="{y + 18}">{ratio:.2f}</text>'
    yield "</svg>"


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print("\n".join(svg(json.load(file))))
