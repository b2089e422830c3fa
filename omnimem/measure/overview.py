"""Draw the picture of the README: a video streams through the bounded caches, the gradient flows back.

python -m omnimem.measure.overview omnimem/memory/overview.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from omnimem.files import atomic_write_text

CHUNKS, LAYERS, SLOTS = 4, 3, 8
LEFT, TOP, WIDTH, HEIGHT, GAP = 150, 96, 150, 46, 30
VISUAL, AUDIO, TEXT, EVICTED, GRADIENT, INK = "#4c78a8", "#f58518", "#9d9d9d", "#e8e8e8", "#c03028", "#303030"


def overview() -> str:
    """SVG of four chunks and three layers."""
    width, height = LEFT + CHUNKS * (WIDTH + GAP) + 150, TOP + LAYERS * (HEIGHT + 26) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(_arrow_head(name, color) for name, color in (("forward", INK), ("backward", GRADIENT))),
        *(part for number in range(CHUNKS) for part in _chunk(number)),
        *(part for layer in range(LAYERS) for number in range(CHUNKS) for part in _cache(layer, number)),
        *(_text(16, _row(layer) + HEIGHT / 2 + 5, f"layer {layer + 1} cache") for layer in range(LAYERS)),
        *_answer(),
        *_legend(TOP + LAYERS * (HEIGHT + 26) + 16),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _row(layer: int) -> float:
    return TOP + layer * (HEIGHT + 26)


def _column(number: int) -> float:
    return LEFT + number * (WIDTH + GAP)


def _chunk(number: int) -> list[str]:
    """Frames and audio of a chunk, and the arrow into its caches."""
    x = _column(number)
    frames = [_box(x + 16 + 28 * i, 30, 24, 16, VISUAL) for i in range(4)]
    wave = [_box(x + 16 + 7 * i, 52 + (i % 3) * 2, 4, 12 - (i % 3) * 4, AUDIO) for i in range(16)]
    arrow = _line(x + 75, 70, x + 75, TOP - 6, INK, "forward")
    return [_text(x + 16, 20, f"chunk {number + 1}"), *frames, *wave, arrow]


def _cache(layer: int, number: int) -> list[str]:
    """A bounded cache after a chunk: text, retained tokens, and what was evicted."""
    x, y = _column(number), _row(layer)
    visual = 5 - layer
    slots = []
    for slot in range(SLOTS):
        color = TEXT if slot == 0 else VISUAL if slot <= visual else AUDIO if slot <= visual + 2 else EVICTED
        slots.append(_box(x + 8 + slot * 17, y + 12, 13, 22, color))
    parts = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="none" stroke="{INK}"/>', *slots]
    if number + 1 < CHUNKS:
        end = _column(number + 1)
        parts.append(_line(x + WIDTH + 3, y + 16, end - 3, y + 16, INK, "forward"))
        parts.append(_line(end - 3, y + 32, x + WIDTH + 3, y + 32, GRADIENT, "backward"))
    return parts


def _answer() -> list[str]:
    """Question and loss after the last chunk."""
    x, y = _column(CHUNKS - 1) + WIDTH, _row(1)
    return [
        _line(x + 3, y + 16, x + 34, y + 16, INK, "forward"),
        _line(x + 34, y + 32, x + 3, y + 32, GRADIENT, "backward"),
        _text(x + 42, y + 12, "question →"),
        _text(x + 42, y + 30, "answer →"),
        _text(x + 42, y + 48, "loss", GRADIENT),
    ]


def _legend(y: float) -> list[str]:
    parts, x = [], 16.0
    for color, label in (
        (VISUAL, "retained visual token"),
        (AUDIO, "retained audio token"),
        (TEXT, "text, always retained"),
        (EVICTED, "evicted"),
    ):
        parts += [_box(x, y - 11, 13, 13, color), _text(x + 19, y, label)]
        x += 40 + 7.2 * len(label)
    gradient = _line(x + 30, y - 4, x, y - 4, GRADIENT, "backward")
    return [*parts, gradient, _text(x + 38, y, "gradient, also into the selection")]


def _arrow_head(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
    )


def _box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{color}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, head: str) -> str:
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.6" '
        f'marker-end="url(#{head})"/>'
    )


def _text(x: float, y: float, text: str, color: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}">{text}</text>'


if __name__ == "__main__":
    atomic_write_text(Path(sys.argv[1]), overview())
