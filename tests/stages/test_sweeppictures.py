"""Pictures of sweeps made up by hand: what is drawn where, and that no kind of sweep stops them."""

import io
import statistics

import matplotlib
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from cvdd_ray.recipes import validate
from cvdd_ray.stages import sweeppictures
from cvdd_ray.stages.pictures import DPI
from cvdd_ray.stages.sweeppictures import (
    CUT,
    DOTS,
    FINISHED,
    NOTHING,
    WINNER,
    learning_figure,
    parallel_figure,
    values_figure,
)
from cvdd_ray.stages.sweepsummary import SweepSummary, Trial, default_point
from cvdd_ray.sweepconfig import SweepConfig

FIGURES = (values_figure, parallel_figure, learning_figure)
TEMPERATURES = {"evaluate.temperature": {"grid": [1, 4, 10, 20]}}
WEIGHTINGS = {"voting.weighting": {"choice": ["prior", "equal", "random"]}, "evaluate.lr": {"loguniform": [1e-4, 1e-2]}}

pytestmark = pytest.mark.filterwarnings("error")


def trial(name: str, point: dict, *accuracies: float, std: float = 0.0, state: str = "finished") -> Trial:
    rows = tuple((epoch + 1, accuracy, std) for epoch, accuracy in enumerate(accuracies))
    return Trial(name, point, state, 8, rows)


def summary_of(space: dict, *trials: Trial, **default) -> SweepSummary:
    """A sweep of the bundled digits; trials are in the order given."""
    is_grid = all("grid" in domain for domain in space.values())
    search = {"search": "grid"} if is_grid else {"search": "random", "num_trials": 4}
    c = validate({"ipc": [2], "sweep": {"space": space, **search}}, SweepConfig)
    return SweepSummary("sweeps/x", c, default or default_point(c), trials, (), ())


def temperatures(*accuracies: float, std: float = 0.0) -> SweepSummary:
    """One finished trial of two epochs per temperature."""
    points = [{"evaluate.temperature": value} for value in (1.0, 4.0, 10.0, 20.0)]
    pairs = enumerate(zip(points, accuracies, strict=False))
    return summary_of(TEMPERATURES, *(trial(f"t{k}", point, 10, a, std=std) for k, (point, a) in pairs))


@pytest.fixture
def figure_of(monkeypatch):
    """Draw a picture, check that it is a whole PNG of the right size, and return the matplotlib Figure behind it."""
    figures = []
    png = sweeppictures._png

    def keeping(figure, title, trials):
        figures.append(figure)
        return png(figure, title, trials)

    monkeypatch.setattr(sweeppictures, "_png", keeping)

    def draw(function, summary: SweepSummary, title: str = "digits"):
        image = Image.open(io.BytesIO(function(summary, title=title)))
        image.load()
        assert image.format == "PNG"
        assert image.size == tuple(int(inches * DPI) for inches in figures[-1].get_size_inches())
        return figures[-1]

    return draw


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(panel) -> dict[str, float]:
    return {text.get_text(): text.get_position()[0] for text in panel.get_xticklabels()}


def dots(panel, role: str) -> list[tuple[float, float]]:
    """Return the markers of a kind, the bars at them left out."""
    found = [c for c in panel.containers if c.get_label().startswith(role)]
    return [tuple(map(float, xy)) for c in found for xy in c.lines[0].get_xydata()]


def bars(panel, role: str) -> list[tuple[float, float]]:
    """Return (lower end, upper end) of the error bars of a kind, those of nothing left out."""
    found = [c for c in panel.containers if c.get_label().startswith(role) and c.has_yerr]
    segments = [segment for c in found for segment in c.lines[2][0].get_segments() if len(segment)]
    return [(low, high) for (_, low), (_, high) in segments]


def lines(panel) -> dict[str, object]:
    """Return the lines of trials by name."""
    return {line.get_gid(): line for line in panel.lines if line.get_gid()}


