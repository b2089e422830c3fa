"""Picture of the results of `streaming_recall`: accuracy over total bytes per layer, one line per method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

COLOURS = {
    "random": "#b0b0b0",
    "uniform": "#808080",
    "snapkv": "#c49c94",
    "infinipot_v": "#bcbd22",
    "omnimem": "#d62728",
    "omnimem, sketch": "#ff7f0e",
    "novelty, attention": "#1f77b4",
    "learned": "#1f77b4",
    "dms": "#2ca02c",
    "trim_kv": "#9467bd",
    "kvzap": "#e377c2",
}
"""Colour of each line; `learned` and `novelty` share one, because the first begins as the second."""

TITLES = {"plain": "each fact shown once", "repeated": "each fact shown three times"}


def draw_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Write an SVG with one panel per regime, with heads trained in the regime of the panel where there are such."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": "streaming_recall"})
    found = {row["row"]: row for row in rows}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for regime, panel in zip(TITLES, panels, strict=True):
        for name, colour in COLOURS.items():
            row = found.get(f"{name} on repeated" if regime == "repeated" else name, found.get(name))
            if row is None:
                continue
            points = row["equal_bytes"]
            style = {"linestyle": "-", "linewidth": 2} if row["trained"] else {"linestyle": "--", "linewidth": 1.4}
            if name == "kvzap":  # wide and below, because it coincides with `learned` where nothing repeats
                style |= {"linewidth": 5, "alpha": 0.6, "zorder": 1}
            x = [point["kibibytes"] for point in points]
            panel.plot(x, [point[regime] for point in points], color=colour, marker="o", ms=3.5, label=name, **style)
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [f"{value:.0f}" for value in x])
        panel.minorticks_off()
        panel.set_title(TITLES[regime], fontsize=11)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    figure.supxlabel("KiB per layer at the 7B shape, everything counted", fontsize=11, x=0.42)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, title="solid: trained heads\ndashed: no training")
    figure.tight_layout(rect=(0, 0, 0.81, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
