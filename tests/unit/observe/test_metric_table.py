"""The table of metrics and the checks on what is sent."""

import ast
import functools
import math
import re
from pathlib import Path

import pytest

from rlhf_cluster.errors import MetricError
from rlhf_cluster.observe.metric_table import (
    DISTRIBUTIONS,
    METRICS,
    Kind,
    Role,
    docs_table,
    find,
    label_value,
    read_table,
)
from rlhf_cluster.observe.metrics import Metrics
from tests.support.fakes.checked_metrics import CheckedMetrics


class Collected:
    """A sender that keeps what it gets."""

    def __init__(self):
        self.sent = []

    def send(self, metric, value, labels):
        self.sent.append((metric.name, value, dict(labels)))


def test_every_name_has_an_area_and_fits_prometheus():
    for metric in METRICS.values():
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", metric.name), metric.name
        assert re.fullmatch(r"rlhf_[a-z0-9_]+", metric.prometheus_name)
        assert metric.help
        assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)


def test_names_stay_different_in_prometheus():
    names = [metric.prometheus_name for metric in METRICS.values()]
    assert len(set(names)) == len(names)


def test_every_role_has_metrics():
    assert {metric.role for metric in METRICS.values()} == set(Role)


def test_two_rows_with_one_name_are_refused():
    row = "reward/mean | 1 | x\n"
    with pytest.raises(MetricError, match="same name: reward/mean"):
        read_table(f"[controller]\n{row}\n[learner]\n{row}")


@pytest.mark.parametrize(
    "text",
    [
        "reward/mean | 1 | without a role",
        "[controller]\nreward/mean | 1",
        "[controller]\nreward/mean{part | 1 | x",
        "[controller]\nmean | 1 | without an area",
        "[controller]\n    mean | 1 | without a row before",
    ],
)
def test_a_line_that_is_no_row_is_refused(text):
    with pytest.raises(MetricError, match="a row is `name"):
        read_table(text)


def test_a_row_says_all_of_its_metric():
    (counted, gauged) = read_table(
        "[buffer]\nbuffer/lost_total{reason} | 1 |\n    Groups that were lost\n\n"
        "[learner]\nlearner/wait_s | s | Time of waiting\n"
    ).values()
    assert (counted.name, counted.kind, counted.label) == ("buffer/lost_total", "counter", "reason")
    assert (counted.role, counted.help) == ("buffer", "Groups that were lost")
    assert (gauged.kind, gauged.unit, gauged.label) == ("gauge", "s", None)
    assert (gauged.role, gauged.help) == ("learner", "Time of waiting")


def test_every_unit_is_known_and_every_distribution_has_its_row():
    units = {"1", "s", "steps", "tokens", "tokens/s", "bytes", "nats", "reward"}
    assert {metric.unit for metric in METRICS.values()} == units
    assert set(METRICS) >= DISTRIBUTIONS


def test_every_metric_name_in_the_code_is_in_the_table():
    areas = {name.split("/")[0] for name in METRICS}
    found = set()
    for path in [*Path("rlhf_cluster").rglob("*.py"), *Path("actors").rglob("*.py")]:
        if path.name == "metric_table.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                area, slash, rest = node.value.partition("/")
                if slash and area in areas and re.fullmatch(r"[a-z0-9_]+", rest):
                    found.add(node.value)
    assert "learner/loss" in found
    assert {name for name in found if name not in METRICS} == set()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewrd/mean", "did you mean 'reward/mean'"),
        ("nothing", "unknown metric 'nothing'"),
        ("reward/part", "needs a label: write reward/part/<part>"),
        ("reward/part/", "unknown metric"),
        ("reward/mean/x", "unknown metric"),
    ],
)
def test_a_name_that_is_not_in_the_table_raises(name, message):
    with pytest.raises(MetricError, match=re.escape(message)):
        find(name)
    with pytest.raises(MetricError, match=re.escape(message)):
        CheckedMetrics().record({name: 1.0})


def test_a_labelled_name_carries_its_label():
    assert find("buffer/discarded_total/WorkerError").name == "buffer/discarded_total"
    assert label_value("buffer/discarded_total/WorkerError") == {"reason": "WorkerError"}
    assert label_value("reward/mean") == {}


def test_two_labels_are_sent_as_two_series():
    # S39: values of different labels are never merged.
    collected = Collected()
    Metrics(collected).record({"reward/part/a": 1.0, "reward/part/b": 2.0})
    assert collected.sent == [
        ("reward/part", 1.0, {"part": "a"}),
        ("reward/part", 2.0, {"part": "b"}),
    ]


def test_counters_are_sent_as_increases_and_survive_a_restart_of_their_source():
    collected = Collected()
    metrics = Metrics(collected)
    for total in (3.0, 7.0, 7.0, 2.0):
        metrics.count_up_to("generation/tokens_total", total)
    assert [value for _, value, _ in collected.sent] == [3.0, 4.0, 0.0, 2.0]


def test_a_counter_never_goes_down():
    with pytest.raises(MetricError, match="negative"):
        CheckedMetrics().count("generation/tokens_total", -1.0)


def test_a_metric_sent_as_another_kind_raises():
    with pytest.raises(MetricError, match="is a gauge, it was sent as a counter"):
        CheckedMetrics().count("reward/mean")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_sent(value):
    collected = Collected()
    Metrics(collected).gauge("reward/mean", value)
    assert collected.sent == []


def test_the_documentation_lists_every_metric_once():
    rows = [line for line in docs_table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS)
    assert all(line.count("|") == 8 for line in rows)


TABLES = (
    "metric_table.py",
    "page.py",
    "trace_rollout.py",
    "learning_curve.py",
)
COMPOSED = ("_by_staleness", "_mean", "_max", "_p50", "_p95", "_total", "_fraction")
"""Endings that code puts behind a name: f"{name}_by_staleness"."""


@functools.cache
def words_of_the_code() -> set[str]:
    """Strings of the code that can send, those inside of f-strings included, without punctuation at
    their ends."""
    found = set()
    for folder in ("rlhf_cluster", "actors"):
        for path in Path(folder).rglob("*.py"):
            if path.name in TABLES:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value.strip("/_"))
    return found


def is_sent(name: str, words: set[str]) -> bool:
    """Whether the whole name stands there, or its last part, less the endings that are put to it."""
    if name in words:
        return True
    stems = {name.partition("/")[2]}
    for _ in range(2):
        stems |= {stem.removesuffix(ending) for stem in stems for ending in COMPOSED}
    return not stems.isdisjoint(words)


def test_every_row_of_the_table_is_sent_by_some_code():
    words = words_of_the_code()
    assert [name for name in METRICS if not is_sent(name, words)] == []


@pytest.mark.parametrize("name", ["generation/preemptions_total", "importance/kurtosis_p95"])
def test_a_row_that_nothing_sends_is_found(name):
    assert not is_sent(name, words_of_the_code())