TEN_KEYS = {
    "evaluate.lr": {"loguniform": [1e-5, 1e-1]},
    "evaluate.temperature": {"uniform": [1, 30]},
    "evaluate.weight_decay": {"choice": [0, 1e-4, 1e-3, 1e-2]},
    "evaluate.eta": {"quniform": [1, 3, 0.5]},
    "evaluate.schedule": {"choice": ["cosine", "linear"]},
    "relabel.batchnorm": {"choice": ["batch", "eval"]},
    "relabel.weighting": {"choice": ["prior", "equal"]},
    "synthesize.first_bn_multiplier": {"choice": [1, 2, 5, 10, 20, 50, 100]},
    "synthesize.iterations": {"lograndint": [500, 8000]},
    "initialize.num_crops": {"randint": [1, 9]},
}
TEN = {
    "evaluate.lr": 2e-3, "evaluate.temperature": 3.5, "evaluate.weight_decay": 0.0, "evaluate.eta": 1.5,
    "evaluate.schedule": "linear", "relabel.batchnorm": "eval", "relabel.weighting": "prior",
    "synthesize.first_bn_multiplier": 5.0, "synthesize.iterations": 900.0, "initialize.num_crops": 3.0,
}  # fmt: skip
AT_4, AT_20 = {"evaluate.temperature": 4.0}, {"evaluate.temperature": 20.0}
EQUAL = {"voting.weighting": "equal", "evaluate.lr": 2e-3}
TEACHERS = {"relabel.teachers": {"grid": [["resnet18"], ["resnet18", "resnet50"], None]}}
ONE_VALUE = [trial(f"t{k}", {"evaluate.lr": 0.1}, k) for k in range(3)]
MANY = [trial(f"t{k:03}", TEN | {"evaluate.lr": 1e-5 * 1.04**k}, 10, k / 4, std=k % 3) for k in range(200)]
CASES = {  # name: (summary, trials that are drawn, whether one of them has finished)
    "one trial": (summary_of(TEMPERATURES, trial("a", AT_4, 10, 20)), 1, True),
    "one trial of a range": (summary_of(WEIGHTINGS, trial("a", EQUAL, 9)), 1, True),
    "a failed trial": (summary_of(TEMPERATURES, trial("a", AT_4, 30, 31), trial("b", AT_20, state="failed")), 1, True),
    "failed in between": (summary_of(TEMPERATURES, trial("a", AT_4, 3), trial("b", AT_20, 9, state="failed")), 2, True),
    "all failed": (summary_of(TEMPERATURES, trial("a", AT_4, state="failed")), 0, False),
    "all stopped": (summary_of(TEMPERATURES, trial("a", AT_4, 5, 9, state="stopped")), 1, False),
    "all stopped, two keys": (summary_of(WEIGHTINGS, trial("a", EQUAL, 9, state="stopped")), 1, False),
    "no trials": (summary_of(WEIGHTINGS), 0, False),
    "one epoch": (summary_of(TEMPERATURES, trial("a", AT_4, 30), trial("b", AT_20, 31)), 2, True),
    "one value": (summary_of({"evaluate.lr": {"grid": [0.1]}}, *ONE_VALUE), 3, True),
    "one accuracy": (summary_of(TEMPERATURES, trial("a", AT_4, 0, 0), trial("b", AT_20, 0, 0)), 2, True),
    "texts and none": (summary_of(TEACHERS, trial("a", {"relabel.teachers": "null"}, 1, 2)), 1, True),
    "ten keys": (summary_of(TEN_KEYS, trial("a", TEN, 10, 11, std=1.0)), 1, True),
    "200 trials": (summary_of(TEN_KEYS, *MANY), 200, True),
}


