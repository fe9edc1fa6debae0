"""docs/extending.md: its code is that of docs/examples, and every example does what the page says."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from actors.jobs import job_folder
from rlhf_cluster.algorithms import build_algorithm
from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError, WeightError
from rlhf_cluster.observe.metric_table import TABLE, read_table
from rlhf_cluster.observe.sinks import check_sinks, open_sinks
from rlhf_cluster.rewards import build_rewards
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.weights.read_version import read
from tests.support.builders.preference_ranks import gradients, random_pairs, stage_ranks
from tests.support.builders.run_configs import tiny_config, tiny_tree
from tests.support.builders.scored_groups import score
from tests.support.builders.small_weights import small_model
from tests.support.builders.tiny_learner import loss_inputs, random_groups
from tests.support.builders.weight_transports import Stand

EXAMPLES = Path("docs/examples").absolute()
TEXT = Path("docs/extending.md").read_text()
SHOWN = re.findall(r"\*\*`docs/examples/([\w.]+)`\*\*\n\n```\w+\n(.*?)```", TEXT, re.DOTALL)
SECTIONS = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)]

start_stage = pytest.fixture(stage_ranks)


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def shown(key: str, table: str) -> Any:
    """The last table of the page that has `key` in `table`; the first example is of README.md."""
    return [part[table] for part in SECTIONS if key in part.get(table, {})][-1]


def test_the_page_shows_every_example_as_it_is():
    own = {"grpo_in_60_lines.py", "loop.py"}
    assert {name for name, _ in SHOWN} == {p.name for p in EXAMPLES.iterdir() if p.is_file()} - own
    for name, code in SHOWN:
        assert code == (EXAMPLES / name).read_text(), name
        assert len(code.splitlines()) <= 60, name


def test_the_reward_scores():
    config = tiny_config(scoring=shown("rewards", "scoring"))
    built = build_rewards(config.scoring.rewards, "", "cpu")
    [(reward, weight)] = built.values()
    assert weight == 0.5
    assert score(reward, "HELLO there", "no", "ALL OF IT") == [0.5, 0.0, 1.0]
    assert list(built) == ["capitals"]


def test_the_reward_refuses_what_it_cannot_score():
    config = tiny_config(scoring=shown("rewards", "scoring"))
    [(reward, _)] = build_rewards(config.scoring.rewards, "", "cpu").values()
    assert score(reward, "A B", columns={"language": "English"}) == [1.0]
    with pytest.raises(RewardFailure, match="Japanese has no capitals"):
        score(reward, "A B", columns={"language": "Japanese"})


def test_the_algorithm_trains_relative_to_the_median():
    config = tiny_config(algorithm=shown("group_size", "algorithm"))
    algorithm = build_algorithm(config.algorithm, 24)
    groups = random_groups(0, num_groups=1, group_size=3, rewards=[3.0, 0.0, 1.0])
    found = [float(tokens[0]) for tokens in algorithm.advantages(groups)[0]]
    assert found == [2.0, -1.0, 0.0]
    learner = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    inputs = loss_inputs(learner, learner.detach(), torch.ones(3), lengths=[3])
    losses, sums = algorithm.loss(inputs)
    torch.testing.assert_close(losses, -torch.ones(3), check_dtype=False)
    assert "learner/clip_fraction" in sums


def test_the_preference_loss_trains_a_rank(start_stage: Callable[..., Any]):
    rank = start_stage(shown("loss", "stage"))
    units = random_pairs(4)
    assert rank.evaluate(units)["preference/loss"] == pytest.approx(1.0)  # margin 0 at the start
    assert any(gradient.abs().sum() > 0 for gradient in gradients(rank, units).values())


def test_the_stage_trains_a_rank(start_stage: Callable[..., Any]):
    rank = start_stage(shown("min_distance", "stage"))
    units = random_pairs(4)
    before = rank.evaluate(units)["sft/loss"]
    for _ in range(5):
        rank.train(units)
    assert rank.evaluate(units)["sft/loss"] < before


def test_the_sink_gets_the_metrics(tmp_path: Path):
    config = tiny_config(observe=shown("sinks", "observe"))
    check_sinks(config.observe.sinks)
    told: list[str] = []
    for step in (1, 2):  # the second is a resumed run
        sinks = open_sinks(config, tmp_path, told.append)
        sinks.log(step, {"reward/mean": 0.25})
        sinks.close()
    [name] = config.observe.sinks
    written = (tmp_path / "sinks" / name / "metrics.csv").read_text().split()
    assert (written, told) == (["1,reward/mean,0.25", "2,reward/mean,0.25"], [])


def test_the_transport_brings_a_version_and_damage_is_found(tmp_path: Path):
    from fsspec_transport import FsspecSource  # type: ignore[import-not-found]

    tensors = small_model()
    version = Stand(tmp_path / "here").publish(0, tensors)
    storage = fsspec.filesystem("memory")
    storage.put(version.path, "/extending/v000000", recursive=True)
    source = FsspecSource("memory://extending")
    assert source.has(0)
    found = dict(read(version.path, expected_digest=version.digest, source=source))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    [first, *_] = [name for name in storage.find("/extending") if name.endswith(".safetensors")]
    data = bytearray(storage.cat_file(first))
    data[-1] ^= 1
    storage.pipe_file(first, bytes(data))
    with pytest.raises(WeightError, match="safetensors"):
        dict(read(version.path, source=source))
    with pytest.raises(WeightError, match="v000007"):
        source.manifest(7)


def test_the_row_of_the_metric_is_one_of_the_table():
    row = (EXAMPLES / "new_metric.txt").read_text()
    [name] = read_table(TABLE + row).keys() - read_table(TABLE).keys()
    assert name == "learner/median_advantage"


def test_the_configuration_key_is_checked():
    import configuration_key  # type: ignore[import-not-found]

    tree = {**tiny_tree(), "pause": shown("at_step", "pause")}
    found = validate(configuration_key.Sections, tree, "run.toml")
    assert found.pause.at_step == 2
    configuration_key.check_pause(found)
    with pytest.raises(
        ConfigError, match=r"pause: at_setp|pause\.at_setp: unknown key; did you mean"
    ):
        validate(configuration_key.Sections, {**tree, "pause": {"at_setp": 2}}, "run.toml")
    late = validate(configuration_key.Sections, {**tree, "pause": {"at_step": 9}}, "run.toml")
    with pytest.raises(ValueError, match=r"pause\.at_step = 9 is over run\.steps = 3"):
        configuration_key.check_pause(late)


def test_modules_that_a_run_file_names_travel_with_a_job(tmp_path: Path):
    here, target = tmp_path / "here", tmp_path / "job"
    here.mkdir()
    target.mkdir()
    (here / "run.toml").write_text("")
    for name in ("shout_reward.py", "median_algorithm.py", "csv_sink.py"):
        (here / name).write_text((EXAMPLES / name).read_text())
    config = tiny_config(
        scoring=shown("rewards", "scoring"),
        algorithm=shown("group_size", "algorithm"),
        observe=shown("sinks", "observe"),
    )
    work = job_folder.Work(name="tiny", configs=(config,), overrides=())
    job_folder.pack(target, here / "run.toml", work, here)
    sent = {path.name for path in target.glob("*.py")}
    assert sent == {"shout_reward.py", "median_algorithm.py", "csv_sink.py"}
