"""What docs/rewards.md states: its example runs, and it has every reward and every key."""

import re
import tomllib
from pathlib import Path

import pytest

from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.rewards import REWARDS, build_rewards
from rlhf_cluster.rewards.http_client import RemoteSection
from rlhf_cluster.rewards.programs.code_tests import read_test
from rlhf_cluster.rewards.programs.sandbox import Outcome
from rlhf_cluster.rewards.reward import RewardSection
from rlhf_cluster.rewards.reward_model import ModelSection
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_prompt, make_rollouts

TEXT = Path("docs/rewards.md").read_text()
SECTIONS = {
    config.model_fields["type"].default: config
    for base in (RewardSection, RemoteSection, ReasoningSection, ModelSection)
    for config in base.__subclasses__()
    if "type" in config.model_fields
}
EXPLAINED_ELSEWHERE = {"exact_match", "equations", "python", "reward_model"}


def part(heading: str) -> str:
    return TEXT.partition(f"### {heading}\n")[2].partition("\n##")[0]


def test_the_example_of_five_lines_is_a_reward(tmp_path, monkeypatch):
    example = TEXT.partition("in five lines")[2].partition("\n## ")[0]
    code, section = (
        re.search(rf"```{kind}\n(.*?)```", example, re.DOTALL)[1] for kind in ("python", "toml")
    )
    assert len((code + section).splitlines()) == 5
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    scoring = Scoring.model_validate(tomllib.loads(section)["scoring"])
    built = build_rewards(scoring.rewards, "", "cpu", 60)
    try:
        reward, weight = built["python"]
        prompt = make_prompt(columns={"answer": "4"})
        completions = ["4", "it is 4"]
        rollouts = make_rollouts(prompt, [[5, 1]] * 2)
        assert reward.score(prompt, rollouts, completions) == [0.5, 0.25]
        assert weight == 1.0
    finally:
        for reward, _ in built.values():
            reward.close()


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL))
def test_every_example_is_what_a_run_takes(block):
    scoring = tomllib.loads(block)["scoring"]
    order = scoring.get("objective", {}).get("order", ["example"])
    scoring.setdefault("rewards", [{"type": "exact_match", "name": name} for name in order])
    taken = tiny_config(scoring=scoring).scoring
    assert [reward.type for reward in taken.rewards] == [r["type"] for r in scoring["rewards"]]


def test_the_table_has_every_reward():
    table = TEXT.partition("## All rewards")[2].partition("###")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(REWARDS) == set(SECTIONS)


@pytest.mark.parametrize("kind", sorted(set(SECTIONS) - EXPLAINED_ELSEWHERE))
def test_every_key_of_a_reward_is_explained(kind):
    shown = part(kind)
    if issubclass(SECTIONS[kind], ReasoningSection):
        shown += part("Where a completion states its answer")
    own = set(SECTIONS[kind].model_fields) - set(RewardSection.model_fields) - {"type"}
    if issubclass(SECTIONS[kind], RemoteSection):
        shown += part("Servers")
    assert {key for key in own if f"`{key}" not in shown} == set()


def test_the_shown_tests_of_programs_are_read():
    shown = re.findall(r"^\| `(\{.*\}|\".*\")` \|", part("code"), re.MULTILINE)
    assert len(shown) == 3
    for text in shown:
        read_test(eval(text))


def test_the_outcomes_of_programs_are_those_of_the_sandbox():
    shown = part("code").rpartition("`outcomes/<name>/<outcome>`:")[2].strip(" .\n")
    named = set(re.split(r",\s+", shown))
    assert named == {"passed", "wrong", "no_program", *map(str, Outcome)} - {"ended"}


def test_a_run_takes_every_reward():
    annotation = RunConfig.model_json_schema()["$defs"]["Scoring"]["properties"]["rewards"]
    assert set(annotation["items"]["discriminator"]["mapping"]) == set(REWARDS)
