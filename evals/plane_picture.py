"""The pictures of `evaluate.py map`: a PNG, and an interactive HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from data.checks import fitted
from data.images import BadImage
from data.sources import ImageSource
from evals.plane import spread_out
from runtime.packages import need_package
from runtime.state import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#999933", "#444444", "#a50026",
           "#1b9e77", "#e7298a", "#66a61e", "#a6761d", "#8da0cb", "#fb8072", "#80b1d3", "#b3de69", "#bc80bd", "#bdbdbd")
SMALL, THUMBNAIL, EXAMPLES = 36, 96, 12  # pixels of the pictures in a panel and under the mouse; pictures in a panel
INK = "#333333"


def colours_of(source: ImageSource) -> list[str]:
    """A colour for each image, by class where there are classes; from the 21st class on they repeat."""
    if source.labels is None:
        return [COLOURS[0]] * len(source)
    return [COLOURS[label % len(COLOURS)] for label in source.labels]


def thumbnail(source: ImageSource, i: int, side: int) -> Image.Image:
    """Image i, at most ``side`` pixels wide and high; grey if it is unreadable."""
    try:
        return fitted(source.open(i), side)
    except BadImage:
        return Image.new("RGB", (side, side), (225, 225, 225))


def new_figure(**options: Any) -> Any:
    """A figure of matplotlib's. Raises :class:`UserError` if that is not installed."""
    library = need_package("matplotlib", "the picture", module="matplotlib.figure",
                           otherwise="omit the picture with --picture none")
    return library.Figure(**options)