@pytest.mark.parametrize("function", FIGURES)
@pytest.mark.parametrize("case", CASES)
def test_every_sweep_can_be_drawn(case, function, figure_of):
    summary, drawn, has_finished = CASES[case]
    figure = figure_of(function, summary)
    panels = figure.axes[: len(summary.config.sweep.space)] if function is values_figure else figure.axes[:1]
    for panel in panels:
        assert (NOTHING in [text.get_text() for text in panel.texts]) is not has_finished
        count = sum(len(dots(panel, role)) for role in DOTS) if function is values_figure else len(lines(panel))
        assert count == drawn
    assert (len(figure.axes[0].get_yticks()) == 0) is (drawn == 0)
    assert any(text.startswith(WINNER) for text in legend(figure)) is has_finished
    assert (CUT in legend(figure)) is (drawn > 0 and any(t.curve and t.state != "finished" for t in summary.trials))


@pytest.mark.parametrize("function", FIGURES)
def test_texts_of_users_are_not_mathematics(function, figure_of):
    key = "committee.weights"
    domain = {"grid": [{"resnet18": "$_^$"}, {"resnet18": "$b^$"}]}
    summary = summary_of({key: domain}, trial("a", {key: "resnet18=$b^$"}, 1, 2), **{key: "$c^$"})
    title = "two $signs^$ and more words than a figure of this width can take in a single line, as a path may have"
    assert figure_of(function, summary, title).get_suptitle().replace("\n", " ") == title


@pytest.mark.parametrize("function", FIGURES)
def test_pictures_leave_no_settings_behind(function):
    before = dict(matplotlib.rcParams)
    function(temperatures(1, 2, 3, 4), title="x")
    assert dict(matplotlib.rcParams) == before


# --- accuracy against every setting


def test_values_have_a_panel_per_setting_in_three_columns(figure_of):
    figure = figure_of(values_figure, CASES["ten keys"][0])
    assert [panel.get_xlabel().split("\n")[0] for panel in figure.axes] == list(TEN_KEYS)
    assert {panel.get_subplotspec().get_geometry()[:2] for panel in figure.axes} == {(4, 3)}
    assert [k for k, panel in enumerate(figure.axes) if panel.get_ylabel()] == [0, 3, 6, 9]
    assert all(figure.axes[0].get_shared_y_axes().joined(figure.axes[0], panel) for panel in figure.axes)
    assert len(legend(figure)) == len(set(legend(figure)))


def test_values_are_drawn_where_they_are_with_the_std_over_students(figure_of):
    summary = temperatures(50.0, 60.0, 65.0, 55.0, std=1.5)
    panel = figure_of(values_figure, summary).axes[0]
    at = ticks(panel)
    assert sorted(dots(panel, FINISHED)) == [(at["1"], 50.0), (at["4"], 60.0), (at["20"], 55.0)]
    assert dots(panel, WINNER) == [(at["10"], 65.0)]
    assert sorted(bars(panel, FINISHED)) == [(48.5, 51.5), (53.5, 56.5), (58.5, 61.5)]
    assert bars(panel, WINNER) == [(63.5, 66.5)]


def test_values_of_single_students_have_no_bars(figure_of):
    figure = figure_of(values_figure, temperatures(50.0, 60.0, 65.0, 55.0))
    assert bars(figure.axes[0], FINISHED) == bars(figure.axes[0], WINNER) == []
    assert FINISHED in legend(figure)


def test_bars_are_explained_once(figure_of):
    bar = "(bar: std over its students)"
    assert [text for text in legend(figure_of(values_figure, temperatures(1, 2, std=1.0))) if bar in text] == [
        f"{FINISHED} {bar}"
    ]
    assert [text for text in legend(figure_of(values_figure, temperatures(1, std=1.0))) if bar in text] == [
        f"{WINNER} {bar}"
    ]


@pytest.mark.parametrize("function", FIGURES)
def test_the_winner_has_finished(function, figure_of):
    better = trial("b", AT_20, 10, 90, std=1.0, state="stopped")
    figure = figure_of(function, summary_of(TEMPERATURES, trial("a", AT_4, 10, 30), better))
    panel = figure.axes[0]
    if function is values_figure:
        assert dots(panel, WINNER) == [(ticks(panel)["4"], 30.0)]
        assert dots(panel, CUT) == [(ticks(panel)["20"], 90.0)]
        hollow = next(c for c in panel.containers if c.get_label() == CUT)
        assert hollow.lines[0].get_markerfacecolor() == "none"
        assert bars(panel, CUT) == []
    else:
        assert lines(panel)["a"].get_linewidth() > 2 > 1 > lines(panel)["b"].get_linewidth()
        assert lines(panel)["a"].get_zorder() > lines(panel)["b"].get_zorder()


