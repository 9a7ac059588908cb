"""Pictures of a run, drawn without a display: contact sheets of images, and curves of every training.

Legend: H W pixels of a sheet, C channels; `side` pixels per side of one image.
"""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from cvdd_ray.data.imagesets import ImageSet
from cvdd_ray.stages.arms import CEILING, OURS

MAX_CLASSES, MAX_INDICES = 10, 3
CELL = 128  # pixels per side an image is enlarged to, where a whole factor allows
DPI = 150
KINDS = ("random real", "start", "distilled")

ARM_COLOURS = {  # Okabe-Ito, one colour per row of the table in every picture; without augmentation the same, dashed
    "distilled": "#0072B2",
    "eval_labels": "#56B4E9",
    "start_soft": "#009E73",
    "random_soft": "#E69F00",
    "distilled_plain": "#0072B2",
    "random_plain": "#E69F00",
    "distilled_hard": "#CC79A7",
    "random_hard": "#D55E00",
    "real_hard": "#000000",
}
EXPERT_COLOURS = ("#000000", "#CC79A7", "#999999", "#56B4E9", "#E69F00", "#009E73", "#D55E00")  # with other dashes
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3, "legend.frameon": False, "lines.linewidth": 1.6}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where things are on a contact sheet, in pixels from its upper left corner."""

    side: int
    scale: int
    left: int
    top: int
    gap: int = 4
    group_gap: int = 28

    @property
    def cell(self) -> int:
        return self.side * self.scale

    @property
    def group_width(self) -> int:
        return len(KINDS) * self.cell + (len(KINDS) - 1) * self.gap

    def x(self, column: int, kind: int = 0) -> int:
        return self.left + column * (self.group_width + self.group_gap) + kind * (self.cell + self.gap)

    def y(self, row: int) -> int:
        return self.top + row * (self.cell + self.gap)


def contact_sheet(
    random: ImageSet, start: ImageSet, distilled: ImageSet, voters: Sequence[Sequence[str]], *, title: str
) -> bytes:
    """Return PNG bytes: a row per class, and for the first image indices its random real, starting and distilled image.

    Images are enlarged by a whole factor without smoothing. `voters` gives the lines under the title of each image
    index.  At most 10 classes (sampled evenly) and 3 indices are shown; the title says so when there are more.
    """
    num_classes = len(distilled.classes)
    ipc = distilled.metadata.get("ipc", len(distilled) // num_classes)  # more than these files hold of a large set
    labels = np.unique(np.linspace(0, num_classes - 1, min(num_classes, MAX_CLASSES)).round().astype(int))
    indices = range(min(ipc, MAX_INDICES))
    side = distilled.images_NCHW.shape[-1]
    names = [shortened(distilled.classes[label]) for label in labels]
    with matplotlib.rc_context(STYLE):
        measure = Figure(dpi=DPI)
        FigureCanvasAgg(measure)
        left = 30 + max(_width(measure.text(0, 0, name, parse_math=False)) for name in names)
        lines = max((len(voters[i]) for i in indices), default=0)
        layout = Layout(side, max(1, CELL // side), left, top=148 + 22 * lines)
        width = max(760, layout.x(len(indices)))
        height = layout.y(len(labels)) + 16
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)

        def write(x: float, y: float, text: str, limit: int, **style) -> None:
            written = figure.text(x / width, 1 - y / height, text, parse_math=False, **style)
            while _width(written) > limit and written.get_fontsize() > 4:
                written.set_fontsize(written.get_fontsize() - 0.5)

        cut = [f"{len(labels)} of {num_classes} classes"] if len(labels) < num_classes else []
        cut += [f"{len(indices)} of {ipc} images per class"] if len(indices) < ipc else []
        images_of = "1 image" if ipc == 1 else f"{ipc} images"
        write(14, 14, f"{title}, {images_of} per class", width - 28, va="top", fontsize=12)
        note = f"shown: {', '.join(cut)}" if cut else "all classes and images are shown"
        write(14, 48, note, width - 28, va="top", fontsize=9, color="#444444")
        for column, i in enumerate(indices):
            middle = layout.x(column) + layout.group_width / 2
            limit = layout.group_width + layout.group_gap - 8
            write(middle, 86, f"image index {i}", limit, ha="center", va="top", fontsize=9, weight="bold")
            for line, voter in enumerate(voters[i]):
                write(middle, 111 + 22 * line, voter, limit, ha="center", va="top", fontsize=8)
            for kind, name in enumerate(KINDS):
                x = layout.x(column, kind) + layout.cell / 2
                write(x, layout.top - 8, name, layout.cell, ha="center", va="bottom", fontsize=8)
        for row, name in enumerate(names):
            write(left - 14, layout.y(row) + layout.cell / 2, name, left, ha="right", va="center")
        canvas.draw()
        sheet_HWC = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    for row, label in enumerate(labels):
        for column, i in enumerate(indices):
            for kind, images in enumerate((random, start, distilled)):
                pixels_CSS = images.images_NCHW[i * num_classes + label]
                x, y = layout.x(column, kind), layout.y(row)
                sheet_HWC[y : y + layout.cell, x : x + layout.cell] = enlarged(pixels_CSS, layout.scale)
    buffer = io.BytesIO()
    imsave(buffer, sheet_HWC, format="png", dpi=DPI)
    return buffer.getvalue()


def enlarged(pixels_CSS: np.ndarray, scale: int) -> np.ndarray:
    """Return pixels (H, W, C), every one repeated scale x scale times."""
    return pixels_CSS.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)


def curves_figure(
    training: Mapping[str, Sequence],
    trace: Sequence,
    runs: Sequence[Mapping],
    names: Mapping[str, str],
    *,
    title: str,
    terms: tuple[str, str] = ("cross-entropy", "BN term"),
) -> bytes:
    """Return PNG bytes with the curves of all trainings; what is not there yet is said in its panel.

    `training` has rows (epoch, loss, train accuracy in percent) per expert, `trace` rows (iteration, image index,
    chunk, expert, and two `terms`), `runs` the students' results; `names` says in words what each arm is.
    """
    students = list(dict.fromkeys(run["student"] for run in runs)) or ["student"]
    rows = -(-len(students) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.6 + 3.2 * rows), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=12, parse_math=False)
        upper, lower = figure.subfigures(2, 1, height_ratios=[6.3, 0.6 + 3.2 * rows], hspace=0.04)
        (loss, accuracy), (cross_entropy, bn_term) = upper.subplots(2, 2)
        styles = {
            name: {"color": EXPERT_COLOURS[k % 7], "linestyle": DASHES[k % 5]}
            for k, name in enumerate(dict.fromkeys([*training, *(row[3] for row in trace)]))
        }
        for panel, what, column in ((loss, "loss", 1), (accuracy, "train accuracy in %", 2)):
            _training_panel(panel, training, column, styles)
            panel.set(title=f"pretraining: {what}", xlabel="epoch", ylabel=what)
        for panel, what, column in ((cross_entropy, terms[0], 4), (bn_term, terms[1], 5)):
            _trace_panel(panel, trace, column, styles)
            panel.set(title=f"synthesis: {what}", xlabel="iteration", ylabel="median, range over jobs")
        if trace:
            bn_term.set_yscale("log")
        handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
        upper.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles) or 1), handlelength=2.6,
                     title="experts" if handles else None)  # fmt: skip
        panels = lower.subplots(rows, min(2, len(students)), sharey=True, squeeze=False).ravel()
        for panel, student in zip(panels, students, strict=False):
            _student_panel(panel, [run for run in runs if run["student"] == student])
            panel.set(title=f"{student} trained from scratch", xlabel="epoch", ylabel="test accuracy in %")
            panel.label_outer()
        for panel in panels[len(students) :]:
            panel.set_axis_off()
        arms = [arm for arm in names if any(run["arm"] == arm for run in runs)]
        handles = [Line2D([], [], label=names[arm], **_arm_style(arm)) for arm in arms]
        if handles:
            seeds = max(run["seed"] for run in runs) + 1
            band = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
            lower.legend(handles=handles, loc="outside lower center", ncols=3, title=f"training set ({band})")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _training_panel(panel: Axes, training: Mapping[str, Sequence], column: int, styles: Mapping) -> None:
    for name, rows in training.items():
        if rows:
            epochs, values = [row[0] + 1 for row in rows], [row[column] for row in rows]
            panel.plot(epochs, values, marker="o" if len(rows) == 1 else None, **styles[name])
    whole_epochs(panel, max(map(len, training.values()), default=0))
    if not any(training.values()):
        _say(panel, "no curve: not trained yet,\nor weights were given")


def _trace_panel(panel: Axes, trace: Sequence, column: int, styles: Mapping) -> None:
    """Draw every expert's median over the jobs it voted on, with their range, by iteration."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in trace:
        found.setdefault(row[3], {}).setdefault(row[0], []).append(row[column])
    for name in sorted(found, key=list(styles).index):
        iterations = sorted(found[name])
        values = [found[name][t] for t in iterations]
        ticks = [t + 1 for t in iterations]
        panel.plot(ticks, [statistics.median(v) for v in values], **styles[name])
        panel.fill_between(ticks, [min(v) for v in values], [max(v) for v in values], alpha=0.15, lw=0,
                           color=styles[name]["color"])  # fmt: skip
    if not found:
        _say(panel, "not synthesized yet")


