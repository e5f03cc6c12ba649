"""What people see of a run: a line per epoch, a bar within it, a table and a picture at the end."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cuttlefish_jax.errors import storage_errors
from cuttlefish_jax.files import replace_file
from cuttlefish_jax.training.console import Deaf

# More layers than this have a colour scale by depth instead of a legend.
_MAX_LEGEND = 12
# viridis without its end, which is too pale on white.
_COLORS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))
_FACTORIZED: dict[str, Any] = {"alpha": 0.9, "linewidth": 1.4}
_KEPT: dict[str, Any] = {"alpha": 0.4, "linewidth": 0.9, "linestyle": "--"}


def progress_line(
    *,
    epoch: int,
    epochs: int,
    phase: str,
    train_loss: float,
    learning_rate: float,
    examples_per_second: float,
    seconds_left: float,
    test_loss: float | None = None,
    test_score: float | None = None,
    metric: str = "accuracy",
) -> str:
    """One line about one epoch.

    Args:
      epoch: its index, counted from 0; shown from 1.
      epochs: the length of the run.
      phase: ``"full_rank"`` or ``"low_rank"``.
      train_loss: mean over the epoch.
      learning_rate: at the end of the epoch.
      examples_per_second: trained on.
      seconds_left: to the end of the run, as far as one can tell.
      test_loss: after the epoch; None if it was not evaluated.
      test_score: at best 1; None if it was not evaluated.
      metric: what the score is.

    Returns:
      The line, without a newline.

    Example:
      >>> print(progress_line(epoch=11, epochs=300, phase="low_rank", train_loss=0.4123, learning_rate=0.8,
      ...       examples_per_second=12345, seconds_left=4000, test_loss=0.5021, test_score=0.9123))
      epoch  12/300  low rank   loss 0.4123  test loss 0.5021  accuracy 91.23 %  lr 0.8  12,345 examples/s  1 h 07 min left
    """  # noqa: E501
    parts = [
        f"epoch {epoch + 1:{len(str(epochs))}d}/{epochs}",
        f"{phase.replace('_', ' '):<9}",
        f"loss {train_loss:.4f}",
    ]
    if test_loss is not None:
        parts.append(f"test loss {test_loss:.4f}")
    if test_score is not None:
        parts.append(f"{metric} {100 * test_score:5.2f} %")
    parts += [f"lr {learning_rate:.4g}", f"{examples_per_second:,.0f} examples/s"]
    if epoch + 1 < epochs:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A length of time in words.

    Example:
      >>> duration(8.25), duration(200), duration(4000), duration(100_000)
      ('8.2 s', '3 min 20 s', '1 h 07 min', '1 d 04 h')
    """
    if not np.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    size, name, small, small_name = next(unit for unit in units if seconds >= unit[0])
    # Rounded first, or 119.7 s would be "1 min 60 s".
    whole = round(seconds / small) * small
    return f"{whole // size} {name} {whole % size // small:02d} {small_name}"


