"""A picture of the singular values of every layer."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cuttlefish_jax.errors import storage_errors
from cuttlefish_jax.files import replace_file

_KEPT = "#b8bcc2"
_STABLE = "crimson"


def plot_singular_values(
    singular_values: Mapping[str, Any],
    stable_ranks: Mapping[str, Any],
    file: str | Path,
    *,
    ranks: Mapping[str, int],
    title: str,
) -> None:
    """Draws a small panel for each layer into a PNG file.

    A panel has the singular values, the largest of them 1, against their index. What a plan keeps of a layer
    is filled in a colour that tells the layer's depth, what it drops is grey; so is all of a layer that stays
    full-rank. The stable rank is a dashed line. Of stacked layers the mean of the copies is drawn.

    Args:
      singular_values: ``{path: f[*stack, min(m, n)]}``, descending.
      stable_ranks: ``{path: f[*stack]}``.
      file: the PNG to write; an older one is replaced in one step.
      ranks: ``{path: rank}`` of the layers that are factorized.
      title: above the picture.

    Raises:
      StorageError: if the disk is full or the file cannot be written.
    """
    count = len(singular_values)
    columns = min(count, max(3, math.ceil(math.sqrt(1.4 * count))))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1.9 * columns + 0.6, 1.55 * rows + 1.1), layout="constrained", dpi=130)
    # The canvas of this figure alone: a program that imports this keeps its own backend.
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for number, (axes, (path, sigmas)) in enumerate(zip(grid.flat, singular_values.items(), strict=False)):
        color = colormaps["viridis"](0.92 * number / max(1, count - 1))  # its end is too pale on white
        _draw(axes, _mean_spectrum(sigmas), float(np.mean(stable_ranks[path])), ranks.get(path), color)
        axes.set_title(_short(path or "(root)"), fontsize=7.5, loc="left", pad=3)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("σᵢ / σ₁", fontsize=7.5)
    figure.suptitle(f"Singular values: {title}", x=0.01, ha="left", fontsize=10.5)
    _draw_legend(figure, has_ranks=bool(ranks))
    png = io.BytesIO()
    canvas.print_png(png)
    with storage_errors(file, option="--picture"):
        replace_file(Path(file), png.getvalue())


def _draw(axes: Any, sigmas: np.ndarray, stable_rank: float, rank: int | None, color: Any) -> None:
    edges = np.arange(len(sigmas) + 1)
    kept = len(sigmas) if rank is None else rank
    axes.stairs(sigmas, edges, fill=True, color=_KEPT, alpha=0.45)
    if rank is not None:
        axes.stairs(sigmas[:kept], edges[: kept + 1], fill=True, color=color, alpha=0.85)
    axes.stairs(sigmas, edges, color="black" if rank is None else color, linewidth=0.9, baseline=None)
    axes.axvline(stable_rank, color=_STABLE, linewidth=0.9, linestyle="--")
    label = f"{len(sigmas)}" if rank is None else f"{rank} of {len(sigmas)}"
    axes.text(0.97, 0.93, label, transform=axes.transAxes, ha="right", va="top", fontsize=7.5)
    axes.set_xlim(0, len(sigmas))
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.5, 1])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.tick_params(labelsize=6.5, length=2, pad=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", alpha=0.2)


def _draw_legend(figure: Figure, *, has_ranks: bool) -> None:
    middle = colormaps["viridis"](0.45)
    handles: list[Any] = [Patch(color=middle, alpha=0.85, label="rank of the factors")] if has_ranks else []
    handles += [
        Patch(color=_KEPT, alpha=0.45, label="left out, or kept full-rank" if has_ranks else "full rank"),
        Line2D([], [], color=_STABLE, linewidth=0.9, linestyle="--", label="stable rank"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8)


def _mean_spectrum(sigmas: Any) -> np.ndarray:
    """One spectrum for all copies, each with its largest value scaled to 1."""
    spectra = np.nan_to_num(np.asarray(sigmas, np.float64)).reshape(-1, np.shape(sigmas)[-1])
    largest = spectra[:, :1]
    return np.mean(spectra / np.where(largest > 0, largest, 1), axis=0)


def _short(path: str, *, length: int = 28) -> str:
    return path if len(path) <= length else "…" + path[1 - length :]