def save_png(path: Path, maps: Mapping[str, np.ndarray], source: ImageSource, title: str) -> Path:
    """A panel for each of ``maps``, name -> [n, 2], with the same few images shown in all of them.

    Raises :class:`UserError` without matplotlib.
    """
    figure = new_figure(figsize=(6 * len(maps), 6.6), layout="constrained")
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    edge = 1.12 * max(np.abs(points).max() for points in maps.values())
    colours, examples = colours_of(source), spread_out(next(iter(maps.values())), EXAMPLES)
    pictures = {i: np.asarray(thumbnail(source, i, SMALL)) for i in examples}
    for axis, (name, points) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items(), strict=True):
        axis.scatter(*points.T, c=colours, s=max(3, min(25, 20_000 / len(points))), alpha=0.6, linewidths=0)
        for i, picture in pictures.items():
            frame = {"edgecolor": colours[i], "linewidth": 1.5, "boxstyle": "square,pad=0.1"}
            axis.add_artist(AnnotationBbox(OffsetImage(picture), points[i], pad=0.1, bboxprops=frame))
        axis.set(title=name, xticks=[], yticks=[], aspect="equal", xlim=(-edge, edge), ylim=(-edge, edge))
        for spine in axis.spines.values():
            spine.set_color("#cccccc")
    if source.labels is not None and 1 < len(source.classes) <= len(COLOURS):
        marks = [figure.axes[0].scatter([], [], c=COLOURS[number], label=name)
                 for number, name in enumerate(source.classes)]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(10, len(marks)), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, color=INK)
    return write_atomic(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def save_html(path: Path, maps: Mapping[str, np.ndarray], source: ImageSource, title: str) -> Path:
    """One file without links to others: the panels of :func:`save_png`, with each image's picture, name and class under
    the mouse, and the same image marked in every panel."""
    classes = [""] if source.labels is None else source.classes
    labels = [0] * len(source) if source.labels is None else source.labels.tolist()
    values = {"names": [source.names[i] for i in range(len(source))], "labels": labels, "classes": classes,
              "colours": colours_of(source), "pictures": [_jpeg(source, i) for i in range(len(source))],
              "maps": [{"name": name, "points": np.round(points, 4).tolist()} for name, points in maps.items()],
              "title": title}
    text = PAGE.substitute(values=_script_text(values))
    return write_atomic(path, lambda file: file.write(text.encode("utf-8", "replace")) and None)


def _jpeg(source: ImageSource, i: int) -> str:
    data = io.BytesIO()
    thumbnail(source, i, THUMBNAIL).save(data, "JPEG", quality=70)
    return base64.b64encode(data.getvalue()).decode()


def _script_text(values: Mapping[str, object]) -> str:
    """JSON that is safe inside a script element, whatever names it holds."""
    return json.dumps(values).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>map</title><style>
body { font: 14px system-ui, sans-serif; color: #333; margin: 16px; }
#panels { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; } figcaption { text-align: center; padding: 4px; }
canvas { border: 1px solid #ccc; }
#hint { position: fixed; display: none; pointer-events: none; background: #fff; border: 1px solid #999;
        padding: 6px; max-width: 320px; overflow-wrap: anywhere; box-shadow: 0 1px 4px #0003; }
#hint img { display: block; margin-bottom: 4px; }
#legend span { margin-right: 12px; white-space: nowrap; }
</style></head><body><p id="title"></p><div id="panels"></div><p id="legend"></p><div id="hint"></div><script>
const all = $values, side = 560, radius = Math.max(1.5, Math.min(4, 180 / Math.sqrt(all.names.length)));
document.getElementById("title").textContent = all.title;
const panels = all.maps.map(map => {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption"), ratio = window.devicePixelRatio || 1;
  caption.textContent = map.name; canvas.width = canvas.height = side * ratio;
  canvas.style.width = canvas.style.height = side + "px";
  const xs = map.points.map(p => p[0]), ys = map.points.map(p => p[1]);
  const low = [Math.min(...xs), Math.min(...ys)], high = [Math.max(...xs), Math.max(...ys)];
  const scale = 0.9 * side / Math.max(high[0] - low[0], high[1] - low[1], 1e-9);
  const at = map.points.map(p => [side / 2 + (p[0] - (low[0] + high[0]) / 2) * scale,
                                  side / 2 - (p[1] - (low[1] + high[1]) / 2) * scale]);
  figure.append(caption, canvas); document.getElementById("panels").append(figure);
  const pen = canvas.getContext("2d"); pen.scale(ratio, ratio);
  return { canvas, pen, at };
});
function dot(pen, [x, y], colour, size, alpha) {
  pen.globalAlpha = alpha; pen.fillStyle = colour; pen.beginPath(); pen.arc(x, y, size, 0, 7); pen.fill();
}
function draw(marked) {
  for (const { pen, at } of panels) {
    pen.clearRect(0, 0, side, side);
    at.forEach((p, i) => dot(pen, p, all.colours[i], radius, 0.6));
    if (marked < 0) continue;
    dot(pen, at[marked], "#000", radius + 4, 1);
    dot(pen, at[marked], all.colours[marked], radius + 2, 1);
  }
}
const hint = document.getElementById("hint");
for (const { canvas, at } of panels) {
  canvas.onmousemove = event => {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = 400;
    at.forEach((p, i) => { const d = (p[0] - x) ** 2 + (p[1] - y) ** 2; if (d < least) { least = d; best = i; } });
    draw(best); hint.style.display = best < 0 ? "none" : "block";
    if (best < 0) return;
    const picture = document.createElement("img"), name = document.createElement("div");
    picture.src = "data:image/jpeg;base64," + all.pictures[best];
    const kind = all.classes[all.labels[best]];
    name.textContent = all.names[best] + (kind ? " (" + kind + ")" : "");
    hint.replaceChildren(picture, name);
    hint.style.left = Math.min(event.clientX + 16, innerWidth - 340) + "px";
    hint.style.top = Math.min(event.clientY + 16, innerHeight - 160) + "px";
  };
  canvas.onmouseleave = () => { hint.style.display = "none"; draw(-1); };
}
if (all.classes.length > 1 && all.classes.length <= 20) all.classes.forEach((name, k) => {
  const entry = document.createElement("span"), i = all.labels.indexOf(k);
  if (i < 0) return;
  entry.textContent = "● " + name; entry.style.color = all.colours[i]; document.getElementById("legend").append(entry);
});
draw(-1);
</script></body></html>
""")
