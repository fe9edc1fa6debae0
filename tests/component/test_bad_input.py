"""Bad input as a user meets it: the real command line, one clear message, nothing touched.

Every refusal happens beside a finished run of the same name and with --overwrite, so that a run
which starts too early would be seen to delete or write something.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from rlhf_cluster.cli.commands import main
from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.sections.every_run import ModelInit
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)
from tests.support.processes.free_ports import free_ports

REPOSITORY = Path(__file__).parents[2]
REWARDS = """
import no_such_package
def reward(prompts, completions, **columns):
    return [1.0] * len(completions)
"""
# Which fault a group meets is in the first digit of its prompt; half of them score.
FAULTS = """
import time
def reward(prompts, completions, **columns):
    first = int(prompts[0][0])
    if first == 0:
        raise ZeroDivisionError("on purpose")
    if first == 1:
        time.sleep(3600)
    if first == 2:
        return [0.25] * (len(completions) - 1)
    value = {3: float("nan"), 4: None}.get(first, 0.25)
    return [value] * len(completions)
"""
JSONL = '{"question": "1+1=", "answer": "2"}\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file, data, and a finished run of the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "http://nobody")  # going on to a cluster would show
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tiny_tree()))
    (tmp_path / "good.jsonl").write_text(JSONL * 4)
    (tmp_path / "malformed.jsonl").write_text(JSONL * 2 + '{"question": \n' + JSONL)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "long.jsonl").write_text(
        JSONL + json.dumps({"question": "1+1+1+1+1+1+1=", "answer": "7"}) + "\n"
    )
    (tmp_path / "broken_rewards.py").write_text(REWARDS)
    (tmp_path / "not.toml").write_text("[run\nname = 3")
    config = tiny_config().with_absolute_paths()
    with RunDir.create(tmp_path / "runs" / "tiny", config) as finished:
        finished.write_summary({"run": "tiny", "reward_after": 0.5})
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`: a model with its tokenizer. `misfit`: a model with fewer embeddings than tokens."""
    folder = tmp_path_factory.mktemp("models")
    good = make_model(ModelInit(hidden_size=128, num_layers=1), folder / "good", seed=0)
    shutil.copytree(good, folder / "misfit")
    config = json.loads((good / "config.json").read_text())
    (folder / "misfit" / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    (folder / "no_tokenizer").mkdir()
    shutil.copy(good / "config.json", folder / "no_tokenizer")
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder` with what would change if someone wrote it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            stat = path.stat()
            found[str(path)] = (stat.st_mtime_ns if path.is_file() else 0, stat.st_size)
    return found


def refusal(capfd: pytest.CaptureFixture[str], config: str, *overrides: str) -> str:
    """The message that `run --overwrite` ends with; everything around it is checked here."""
    before = contents(Path.cwd())
    words = [word for text in overrides for word in ("--set", text)]
    code = main(["run", config, "--overwrite", *words])
    captured = capfd.readouterr()
    assert code == 1, captured
    assert captured.err.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert "unexpected" not in captured.err
    assert captured.out == ""
    assert contents(Path.cwd()) == before
    return captured.err


def from_file(name: str) -> list[str]:
    """Overrides that take the prompts from a file of the current folder instead of the task."""
    data = f"data={{path='{name}', prompt_column='question', max_prompt_tokens=8}}"
    return [data, "scoring.rewards=[{type='exact_match'}]"]


CASES = {
    "an unknown key": (["run.stepz=3"], ["run.stepz: unknown key", "did you mean 'steps'"]),
    "an unknown section": (["genration.workers=2"], ["genration", "did you mean 'generation'"]),
    "a wrong type": (["run.steps='many'"], ["run.steps", "'many'", "integer"]),
    "a number out of range": (["run.steps=0"], ["run.steps", "greater than 0", "found 0"]),
    "an override without a value": (["run.steps"], ["--set 'run.steps'", "section.key=value"]),
    "an unknown algorithm": (["algorithm.type='pppo'"], ["algorithm", "'pppo'", "'grpo'"]),
    "an unknown reward": (
        ["scoring.rewards=[{type='exakt'}]"],
        ["unknown type 'exakt'; expected one of 'code', ", "'exact_match'"],
    ),
    "KL without a reference": (
        ["algorithm.kl_coef=0.1"],
        ["algorithm.kl_coef = 0.1", "scoring.reference = true", "Turn the reference on"],
    ),
    "versions that are never published": (
        ["weights.publish_every=5"],
        ["weights.publish_every = 5", "staleness.max_staleness + 1 = 2", "Publish more often"],
    ),
    "a quantisation that the engine gets wrong": (
        ["generation.quantization='fp8'"],
        ["generation.quantization = 'fp8'", "Use one of int8, fp8_per_channel"],
    ),
    "no prompt source": (["data={max_prompt_tokens=8}"], ["data.task", "data.path"]),
    "a data file that is not there": (
        from_file("absent.jsonl"),
        ["absent.jsonl: no such file", "Set data.path"],
    ),
    "a data file of another kind": (from_file("run.toml"), ["'.toml'", ".jsonl or .parquet"]),
    "a variable that is not set": (
        from_file("${RLHF_NO_SUCH_FOLDER}/x.jsonl"),
        ["RLHF_NO_SUCH_FOLDER is not set", "Export"],
    ),
    "a malformed line": (from_file("malformed.jsonl"), ["malformed.jsonl, line 3", "JSON"]),
    "an empty data set": (from_file("empty.jsonl"), ["empty.jsonl: has no rows", "at least one"]),
    "a column that is not there": (
        [*from_file("good.jsonl"), "data.prompt_column='prompt'"],
        ["good.jsonl, line 1: no column 'prompt'", "'question'", "data.prompt_column"],
    ),
    "a prompt that is too long": (
        from_file("long.jsonl"),
        ["1 of 2 prompts are longer than data.max_prompt_tokens = 8", "line 2", "15 tokens"],
    ),
    "sequences longer than the model": (
        ["data.max_prompt_tokens=60"],
        ["60 + 8 = 68 is over model.init.max_position = 64", "Lower the lengths, or raise"],
    ),
    "no chat template": (
        [*from_file("good.jsonl"), "data.template='chat'"],
        ["chat template", "data.template"],
    ),
    "a model that is not there": (
        ["model={path='/no/such/model'}"],
        ["/no/such/model: no such folder"],
    ),
    "an impossible made model": (
        ["model.init.num_heads=8"],
        ["hidden_size / num_heads = 128 / 8 = 16", "take hidden_size = 256"],
    ),
    "a reward module that is not there": (
        ["scoring.rewards=[{type='python', function='absent_rewards:score'}]"],
        ["absent_rewards:score cannot be imported: ", "'absent_rewards'. Give module:function"],
    ),
    "a reward module that does not import": (
        ["scoring.rewards=[{type='python', function='broken_rewards:reward'}]"],
        [
            "broken_rewards:reward cannot",
            "No module named 'no_such_package' (broken_rewards.py, line 2)",
        ],
    ),
    "a reward function that is not there": (
        ["scoring.rewards=[{type='python', function='json:score'}]"],
        ["json:score cannot be imported", "has no attribute 'score'"],
    ),
    "a reward column that is not there": (
        ["scoring.rewards=[{type='exact_match', target_column='gold'}]"],
        ["no column 'gold'"],
    ),
    "more held-out prompts than there are": (
        [*from_file("good.jsonl"), "evaluation={path='good.jsonl', num_prompts=9}"],
        ["4 usable prompts", "evaluation.num_prompts = 9"],
    ),
}


@pytest.mark.parametrize(("overrides", "fragments"), CASES.values(), ids=CASES)
def test_a_bad_input_is_refused_with_what_where_and_cure(here, capfd, overrides, fragments):
    message = refusal(capfd, "run.toml", *overrides)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ("absent.toml", "absent.toml: cannot read the configuration (No such file or directory)"),
        ("runs", "runs: cannot read the configuration (Is a directory)"),
        ("not.toml", "not.toml: not valid TOML"),
    ],
)
def test_a_run_file_that_cannot_be_read_is_named(here, capfd, config, fragment):
    assert fragment in refusal(capfd, config)


def test_a_model_and_a_tokenizer_that_do_not_fit_are_refused(here, models, capfd):
    message = refusal(capfd, "run.toml", f"model={{path='{models}/misfit'}}")
    assert "misfit: the tokenizer has" in message
    assert "the model embeds 8" in message
    message = refusal(capfd, "run.toml", f"model={{path='{models}/no_tokenizer'}}")
    assert "no_tokenizer: no tokenizer can be loaded" in message
    long = [f"model={{path='{models}/good'}}", "data.max_prompt_tokens=60"]
    message = refusal(capfd, "run.toml", *long)
    assert "max_position_embeddings = 64, the run allows sequences of 68 tokens" in message


def test_all_problems_of_a_run_file_are_listed_at_once(here, capfd):
    message = refusal(capfd, "run.toml", "run.stepz=3", "learner.ranks=0", "data.shuffle='no?'")
    assert message.startswith("error: run.toml: 3 problems\n")
    assert [key in message for key in ("run.stepz", "learner.ranks", "data.shuffle")] == [True] * 3


def test_long_prompts_left_out_on_request_are_counted(here, capfd):
    words = [*from_file("long.jsonl"), "data.on_long_prompt='skip'"]
    assert main(["validate", "run.toml", *(w for t in words for w in ("--set", t))]) == 0
    assert "1 prompts are over data.max_prompt_tokens" in capfd.readouterr().out


def test_a_dashboard_port_that_is_taken_is_named(here, capfd, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        port_set = f"cluster={{dashboard=true, dashboard_port={port}}}"
        message = refusal(capfd, "run.toml", port_set)
    assert f"cluster.dashboard_port = {port}: the port is taken" in message
    assert "Choose another" in message


def test_a_run_directory_in_use_is_refused_without_waiting_for_a_cluster(here, capfd):
    with RunDir.create(here / "runs" / "tiny", tiny_config(), overwrite=True):
        message = refusal(capfd, "run.toml")
    assert f"in use by process {os.getpid()}" in message
    assert "--set run.name=NEW" in message


def test_a_finished_run_is_not_overwritten_unasked(here, capfd):
    before = contents(here)
    assert main(["run", "run.toml"]) == 0
    assert "has finished; --overwrite starts it anew" in capfd.readouterr().out
    assert main(["run", "run.toml", "--set", "run.steps=5"]) == 1
    assert "run.steps = 5, was 3" in (message := capfd.readouterr().err)
    assert "--accept-changes" in message
    assert contents(here) == before


def test_bundles_that_do_not_fit_are_refused_with_demand_and_supply(ray_address, here):
    before = contents(here)
    words = ["run", "run.toml", "--overwrite", "--set", "generation.num_cpus=500"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_cluster.cli", *words],
        env={**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the run does not fit the cluster")
    for fragment in ("generation-0 (500 CPU)", "Demand: ", "Supply: ", "Lower the workers"):
        assert fragment in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(here) == before


def test_s23_every_fault_of_a_reward_discards_its_group_with_its_reason(start_run, tmp_path):
    (tmp_path / "faulty_rewards.py").write_text(FAULTS)
    reward = {"type": "python", "function": "faulty_rewards:reward", "timeout_s": 1.0}
    run = start_run(
        run={"steps": 4, "groups_per_step": 8},
        scoring={"rewards": [reward], "max_retries": 0, "max_error_rate": 1.0},
    )
    code, output = run.finish()
    assert code == 0, output
    for reason in ("raised", "timeout", "length", "nan", "none"):
        assert f"[{reason}]" in output
    assert max(r.get("buffer/discarded_total/ScoringError", 0) for r in run.metrics()) >= 5
    rows = [row for p in (run.path / "samples").iterdir() for row in read_samples(p)]
    assert len(rows) == 4 * 16
    assert {row["reward"] for row in rows} == {0.25}, "a fault is discarded, it scores nothing"


def test_a_cluster_that_has_ended_is_told_at_once(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray alone would ask it for many minutes."""
    (port,) = free_ports(1)
    ended = here / "runs" / "tiny"
    (ended / "control.json").write_text(f'{{"ray_address": "127.0.0.1:{port}"}}')
    assert main(["scale", str(ended), "generation=2"]) == 1
    assert "nothing listens there" in capfd.readouterr().err
    join = f"cluster.address='127.0.0.1:{port}'"
    assert "nothing listens there" in refusal(capfd, "run.toml", join)