@pytest.mark.parametrize("values", [[1, 4, 10], [0.5, 0.75, 1.0]])
def test_values_that_are_shared_have_mean_and_std_over_trials(values, figure_of):
    key = "evaluate.temperature"
    accuracies = {values[0]: [50.0, 53.0, 58.0], values[1]: [40.0], values[2]: [45.0, 48.0]}
    trials = [trial(f"t{a}", {key: float(v)}, a) for v, group in accuracies.items() for a in group]
    stopped = trial("s", {key: float(values[0])}, 1.0, state="stopped")
    figure = figure_of(values_figure, summary_of({key: {"grid": values}}, *trials, stopped))
    panel = figure.axes[0]
    at = [ticks(panel)[f"{v:g}"] for v in values]
    means = [statistics.mean(group) for group in accuracies.values()]
    assert [x for x, _ in dots(panel, "mean")] == at
    assert [mean for _, mean in dots(panel, "mean")] == pytest.approx(means)
    stds = [statistics.stdev(accuracies[v]) for v in (values[0], values[2])]
    expected = [end for m, s in zip((means[0], means[2]), stds, strict=True) for end in (m - s, m + s)]
    assert [end for bar in bars(panel, "mean") for end in bar] == pytest.approx(expected)
    assert "mean of a value (shaded: std over trials)" in legend(figure)
    assert dots(panel, WINNER) == [(at[0], 58.0)]
    near = [x for x, a in dots(panel, FINISHED) if a in accuracies[values[0]]]
    assert len(set(near)) == 2  # side by side, so that bars can be told apart
    assert near == pytest.approx([at[0]] * 2, abs=0.05)


def test_values_of_ranges_have_no_means(figure_of):
    figure = figure_of(values_figure, summary_of({"evaluate.lr": {"loguniform": [1e-4, 1e-2]}}, *(
        trial(f"t{k}", {"evaluate.lr": 1e-3}, 20 + k) for k in range(2)
    )))  # fmt: skip
    assert dots(figure.axes[0], "mean") == []
    assert [text for text in legend(figure) if "mean" in text] == []


@pytest.mark.parametrize(
    ("domain", "at", "is_log"),
    [
        ({"grid": [1, 10, 100]}, (1, 10, 100), True),
        ({"grid": [1, 2, 8]}, (1, 2, 4), True),
        ({"grid": [10, 20, 70]}, (20, 40, 60), False),
        ({"choice": [0, 4, 10]}, (2, 4, 6), False),
        ({"loguniform": [1e-4, 1e-2]}, (1e-4, 1e-3, 1e-2), True),
        ({"lograndint": [2, 40]}, (3, 6, 12), True),
        ({"uniform": [1, 100]}, (20, 40, 60), False),
        ({"randint": [1, 100]}, (20, 40, 60), False),
        ({"quniform": [0, 100, 10]}, (20, 40, 60), False),
    ],
)
def test_axes_are_logarithmic_where_values_are(domain, at, is_log, figure_of):
    key = "evaluate.temperature" if "randint" not in next(iter(domain)) else "synthesize.iterations"
    key = "evaluate.weight_decay" if next(iter(domain.values()))[0] == 0 else key
    assert (at[1] / at[0] == pytest.approx(at[2] / at[1])) is is_log, "the three values are even on such an axis"
    summary = summary_of({key: domain}, *(trial(f"t{value}", {key: float(value)}, 9.0) for value in at), **{key: at[1]})
    panel = figure_of(values_figure, summary).axes[0]
    low, middle, high = sorted(x for x, _ in dots(panel, FINISHED) + dots(panel, WINNER))
    assert middle - low == pytest.approx(high - middle)
    panel = figure_of(parallel_figure, summary).axes[0]
    low, middle, high = sorted(line.get_ydata()[0] for line in lines(panel).values())
    assert middle - low == pytest.approx(high - middle)
    assert high - low > 0.1


