"""Ensembles: the formulas by hand, and real tiny members beside each one alone."""

import math
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.reward import Detailed, RewardContext, Versioned
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.rewards.reward_model_ensemble import (
    Ensemble,
    EnsembleConfig,
    combine_scores,
    disagreement,
)
from tests.support.builders import tiny_llama
from tests.support.builders.scored_groups import make_prompt, make_rollouts

SCORES = np.array([[1.0, 4.0, 7.0], [3.0, 4.0, -2.0]])  # two members, three rollouts


def test_the_mean_the_minimum_and_the_mean_less_deviations_by_hand():
    assert disagreement(SCORES).tolist() == [1.0, 0.0, 4.5]
    assert combine_scores(SCORES, "mean", 1.0).tolist() == [2.0, 4.0, 2.5]
    assert combine_scores(SCORES, "min", 1.0).tolist() == [1.0, 4.0, -2.0]
    assert combine_scores(SCORES, "mean_minus_std", 0.5).tolist() == [1.5, 4.0, 0.25]
    three = np.array([[0.0], [0.0], [3.0]])
    assert disagreement(three).tolist() == [pytest.approx(math.sqrt(2.0))]


def test_members_that_agree_do_not_disagree_at_all():
    score = np.full((3, 2), 0.1)
    assert disagreement(score).tolist() == [0.0, 0.0]
    assert (
        combine_scores(score, "mean_minus_std", 1e9).tolist()
        == combine_scores(score, "mean", 0.0).tolist()
    )


def test_with_two_members_one_deviation_less_is_the_minimum():
    np.testing.assert_allclose(
        combine_scores(SCORES, "mean_minus_std", 1.0), combine_scores(SCORES, "min", 0)
    )


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"paths": ["/a"]}, "at least 2"),
        ({"paths": ["/a", "/b", "/a"]}, "names '/a' 2 times"),
        ({"paths": ["/a", "/b"], "coef": 2.0}, "combine = 'mean', which has none"),
        ({"paths": ["/a", "/b"], "combine": "mean_minus_std", "coef": -1.0}, "greater than or"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused(keys, text):
    with pytest.raises(ValidationError, match=text):
        EnsembleConfig(**keys)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and two reward models with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    root = tmp_path_factory.mktemp("ensemble")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=32), root / "policy")
    config = LlamaConfig.from_pretrained(root / "policy", num_labels=1)
    for seed in (2, 3):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(root / f"member{seed}")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(root / "policy" / name, root / f"member{seed}" / name)
    return root


def test_members_score_as_each_does_alone_and_are_told_apart(folders):
    context = RewardContext(tokenizer_dir=str(folders / "policy"))
    paths = [str(folders / "member2"), str(folders / "member3")]
    config = EnsembleConfig(paths=paths, combine="mean_minus_std", coef=0.5, dtype="float32")
    ensemble = Ensemble(config, context)
    assert isinstance(ensemble, Detailed)
    assert isinstance(ensemble, Versioned)
    prompt = make_prompt(ids=[2, 3])
    given = (prompt, make_rollouts(prompt, [[9, 8, 1], [5, 1]]), ["", ""])
    alone = [RewardModel(RewardModelConfig(path=p, dtype="float32"), context) for p in paths]
    expected = np.array([model.score(*given) for model in alone])
    scores, details = ensemble.score_in_detail(*given)
    assert list(details) == list(config.details) == ["0", "1", "disagreement"]
    assert [details["0"], details["1"]] == expected.tolist()
    np.testing.assert_allclose(details["disagreement"], np.abs(expected[0] - expected[1]) / 2)
    np.testing.assert_allclose(scores, expected.mean(axis=0) - 0.25 * np.ptp(expected, axis=0))
    assert ensemble.score(*given) == scores
    assert min(details["disagreement"]) > 0
    ensemble.close()


def test_the_version_follows_the_weights_and_not_their_folder(folders, tmp_path):
    context = RewardContext(tokenizer_dir=str(folders / "policy"))

    def version(*names: str) -> str:
        return Ensemble(EnsembleConfig(paths=list(names), dtype="float32"), context).version

    moved = tmp_path / "elsewhere"
    shutil.copytree(folders / "member3", moved)
    two, three = str(folders / "member2"), str(folders / "member3")
    assert version(two, three) == version(two, str(moved))
    assert version(two, three) != version(three, two)


def test_a_member_that_is_not_there_is_a_configuration_error(folders, tmp_path):
    config = EnsembleConfig(paths=[str(folders / "member2"), str(tmp_path / "absent")])
    with pytest.raises(ConfigError, match=r"absent: cannot be loaded"):
        Ensemble(config, RewardContext(tokenizer_dir=str(folders / "policy")))
