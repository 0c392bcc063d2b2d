"""How a curve of a report is drawn: inline SVG, the same bytes for the same input.

Figures are drawn in placeholder colours that become `var(--...)` afterwards, so one SVG serves the
light page, the dark page and paper. Text stays text, in the page's own font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from prefopt.report.record import Row, RunRecord, number, series

COLOURS = {  # placeholder -> CSS variable of the page
    "train": "#010101",
    "held": "#010102",
    "chosen": "#010103",
    "rejected": "#010104",
    "ink": "#010105",
    "muted": "#010106",
    "grid": "#010107",
    "surface": "#010108",
}
WIDTH, HEIGHT = 5.6, 3.1  # inches at 72 units each: about the width of a column
MAX_POINTS = 1500


class Chart(NamedTuple):
    """`svg` is empty when nothing was recorded."""

    title: str
    about: str
    svg: str


def smooth(values: np.ndarray) -> np.ndarray:
    """The trend: at each point a straight line fitted to its neighbourhood, a Gaussian window of
    about a tenth of the points (600 at most: time). No lag, and unlike an average not bent at the
    ends. NaN stays a gap and carries no weight.
    """
    width = min(max(1.0, len(values) / 40), 100.0)
    away = np.arange(-int(3 * width), int(3 * width) + 1.0)
    window = np.exp(-0.5 * (away / width) ** 2)
    known = np.isfinite(values)

    def around(moment: np.ndarray, of: np.ndarray) -> np.ndarray:
        spread = np.convolve(of, (window * moment)[::-1])
        return spread[len(away) // 2 :][: len(values)]

    y = np.where(known, values, 0.0)
    w0, w1, w2 = (around(away**k, known.astype(float)) for k in (0, 1, 2))
    y0, y1 = around(away**0, y), around(away, y)
    spread = w0 * w2 - w1**2
    line = (w2 * y0 - w1 * y1) / np.where(spread > 1e-9, spread, 1.0)
    mean = y0 / np.where(w0 > 0, w0, 1.0)
    return np.where(known, np.where(spread > 1e-9, line, mean), math.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MAX_POINTS points: the lowest and highest of each stretch, so spikes stay."""
    if len(y) <= MAX_POINTS:
        return x, y
    keep = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), MAX_POINTS // 2):
        filled = np.where(np.isfinite(y[part]), y[part], np.nan)
        if np.isfinite(filled).any():
            keep |= {int(part[np.nanargmin(filled)]), int(part[np.nanargmax(filled)])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def optimizer_chart(run: RunRecord, xlabel: str = "optimizer step") -> Chart:
    return Chart(
        "Learning rate and gradient norm",
        "gradient norm before clipping, log scale",
        figure("optimizer", run, _optimizer, 2, xlabel),
    )


def _optimizer(axes: Any, run: RunRecord) -> bool:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rate = line(axes[0], *series(run.train, "learning_rate"), "train", "learning rate")
    positive = [row for row in run.train if (number(row.get("grad_norm")) or 0) > 0]
    norm = trained(axes[1], positive, "grad_norm", "ink", "gradient norm")
    if norm:
        axes[1].set_yscale("log")
        _plain_log_ticks(axes[1])
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return rate or norm


def trained(axis: Any, rows: list[Row], key: str, colour: str, label: str) -> bool:
    """The logged values light, their running average on top; few points are drawn as they are."""
    x, y = series(rows, key)
    if np.isfinite(y).sum() < 10:
        return line(axis, x, y, colour, label)
    axis.plot(*thin(x, y), color=COLOURS[colour], alpha=0.22, linewidth=0.9)
    return line(axis, x, smooth(y), colour, label)


def line(axis: Any, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> bool:
    if not np.isfinite(y).any():
        return False
    marker = "o" if np.isfinite(y).sum() < 10 else None
    x, y = thin(x, y)
    axis.plot(x, y, color=COLOURS[colour], linewidth=1.9, label=label, marker=marker, markersize=3)
    return True


def held_out(
    axis: Any, rows: list[Row], key: str, colour: str, label: str, interval: str = ""
) -> bool:
    """Held-out points, joined by a thin line, with their interval where one was recorded."""
    x, y = series(rows, key)
    if not np.isfinite(y).any():
        return False
    style = {"color": COLOURS[colour], "linewidth": 1.1, "markersize": 5, "zorder": 4}
    edge = {"markeredgecolor": COLOURS["surface"], "markeredgewidth": 1.0}
    axis.plot(x, y, marker="o", label=label or None, **style, **edge)
    if interval:
        bounds = [series(rows, f"eval_{interval}_{end}") for end in ("low", "high")]
        if all(len(bound[0]) == len(x) and (bound[0] == x).all() for bound in bounds):
            (_, low), (_, high) = bounds
            axis.vlines(x, low, high, color=COLOURS[colour], linewidth=2.2, alpha=0.5)
    return True


def level(axis: Any, value: float, label: str | None = None) -> None:
    style: Any = {"linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    axis.axhline(value, color=COLOURS["muted"], label=label, **style)


def _short(value: float) -> str:
    """0.0002 -> "2e-4"."""
    text = f"{value:.1e}" if value and abs(value) < 1e-2 else f"{value:g}"
    return text.replace(".0e", "e").replace("e-0", "e-")


def _plain_log_ticks(axis: Any) -> None:
    """0.5, 1, 2 instead of powers of ten, which leave a narrow range without any label."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    subs = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def figure(
    key: str,
    run: RunRecord,
    draw: Callable[[Any, RunRecord], bool],
    panels: int = 1,
    xlabel: str = "optimizer step",
) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "prefopt",
        "font.size": 12,
        "axes.edgecolor": COLOURS["grid"],
        "axes.labelcolor": COLOURS["muted"],
        "text.color": COLOURS["ink"],
        "xtick.color": COLOURS["grid"],
        "ytick.color": COLOURS["grid"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.labelcolor": COLOURS["muted"],
        "grid.color": COLOURS["grid"],
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = np.atleast_1d(figure.subplots(panels, 1, sharex=True))
        if not draw(axes, run):
            return ""
        for axis in axes:
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.grid(axis="y", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0, pad=5)
            axis.margins(x=0.015)
            if axis.get_legend_handles_labels()[1]:
                place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99), "ncols": 4}
                small = {"handlelength": 1.3, "columnspacing": 1.4, "borderpad": 0.2}
                axis.legend(**place, **small, frameon=False, fontsize=11.5)
        if xlabel in ("optimizer step", "update"):
            axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[-1].set_xlabel(xlabel)
        buffer = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return _inline(buffer.getvalue(), key)


def _inline(svg: str, key: str) -> str:
    """The SVG element alone, its ids unique on the page, its colours and font those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)[ >].*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\sid="', f' id="{key}-', svg)
    svg = svg.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1
    )
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([^'\";]*px) [^;\"]*", r"font: \1 var(--sans)", svg)  # matplotlib < 3.11
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
