"""Plots: how figures are made and written, and the line charts of a page."""

import io
import re
from html import escape

from sidfast.common.extras import need

COLORS = "#2f5fd0", "#d0662f"                            # of two lines; on a page its --a and --b
_ON_PAGE = {COLORS[0]: "var(--a)", COLORS[1]: "var(--b)", "#000000": "currentColor", "#ffffff": "var(--card)"}
FONT = 12                                                # points, and pixels of a page
_STYLE = {"font.size": FONT, "font.sans-serif": "DejaVu Sans", "svg.hashsalt": "sidfast"}
# (without a salt, names in an SVG are random)
_MOST, _LEAST = 1e100, 1e-100                            # so that differences and powers stay floats


def new_figure(width, height):
    """A matplotlib (Figure, Axes) of so many inches, to be written by `encode` or `inline`. Raises UserError without
    matplotlib."""
    matplotlib = need("matplotlib", "report", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()


def encode(figure, kind, style=None, **options):
    """The bytes of a figure's "png" or "svg", the same for the same figure. `style`: matplotlib's settings; `options`:
    of its savefig."""
    import matplotlib

    data = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_STYLE | (style or {})):
        figure.savefig(data, format=kind, dpi=150, metadata=metadata, **options)
    return data.getvalue()


def inline(figure, name):
    """A figure as an <svg> element for a page, with the page's colours: `currentColor`, --card, --a and --b.

    A unit of it is 1/72 inch of the figure: the page shows a figure of 4.7 inches in 338 pixels or more, or text gets
    smaller than FONT.
    """
    svg = encode(figure, "svg", {"svg.fonttype": "none"}, transparent=True).decode()
    svg = re.sub(r' id="\w+_\d+"', "", svg[svg.index("<svg"):])                  # (those that nothing refers to)
    svg = re.sub("#[0-9a-f]{6}", lambda found: _ON_PAGE.get(found[0], found[0]), svg)
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    return re.sub("^<svg[^>]*>", lambda _: f'<svg {box} role="img" aria-label="{escape(name)}">', svg)


def line_chart(series, x_label, level=None, log=False):
    """<svg> of {name: [(x, y), ...]}: one line or two, from left to right; points that are not finite, or beyond
    1e100, are left out. None if nothing is left to draw.

    `level`: (name, y) of a dashed line across; `log`: a logarithmic axis, if all values are above 0 and far apart.
    """
    series = {name: sorted(point for point in points if abs(point[1]) < _MOST) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    figure, axes = new_figure(4.7, 2.9)
    for (name, points), color in zip(series.items(), COLORS, strict=False):
        axes.plot(*zip(*points, strict=True), "o-" if len(points) <= 30 else "-", color=color, linewidth=1.6,
                  markersize=4, label=name)
    level = level if level and abs(level[1]) < _MOST else None
    if level:
        axes.axhline(level[1], color=COLORS[1], linewidth=1.6, linestyle="--", label=level[0])
    values = [y for points in series.values() for _, y in points] + ([level[1]] if level else [])
    if log and _LEAST < 3 * min(values) < max(values):
        logarithmic(axes)
    else:
        axes.locator_params("y", nbins=6)
        axes.yaxis.set_major_formatter("{x:.6g}")
    axes.locator_params("x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlabel(x_label)
    if len(series) > 1 or level:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, borderpad=0, fontsize=FONT)
    bare(axes)
    return inline(figure, ", ".join(series))


def logarithmic(axes, which="y"):
    """Make the axis "x" or "y" logarithmic, with plain numbers on it."""
    from matplotlib.ticker import LogLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def bare(axes):
    """Thin lines behind the data in place of a frame around it."""
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)
