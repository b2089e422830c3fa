"""Pictures of a profile: budgets over layers (the paper's figure 7), entropy and similarity over layers (figure 2).

omnimem profile plot profile.json --out profile.png
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from omnimem.budget.profile import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file


def plot_profile(profile: BudgetProfile, out: Path) -> None:
    """Draw budgets over layers, and below them what calibration measured, if it did.

    Raises
    ------
    OmniMemError
        matplotlib is not installed, or the picture cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise OmniMemError("plots need matplotlib: pip install 'omnimem[report]'")
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
    axes[0].set(xlabel="layer", ylabel="positions kept", title=profile.model_id or "budget profile")
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
