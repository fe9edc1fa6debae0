"""Jobs, against a client written by hand."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w

from actors.jobs import (
    job_folder,
    jobs,
)
from actors.jobs.dashboard_calls import ENDED
from rlhf_cluster.config import load_run
from rlhf_cluster.errors import ConfigError, RunError, StalledError
from tests.support.builders.cluster_jobs import (
    ADDRESS,
    PYTHON,
    FakeClient,
    FakeTime,
    make_job,
    told,
)
from tests.support.builders.offline_stages import stage_tree
from tests.support.builders.run_configs import tiny_config

TOML = """
[run]
name = "tiny"
root = "/shared/runs"
steps = 3
groups_per_step = 4
[model.init]
hidden_size = 128
num_layers = 1
[data]
path = "data/prompts.jsonl"
max_prompt_tokens = 8
[generation]
max_response_tokens = 8
[scoring]
rewards = [{type = "exact_match"}]
[learner]
learning_rate = 1e-3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(TOML)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text("{}\n")
    (tmp_path / "data" / "private.txt").write_text("not for the cluster")
    return tmp_path


def submit(client, *overrides, run_name=None):
    return jobs.submit(
        Path("run.toml"),
        list(overrides),
        ADDRESS,
        run_name,
        client=client,
        waiting=FakeTime().waiting,
    )


def test_a_job_gets_the_configuration_the_code_and_its_prompts_and_nothing_else(here):
    client = FakeClient()
    assert submit(client, "run.steps=5", "data.prompt_column=be nice; rm -rf /") == "job-new"
    [(entrypoint, files, metadata, config)] = client.submitted
    assert shlex.split(entrypoint)[:5] == [PYTHON, "-m", "rlhf_cluster.cli", "run", "run.toml"]
    assert "data.prompt_column=be nice; rm -rf /" in shlex.split(entrypoint)
    assert metadata == {"rlhf_run": "tiny"}
    assert config["run"]["name"] == "tiny"
    assert {"rlhf_cluster/cli/commands.py", "actors/jobs/jobs.py", "data/prompts.jsonl"} <= files
    assert "data/private.txt" not in files
    assert not any("__pycache__" in name for name in files)


def test_nothing_is_submitted_where_the_cluster_cannot_run_it(here):
    client = FakeClient(probe_text=told(missing="ModuleNotFoundError: No module named 'typer'"))
    with pytest.raises(RunError, match="No module named 'typer'"):
        submit(client)
    assert client.submitted == []
    assert len(client.probes) == 1


def test_the_cluster_is_asked_for_its_python_with_the_files_that_the_job_gets(here):
    client = FakeClient()
    submit(client)
    assert client.probes[0][1] == client.submitted[0][1]


def test_the_override_of_a_job_gives_the_run_that_was_checked(here):
    client = FakeClient()
    submit(client, "run.steps=5", run_name="other")
    entrypoint, _, metadata, _ = client.submitted[0]
    words = shlex.split(entrypoint)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert load_run("run.toml", overrides) == load_run(
        "run.toml", ["run.steps=5", "run.name=other"]
    )
    assert metadata == {"rlhf_run": "other"}


def test_a_job_joins_the_cluster_that_runs_it(here):
    client = FakeClient()
    submit(client, "cluster.address=ray://elsewhere:10001")
    assert "cluster.address=auto" in shlex.split(client.submitted[0][0])


def test_a_run_name_in_use_is_refused_until_its_job_has_ended(here):
    client = FakeClient(jobs=[make_job("job-1", "tiny", "RUNNING")])
    with pytest.raises(RunError, match=r"run 'tiny' is already running as job job-1.*--run-id"):
        submit(client)
    assert client.submitted == []
    for ended in ENDED:
        assert submit(FakeClient(jobs=[make_job("job-1", "tiny", ended)])) == "job-new"
    assert submit(client, run_name="other") == "job-new"


@pytest.mark.parametrize(
    ("override", "key"), [("run.root=runs", "run.root"), ("weights.root=shm", "weights.root")]
)
def test_a_run_directory_that_no_other_node_finds_is_refused(here, override, key):
    client = FakeClient()
    with pytest.raises(ConfigError, match=rf"{key} = .* relative.*--set {key}=/shared"):
        submit(client, override)
    assert client.submitted == []


def test_a_prompt_file_too_large_to_send_is_refused(here):
    os.truncate(here / "data" / "prompts.jsonl", job_folder.MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match=r"data\.path = .* 52428801 bytes, 52428800 at most"):
        submit(FakeClient())


