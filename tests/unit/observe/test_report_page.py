"""The HTML report: complete, self-contained, and safe whatever the samples hold."""

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from actors.drivers import rl_observer, run_observer
from rlhf_cluster.cli.commands import main
from rlhf_cluster.observe.metric_table import read_table
from rlhf_cluster.observe.report.charts import MAX_POINTS, Curve, chart, ticks
from rlhf_cluster.observe.report.html_text import text
from rlhf_cluster.observe.report.learning_curve import held_out_series
from rlhf_cluster.observe.report.page import page
from rlhf_cluster.observe.report.read_run import RunRecord, read_run
from rlhf_cluster.run.run_directory import RunDir
from tests.support.builders.recorded_run import record_run
from tests.support.builders.run_configs import tiny_config

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>\" & \u202e \x1b[31m {{7*7}}"
)
VOID = {"meta", "path", "circle"}


class Elements(HTMLParser):
    """Every element of a page, and whether all of them are closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("runs"), hostile=HOSTILE)


@pytest.fixture(scope="module")
def content(recorded):
    return page([read_run(RunDir.open(recorded))], now_s=1.7e9)


def test_hostile_text_stays_text(content):
    elements = Elements(content)
    tags = {tag for tag, _ in elements.found}
    assert tags & {"script", "img", "iframe", "object", "link", "form", "input", "a"} == set()
    assert "".join(elements.text).count("<script>alert(1)</script>") > 10, "shown as it is"
    assert not [name for _, attributes in elements.found for name in attributes if name[:2] == "on"]
    assert "\u202e" not in content
    assert "\x1b" not in content


def test_the_page_loads_nothing(content):
    elements = Elements(content)
    assert not [
        attributes
        for _, attributes in elements.found
        if {"src", "href", "srcset"} & set(attributes)
    ]
    assert "url(" not in content
    assert "@import" not in content
    policy = next(
        a for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in str(policy["content"])
    assert "script-src" not in str(policy["content"])


@pytest.mark.parametrize(
    "part",
    [
        "generation-bound: learner waits 50 % of the time; one more generation worker (2 -&gt; 3)",
        "0.1 -&gt; 0.6",
        "0.25 (step 0)",
        "Who waits for whom",
        "step 6: 3 samples",
        "g00000010/1 | reward 1 |",
        "versions 4..4 | staleness 1 | ended by stop | generation-0, fake",
        "generation-1 died: ",
        "6 of 8",
        "prefers-color-scheme:dark",
        'name="viewport"',
    ],
)
def test_the_page_has(content, part):
    assert part in content


def test_the_parts_of_the_reward_are_drawn_beside_what_is_watched(recorded, content):
    run = read_run(RunDir.open(recorded))
    for record in run.steps:
        for part in ("gold", "proxy", "ens.0", "ens.disagreement"):
            record[f"reward/part/{part}"] = 0.5
    drawn = page([run], now_s=1.7e9)
    for shown in ("Parts of the reward", "gold", "proxy", "ens.disagreement"):
        assert shown in drawn
    assert "ens.0" not in drawn, "members are told by how far they disagree"
    assert "Parts of the reward" not in content, "nothing is drawn where no parts were recorded"


def test_routine_lines_of_the_log_are_no_events(content):
    assert "step 1: reward 0.5, 1 s" not in content
    assert "not an event" not in content


@pytest.mark.parametrize("log", [run_observer.log, rl_observer.log], ids=lambda log: log.name)
def test_what_the_observers_log_is_an_event(recorded, log):
    run = RunDir.open(recorded)
    line = f"2023-11-14T22:13:20.000Z INFO controller controller {log.name}: scaled\n"
    path = run.logs / "controller.log"
    before = path.read_text()
    path.write_text(before + line)
    found = read_run(run).events
    path.write_text(before)
    assert found[-1].text == "scaled"


def shown_numbers(content: str) -> dict[str, str]:
    """The big numbers of a page, by name."""
    pattern = r'<span class="name">(.*?)</span><span class="value">(.*?)</span>'
    return dict(re.findall(pattern, content))


def with_records(path, *lines: dict) -> RunRecord:
    """The run at `path`, with these metric records instead of its own."""
    run = read_run(RunDir.open(path))
    return replace(run, records=list(lines))


def test_at_the_top_stand_the_four_numbers_that_matter(recorded, content):
    assert shown_numbers(content) == {
        "held-out reward": "0.25",
        "training reward": "0.35",
        "steps": "6 of 8",
        "time": "1 min 40 s",
    }
    assert content.index('class="tiles"') < content.index("<svg") < content.index("<h2>")
    after = {"step": 6, "evaluation/reward_mean": 0.75}
    run = with_records(recorded, {"step": 0, "evaluation/reward_mean": 0.25}, after)
    assert shown_numbers(page([run], now_s=1.7e9))["held-out reward"] == "0.25 \u2192 0.75"


def test_the_reward_is_smoothed_with_held_out_points_on_it(content):
    figure = re.search(r'<div class="large for-wide">.*?</figure>', content, re.S)
    assert figure is not None
    legend = re.findall(r'<li class="(\S+) (\S+)">(.*?)</li>', figure[0])
    assert [(style, label) for _, style, label in legend] == [
        ("s0", "mean of 2 steps"), ("s4", "mean of the step"), ("s3", "held-out")
    ]  # fmt: skip
    assert figure[0].count("<circle") == 1


def test_each_held_out_set_of_the_table_is_a_series_of_its_own():
    table = read_table("""