@pytest.mark.parametrize(
    ("domain", "texts"),
    [
        ({"grid": [1, 4, 10, 20]}, ["1", "4", "10", "20"]),
        ({"grid": [20, 1, 4]}, ["1", "4", "20"]),
        ({"grid": [0.0001, 0.001, 0.02]}, ["0.0001", "0.001", "0.02"]),
        ({"grid": [10000.0, 250000.0]}, ["10000", "250000"]),
        ({"loguniform": [1e-4, 1e-2]}, ["0.0001", "0.001", "0.01"]),
        ({"loguniform": [2, 30]}, ["2", "5", "10", "20"]),
        ({"loguniform": [2, 4]}, ["2", "2.4", "2.8", "3.2", "3.6", "4"]),
        ({"uniform": [1, 30]}, ["6", "12", "18", "24", "30"]),
        ({"grid": [3]}, ["3"]),
    ],
)
def test_ticks_are_plain_numbers(domain, texts, figure_of):
    key = "evaluate.temperature"
    summary = summary_of({key: domain}, **{key: None})
    assert list(ticks(figure_of(values_figure, summary).axes[0])) == texts
    drawn = [text.get_text() for text in figure_of(parallel_figure, summary).axes[0].texts]
    assert drawn[1 : 1 + len(texts)] == texts


def test_numbers_that_would_lie_on_each_other_stand_side_by_side(figure_of):
    key = "evaluate.weight_decay"
    summary = summary_of({key: {"grid": [0, 0.0001, 0.001, 0.01, 0.1]}}, trial("a", {key: 0.0001}, 9.0))
    panel = figure_of(values_figure, summary).axes[0]
    at = ticks(panel)
    assert list(at) == ["0", "0.0001", "0.001", "0.01", "0.1"]
    assert list(at.values()) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert dots(panel, WINNER) == [(at["0.0001"], 9.0)]
    assert [line.get_xdata()[0] for line in panel.lines if line.get_label().startswith("default")] == [at["0.01"]]


def test_of_many_listed_values_not_all_have_a_text(figure_of):
    key = "synthesize.iterations"
    panel = figure_of(values_figure, summary_of({key: {"grid": list(range(100, 160))}})).axes[0]
    texts = [text.get_text() for text in panel.get_xticklabels()]
    assert len(texts) == 60
    assert [text for text in texts if text] == [str(value) for value in range(100, 160, 3)]


def test_the_axis_of_whole_numbers_ends_at_the_last(figure_of):
    key = "initialize.num_crops"
    summary = summary_of({key: {"randint": [1, 9]}}, trial("a", {key: 8.0}, 9.0), **{key: None})
    panel = figure_of(values_figure, summary).axes[0]
    assert dots(panel, WINNER) == [(1.0, 9.0)]
    assert list(ticks(panel)) == ["2", "4", "6", "8"]


def test_texts_stand_in_listed_order_turned_and_short_where_long(figure_of):
    short = summary_of(WEIGHTINGS, trial("a", {"voting.weighting": "random", "evaluate.lr": 1e-3}, 9.0))
    panel = figure_of(values_figure, short).axes[0]
    assert list(ticks(panel)) == ["prior", "equal", "random"]
    assert {text.get_rotation() for text in panel.get_xticklabels()} == {0}
    assert dots(panel, WINNER) == dots(panel, "mean") == [(ticks(panel)["random"], 9.0)]
    mean = next(c for c in panel.containers if c.get_label() == "mean of a value").lines[0]
    assert (mean.get_linestyle(), mean.get_marker()) == ("None", "_"), "texts are not joined by a line"
    key = "relabel.teachers"
    committee = ["resnet18", "resnet50", "densenet121"]
    values = [committee[:1], committee, committee[:2], None]
    panel = figure_of(values_figure, summary_of({key: {"grid": values}})).axes[0]
    assert list(ticks(panel)) == ["resnet18", "resnet18+resnet50+densene…", "resnet18+resnet50", "null"]
    assert {text.get_rotation() for text in panel.get_xticklabels()} == {40}