def test_the_module_of_a_reward_function_travels_with_the_job(here, tmp_path):
    (here / "my_rewards.py").write_text("def score(): ...")
    config = load_run("run.toml")
    reward = SimpleNamespace(function="my_rewards:score")
    scoring = config.scoring.model_copy(update={"rewards": [reward]})
    target = tmp_path / "packed"
    target.mkdir()
    changed = config.model_copy(update={"scoring": scoring})
    work = job_folder.Work(name="tiny", configs=(changed,), overrides=())
    job_folder.pack(target, here / "run.toml", work, Path.cwd())
    assert (target / "my_rewards.py").exists()


def test_the_files_of_a_stage_travel_with_its_job(here):
    write_stages(here)
    client = FakeClient()
    submit(client)
    _, files, metadata, config = client.submitted[0]
    assert "data/sft.jsonl" in files
    assert metadata == {"rlhf_run": "tiny"}
    assert config["stage"] == {"type": "sft"}


def test_a_pipeline_is_one_job_with_the_files_of_all_its_stages(here):
    write_stages(here, "first", "second")
    client = FakeClient()
    submit(client, "stages.second.cluster.address=ray://elsewhere:10001", run_name="other")
    entrypoint, files, metadata, config = client.submitted[0]
    assert {"data/first.jsonl", "data/second.jsonl"} <= files
    assert metadata == {"rlhf_run": "other"}
    assert list(config["stages"]) == ["first", "second"]
    words = shlex.split(entrypoint)
    assert words[-4:] == ["--set", "pipeline.name=other", "--set", words[-1]]
    assert words[-1] == "stages.second.cluster.address=auto"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("pipeline.root=runs", "pipeline.root"),
        ('stages.a.model={path="here"}', "stages.a.model.path"),
    ],
)
def test_a_folder_of_a_pipeline_that_no_other_node_finds_is_refused(here, override, key):
    write_stages(here, "a")
    (here / "here").mkdir()
    with pytest.raises(ConfigError, match=rf"{key} = .* relative.*--set {key}=/shared"):
        submit(FakeClient(), override)


def write_stages(here, *names):
    """A stage as the run file, or a pipeline of stages with these names, each with its own data."""
    trees = {}
    for name in names or ("sft",):
        trees[name] = stage_tree(data={"sources": [{"path": f"data/{name}.jsonl"}]})
        (here / "data" / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}')
        if names:
            del trees[name]["run"]["name"]
        else:
            trees[name]["run"]["root"] = "/shared/runs"
    pipeline = {"pipeline": {"name": "p", "root": "/shared/runs"}, "stages": trees}
    (here / "run.toml").write_text(tomli_w.dumps(pipeline if names else trees["sft"]))


def test_a_job_is_found_by_id_or_by_run_the_live_one_first():
    client = FakeClient(
        jobs=[
            make_job("job-1", "tiny", "RUNNING", start_s=1),
            make_job("job-2", "tiny", "FAILED", start_s=2),
            make_job("job-3", None, "RUNNING", start_s=3),
        ]
    )
    assert jobs.status("tiny", ADDRESS, client=client)["job"] == "job-1"
    found = jobs.status("job-2", ADDRESS, client=client)
    assert (found["run"], found["state"], found["started_s"]) == ("tiny", "FAILED", 2.0)
    assert found["message"] == "message of job-2"
    with pytest.raises(RunError, match="nothing: no job"):
        jobs.status("nothing", ADDRESS, client=client)


def test_the_tail_of_a_log():
    client = FakeClient(jobs=[make_job("job-1", "tiny", "RUNNING")], text="a\nb\nc\n")
    assert list(jobs.logs("tiny", ADDRESS, client=client)) == ["a", "b", "c"]
    assert list(jobs.logs("tiny", ADDRESS, 2, client=client)) == ["b", "c"]
    assert client.tails == [("job-1", "node-1", 2)], "no more than that is read"
    with pytest.raises(RunError, match=r"logs/learner-0\.log"):
        list(jobs.logs("tiny", ADDRESS, actor="learner-0", client=client))


def test_following_a_job_gives_every_line_once_and_ends_with_it():
    def write(text):
        return lambda client: setattr(client, "text", client.text + text)

    def end(client):
        client.text += "last"
        client.jobs = [make_job("job-1", "tiny", "SUCCEEDED")]

    client = FakeClient(
        jobs=[make_job("job-1", "tiny", "RUNNING")],
        script=[write(""), write("one\ntw"), write("o\n"), write(""), end],
    )
    naps = []
    lines = list(jobs.follow("tiny", ADDRESS, client=client, sleep=naps.append))
    assert lines == ["one", "two", "last"]
    assert len(naps) == 3


