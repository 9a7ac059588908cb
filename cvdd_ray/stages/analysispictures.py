"""Pictures of analyses, drawn without a display.

Legend: K classes, G batches, L layers, T epochs, R seeds; H W pixels, C channels.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cvdd_ray.data.imagesets import ImageSet
from cvdd_ray.stages.paper import PAPER
from cvdd_ray.stages.pictures import DPI, STYLE, enlarged, shortened, whole_epochs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#5D3A9B")
MARKERS = "osD^vP*Xh"
MAX_CLASSES, MAX_COLUMNS, CELL = 10, 10, 64


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def class_figure(values: Mapping[str, np.ndarray], *, title: str, label: str) -> bytes:
    """Return PNG bytes: a line per set of images over its K classes, each set's classes in rising order of the first set."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(7, 4.2, title)
        panel = figure.subplots()
        order = np.argsort(next(iter(values.values())))
        for k, (name, found) in enumerate(values.items()):
            panel.plot(np.arange(1, len(order) + 1), found[order], color=COLOURS[k % 9], marker=MARKERS[k % 9], markersize=3,
                       label=f"{name} (mean {found.mean():.3f})")  # fmt: skip
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set(xlabel="class, in rising order of the first set", ylabel=label)
        figure.legend(loc="outside lower center", ncols=2)
        return _png(figure)


def layer_figure(gaps: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str, batch: int) -> bytes:
    """Return PNG bytes: gaps of means and of variances (two arrays GL per set of images) by BatchNorm layer, mean and range over
    the batches."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 4.4, title)
        panels = figure.subplots(1, 2)
        for panel, what, which in zip(panels, ("means", "variances"), (0, 1), strict=True):
            for k, (name, pair) in enumerate(gaps.items()):
                gap_GL, layers = pair[which], np.arange(pair[which].shape[1])
                panel.plot(layers, gap_GL.mean(0), color=COLOURS[k], marker=MARKERS[k], markersize=3,
                           label=name if which == 0 else None)  # fmt: skip
                panel.fill_between(layers, gap_GL.min(0), gap_GL.max(0), color=COLOURS[k], alpha=0.15, lw=0)
            panel.set_yscale("log")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set(title=f"difference of {what}", xlabel="BatchNorm layer", ylabel="mean over channels")
        figure.legend(loc="outside lower center", ncols=3, title=f"batches of {batch} images: mean and range")
        return _png(figure)


def fit_figure(curves: Mapping[str, Mapping[str, Sequence]], *, title: str) -> bytes:
    """Return PNG bytes: train agreement and test accuracy by epoch, mean and standard deviation over seeds."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 4.8, title)
        panels = figure.subplots(1, 2, sharey=True)
        for panel, which, what in zip(panels, ("train", "test"), ("train agreement", "test accuracy"), strict=True):
            for k, (name, curve) in enumerate(curves.items()):
                values_RT, style = np.array(curve[which]), {"color": COLOURS[k % 9]}
                mean_T = values_RT.mean(0)
                panel.plot(curve["epochs"], mean_T, marker=MARKERS[k % 9], markersize=3,
                           label=name if which == "train" else None, **style)  # fmt: skip
                if len(values_RT) > 1:
                    std_T = values_RT.std(0, ddof=1)
                    panel.fill_between(curve["epochs"], mean_T - std_T, mean_T + std_T, alpha=0.15, lw=0, **style)
            panel.set(title=what, xlabel="epoch", ylabel="%" if which == "train" else "")
            whole_epochs(panel, max(curve["epochs"][-1] for curve in curves.values()))
        seeds = max(len(curve["test"]) for curve in curves.values())
        band = f"mean and standard deviation over {seeds} students" if seeds > 1 else "one student each"
        figure.legend(loc="outside lower center", ncols=2, title=band)
        return _png(figure)


