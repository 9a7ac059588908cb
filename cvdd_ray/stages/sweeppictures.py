"""Pictures of a sweep, drawn without a display: accuracy against every setting, parallel coordinates, learning curves.

Accuracy is hold-out accuracy in percent after a trial's last epoch; trials that were never measured are not drawn.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator

from cvdd_ray.space import Domain, label
from cvdd_ray.stages.pictures import DPI, STYLE, shortened, whole_epochs
from cvdd_ray.stages.sweepsummary import SweepSummary, Trial, winner_of

LOOK = {**STYLE, "text.parse_math": False}  # texts come from users
ACCURACY, NOTHING = "hold-out accuracy in %", "no trial has finished"
CUT, FINISHED, WINNER = "stopped early or failed", "finished trial", "winner"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
SHADES = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 256)))  # its yellow is lost on white
DOTS = {
    CUT: {"fmt": "o", "color": GREY, "markerfacecolor": "none", "markersize": 3.5, "alpha": 0.6},
    FINISHED: {"fmt": "o", "color": BLUE, "markeredgecolor": "white", "markersize": 5},
    WINNER: {"fmt": "*", "color": ORANGE, "markeredgecolor": "white", "markersize": 13, "zorder": 5},
}
LINES = {  # in the order of drawing
    CUT: {"linewidth": 0.7, "alpha": 0.5, "zorder": 2, "marker": "x", "markersize": 4, "markevery": [-1]},
    FINISHED: {"linewidth": 1.3, "alpha": 0.85, "zorder": 3},
    WINNER: {"linewidth": 2.8, "zorder": 3.5, "path_effects": [withStroke(linewidth=4, foreground="#333333")]},
}
BOX = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5}  # texts on lines
DODGE = (0, -1, 1, -2, 2)  # trials that share a listed value stand side by side
LETTER = 0.075  # inches, about, that a letter takes
MANY = 10  # bands, or colours of values, that can be told apart
Roles = Sequence[tuple[Trial, str]]  # trials that have a curve and what they are, in the order of drawing


@dataclass(frozen=True)
class Scale:
    """Where values lie on an axis: numbers between low and high, named ones where their names say."""

    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    listed: tuple = ()
    names: Mapping[Any, float] | None = None

    def place(self, value: Any) -> float:
        """Return how far along the axis a value is, 0 at its lower end and 1 at its upper; nan where it has no place."""
        plain = _plain(value)
        if self.names is not None:
            return self.names.get(plain, math.nan)
        if not isinstance(plain, float) or (self.is_log and plain <= 0):
            return math.nan
        x, low, high = (math.log(v) if self.is_log else v for v in (plain, self.low, self.high))
        return (x - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places with texts: the listed values (not all have a text when they are many), else round numbers."""
        locator = MaxNLocator(5, integer=self.high - self.low >= 4)
        if self.is_log and self.high >= 5 * self.low:
            locator = LogLocator(subs=(1,) if self.high >= 100 * self.low else (1, 2, 5))
        values = self.listed or locator.tick_values(self.low, self.high)
        ticks = [(self.place(v), "" if k % (1 + len(self.listed) // 21) else _text(v)) for k, v in enumerate(values)]
        return [(place, text) for place, text in ticks if -1e-9 <= place <= 1 + 1e-9]


@matplotlib.rc_context(LOOK)
def values_figure(summary: SweepSummary, *, title: str) -> bytes:
    """Return PNG bytes: hold-out accuracy (percent) of all trials against every swept setting, a panel each.

    Bars are the standard deviation over a trial's students. Listed values have the mean and standard deviation of all
    finished trials that share them. A dashed line is at the value of the unchanged run."""
    space, trials = summary.config.sweep.space, _measured(summary)
    longest = max(len(_text(p)) for domain in space.values() for p in (*domain.points(), ""))
    columns = 2 if len(space) in (2, 4) else min(3, len(space))
    rows, width = -(-len(space) // columns), 6.5 if columns == 1 else 3.5
    figure = Figure((columns * width, 1.1 + rows * (2.6 + 0.045 * longest)), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(space) :]:
        panel.remove()
    for k, (key, panel) in enumerate(zip(space, panels, strict=False)):
        _draw_setting(panel, key, summary, trials, width - 0.8)
        panel.set_ylabel("" if k % columns else ACCURACY)
    return _png(figure, title, trials)


def _draw_setting(panel: Axes, key: str, summary: SweepSummary, trials: Roles, inches: float) -> None:
    domain, default = summary.config.sweep.space[key], _plain(summary.default.get(key))
    scale = _scale(domain, [trial.point.get(key) for trial, _ in trials], default)
    places, texts = zip(*scale.ticks(), strict=True)
    is_tight = min(np.diff(sorted(places)), default=1) * inches < LETTER * (max(map(len, texts)) + 1)
    turn = {"rotation": 40 if len(texts) <= MANY else 90, "ha": "right", "rotation_mode": "anchor"}
    panel.set_xticks(places, texts, **(turn if is_tight else {}))
    is_on = 0 <= scale.place(default) <= 1
    about = "" if default is None else f"\ndefault: {_text(default)}{'' if is_on else ' (not shown)'}"
    panel.set_xlabel(f"{key}{about}")
    panel.set_xlim(-0.07, 1.07)
    shared: dict[float, list[float]] = {}
    dots: dict[str, list[tuple[float, float, float]]] = {}
    for trial, role in reversed(trials):  # the winner first: it stays where it is
        x, (_, accuracy, std) = scale.place(trial.point.get(key)), trial.curve[-1]
        if domain.values and role != CUT:
            same = shared.setdefault(x, [])
            x += min(0.02, 0.12 / len(texts)) * DODGE[len(same) % len(DODGE)]
            same.append(accuracy)
        dots.setdefault(role, []).append((x, accuracy, std if std and role != CUT else math.nan))
    for role, rows in dots.items():
        xs, ys, stds = zip(*rows, strict=True)
        bars = {"yerr": stds, "elinewidth": 1} if any(std > 0 for std in stds) else {}
        about = " (bar: std over its students)" if bars and (role == FINISHED or FINISHED not in dots) else ""
        panel.errorbar(xs, ys, markeredgewidth=0.7, label=f"{role}{about}", **bars, **DOTS[role])
    if shared:
        xs, groups = zip(*sorted(shared.items()), strict=True)
        look = {"fmt": "_" if scale.names else "-", "lw": 1.2, "ms": 24, "color": "#333333", "zorder": 1.5}
        about = " (shaded: std over trials)" if max(map(len, groups)) > 1 else ""
        if about:
            look |= {"yerr": [np.std(group, ddof=1) if len(group) > 1 else math.nan for group in groups]}
            look |= {"ecolor": (BLUE, 0.2), "elinewidth": 16, "zorder": 4}
        panel.errorbar(xs, [np.mean(group) for group in groups], label=f"mean of a value{about}", **look)
    if is_on:
        panel.axvline(scale.place(default), color=GREEN, ls="--", lw=1.2, zorder=1, label="default: the unchanged run")


@matplotlib.rc_context(LOOK)
def parallel_figure(summary: SweepSummary, *, title: str) -> bytes:
    """Return PNG bytes: parallel coordinates, an axis per swept setting and hold-out accuracy (percent) as the last, a
    line per trial, coloured by its accuracy; those of trials that were stopped early are thin."""
    space, trials = summary.config.sweep.space, _measured(summary)
    scales = {key: _scale(domain, [trial.point.get(key) for trial, _ in trials]) for key, domain in space.items()}
    reached = [trial.accuracy for trial, _ in trials] or [0.0, 100.0]
    scales["hold-out.accuracy in %"] = Scale(min(reached) - 0.1, max(reached) + 0.1)
    last, shades = len(space), _shades(trials)
    figure = Figure((max(6.5, 1.6 * (last + 1)), 4.8), layout="constrained")
    panel = figure.subplots(subplot_kw={"xlim": (-0.45, last + 0.35), "ylim": (-0.01, 1.01)})
    panel.set_axis_off()
    for k, (key, scale) in enumerate(scales.items()):
        panel.text(k, 1.04, key.replace(".", "\n", 1), ha="center")
        panel.vlines(k, 0, 1, color="#333333", linewidth=1, zorder=4)
        x, side = (k + 0.04, "left") if k == last else (k - 0.03, "right")
        for place, text in scale.ticks():
            panel.text(x, place, text, ha=side, va="center", fontsize=8, zorder=6, bbox=BOX)
            panel.hlines(place, k - 0.015, k + 0.015, color="#333333", linewidth=1, zorder=4)
    for trial, role in trials:
        values = [*(trial.point.get(key) for key in space), trial.accuracy]
        places = [scale.place(value) for scale, value in zip(scales.values(), values, strict=True)]
        panel.plot(places, color=shades.to_rgba(trial.accuracy), label=role, gid=trial.name, **LINES[role])
    return _png(figure, title, trials)


@matplotlib.rc_context(LOOK)
def learning_figure(summary: SweepSummary, *, title: str) -> bytes:
    """Return PNG bytes: hold-out accuracy (percent) of every trial by epoch.

    A colour is a value when one setting with at most 10 listed values was swept, else the accuracy after the last epoch.
    With at most 10 trials, bands are the standard deviation over a trial's students."""
    space, trials = summary.config.sweep.space, _measured(summary)
    key, points = next((key, domain.points()) for key, domain in space.items())
    points, shades = points if len(space) == 1 and len(points) <= MANY else (), _shades(trials)
    is_text = any(isinstance(p, str) for p in points)
    palette = matplotlib.colormaps["tab10"](range(len(points))) if is_text else SHADES(np.linspace(0, 1, len(points)))
    colours = dict(zip(map(_plain, points), palette, strict=True))
    has_bands = len(trials) <= MANY and any(row[2] for trial, _ in trials for row in trial.curve)
    figure = Figure((7.5, 4.8), layout="constrained")
    about = " (band: std over students)" if has_bands else ""
    panel = figure.subplots(subplot_kw={"xlabel": "epoch", "ylabel": f"{ACCURACY}{about}"})
    for p in points:
        panel.plot(math.nan, math.nan, color=colours[_plain(p)], label=f"{key}={_text(p)}")
    for trial, role in trials:
        color = colours.get(_plain(trial.point.get(key)), GREY) if points else shades.to_rgba(trial.accuracy)
        epochs, means, stds = (np.array(column) for column in zip(*trial.curve, strict=True))
        look = {"marker": "o" if len(epochs) == 1 else None, **LINES[role]}
        text = None if points and role == FINISHED else role
        panel.plot(epochs, means, color=color, label=text, gid=trial.name, **look)
        if has_bands:
            panel.fill_between(epochs, means - stds, means + stds, color=color, alpha=0.15, linewidth=0)
    whole_epochs(panel, max((trial.curve[-1][0] for trial, _ in trials), default=0))
    if not points and any(role != CUT for _, role in trials):
        figure.colorbar(shades, ax=panel, extend="min", aspect=30, pad=0.02, label="accuracy after the last epoch in %")
    return _png(figure, title, trials)


def _measured(summary: SweepSummary) -> Roles:
    trials = [trial for trial in summary.trials if trial.curve]
    winner = winner_of(trials)
    roles = [WINNER if t is winner else FINISHED if t.state == "finished" else CUT for t in trials]
    return sorted(zip(trials, roles, strict=True), key=lambda pair: (list(LINES).index(pair[1]), pair[0].accuracy))


def _scale(domain: Domain, values: Sequence[Any], default: Any = None) -> Scale:
    """Return the axis of a setting: its whole domain, all values of trials, and the default unless it is far away;
    numbers that it would crowd at one end lie side by side like texts."""
    points = domain.points()
    if not any(isinstance(p, str) for p in points):
        points = tuple(sorted(points))
        ends = points or (domain.argument[0], domain.argument[1] - ("randint" in domain.kind))
        is_log = domain.is_log or 0 < 8 * min(ends) <= max(ends) * bool(points)
        found = [v for v in map(_plain, (*ends, *values)) if isinstance(v, float)]
        room = (abs(found[0]) / 2 or 1) * (min(found) == max(found))
        scale = Scale(min(found) - room, max(found) + room, is_log, points)
        if -1 <= scale.place(default) <= 2:
            scale = replace(scale, low=min(scale.low, default), high=max(scale.high, default))
        if not points or min(np.diff([scale.place(p) for p in points]), default=1) * len(points) > 0.25:
            return scale
    return Scale(listed=points, names={_plain(p): (k + 0.5) / len(points) for k, p in enumerate(points)})


def _plain(value: Any) -> Any:
    """Return a number, also one written as text (as results with other texts beside it are), as float, else the value."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else shortened(label(value), 26)


def _shades(trials: Roles) -> ScalarMappable:
    found = [trial.accuracy for trial, role in trials if role != CUT] or [100.0]
    return ScalarMappable(Normalize(min(found) - 0.01, max(found) + 0.01), SHADES)


def _png(figure: Figure, title: str, trials: Roles) -> bytes:
    """Return the figure as PNG, with its title, a legend below, and the remark that no trial has finished."""
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        handles |= {text: handle for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        if all(role == CUT for _, role in trials):
            panel.text(0.5, 0.6, NOTHING, transform=panel.transAxes, ha="center", zorder=7, bbox=BOX)
        if not trials:
            panel.set_yticks([])
    columns = figure.get_figwidth() / (0.85 * LETTER * max(map(len, handles), default=1) + 0.6)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=max(1, int(columns)))
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=12)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