[controller]
evaluation/reward_mean | reward | All
evaluation/set_reward_mean{set} | reward | Of one set
evaluation/part{part} | reward | A part
reward/mean | reward | Training
""")
    recorded = [
        "reward/mean", "evaluation/part/a", "evaluation/set_reward_mean/hard",
        "evaluation/set_reward_mean/easy", "evaluation/reward_mean", "evaluation/unknown",
    ]  # fmt: skip
    assert held_out_series(recorded, table) == {
        "evaluation/reward_mean": "held-out",
        "evaluation/set_reward_mean/easy": "easy",
        "evaluation/set_reward_mean/hard": "hard",
    }


@pytest.mark.parametrize(
    ("records", "shown", "hidden"),
    [
        ([], ["nothing recorded"], ["held-out reward", "training reward", "<svg", "Curves"]),
        (
            [{"step": 1, "reward/mean": 0.5}],
            ["training reward", "Reward</figcaption>"],
            ["held-out", "KL to the reference", "Who waits", "Gradient norm", "mean of 2 steps"],
        ),
        (
            [{"step": 1, "reward/mean": 0.5, "learner/entropy": 1.0}],
            ["entropy</li>"],
            ["KL to the reference", "Effective sample size"],
        ),
        (
            [{"step": 1, "learner/grad_norm": 2.0, "importance/effective_sample_size": 0.9}],
            ["Gradient norm", "Effective sample size"],
            ["training reward", "ratio clipped"],
        ),
    ],
)
def test_only_what_is_recorded_is_shown(recorded, records, shown, hidden):
    run = replace(with_records(recorded, *records), advice=None, samples={}, best=[], worst=[])
    found = page([run], now_s=1.7e9)
    Elements(found)
    body = found[found.index("</style>") : found.index("<summary>all")]
    curves = found[found.index("Curves</h2>") :] if "Curves</h2>" in found else ""
    assert [part for part in shown if part not in body + curves] == []
    assert [part for part in hidden if part in body + curves] == []


def test_a_run_without_records_settings_and_status_gives_a_page(tmp_path):
    path = record_run(tmp_path)
    for name in ("metrics.jsonl", "status.json", "resolved.json"):
        (path / name).unlink()
    (path / "metrics.jsonl").touch()
    found = page([read_run(RunDir.open(path))], now_s=1.7e9)
    Elements(found)
    assert "ended before it wrote a status" in found
    assert "nothing recorded" in found
    assert "<h2>Settings" not in found
    assert "<h2>What bounded it" not in found


def test_the_main_settings_are_shown_and_all_can_be_unfolded(content):
    main, _, rest = content[content.index("<h2>Settings") :].partition("<details>")
    assert "<th>algorithm.type</th><td>grpo</td>" in main
    assert "<th>scoring.rewards</th>" in main
    assert "learner.adam_eps" not in main
    assert "<th>learner.adam_eps</th>" in rest


def test_a_stage_has_its_own_metric_at_the_top(tmp_path):
    path = record_run(tmp_path, "stage", steps=1)
    status = RunDir.open(path).read_status()
    assert status is not None
    run = with_records(
        path,
        {"step": 0, "stage/held_out/sft.loss": 2.0},
        {"step": 1, "sft/loss": 1.25},
        {"step": 2, "sft/loss": 1.0, "stage/held_out/sft.loss": 0.5},
    )
    run.snapshot = replace(status, stage="sft", metric="sft/loss", metric_value=1.0)
    found = page([run], now_s=1.7e9)
    numbers = shown_numbers(found)
    assert numbers["held-out sft/loss"] == "2 \u2192 0.5"
    assert numbers["training sft/loss"] == "1.12"


def test_several_runs_are_compared(recorded, tmp_path):
    other = record_run(tmp_path, "other", steps=4, learner={"learning_rate": 5e-4})
    found = page([read_run(RunDir.open(path)) for path in (recorded, other)], now_s=1.7e9)
    Elements(found)
    assert "recorded: mean of the step" in found
    assert "other: mean of the step" in found
    row = "<tr><th>learner.learning_rate</th><td>0.001</td><td>0.0005</td></tr>"
    assert row in found
    assert "algorithm.group_size" not in found, "only what differs"


def test_a_run_that_has_just_started_gives_a_page(tmp_path):
    config = tiny_config(run={"root": str(tmp_path), "name": "young"})
    with RunDir.create(tmp_path / "young", config) as run:
        found = page([read_run(RunDir.open(run.path))], now_s=1.7e9)
    Elements(found)
    assert "starting" in found
    assert "nothing recorded" in found


def test_an_offline_stage_shows_what_it_is_watched_by(tmp_path):
    path = record_run(tmp_path, "stage", steps=1)
    run = RunDir.open(path)
    status = run.read_status()
    assert status is not None
    run.write_status(replace(status, stage="sft", metric="sft/loss", metric_value=1.25))
    (path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1.0, "sft/loss": 1.25}\n')
    found = page([read_run(run)], now_s=1.7e9)
    Elements(found)
    assert "<figcaption>sft/loss</figcaption>" in found
    assert "<td>1.25, held-out -</td>" in found
    assert "Who waits for whom" not in found, "nothing of it is recorded"
    assert "bottleneck" not in found


def test_what_is_damaged_is_named_and_the_rest_shown(tmp_path):
    path = record_run(tmp_path)
    (path / "samples" / "step-000002.parquet").write_bytes(b"PAR1")
    (path / "status.json").write_text("{")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # being written
    (path / "post_mortem.json").write_text('{"first_cause": "WorkerError: <b>"}')
    found = page([read_run(RunDir.open(path))], now_s=1.7e9)
    Elements(found)
    assert "step-000002.parquet: cannot be read as samples" in found
    assert "not a run&#x27;s status" in found
    assert "step 1: 3 samples" in found
    assert "WorkerError: &lt;b&gt;" in found


@pytest.mark.parametrize(
    ("name", "columns", "problem"),
    [
        ("step-000002", {"rollout_id": ["g1/0"], "reward": [1.0]}, "it has no prompt_id, prompt,"),
        ("step-two", {"rollout_id": ["g1/0"]}, "cannot be read as samples"),
    ],
)
def test_samples_of_another_shape_are_named_and_the_rest_shown(tmp_path, name, columns, problem):
    path = record_run(tmp_path)
    parquet.write_table(pa.table(columns), path / "samples" / f"{name}.parquet")
    found = page([read_run(RunDir.open(path))], now_s=1.7e9)
    assert f"{name}.parquet: " in found
    assert problem in found
    assert "step 1: 3 samples" in found


def test_the_command_writes_into_the_run_or_where_it_is_told(recorded, tmp_path, capsys):
    assert main(["report", str(recorded)]) == 0
    assert capsys.readouterr().out == f"{recorded / 'report.html'}\n"
    assert (recorded / "report.html").read_text().startswith("<!doctype html>")
    target = tmp_path / "two.html"
    assert main(["report", str(recorded), str(recorded), "--out", str(target)]) == 0
    assert target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["two.html"]
    assert main(["report", str(tmp_path)]) == 1
    assert "no such run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 119.0, [0.0, 50.0, 100.0]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (1e-7, 3e-7, [1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7]),
        (3.2, 9.9, [4.0, 6.0, 8.0]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 1.0)],
        [(1, 2.0), (2, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(0, -3e9), (5, 4e9)],
        [(k, math.sin(k)) for k in range(5000)],
        [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)],
    ],
)
def test_a_curve_stays_inside_its_picture(points):
    drawn = chart("a < b", [Curve(label="<i>", points=points)])
    picture = re.search(r"<svg.*</svg>", drawn, re.S)
    assert picture is not None
    root = ElementTree.fromstring(picture[0])
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    numbers = [
        tuple(map(float, pair))
        for node in root.iter("path")
        if "line" in node.attrib["class"]
        for pair in re.findall(r"([-\d.]+) ([-\d.]+)", node.attrib["d"])
    ]
    numbers += [(float(n.attrib["cx"]), float(n.attrib["cy"])) for n in root.iter("circle")]
    assert 1 <= len(numbers) <= MAX_POINTS
    assert all(0 <= x <= width and 0 <= y <= height for x, y in numbers)
    assert "&lt;i&gt;" in drawn


def test_a_chart_without_values_says_so():
    assert "nothing recorded" in chart("x", [Curve(label="a", points=[(1, math.nan)])])


def test_text_is_safe_in_attributes_too():
    assert text("\" ' < > &") == "&quot; &#x27; &lt; &gt; &amp;"
    assert text("a\nb\tc\x00\u202e") == "a\nb\tc\ufffd\ufffd"