def test_numbers_beside_texts_are_found_as_a_table_writes_them(figure_of):
    key = "initialize.factor"
    summary = summary_of({key: {"grid": [1, 2, None]}}, trial("a", {key: "2"}, 9.0), **{key: "null"})
    panel = figure_of(values_figure, summary).axes[0]
    assert dots(panel, WINNER) == [(ticks(panel)["2"], 9.0)]
    assert legend(figure_of(learning_figure, summary)) == [f"{key}=1", f"{key}=2", f"{key}=null", WINNER]


@pytest.mark.parametrize(
    ("space", "default", "at", "text"),
    [
        ({"evaluate.temperature": {"grid": [1, 4, 20]}}, 4.0, "4", "default: 4"),
        ({"evaluate.temperature": {"grid": [4, 6]}}, 5.0, 0.5, "default: 5"),
        ({"evaluate.temperature": {"grid": [4, 6]}}, 8.0, 1.0, "default: 8"),
        ({"evaluate.temperature": {"grid": [4, 6]}}, 500.0, None, "default: 500 (not shown)"),
        ({"evaluate.lr": {"loguniform": [1e-4, 1e-2]}}, 1e-3, 0.5, "default: 0.001"),
        ({"evaluate.lr": {"loguniform": [1e-4, 1e-2]}}, 0.0, None, "default: 0 (not shown)"),
        ({"voting.weighting": {"grid": ["prior", "equal"]}}, "equal", "equal", "default: equal"),
        ({"voting.weighting": {"grid": ["prior", "equal"]}}, "random", None, "default: random (not shown)"),
        ({"initialize.factor": {"grid": [1, 2]}}, "null", None, "default: null (not shown)"),
    ],
)
def test_the_default_is_a_dashed_line_where_it_is_near(space, default, at, text, figure_of):
    (key,) = space
    figure = figure_of(values_figure, summary_of(space, **{key: default}))
    panel = figure.axes[0]
    found = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert panel.get_xlabel() == f"{key}\n{text}"
    assert ("default: the unchanged run" in legend(figure)) is (at is not None)
    assert len(found) == (at is not None)
    if found:
        expected = ticks(panel)[at] if isinstance(at, str) else at
        assert list(found[0].get_xdata()) == pytest.approx([expected] * 2)


# --- parallel coordinates


def test_parallel_lines_pass_the_values_and_end_at_the_accuracy(figure_of):
    trials = [
        trial("a", {"voting.weighting": "random", "evaluate.lr": 1e-2}, 10, 60),
        trial("b", {"voting.weighting": "prior", "evaluate.lr": 1e-3}, 10, 50),
        trial("c", {"voting.weighting": "equal", "evaluate.lr": 1e-4}, 40, state="stopped"),
    ]
    figure = figure_of(parallel_figure, summary_of(WEIGHTINGS, *trials))
    panel = figure.axes[0]
    assert {name: list(line.get_ydata()) for name, line in lines(panel).items()} == {
        "a": pytest.approx([5 / 6, 1, 1], abs=0.01),
        "b": pytest.approx([1 / 6, 0.5, 0.5], abs=0.01),
        "c": pytest.approx([3 / 6, 0, 0], abs=0.01),
    }
    assert legend(figure) == [CUT, FINISHED, WINNER]
    texts = [(text.get_text(), round(text.get_position()[1], 2)) for text in panel.texts]
    assert [text for text, _ in texts[:4]] == ["voting\nweighting", "prior", "equal", "random"]
    assert texts[4:8] == [("evaluate\nlr", 1.04), ("0.0001", 0.0), ("0.001", 0.5), ("0.01", 1.0)]
    assert texts[8:] == [("hold-out\naccuracy in %", 1.04), *[(str(40 + 5 * k), k / 4) for k in range(5)]]


