"""Line pictures of measured tables: one line a method, a level line for what does not depend on x.

draw(out, [Panel("mean budget (positions a layer)", "accuracy", [Line("omnimem", [24, 48], [0.2, 0.4])])])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from omnimem.errors import OmniMemError
from omnimem.files import atomic_file

MARKERS = "osD^v<>P*X"


@dataclass(frozen=True)
class Line:
    """Points of one label; a single point without x is drawn as a level line; `dotted` shares the label's colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[tuple[float, float]] | None = None
    dotted: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    log: bool = False
    note: str = field(default="")


def require_matplotlib() -> None:
    """Refuse to begin what would end without its picture.

    Raises
    ------
    OmniMemError
        matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise OmniMemError("pictures need matplotlib: pip install 'omnimem[report]'")


def draw(out: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side with one legend and write the picture.

    Parameters
    ----------
    out : Path
        File; its suffix chooses the format.
    panels : sequence of Panel
        Lines of the same label have the same colour and marker in all of them.

    Raises
    ------
    OmniMemError
        The picture cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colours = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    style = {
        label: {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(labels)
    }
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    shown = {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            look = style[line.label]
            if not line.x:
                shown[line.label] = axis.axhline(line.y[0], color=look["color"], linestyle="--")
            elif line.dotted:
                axis.plot(line.x, line.y, ":", linewidth=1, **{**look, "marker": None})
            else:
                spread = None if line.error is None else list(zip(*line.error, strict=True))
                shown[line.label] = axis.errorbar(
                    line.x, line.y, spread, markersize=5, capsize=2, elinewidth=0.6, **look
                )
        if panel.log:
            ticks = sorted({x for line in panel.lines for x in line.x})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.note)
        axis.grid(alpha=0.3)
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=150)