def test_n17_following_backs_off_while_nothing_comes_and_where_the_log_is_long():
    def write(text):
        return lambda client: setattr(client, "text", client.text + text)

    def end(client):
        client.jobs = [make_job("job-1", "tiny", "SUCCEEDED")]

    quiet, long = [lambda _: None] * 8, write("x" * 4_000_000 + "\n")
    client = FakeClient(
        jobs=[make_job("job-1", "tiny", "RUNNING")],
        script=[write(""), write("one\n"), *quiet, long, write("two\n"), end],
    )
    naps: list[float] = []
    lines = list(jobs.follow("tiny", ADDRESS, client=client, sleep=naps.append))
    assert [line[:3] for line in lines] == ["one", "xxx", "two"]
    assert naps[naps.index(1.0) :][:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [round(nap) for nap in naps[-2:]] == [8, 8], "4 MB a look, half a megabyte a second"


def test_n17_a_job_has_the_time_that_its_runs_need_to_stop():
    configs = [tiny_config(checkpoint={"notice_s": notice_s}) for notice_s in (45.0, 300.5)]
    assert jobs.stop_grace_s(configs[:1]) == 60
    assert jobs.stop_grace_s(configs) == 301 + 15
    job = make_job("job-1", "tiny", "RUNNING")
    job.metadata["rlhf_stop_grace_s"] = "316"
    naps: list[float] = []
    with pytest.raises(StalledError, match="still runs 632 s"):
        jobs.stop("tiny", ADDRESS, client=FakeClient(jobs=[job]), sleep=naps.append)
    assert sum(naps) == 632


def test_a_stopped_job_is_seen_to_end():
    def end(client):
        client.jobs = [make_job("job-1", "tiny", "STOPPED")]

    client = FakeClient(
        jobs=[make_job("job-1", "tiny", "RUNNING")],
        script=[lambda _: None, lambda _: None, end],
    )
    naps = []
    jobs.stop("tiny", ADDRESS, client=client, sleep=naps.append)
    assert client.stopped == ["job-1"]
    assert len(naps) == 1
    with pytest.raises(RunError, match="already ended: STOPPED"):
        jobs.stop("tiny", ADDRESS, client=client)


def test_a_run_is_scaled_by_a_job_that_asks_it_on_its_cluster():
    def end(client):
        client.jobs.append(make_job("job-new", None, "SUCCEEDED"))
        client.text = "noise of Ray\n  generation  3 workers\n"

    live = make_job("job-1", "tiny", "RUNNING")
    asked = make_job("job-new", None, "RUNNING")
    client = FakeClient(
        jobs=[live, asked],
        script=[lambda _: None, lambda _: None, lambda c: c.jobs.remove(asked) or end(c)],
    )
    naps = []
    found = jobs.scale("job-1", {"generation": 3}, ADDRESS, client=client, sleep=naps.append)
    assert found == {"generation": "3 workers"}
    assert len(naps) == 1
    [(entrypoint, files, metadata, _)] = client.submitted
    words = "/opt/env/bin/python -m rlhf_cluster.cli scale tiny generation=3 --address auto"
    assert shlex.split(entrypoint) == words.split()
    assert {"rlhf_cluster/cli/commands.py", "actors/services/control_actor.py"} <= files
    assert metadata == {}, "it is not the run, and the run's name stays the run's"


def test_only_a_live_run_is_scaled_and_a_refusal_is_an_error():
    client = FakeClient(jobs=[make_job("job-1", "tiny", "STOPPED")])
    with pytest.raises(RunError, match="job-1 has ended: STOPPED. Only a live run"):
        jobs.scale("tiny", {"generation": 3}, ADDRESS, client=client)
    assert client.submitted == []
    refused = make_job("job-new", None, "FAILED")
    refused.message = "Job failed, last logs:\nerror: tiny: generation refused: no room\n\n"
    client = FakeClient(jobs=[make_job("job-1", "tiny", "RUNNING"), refused])
    with pytest.raises(RunError, match="tiny: not scaled: error: tiny: generation refused: no r"):
        jobs.scale("tiny", {"generation": 3}, ADDRESS, client=client)


def test_a_job_that_does_not_stop_is_an_error_and_not_a_wait_for_ever():
    client = FakeClient(jobs=[make_job("job-1", "tiny", "RUNNING")])
    with pytest.raises(StalledError, match="still runs"):
        jobs.stop("tiny", ADDRESS, client=client, sleep=lambda _: None)
