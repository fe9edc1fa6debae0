"""A run whose rewards take its prompts for what they are not is refused before it starts."""

import pytest

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.planning.run_inputs import check_inputs, check_reasoning
from rlhf_cluster.rewards.rules.exact_match import ExactMatchConfig
from rlhf_cluster.rewards.rules.numeric import NumericConfig
from tests.support.builders.run_configs import tiny_config

OPEN, CLOSED, BEGUN = "<think>\n", "<think>\n\n</think>\n", "<think>\nOkay,"
TAKES_OPEN, TAKES_CLOSED = NumericConfig(prompt_opens_reasoning=True), NumericConfig()


@pytest.mark.parametrize(
    ("config", "ending", "words"),
    [
        (TAKES_CLOSED, OPEN, "ends in an open tag of reasoning.*Set prompt_opens_reasoning = true"),
        (TAKES_OPEN, CLOSED, "leaves no tag.*Set prompt_opens_reasoning = false, or name the tags"),
        (TAKES_OPEN, "1+1?", "leaves no tag"),
        (TAKES_OPEN, "<muse>", "reward 'numeric'.*it ends in '<muse>'"),
    ],
)
def test_l05_a_reward_that_takes_prompts_for_others_is_refused(config, ending, words):
    with pytest.raises(ConfigError, match=words):
        check_reasoning([ExactMatchConfig(), config], ending)


def test_l05_a_reward_that_fits_the_prompts_is_taken():
    for config, ending in (
        (TAKES_OPEN, OPEN),
        (TAKES_OPEN, BEGUN),
        (TAKES_CLOSED, BEGUN),
        (TAKES_CLOSED, CLOSED),
        (TAKES_CLOSED, "1+1?"),
        (
            NumericConfig(prompt_opens_reasoning=True, reasoning_tags=(("<muse>", "</muse>"),)),
            "<muse>",
        ),
    ):
        check_reasoning([ExactMatchConfig(), config], ending)


def test_l05_the_first_prompt_of_a_run_is_looked_at(tmp_path):
    reward = {"type": "numeric", "prompt_opens_reasoning": True}
    config = tiny_config(scoring={"rewards": [reward]})
    with pytest.raises(ConfigError, match="prompt_opens_reasoning = true, and the first prompt"):
        check_inputs(config, tmp_path)