def parameter_figure(
    points: Mapping[str, tuple[float, float, float | None]],
    theirs: Mapping[str, tuple[float, float]],
    *,
    title: str,
    label: str,
) -> bytes:
    """Return PNG bytes: accuracy in percent (mean, std) against parameters in millions, with the paper's points hollow."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(7.5, 4.8, title)
        panel = figure.subplots()
        for k, (name, (millions, mean, std)) in enumerate(sorted(points.items(), key=lambda item: item[1][0])):
            style = {"color": COLOURS[k % 9], "marker": MARKERS[(k + k // 9) % 9]}
            panel.errorbar(millions, mean, yerr=std, capsize=3, linestyle="", label=name, **style)
            if name in theirs:
                panel.plot(*theirs[name], linestyle="", markerfacecolor="none", **style)
        sizes = [point[0] for point in (*points.values(), *theirs.values())]
        ticks = np.geomspace(min(sizes), max(sizes), 5 if max(sizes) > min(sizes) else 1)
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set(xlabel="parameters in millions", ylabel=label)
        note = "filled: ours, mean and standard deviation" + (f"; hollow: {PAPER}" if theirs else "")
        figure.legend(loc="outside lower center", ncols=3, title=note)
        return _png(figure)


def bars_figure(values: Sequence[tuple[str, float, float | None, float | None]], *, title: str, label: str) -> bytes:
    """Return PNG bytes: a bar per (name, mean, std, the paper's number or None), the paper's numbers as hollow diamonds."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(7.5, 1.7 + 0.34 * len(values), title)
        panel = figure.subplots()
        names, means = [shortened(row[0], 60) for row in values], [row[1] for row in values]
        at = np.arange(len(values))
        panel.barh(
            at, means, xerr=[row[2] or 0 for row in values], color=COLOURS[0], capsize=3, height=0.6, label="ours"
        )
        if any(row[3] is not None for row in values):
            panel.plot([row[3] if row[3] is not None else np.nan for row in values], at, linestyle="", marker="D",
                       markerfacecolor="none", color=COLOURS[1], label=PAPER)  # fmt: skip
        panel.set_yticks(at, names, parse_math=False)
        panel.invert_yaxis()
        panel.grid(visible=False, axis="y")
        panel.set(xlabel=label)
        figure.legend(loc="outside lower center", ncols=2)
        return _png(figure)


def image_grid(sets: Mapping[str, ImageSet], *, title: str) -> bytes:
    """Return PNG bytes: up to 10 classes (sampled evenly) by 10 images of each set, sets side by side, pixels enlarged by a
    whole factor without smoothing. The title says how many are shown."""
    first = next(iter(sets.values()))
    labels = np.unique(np.linspace(0, len(first.classes) - 1, min(len(first.classes), MAX_CLASSES)).round().astype(int))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        counts = [min(len(images) // len(images.classes), MAX_COLUMNS) for images in sets.values()]
        per_class = [len(images) // len(images.classes) for images in sets.values()]
        width = 1.6 + sum(0.62 * max(count, 3) + 0.3 for count in counts)
        numbers = dict.fromkeys(f"{count} of {all_}" for count, all_ in zip(counts, per_class, strict=True))
        shown = f"{len(labels)} of {len(first.classes)} classes, {' and '.join(numbers)} images of each"
        figure = _figure(width, 1.3 + 0.62 * len(labels), f"{title}\n{shown}")
        panels = figure.subplots(1, len(sets), squeeze=False, width_ratios=[max(count, 3) for count in counts])[0]
        for position, (panel, (name, images), count) in enumerate(zip(panels, sets.items(), counts, strict=True)):
            _grid(panel, images, labels, count)
            panel.set_title(name if len(sets) > 1 else "", parse_math=False)
            if position == 0:
                names = [shortened(first.classes[label], 16) for label in labels]
                side = images.images_NCHW.shape[-1] * max(1, CELL // images.images_NCHW.shape[-1])
                panel.set_yticks([(k + 0.5) * side for k in range(len(labels))], names, parse_math=False)
        return _png(figure)


def _grid(panel: Axes, images: ImageSet, labels: np.ndarray, count: int) -> None:
    """Show `count` images of each of these classes as one picture, a row per class."""
    num_classes, scale = len(images.classes), max(1, CELL // images.images_NCHW.shape[-1])
    rows = [
        np.concatenate([enlarged(images.images_NCHW[i * num_classes + label], scale) for i in range(count)], 1)
        for label in labels
    ]
    panel.imshow(np.concatenate(rows), interpolation="none")
    panel.set(xticks=[], yticks=[])
    for side in panel.spines.values():
        side.set_visible(False)
