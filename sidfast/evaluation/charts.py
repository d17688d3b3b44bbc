"""Line charts as SVG that takes its colours from the page around it."""

import math
from html import escape

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 30
_MOST, _LEAST = 1e300, 1e-300                            # so that differences and powers stay floats


def line_chart(series, x_label, level=None, log=False):
    """SVG of {name: [(x, y), ...]}: one line each, classes `line-0`, `line-1`, ..., from left to right; points that are
    not finite, or beyond 1e300, are left out. None if nothing is left to draw.

    `level`: (name, y) of a dashed line across; `log`: a logarithmic axis, if all values are above 0.
    """
    series = {name: sorted((point for point in points if abs(point[1]) < _MOST), key=lambda point: point[0])
              for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    level = level if level and abs(level[1]) < _MOST else None
    values = [y for points in series.values() for _, y in points] + ([level[1]] if level else [])
    log = log and min(values) > _LEAST
    xs = _ticks(*_span([x for points in series.values() for x, _ in points]))
    ys = _log_ticks(min(values), max(values)) if log else _ticks(*_span(values))
    scale = math.log if log else float
    bottom, top = scale(ys[0]), scale(ys[-1])

    def place(x, y):
        right, low = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        return (_LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (right - _LEFT),
                low - (scale(y) - bottom) / (top - bottom) * (low - _TOP))

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(", ".join(series))}">']
    for y in ys:
        h = place(xs[0], y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{h:.1f}" y2="{h:.1f}"/>'
                     f'<text x="{_LEFT - 6}" y="{h + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts += [f'<text x="{place(x, ys[0])[0]:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
              for x in xs]
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 1}" text-anchor="end">{escape(x_label)}</text>')
    if level:
        h = place(xs[0], level[1])[1]
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{h:.1f}" y2="{h:.1f}">'
                     f'<title>{escape(level[0])}: {level[1]:.4g}</title></line>')
    for k, (name, points) in enumerate(series.items()):
        spots = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="line-{k}" points="{path}"/>')
        if len(spots) <= 30:
            parts += [f'<circle class="line-{k}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(name)}, {px:g} '
                      f'{escape(x_label)}: {py:.4g}</title></circle>' for (x, y), (px, py) in
                      zip(spots, points, strict=True)]
    return "".join([*parts, "</svg>"])


def _span(values):
    """(low, high) around values, apart even where they are all the same, or nearly so."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size > _LEAST and high - low > 1e-9 * size:
        return low, high
    half = size / 2 if size > _LEAST else 0.5
    return low - half, high + half


def _ticks(low, high):
    """About five round numbers from at most `low` to at least `high`."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low, high):
    """1, 2, 5, 10, ... from at most `low` to at least `high`; powers of ten alone over many of them."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    marks = [m * 10.0**power for power in powers for m in steps]
    first = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    last = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9) and i > first)
    return marks[first:last + 1]
