"""Sinks of metrics: what they get, and that none of them can end or delay a run."""

import math
import re
import sys
import threading
import typing

import pytest

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.observe.record.run_log import RunLog
from rlhf_cluster.observe.sinks import SINKS, SinkKind, Sinks, check_sinks, open_sinks
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import read_metrics
from rlhf_cluster.sections.every_run import SinkName
from tests.support.builders.run_configs import tiny_config


class Kept:
    """A sink that keeps what it gets, or fails at a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows, self.fails_at, self.closed = [], fails_at, False

    def log(self, step, values) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_each_sink_gets_every_record_less_what_is_not_finite():
    first, second, told = Kept(), Kept(), []
    sinks = Sinks({"a": lambda: first, "b": lambda: second}, told.append)
    sinks.log(1, {"reward/mean": 0.5, "learner/loss": math.nan})
    sinks.log(2, {"reward/mean": math.inf})
    sinks.close()
    assert first.rows == second.rows == [(1, {"reward/mean": 0.5}), (2, {})]
    assert first.closed
    assert (told, sinks.num_dropped) == ([], 0)


def test_a_sink_that_raises_is_counted_told_of_once_and_dropped():
    bad, good, told = Kept(fails_at=1), Kept(), []
    sinks = Sinks({"bad": lambda: bad, "good": lambda: good}, told.append)
    sinks.log(1, {})
    sinks._threads[0].thread.join(60)
    for step in (2, 3):
        sinks.log(step, {})
    sinks.close()
    assert told == [
        "observe.sinks: bad is dropped: ConnectionError: no route to host. metrics.jsonl has it all"
    ]
    assert sinks.num_dropped == 1
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert bad.rows == []


def test_a_sink_that_cannot_open_is_dropped():
    def broken():
        raise PermissionError("no account")

    told = []
    sinks = Sinks({"x": broken}, told.append)
    sinks.close()
    assert len(told) == 1
    assert "PermissionError: no account" in told[0]


def test_a_sink_that_hangs_delays_nobody():
    opened, released, told = threading.Event(), threading.Event(), []

    class Hangs(Kept):
        def log(self, step, values) -> None:
            opened.set()
            released.wait(60)

    sinks = Sinks({"slow": Hangs}, told.append, max_behind=3)
    sinks.log(0, {})
    assert opened.wait(60)
    for step in range(1, 10):
        sinks.log(step, {})
    assert told == [
        "observe.sinks: slow is dropped: it is 3 records behind. metrics.jsonl has it all"
    ]
    sinks.close()
    released.set()


def test_at_the_end_a_sink_has_its_time_and_no_more():
    released, told = threading.Event(), []

    class Slow(Kept):
        def close(self) -> None:
            released.wait(60)

    sinks = Sinks({"slow": Slow}, told.append)
    sinks.log(1, {})
    sinks.close(timeout_s=0.01)
    assert "it has not written all within 0.01 s" in told[0]
    released.set()


def test_the_record_of_a_run_goes_to_its_sinks_too(tmp_path):
    config = tiny_config(observe={"sinks": ["tensorboard"]}, run={"root": str(tmp_path)})
    kept, about = Kept(), []
    kinds = {"tensorboard": SinkKind(package="json", build=lambda a: (about.append(a), kept)[1])}
    with RunDir.create(config.run_dir, config) as run:
        log = RunLog(run, open_sinks(config, run.path, lambda text: None, kinds))
        log.append(1, 10.0, {"reward/mean": 0.25})
        log.cut(lambda: None)
        log.append(2, 11.0, {"reward/mean": 0.5})
        log.close()
    assert [record["reward/mean"] for record in read_metrics(run.metrics)] == [0.25, 0.5]
    assert kept.rows == [(1, {"reward/mean": 0.25}), (2, {"reward/mean": 0.5})]
    assert kept.closed
    assert about[0].name == "tiny"
    assert about[0].folder == run.path / "sinks" / "tensorboard"
    assert about[0].settings["run"]["steps"] == 3


def test_secrets_are_not_sent_with_the_settings(tmp_path):
    config = tiny_config(generation={"engine_args": {"api_key": "secret-word"}})
    config = config.model_copy(
        update={"observe": config.observe.model_copy(update={"sinks": ("wandb",)})}
    )
    about = []
    kinds = {"wandb": SinkKind(package="json", build=lambda a: (about.append(a), Kept())[1])}
    open_sinks(config, tmp_path, lambda text: None, kinds).close()
    assert "secret-word" not in str(about[0].settings)


def test_a_missing_package_is_an_error_with_the_extra():
    kinds = {"wandb": SinkKind(package="no_such_package", build=lambda about: Kept())}
    with pytest.raises(ConfigError) as error:
        check_sinks(["wandb"], kinds)
    assert str(error.value) == (
        "observe.sinks: 'wandb' needs the package no_such_package, which is not installed. "
        "pip install 'rlhf-cluster[wandb]', or leave it out"
    )


class Deaf:
    def log(self, step, values) -> None: ...


@pytest.mark.parametrize(
    ("build", "fault"),
    [(Deaf, "Deaf.*it has no close"), (int, "no log and no close"), (math.pi, "cannot be called")],
)
def test_what_is_no_sink_is_refused_before_a_run_starts(build, fault):
    kinds = {"mine:Sink": SinkKind(package=None, build=build)}
    with pytest.raises(ConfigError, match=f"observe.sinks: 'mine:Sink' is .*{fault}"):
        check_sinks(["mine:Sink"], kinds)
    takes = {"class": Kept, "function": lambda about: Kept()}
    check_sinks(list(takes), {n: SinkKind(package=None, build=b) for n, b in takes.items()})


def test_names_packages_and_extras_agree():
    import tomllib
    from pathlib import Path

    assert set(typing.get_args(SinkName)) == set(SINKS)
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for name, kind in SINKS.items():
        [requirement] = project["optional-dependencies"][name]
        assert re.match(r"[\w-]+", requirement)[0] == kind.package


def test_an_unknown_sink_is_refused_by_the_configuration():
    with pytest.raises(ConfigError, match="tensorboard"):
        tiny_config(observe={"sinks": ["tensorbord"]})


# Stand-ins with the calls that we make of packages that the tests do not install.


class FakeWandbRun:
    def __init__(self) -> None:
        self.rows, self.metrics, self.finished = [], [], False

    def log(self, values) -> None:
        self.rows.append(values)

    def define_metric(self, name, step_metric) -> None:
        self.metrics.append((name, step_metric))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("variable", "mode"), [(None, "offline"), ("online", "online")])
def test_wandb_is_offline_unless_asked_and_the_same_run_when_it_goes_on(
    tmp_path, monkeypatch, variable, mode
):
    runs, given = [], []

    class Module:
        @staticmethod
        def init(**arguments):
            given.append(arguments)
            runs.append(FakeWandbRun())
            return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", Module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    config = tiny_config(observe={"sinks": ["wandb"]})
    told = []
    for _ in range(2):
        sinks = open_sinks(config, tmp_path, told.append)
        sinks.log(7, {"reward/mean": 0.5})
        sinks.close()
    assert told == []
    assert [a["mode"] for a in given] == [mode] * 2
    assert given[0]["id"] == given[1]["id"]
    assert given[0]["resume"] == "allow"
    assert runs[0].rows == [{"reward/mean": 0.5, "step": 7}]
    assert runs[0].metrics == [("*", "step")]
    assert runs[0].finished


def test_mlflow_gets_steps_in_batches_and_an_end(tmp_path, monkeypatch):
    import types

    calls = []

    class Client:
        def __init__(self, tracking_uri) -> None:
            calls.append(("at", tracking_uri))

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name) -> str:
            return "4"

        def create_run(self, experiment, run_name):
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def log_batch(self, run, metrics) -> None:
            calls.append(("batch", run, len(metrics), metrics[0][:2], metrics[0][3]))

        def set_terminated(self, run) -> None:
            calls.append(("end", run))

    modules = {"mlflow": {}, "mlflow.tracking": {"MlflowClient": Client}}
    modules["mlflow.entities"] = {"Metric": lambda *row: row}
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told = []
    sinks = open_sinks(tiny_config(observe={"sinks": ["mlflow"]}), tmp_path, told.append)
    sinks.log(3, {f"reward/part/{k}": float(k) for k in range(1001)})
    sinks.close()
    assert told == []
    assert calls == [
        ("at", (tmp_path / "sinks" / "mlflow").as_uri()),
        ("run", "4", "tiny"),
        ("batch", "r", 1000, ("reward/part/0", 0.0), 3),
        ("batch", "r", 1, ("reward/part/1000", 1000.0), 3),
        ("end", "r"),
    ]


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra, and not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = []
    sinks = open_sinks(tiny_config(observe={"sinks": ["tensorboard"]}), tmp_path, told.append)
    for step, reward in ((1, 0.25), (2, 0.5)):
        sinks.log(step, {"reward/mean": reward})
    sinks.close(timeout_s=120)
    assert told == []
    events = EventAccumulator(str(tmp_path / "sinks" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
