"""Figures: measured values by setting, one line per method; and budgets and statistics over layers.

draw_panels(out, [Panel("mean budget (tokens per layer)", "accuracy", [Line("omnimem", [24, 48], [0.2, 0.4])])])
plot_profile(BudgetProfile.load("profile.json"), Path("profile.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file

MARKERS = "osD^v<>P*X"


@dataclass(frozen=True)
class Line:
    """Points of one label. Without `x` the single value is drawn as a horizontal line.

    `dotted` draws a second line of the same label, in the same colour and without a legend entry.
    """

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
    """Fail before anything is computed if the figures at the end could not be drawn.

    Raises
    ------
    OmniMemError
        matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise OmniMemError("figures need matplotlib: pip install 'omnimem[report]'")


def draw_panels(out: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side with one legend.

    Parameters
    ----------
    out : Path
        File to write; its suffix selects the format.
    panels : sequence of Panel
        Lines of the same label have the same colour and marker in all of them.

    Raises
    ------
    OmniMemError
        matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
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
    drawn = {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            look = style[line.label]
            if not line.x:
                drawn[line.label] = axis.axhline(line.y[0], color=look["color"], linestyle="--")
            elif line.dotted:
                axis.plot(line.x, line.y, ":", linewidth=1, **{**look, "marker": None})
            else:
                spread = None if line.error is None else list(zip(*line.error, strict=True))
                drawn[line.label] = axis.errorbar(
                    line.x, line.y, spread, markersize=5, capsize=2, elinewidth=0.6, **look
                )
        if panel.log:
            ticks = sorted({x for line in panel.lines for x in line.x})
            axis.set_xscale("log", base=2)
            if all(tick == round(tick) for tick in ticks):  # short labels: a tick for every value
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            else:
                axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.note)
        axis.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center")
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=150)


def plot_profile(profile: BudgetProfile, out: Path) -> None:
    """Plot budgets over layers (arXiv 2606.07577, figure 7) and, if calibrated, entropy and redundancy (figure 2).

    Raises
    ------
    OmniMemError
        matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    measured = profile.statistics.get("layers")
    rows = 2 if measured else 1
    figure = Figure(figsize=(8, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    layers = range(len(profile.layers))
    visual = [layer.visual for layer in profile.layers]
    axes[0].bar(layers, visual, label="visual", color="tab:blue")
    axes[0].bar(layers, [layer.audio for layer in profile.layers], bottom=visual, label="audio", color="tab:orange")
    axes[0].axhline(profile.mean_budget, color="black", linewidth=0.8, linestyle=":", label="mean")
    axes[0].set(xlabel="layer", ylabel="retained tokens", title=profile.model_id or "budget profile")
    if measured:
        for group, colour in (("visual", "tab:blue"), ("audio", "tab:orange")):
            for name, style in (("entropy", "-"), ("redundancy", "--")):
                values = [layer[group][name] for layer in measured]
                axes[1].plot(layers, values, style, color=colour, label=f"{group} {name}")
        axes[1].set(xlabel="layer", ylabel="normalised entropy, mean cosine", ylim=(0, 1.05))
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=150)
