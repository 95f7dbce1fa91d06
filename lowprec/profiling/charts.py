"""Plots as inline SVG: no script, no external resource, colours by CSS variables that follow the reader's theme."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 860
COLOURS = {
    "weights": 1, "adapters": 2, "gradients": 3, "optimizer": 4, "activations": 5, "logits": 6, "workspace": 7,
    "slack": 8, "context": 9, "forward": 1, "backward": 2, "data": 5, "other": 7, "products": 1, "attention": 2,
    "casts": 3, "rotations": 6, "loss": 9, "memory moves": 8,
}  # fmt: skip
"""Name -> number of a CSS colour (``--c1`` ...): a name has its colour in every plot."""


def colour(name: str) -> str:
    return f"var(--c{COLOURS.get(name, 7)})"


def bar(parts: Mapping[str, float], whole: float, write: Mapping[str, str], title: str, height: int = 30) -> str:
    """One stacked bar; ``whole`` is what the full width stands for."""
    shapes, x = [], 0.0
    for name, value in parts.items():
        width = WIDTH * value / whole if whole else 0.0
        if width <= 0:
            continue
        shapes.append(
            f'<rect x="{x:.2f}" y="0" width="{max(width - 1, 0.5):.2f}" height="{height}" rx="2" '
            f'fill="{colour(name)}"><title>{escape(name)}: {escape(write[name])}</title></rect>'
        )
        if width > 9 * len(name) + 8:
            shapes.append(f'<text x="{x + 7:.2f}" y="{height / 2 + 4.5}" class="on">{escape(name)}</text>')
        x += width
    return _svg(height, title, shapes)


def legend(names: Mapping[str, str]) -> str:
    """Name -> its figure, with the colours of the plots."""
    keys = "".join(
        f'<li><i style="background:{colour(name)}"></i>{escape(name)} <b>{escape(told)}</b></li>'
        for name, told in names.items()
    )
    return f'<ul class="legend">{keys}</ul>'


def columns(values: Sequence[float], unit: str, title: str, height: int = 110) -> str:
    """A column a step, from zero, with its median as a line."""
    if not values:
        return ""
    top = max(values) * 1.08
    each = WIDTH / len(values)
    gap = min(2.0, each / 4)
    median = statistics.median(values)
    shapes = [
        f'<rect x="{i * each:.2f}" y="{height * (1 - v / top):.2f}" width="{each - gap:.2f}" '
        f'height="{height * v / top:.2f}" rx="2" fill="var(--c1)"><title>step {i + 1}: {v:,.2f} {unit}</title></rect>'
        for i, v in enumerate(values)
    ]
    y = height * (1 - median / top)
    shapes.append(f'<line x1="0" x2="{WIDTH}" y1="{y:.2f}" y2="{y:.2f}" class="mark"/>')
    return _svg(height, title, shapes)


def areas(
    series: Mapping[str, Sequence[float]], phases: Sequence[str], unit: str, title: str, height: int = 250
) -> str:
    """Stacked areas over the operators of a step, the phases named below.

    Args:
        series: name -> a value at each point.
        phases: the phase of each point.
    """
    count = len(phases)
    if count < 2:
        return ""
    names = [name for name, values in series.items() if any(values)]
    marks = scale(max(sum(series[name][i] for name in names) for i in range(count)))
    top = marks[-1]
    left, bottom = 52, height - 24
    step = (WIDTH - left) / (count - 1)
    below = [0.0] * count
    shapes = []
    for mark in marks:
        y = bottom - mark / top * (bottom - 8)
        shapes.append(f'<line x1="{left}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        shapes.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="axis end">{mark:g}</text>')
    for name in names:
        above = [low + value for low, value in zip(below, series[name], strict=True)]

        def points(values: Sequence[float], reverse: bool = False) -> str:
            order = range(count - 1, -1, -1) if reverse else range(count)
            return " ".join(f"{left + i * step:.1f},{bottom - values[i] / top * (bottom - 8):.1f}" for i in order)

        outline = f"{points(above)} {points(below, reverse=True)}"
        most = f"{escape(name)}: at most {_short(max(series[name]))} {unit}"
        shapes.append(f'<polygon points="{outline}" fill="{colour(name)}"><title>{most}</title></polygon>')
        below = above
    begin = 0
    for i in range(1, count + 1):
        if i == count or phases[i] != phases[begin]:
            x, end = left + begin * step, left + min(i, count - 1) * step
            if begin:
                shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height}" class="edge"/>')
            if end - x > 7 * len(phases[begin]) and phases[begin]:
                middle = (x + end) / 2
                shapes.append(
                    f'<text x="{middle:.1f}" y="{bottom + 6}" class="axis mid phase">{escape(phases[begin])}</text>'
                )
            begin = i
    return _svg(height, title, shapes)


def scale(most: float) -> list[float]:
    """Four to six round numbers from 0 to ``most`` or just above."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(most / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if most <= 5 * factor * power)
    return [round(i * step, 12) for i in range(math.ceil(most / step - 1e-9) + 1)]


def _svg(height: int, title: str, shapes: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{''.join(shapes)}</svg>"
    )


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.1f}"
