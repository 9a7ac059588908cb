"""cluster/grafana.json and cluster/prometheus.yml: what they ask for exists, whatever Grafana they are loaded into."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.metrics import Counter, Gauge, Histogram

from cvdd_ray.runner.metrics import JOB, METRICS

CLUSTER = Path(__file__).parent.parent / "cluster"
DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
SUFFIXES = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_count", "_sum")}
OURS = {f"ray_{name}{end}": row for name, row in METRICS.items() for end in SUFFIXES[row.kind]}
CUMULATIVE = {"Jobs done", "Failures", "Work done by stage", "Failures by kind"}


def names_in(expr: str) -> list[str]:
    return re.findall(r"\bray_\w+", expr)


def test_every_name_is_one_of_ours_or_one_of_rays_gauges():
    assert {name for _, expr in QUERIES for name in names_in(expr)} <= set(OURS) | {f"ray_{g}" for g in METRICS_GAUGES}


def test_every_metric_of_ours_is_shown():
    shown = {name for _, expr in QUERIES for name in names_in(expr)}
    asked = {METRICS[name].meaning for name in METRICS}
    assert asked == {OURS[name].meaning for name in shown if name in OURS}


@pytest.mark.parametrize(("title", "expr"), QUERIES, ids=[f"{title}-{k}" for k, (title, _) in enumerate(QUERIES)])
def test_queries_split_by_labels_that_are_there_and_keep_to_the_chosen_runs(title, expr):
    assert expr.count("(") == expr.count(")")
    used = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expr) for label in group.split(",")}
    ours = [name for name in names_in(expr) if name in OURS]
    for name in ours:
        row = OURS[name]
        assert used <= {*row.tags, "le"}
        assert ("le" in used) == name.endswith("_bucket")
        selectors = re.findall(rf"{name}\{{([^}}]*)\}}", expr)
        assert len(selectors) == names_in(expr).count(name)
        for selector in selectors:
            assert f'{JOB}=~"$run"' in selector
            assert set(re.findall(r"(\w+)=", selector)) <= {*row.tags, JOB}
        assert row.kind is Gauge or "rate(" in expr or title in CUMULATIVE
    if not ours:
        assert used <= {"instance", "GpuIndex"}  # of Prometheus, of Ray


def test_legends_name_labels_of_their_query():
    for panel in PANELS:
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(re.findall(r"\w+", target["expr"]))


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_no_data_source_is_hard_coded():
    def sources(node):
        if isinstance(node, dict):
            yield from ([node["datasource"]] if "datasource" in node else [])
            node = list(node.values())
        for child in node if isinstance(node, list) else []:
            yield from sources(child)

    assert {json.dumps(source) for source in sources(DASHBOARD)} == {
        json.dumps({"type": "prometheus", "uid": "${datasource}"})
    }
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}
    assert "id" not in DASHBOARD  # Grafana gives it one


def test_prometheus_reads_the_file_that_ray_writes():
    (job,) = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())["scrape_configs"]
    (file,) = job["file_sd_configs"][0]["files"]
    assert Path(file) == Path("/tmp/ray") / PROMETHEUS_SERVICE_DISCOVERY_FILE