@contextlib.contextmanager
def epoch_bar(
    total: int, *, description: str, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """A progress bar that vanishes at the end of the epoch; on anything but a terminal there is none.

    Args:
      total: steps in the epoch.
      description: shown before the bar.
      stream: where to; standard error by default, so that standard output has lines only.

    Yields:
      A function to call with the number of steps made since the last call.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty():
        yield lambda steps: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=cast(TextIO, Deaf(stream)))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)


def summary_table(summary: Mapping[str, Any]) -> str:
    """What a finished run came to, as text.

    Args:
      summary: the contents of ``summary.json``.

    Returns:
      Lines of names and values.
    """
    switch = summary["switch_epoch"]
    switched = "never switched" if switch is None else f"switched before epoch {switch + 1}"
    best = _percent(summary["best_test_score"])
    rows = [
        ("experiment", "{model} on {dataset}, {method}, seed {seed}".format_map(summary)),
        ("device", str(summary["device"])),
        ("epochs", f"{summary['epochs']}, {switched}"),
        ("parameters", _change(summary["params_full"], summary["params_final"]) + _trained(summary)),
        ("FLOPs per example", _change(summary["flops_full"], summary["flops_final"])),
        (f"test {summary['metric']}", f"{_percent(summary['test_score'])} (best {best})"),
        ("examples/s", _speeds(summary["examples_per_second_full"], summary["examples_per_second_low"])),
        ("memory per device", _memory(summary)),
        ("time", _times(summary)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _change(before: float, after: float) -> str:
    if before == after:
        return f"{before:,}"
    return f"{before:,} -> {after:,} ({before / after:.2f}x fewer)"


def _trained(summary: Mapping[str, Any]) -> str:
    """How many of the parameters are trained, if not all."""
    trained = summary["params_trained"]
    return "" if trained == summary["params_final"] else f", {trained:,} of them trained"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _speeds(full: float | None, low: float | None) -> str:
    known = [f"{speed:,.0f} {phase}" for speed, phase in ((full, "full rank"), (low, "low rank")) if speed]
    return (", ".join(known) or "-") + (f" ({low / full:.2f}x)" if full and low else "")


def _memory(summary: Mapping[str, Any]) -> str:
    def sizes(what: str) -> str:
        found = [summary[f"{what}_bytes_{phase}"] for phase in ("full", "low")]
        return " -> ".join(f"{size / 1e6:,.1f} MB" for size in found if size is not None) or "-"

    return f"state {sizes('state')}, a step at most {sizes('step')} ({summary['parallelism']})"


def _times(summary: Mapping[str, Any]) -> str:
    parts = {
        "stable ranks": "rank_seconds",
        "profile": "profile_seconds",
        "switch": "switch_seconds",
        "compilation": "compile_seconds",
    }
    others = ", ".join(f"{name} {duration(summary[key])}" for name, key in parts.items() if summary[key])
    return f"training {duration(summary['train_seconds'])}, {others}"


def plot_ranks(
    measurements: Sequence[tuple[int, Mapping[str, float | Sequence[float]]]],
    file: str | Path,
    *,
    switch_epoch: int | None = None,
    factorized: Collection[str] | None = None,
    title: str = "Stable ranks",
) -> None:
    """Draws the stable rank of every layer over the epochs into a PNG file.

    Layers are coloured by depth. Those that were factorized are drawn solid, the others faint. Layers
    stacked by scan have a line for each copy.

    Args:
      measurements: ``(epoch, {path: stable rank, or one for each copy})`` in order of time; the paths in
        the order of the network.
      file: the PNG to write; an older one is replaced in one step.
      switch_epoch: the first low-rank epoch, to be marked; None if there is none.
      factorized: paths of the factorized layers; None draws all layers solid.
      title: above the picture.

    Raises:
      StorageError: if the disk is full or the file cannot be written.
    """
    lines = _lines(measurements)
    figure = Figure(figsize=(9, 5), layout="constrained", dpi=140)
    # The canvas of this figure alone: a program that imports this keeps its own backend.
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for depth, (path, label, epochs, ranks) in enumerate(lines):
        solid = factorized is None or path in factorized
        style = _FACTORIZED if solid else _KEPT
        marker = "o" if len(epochs) <= 2 else None
        color = _COLORS(depth / max(1, len(lines) - 1))
        axes.plot(epochs, ranks, color=color, marker=marker, markersize=3, label=label, **style)
    _draw_axes(axes)
    # Above the line of styles, if there is one.
    has_styles = factorized is not None or switch_epoch is not None
    axes.set_title(title, loc="left", pad=24 if has_styles else None)
    _draw_styles(axes, switch_epoch=switch_epoch, has_kept=factorized is not None)
    _draw_layers(figure, axes, lines)
    png = io.BytesIO()
    canvas.print_png(png)
    with storage_errors(file):
        replace_file(Path(file), png.getvalue())


_Line = tuple[str, str, list[int], list[float]]


def _lines(measurements: Sequence[tuple[int, Mapping[str, float | Sequence[float]]]]) -> list[_Line]:
    """One line for each layer and copy: its path, label, epochs and ranks."""
    lines: dict[str, _Line] = {}
    for epoch, ranks in measurements:
        for path, value in ranks.items():
            values = np.asarray(value, float)
            for index, rank in np.ndenumerate(values):
                label = path + (f"[{', '.join(map(str, index))}]" if index else "")
                _, _, epochs, history = lines.setdefault(label, (path, label, [], []))
                epochs.append(epoch)
                history.append(float(rank))
    return list(lines.values())


def _draw_axes(axes: Any) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel("stable rank")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_styles(axes: Any, *, switch_epoch: int | None, has_kept: bool) -> None:
    """The switch, and what the styles of the lines mean, above the picture where no line is in the way."""
    handles = []
    if has_kept:
        styles = {"factorized": _FACTORIZED, "kept full-rank": _KEPT}
        handles += [Line2D([], [], color="black", label=name, **style) for name, style in styles.items()]
    if switch_epoch is not None:
        handles.append(axes.axvline(switch_epoch, color="crimson", label=f"switch, epoch {switch_epoch}"))
    if handles:
        names = [handle.get_label() for handle in handles]
        # Not by axes.legend(): axes have one legend of their own, and that is the layers'.
        legend = Legend(
            axes, handles, names, ncols=3, fontsize="small", frameon=False,
            loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0, borderaxespad=0.5,
        )  # fmt: skip
        axes.add_artist(legend)


def _draw_layers(figure: Figure, axes: Any, lines: list[_Line]) -> None:
    """A legend of the layers or, where they are many, a colour scale from the first to the last."""
    if len(lines) > _MAX_LEGEND:
        ticks = np.unique(np.linspace(0, len(lines) - 1, 7).round().astype(int))
        scale = ScalarMappable(Normalize(0, len(lines) - 1), _COLORS)
        bar = figure.colorbar(scale, ax=axes, ticks=ticks, pad=0.02)
        bar.ax.set_yticklabels([_short(lines[tick][1]) for tick in ticks], fontsize="small")
        bar.ax.invert_yaxis()
    elif lines:
        handles, labels = axes.get_lines()[: len(lines)], [_short(line[1]) for line in lines]
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        axes.legend(handles, labels, fontsize="small", frameon=False, **place)


def _short(label: str, *, length: int = 32) -> str:
    return label if len(label) <= length else "…" + label[1 - length :]