@pytest.mark.parametrize("function", [parallel_figure, learning_figure])
def test_trials_that_were_stopped_leave_the_colours_to_the_others(function, figure_of):
    trials = [trial("a", EQUAL, 10, 60), trial("b", EQUAL, 10, 55), trial("c", EQUAL, 10, 50)]
    stopped = trial("d", EQUAL, 1, state="stopped")
    few, all_four = (
        {name: to_hex(line.get_color()) for name, line in lines(figure_of(function, summary).axes[0]).items()}
        for summary in (summary_of(WEIGHTINGS, *trials), summary_of(WEIGHTINGS, *trials, stopped))
    )
    assert len(set(few.values())) == 3
    assert all_four == few | {"d": few["c"]}


# --- learning curves


def test_curves_have_a_colour_per_value_of_a_single_setting(figure_of):
    summary = temperatures(50, 60, 65, 55, std=1.0)
    again = trial("again", AT_4, 20, 21)
    summary = summary_of(TEMPERATURES, *summary.trials, again)
    figure = figure_of(learning_figure, summary)
    assert legend(figure) == [*(f"evaluate.temperature={value}" for value in (1, 4, 10, 20)), WINNER]
    assert len(figure.axes) == 1, "no colour bar"
    colours = {name: to_hex(line.get_color()) for name, line in lines(figure.axes[0]).items()}
    assert colours["t1"] == colours["again"]
    assert len(set(colours.values())) == 4
    handles = dict(zip(legend(figure), figure.legends[0].legend_handles, strict=True))
    assert to_hex(handles["evaluate.temperature=4"].get_color()) == colours["t1"]


@pytest.mark.parametrize("space", [WEIGHTINGS, {"synthesize.iterations": {"grid": list(range(1, 12))}}])
def test_curves_of_other_sweeps_are_coloured_by_their_last_accuracy(space, figure_of):
    point = {key: "prior" if "weighting" in key else 0.001 for key in space}
    trials = [trial("a", point, 99, 20), trial("b", point, 1, 30), trial("c", point, 1, 30)]
    figure = figure_of(learning_figure, summary_of(space, *trials))
    assert figure.axes[1].get_ylabel() == "accuracy after the last epoch in %"
    colours = {name: to_hex(line.get_color()) for name, line in lines(figure.axes[0]).items()}
    assert colours["b"] == colours["c"] != colours["a"]
    assert legend(figure) == [FINISHED, WINNER]


def test_curves_are_drawn_by_epoch_with_bands_and_ends(figure_of):
    trials = [
        trial("a", AT_4, 10, 30, 40, std=2.0),
        trial("b", AT_20, 35, std=1.0),
        trial("c", AT_20, 5, 9, state="stopped"),
    ]
    figure = figure_of(learning_figure, summary_of(TEMPERATURES, *trials))
    panel = figure.axes[0]
    assert lines(panel)["a"].get_xydata().tolist() == [[1, 10], [2, 30], [3, 40]]
    assert {name: line.get_marker() for name, line in lines(panel).items()} == {"a": "None", "b": "o", "c": "x"}
    assert lines(panel)["c"].get_markevery() == [-1]
    band = max((collection.get_paths()[0].vertices for collection in panel.collections), key=lambda v: v[:, 1].max())
    assert (band[:, 1].min(), band[:, 1].max()) == (8, 42)
    assert panel.get_ylabel() == "hold-out accuracy in % (band: std over students)"
    assert all(tick == int(tick) for tick in panel.get_xticks())


@pytest.mark.parametrize(("count", "std", "bands"), [(10, 1.0, 10), (11, 1.0, 0), (10, 0.0, 0)])
def test_bands_are_left_out_of_many_curves(count, std, bands, figure_of):
    trials = (trial(f"t{k}", AT_4, 10, 20 + k, std=std) for k in range(count))
    panel = figure_of(learning_figure, summary_of(TEMPERATURES, *trials)).axes[0]
    assert len(panel.collections) == bands
    assert ("band" in panel.get_ylabel()) is (bands > 0)
