"""What a running sweep shows, from made-up trials."""

import pickle
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial

from cvdd_ray.runner.sweepdisplay import DisplayCallback, SweepDisplay


class Shown:
    def __init__(self):
        self.done, self.note, self.detail = 0.0, "", ""

    def update(self, done, note="", detail=""):
        self.done, self.note, self.detail = done, note, detail


def trial(name, temperature, status=Trial.RUNNING, last_result=None):
    return SimpleNamespace(
        trial_id=name, config={"evaluate.temperature": temperature}, status=status, last_result=last_result
    )


def metrics(epoch, accuracy):
    return {"epoch": epoch, "epochs": 10, "holdout_accuracy": accuracy}


@pytest.fixture
def shown():
    return Shown()


@pytest.fixture
def display(shown):
    return SweepDisplay(shown, 4)


def test_progress_counts_running_trials_in_part_and_ended_ones_whole(display, shown):
    display.result(trial("a", 4), metrics(5, 60.0))
    assert shown.done == 0.5
    display.result(trial("b", 20), metrics(2, 70.0))
    display.end(trial("b", 20, Trial.TERMINATED))  # stopped early: nothing is left of it
    assert shown.done == 1.5
    assert "1 running, 1 stopped, 2 waiting" in shown.note


def test_the_best_is_a_finished_trial_where_there_is_one(display, shown):
    display.result(trial("a", 4), metrics(10, 60.0))
    display.end(trial("a", 4, Trial.TERMINATED))
    display.result(trial("b", 20), metrics(2, 90.0))
    assert shown.note.startswith("best so far 60.0 % (temperature=4)")
    lines = shown.detail.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["10/10", "60.0"], ["2/10", "90.0"]]
    assert "temperature" in lines[0]


def test_a_failed_trial_is_counted(display, shown):
    display.end(trial("a", 4, Trial.ERROR))
    assert shown.note == "no result yet; 1 failed, 3 waiting"


def test_trials_of_an_earlier_session_are_taken_up(display, shown):
    display.found([
        trial("a", 4, Trial.TERMINATED, metrics(10, 50.0)), trial("b", 20, Trial.PENDING, metrics(3, 40.0)),
        trial("c", 40, Trial.PENDING, {}),
    ])  # fmt: skip
    assert shown.done == pytest.approx(1.3)
    assert "best so far 50.0 %" in shown.note


def test_many_trials_are_cut(shown):
    display = SweepDisplay(shown, 40)
    for k in range(40):
        display.result(trial(f"t{k}", k), metrics(10, float(k)))
    assert shown.detail.splitlines()[-1].strip() == "and 28 more"


def test_an_interruption_is_noticed(shown):
    display = SweepDisplay(shown, 2)
    assert not display.was_interrupted  # a restored sweep that was complete takes no step
    display.step([trial("a", 4, Trial.TERMINATED)])
    assert display.was_interrupted  # the second trial was never made
    display.step([trial("a", 4, Trial.TERMINATED), trial("b", 4, Trial.PENDING)])
    assert display.was_interrupted
    display.step([trial("a", 4, Trial.TERMINATED), trial("b", 4, Trial.ERROR)])
    assert not display.was_interrupted


def test_the_callback_travels_without_its_display(display, monkeypatch):
    monkeypatch.setattr(DisplayCallback, "current", display)
    callback = pickle.loads(pickle.dumps(DisplayCallback()))
    callback.setup()
    callback.on_step_begin(0, [trial("a", 4, Trial.TERMINATED, metrics(10, 50.0))])
    callback.on_trial_result(1, [], trial("b", 20), metrics(1, 10.0))
    assert display._rows["a"].state == "done"
    assert display._rows["b"].epoch == 1
