"""Types of other packages: what is found and refused, and that a broken one costs its users only."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.planning.doctor import try_installed
from rlhf_cluster.rewards import REWARDS
from rlhf_cluster.sections.section import Section
from tests.support.builders.run_configs import tiny_config

REWARD = """
from rlhf_cluster.rewards.reward import RewardSection
class Keys(RewardSection):
    type: str
    words: int = 1
class Shout:
    section_class = Keys
    def __init__(self, section, context): self.section = section
    def score(self, prompt, rollouts, completions): return [1.0] * len(completions)
    def close(self): ...
def plain(prompts, completions, **columns): ...
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(package, name, target): a package with one reward as entry point, as pip leaves it."""

    def install(package: str, name: str, target: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[rlhf_cluster.rewards]\n{name} = {target}\n")
        (folder / f"{package}_code.py").write_text(REWARD)
        (folder / f"{package}_broken.py").write_text("import no_such_library\n")
        monkeypatch.syspath_prepend(str(folder))

    yield install
    for name in [name for name in sys.modules if name.startswith(("loud_", "noisy_"))]:
        del sys.modules[name]


def rewarded(**reward: Any) -> RunConfig:
    return tiny_config(scoring={"rewards": [reward]})


def refused(**reward: Any) -> str:
    with pytest.raises(ConfigError) as error:
        rewarded(**reward)
    assert pickle.loads(pickle.dumps(error.value)).args == error.value.args
    return str(error.value)


@pytest.mark.parametrize("type", ["shout", "loud_code:Shout"])
def test_a_type_of_another_package_is_found_by_its_name_and_by_its_path(site: Any, type: str):
    site("loud", "shout", "loud_code:Shout")
    config = rewarded(type=type, words=3)
    [section] = config.scoring.rewards
    assert (section.type, section.words) == (type, 3)  # type: ignore[attr-defined]
    assert REWARDS[section.type].__name__ == "Shout"
    assert "shout" not in list(REWARDS)


@pytest.mark.filterwarnings("error")
def test_a_run_file_with_it_is_stored_read_again_and_sent(site: Any):
    site("loud", "shout", "loud_code:Shout")
    config = rewarded(type="shout", words=3)
    assert config.model_dump(mode="json")["scoring"]["rewards"][0]["words"] == 3
    assert validate(RunConfig, config.model_dump(mode="json"), "resolved.json") == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_node_without_the_package_says_so(site: Any, monkeypatch: pytest.MonkeyPatch):
    site("loud", "shout", "loud_code:Shout")
    sent = pickle.dumps(rewarded(type="shout"))
    del sys.modules["loud_code"]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("/loud")])
    with pytest.raises(
        ConfigError, match=r"'loud_code:Keys' on node .*No module named 'loud_code'"
    ):
        pickle.loads(sent)


def test_an_unknown_type_lists_what_there_is(site: Any):
    site("loud", "shout", "loud_code:Shout")
    message = refused(type="shuot")
    assert "scoring.rewards.0: unknown type 'shuot'; expected one of 'code', 'ensemble'" in message
    assert "installed by other packages: 'shout'" in message


def test_a_package_that_does_not_import_costs_the_runs_that_name_it(site: Any):
    site("loud", "shout", "loud_broken:Shout")
    assert rewarded(type="exact_match").scoring.rewards
    message = refused(type="shout")
    assert "reward 'shout' of the package loud 1.2 cannot be imported" in message
    assert "ModuleNotFoundError: No module named 'no_such_library'" in message
    [(name, package, fault)] = try_installed([REWARDS])
    assert (name, package) == ("reward shout", "loud 1.2")
    assert "no_such_library" in fault


def test_two_packages_with_one_name_are_refused(site: Any):
    site("loud", "shout", "loud_code:Shout")
    site("noisy", "shout", "noisy_code:Shout")
    assert "'shout' is in more than one package: noisy 1.2, loud 1.2" in refused(type="shout")
    assert rewarded(type="noisy_code:Shout").scoring.rewards


def test_a_package_that_takes_a_built_in_name_is_refused_where_the_name_is_used(site: Any):
    site("loud", "length", "loud_code:Shout")
    message = refused(type="length", free_tokens=1, full_tokens=2)
    assert "'length' is in more than one package: rlhf-cluster (built in), loud 1.2" in message
    assert rewarded(type="exact_match").scoring.rewards


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (
            {"type": "loud_code:Shout", "word": 1},
            "rewards.0: word: unknown key; did you mean 'words'",
        ),
        ({"type": "loud_code:Shout", "words": "many"}, "rewards.0: words: Input should be a valid"),
        ({"type": "loud_code:Loud"}, "module 'loud_code' has no attribute 'Loud'"),
        ({"type": "loud_code:plain"}, "{ type = 'python', function = 'loud_code:plain' }"),
        ({"type": "no_such_package:Shout"}, "No module named 'no_such_package'"),
    ],
)
def test_what_is_wrong_with_a_section_is_said(site: Any, reward: dict[str, Any], expected: str):
    site("loud", "shout", "loud_code:Shout")
    assert expected in refused(**reward)


def test_a_module_of_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "loud_here.py").write_text(REWARD)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert rewarded(type="loud_here:Shout").scoring.rewards


def test_sections_of_this_project_are_pickled_as_they_are():
    section = tiny_config().scoring
    assert isinstance(section, Section)
    assert b"restore_section" not in pickle.dumps(section)


def test_a_section_of_another_kind_is_refused_with_the_class_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "wrong_base.py").write_text(
        "from rlhf_cluster.sections.section import Section\n"
        "class Keys(Section):\n    type: str\n"
        "class Wrong:\n    section_class = Keys\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = refused(type="wrong_base:Wrong")
    assert "its section Keys is not a subclass of rlhf_cluster.rewards.reward.RewardSection" in told
    with pytest.raises(ConfigError, match="not a subclass of .*AlgorithmSection"):
        tiny_config(algorithm={"type": "wrong_base:Wrong"})


def test_a_path_to_a_script_that_exits_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_script.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "SystemExit: 3" in refused(type="a_script:Main")
