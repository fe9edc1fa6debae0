"""The table of algorithms, what a run file may choose, and combinations that are refused."""

import typing
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.algorithms import ALGORITHMS, AlgorithmConfig, Grpo, GrpoConfig, build_algorithm
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from tests.support.builders.run_configs import tiny_tree


def configured(algorithm: dict[str, Any], **sections: Any) -> Any:
    tree = tiny_tree(**{"scoring": {"reference": True}, **sections})
    return validate(RunConfig, {**tree, "algorithm": algorithm}, source="run.toml").algorithm


def refused(algorithm: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        configured(algorithm, **sections)
    return str(error.value)


def test_the_union_and_the_table_have_the_same_members_under_their_own_names() -> None:
    union = typing.get_args(typing.get_args(AlgorithmConfig)[0])
    assert {c.model_fields["type"].default for c in union} == set(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        teacher = {"teacher": "t"} if name == "on_policy_distillation" else {}
        config = configured({"type": name, "group_size": 4}, scoring={"reference": True, **teacher})
        built = build_algorithm(config, 64)
        assert type(built) is algorithm
        assert (config.type, built.group_size, built.config) == (name, 4, config)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_has_its_section_in_the_documents(name: str) -> None:
    lines = Path("docs/algorithms.md").read_text().splitlines()
    assert any(line.startswith("## ") and f"`{name}`" in line for line in lines)


def test_without_a_type_the_algorithm_is_grpo() -> None:
    assert configured({"group_size": 3}) == GrpoConfig(group_size=3)
    assert validate(RunConfig, _without_algorithm(), source="run.toml").algorithm == GrpoConfig()


def _without_algorithm() -> dict[str, Any]:
    return {name: section for name, section in tiny_tree().items() if name != "algorithm"}


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown type": ({"type": "pppo"}, ["unknown type 'pppo'", "'gspo'", "'sapo'"]),
    "a key of another algorithm": (
        {"type": "sapo", "clip_low": 0.1},
        ["algorithm.sapo.clip_low: unknown key"],
    ),
    "a misspelt key": ({"type": "dapo", "overlong_filtr": True}, ["mean 'overlong_filter'"]),
    "gspo with a token weight": (
        {"type": "gspo", "correction": {"type": "token_tis"}},
        ["correction.type = 'token_tis' with type = 'gspo'", "'geometric_tis'"],
    ),
    "gspo with a token mean": (
        {"type": "gspo", "aggregation": "token_mean"},
        ["aggregation = 'token_mean' with type = 'gspo'", "'sequence_mean'"],
    ),
    "gspo with a token weight in a list": (
        {"type": "gspo", "correction": [{"type": "icepop"}, {"type": "sequence_mask"}]},
        ["with type = 'gspo'", "'geometric_tis'"],
    ),
    "a list with a sequence mask without a group": (
        {"type": "reinforce", "correction": [{"type": "icepop"}, {"type": "sequence_mask"}]},
        ["correction.type = 'combined' with group_size = 1", "whole prompt"],
    ),
    "a full kl to the sampler": (
        {"type": "grpo", "kl_coef": 0.1, "kl_estimator": "full", "kl_to": "sampler"},
        ["kl_estimator = 'full' with kl_to = 'sampler'", "'k2'"],
    ),
    "a misspelt key in a list": (
        {"type": "grpo", "correction": [{"type": "icepop", "hihg": 3}]},
        ["parts.0.icepop.hihg: unknown key", "mean 'high'"],
    ),
    "a sequence mask without a group": (
        {"type": "reinforce", "correction": {"type": "sequence_mis"}},
        ["correction.type = 'sequence_mis' with group_size = 1", "whole prompt"],
    ),
    "a rollout's weight on a ratio that is the weight": (
        {"type": "grpo", "proximal": "bypass", "correction": {"type": "sequence_tis"}},
        ["correction.type = 'sequence_tis' with proximal = 'bypass'", "count it twice"],
    ),
    "a group baseline without a group": (
        {"type": "reinforce", "baseline": "group"},
        ["baseline = 'group' with group_size = 1", "'batch'"],
    ),
    "an adaptive coefficient of zero": (
        {"type": "grpo", "kl_control": {"type": "adaptive", "target": 6}},
        ["kl_control.type = 'adaptive' with kl_coef = 0"],
    ),
    "a target for the wrong divergence": (
        {
            "type": "grpo",
            "kl_coef": 0.1,
            "kl_to": "sampler",
            "kl_control": {"type": "adaptive", "target": 6},
        },
        ["kl_to = 'sampler'", "'fixed' or 'linear'"],
    ),
    "a penalty that is always zero": (
        {"type": "grpo", "kl_coef": 0.1, "kl_to": "sampler", "kl_in": "reward"},
        ["kl_in = 'reward' with kl_to = 'sampler'", "always 0"],
    ),
    "a gradient rule for a reward": (
        {"type": "grpo", "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k3_direct"},
        ["'k3_direct' with kl_in = 'reward'"],
    ),
    "a buffer longer than the response": (
        {"type": "dapo", "overlong_buffer_tokens": 9},
        ["algorithm.overlong_buffer_tokens = 9", "generation.max_response_tokens = 8"],
    ),
    "one rollout in a group": ({"type": "dr_grpo", "group_size": 1}, ["group_size", "found 1"]),
}


@pytest.mark.parametrize(("algorithm", "words"), REFUSED.values(), ids=REFUSED)
def test_a_combination_that_makes_no_sense_is_refused_with_the_reason(algorithm, words) -> None:
    message = refused(algorithm)
    for word in words:
        assert word in message


def test_interpolation_without_staleness_is_refused() -> None:
    message = refused({"type": "grpo", "proximal": "interpolate"}, staleness={"max_staleness": 0})
    assert "algorithm.proximal = 'interpolate' with staleness.max_staleness = 0" in message
    assert "recompute" in message


def test_a_coefficient_that_rises_from_zero_needs_the_reference_too() -> None:
    rising = {"kl_control": {"type": "linear", "final": 0.1, "steps": 5}}
    message = refused({"type": "grpo", **rising}, scoring={"reference": False})
    assert "algorithm.kl_control.final = 0.1 needs scoring.reference = true" in message


def test_a_kl_to_the_sampler_needs_no_reference() -> None:
    config = configured(
        {"type": "grpo", "kl_coef": 0.1, "kl_to": "sampler"}, scoring={"reference": False}
    )
    assert not Grpo(config).needs_reference


FULL = {"type": "grpo", "group_size": 4, "kl_coef": 0.1, "kl_estimator": "full"}


def test_a_full_kl_needs_no_reference_of_the_scoring_pool() -> None:
    for where in ("loss", "reward"):
        config = configured({**FULL, "kl_in": where}, scoring={"reference": False})
        assert (Grpo(config).needs_reference, Grpo(config).full_kl_in) == (False, where)
    configured(FULL, scoring={"reference": False}, learner={"lora": {"rank": 4}})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"scoring": {"reference": True, "reference_update": {"type": "ema"}}},
            ["scoring.reference_update.type = 'ema'", "does not move"],
        ),
        ({"sft": {"steps": 5}}, ["sft.steps = 5", "model.path"]),
        ({"learner": {"backend": "zero3"}}, ["learner.backend = 'zero3'", "'fsdp2'"]),
    ],
    ids=["a moving reference", "a warm-up", "zero3"],
)
def test_a_full_kl_is_refused_where_the_learner_cannot_hold_its_reference(sections, words) -> None:
    message = refused(FULL, **sections)
    for word in ["algorithm.kl_estimator = 'full'", *words]:
        assert word in message
    configured({**FULL, "kl_coef": 0.0}, **sections)


def test_passes_and_rollouts_are_left_out_only_where_the_loss_does_not_need_them() -> None:
    def built(**keys: Any) -> Any:
        return build_algorithm(configured({"type": "grpo", "group_size": 4, **keys}), 64)

    plain = built()
    assert (plain.needs_proximal, plain.trains_entropy) == (True, False)
    assert plain.zero_advantage_is_zero_loss
    assert not built(proximal="bypass").needs_proximal
    assert not built(proximal="interpolate").needs_proximal
    assert not built(kl_coef=0.1).zero_advantage_is_zero_loss
    assert built(kl_coef=0.1, kl_in="reward").zero_advantage_is_zero_loss
    bonus = built(entropy_coef=0.01)
    assert (bonus.trains_entropy, bonus.zero_advantage_is_zero_loss) == (True, False)
