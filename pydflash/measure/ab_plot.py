"""The picture of a comparison: the ratios of all repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydflash.errors import ConfigError
from pydflash.files import replacing
from pydflash.measure.ab_report import Report

__all__ = ["plot", "pyplot"]


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. Raises ConfigError when it is not installed."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]

        matplotlib.use("Agg")
        from matplotlib import pyplot as found  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed; run pip install 'pydflash[bench]'"
        ) from None
    return found


def plot(report: Report, path: Path) -> None:
    """Draw the ratios that the verdict rests on, of every repeat or of every chunk, their medians and intervals, B/A
    beside A'/A, one panel a quantity. Raises WriteError.
    """
    outcomes = report.outcomes
    figure, panels = pyplot().subplots(1, len(outcomes), figsize=(4.5 * len(outcomes), 4), squeeze=False)
    for axes, outcome in zip(panels[0], outcomes):
        shown = outcome.chunks or outcome
        for x, (ratios, estimate) in enumerate(((shown.ratios, shown.ratio), (shown.again_ratios, shown.again))):
            percents = [100.0 * (ratio - 1.0) for ratio in ratios]
            low, median, high = (100.0 * (r - 1.0) for r in (estimate.low, estimate.median, estimate.high))
            axes.plot([x - 0.15] * len(percents), percents, "o", color="gray", alpha=0.6)
            axes.errorbar([x], [median], [[median - low], [high - median]], fmt="s", capsize=6)
        axes.axhline(0.0, linewidth=0.8, color="black")
        axes.set_xticks([0, 1], ["B/A", "A'/A"])
        axes.set_xlim(-0.6, 1.6)
        axes.set(
            title=f"{outcome.what}{' by chunk' if outcome.chunks else ''} ({outcome.unit})",
            ylabel="difference from A in %",
        )
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("\n".join(arm.label for arm in report.arms.values()), fontsize=9)
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:] or None)
    pyplot().close(figure)
