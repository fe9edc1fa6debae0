"""Weights of tokens in the loss, against hand-computed numbers."""

import numpy as np
import pytest

from rlhf_cluster.algorithms.policy_losses import token_weights
from rlhf_cluster.errors import RecordError


def test_s1_every_token_counts_the_same_in_a_token_mean() -> None:
    """100 tokens at 0.5 and 900 at 0.3 are 0.32; the mean of the two means would be 0.40."""
    weights = token_weights([100, 900], "token_mean", 1000)
    assert np.dot(weights, [100 * 0.5, 900 * 0.3]) == pytest.approx(0.32)
    weights = token_weights([100, 900], "sequence_mean", 1000)
    assert np.dot(weights, [100 * 0.5, 900 * 0.3]) == pytest.approx(0.40)


def test_a_fixed_length_divides_by_rollouts_and_the_longest_answer_allowed() -> None:
    assert token_weights([2, 4], "fixed_length", 8) == [1 / 16, 1 / 16]
    with pytest.raises(RecordError, match="9 trained tokens, more than the fixed length 8"):
        token_weights([9], "fixed_length", 8)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
def test_s4_rollouts_without_trained_tokens_are_in_no_denominator(aggregation) -> None:
    with_empty = token_weights([3, 0, 5, 0], aggregation, 8)
    assert [with_empty[0], with_empty[2]] == token_weights([3, 5], aggregation, 8)
    assert with_empty[1] == with_empty[3] == 0
    assert token_weights([0, 0], aggregation, 8) == [0.0, 0.0]
