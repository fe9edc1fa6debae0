"""Names of other frameworks lead to keys that run files have, in errors and in `config`."""

import pytest

from rlhf_cluster.config import RunConfig, StageConfig, validate
from rlhf_cluster.config.reference import all_keys, resolve, sections
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.sections.other_names import OTHER_NAMES, keys_meant
from tests.support.builders.run_configs import tiny_config


def problems(cls, tree) -> str:
    with pytest.raises(ConfigError) as refused:
        validate(cls, tree, "run.toml")
    return str(refused.value)


def test_every_key_of_the_table_exists():
    known = {*sections(), *(key.path for key in all_keys())}
    assert {key for keys in OTHER_NAMES.values() for key in keys} <= known


def test_no_name_of_the_table_is_lost_to_its_spelling():
    assert all(keys_meant(name) for name in OTHER_NAMES)
    assert keys_meant("trainer.Max-Steps") == ("run.steps",)


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("learner.lr", "learner.learning_rate"),
        ("learner.gpus", "learner.num_gpus or generation.num_gpus"),
        ("run.batch_size", "run.groups_per_step"),
        ("generation.temp", "generation.temperature"),
        ("generation.max_new_tokens", "generation.max_response_tokens"),
        ("algorithm.num_generations", "algorithm.group_size"),
        ("algorithm.beta", "algorithm.kl_coef or algorithm.loss.beta"),
    ],
)
def test_an_unknown_key_of_a_run_file_suggests_what_was_meant(place, meant):
    section, _, name = place.partition(".")
    tree = tiny_config().model_dump()
    tree[section][name] = 1
    text = problems(RunConfig, tree)
    assert f"{name}: unknown key; did you mean {meant}?" in text
    with pytest.raises(ConfigError, match=f"did you mean {meant.partition(' ')[0]}"):
        resolve(place)


def test_only_keys_of_this_kind_of_file_are_suggested():
    text = problems(StageConfig, {"run": {"batch_size": 1}, "stage": {"type": "sft"}})
    assert "run.batch_size: unknown key; did you mean run.units_per_step?" in text


def test_a_key_in_the_wrong_section_suggests_its_own():
    tree = tiny_config().model_dump()
    text = problems(RunConfig, tree | {"seed": 3})
    assert "seed: unknown key; did you mean run.seed?" in text


def test_a_misspelt_key_suggests_the_nearest_of_its_section():
    tree = tiny_config().model_dump()
    tree["learner"]["learning_rte"] = 1
    assert "unknown key; did you mean 'learning_rate'?" in problems(RunConfig, tree)