def _student_panel(panel: Axes, runs: Sequence[Mapping]) -> None:
    """Draw every arm's mean test accuracy over the seeds, with its standard deviation, by epoch."""
    for arm in sorted({run["arm"] for run in runs}, key=lambda arm: arm == OURS):
        if arm == CEILING:  # other epochs, of a much larger set
            last = statistics.fmean(run["last"] for run in runs if run["arm"] == arm)
            panel.axhline(last, **{**_arm_style(arm), "marker": None})
            continue
        seeds_RT = np.array([[row[3] for row in run["curve"]] for run in runs if run["arm"] == arm])
        epochs_T = [row[0] + 1 for row in next(run for run in runs if run["arm"] == arm)["curve"]]
        mean_T = seeds_RT.mean(0)
        style = _arm_style(arm)
        panel.plot(epochs_T, mean_T, **style)
        if len(seeds_RT) > 1:
            std_T = seeds_RT.std(0, ddof=1)
            panel.fill_between(epochs_T, mean_T - std_T, mean_T + std_T, alpha=0.15, lw=0, color=style["color"])
    whole_epochs(panel, max((run["curve"][-1][0] + 1 for run in runs if run["arm"] != CEILING), default=0))
    if not runs:
        _say(panel, "not evaluated yet")


def _arm_style(arm: str) -> dict:
    dashes = "--" if arm.endswith("_plain") else ":" if arm == CEILING else "-"
    return {"color": ARM_COLOURS[arm], "marker": None if arm == CEILING else "o", "markersize": 3, "linestyle": dashes,
            "linewidth": 2.4 if arm == OURS else 1.4}  # fmt: skip


def whole_epochs(panel: Axes, epochs: int) -> None:
    """Give the epochs' axis whole numbers, also where there is one epoch alone."""
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if epochs == 1:
        panel.set_xlim(0.5, 1.5)


def _say(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#666666")
    panel.set(xticks=[], yticks=[])


def shortened(name: str, limit: int = 24) -> str:
    """Return the name with an ellipsis where it is longer than `limit` letters."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _width(text: Text) -> int:
    return int(np.ceil(text.get_window_extent().width))
