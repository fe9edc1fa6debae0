"""Scores that are kept: under which key, how many, and what is counted."""

from dataclasses import replace

import pytest

from rlhf_cluster.errors import ScoringError
from rlhf_cluster.scoring.served_rewards import (
    ScoreCache,
    content_key,
)
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)


class Computer:
    """Rows for the letters `keys`; remembers the letters that it was asked for."""

    def __init__(self, keys: bytes) -> None:
        self.keys, self.asked = keys, []

    def __call__(self, places):
        self.asked += [chr(self.keys[place]) for place in places]
        return [(float(self.keys[place]), 0.5) for place in places]


def ask(cache: ScoreCache, letters: str) -> tuple[list, list[str]]:
    computer = Computer(letters.encode())
    return cache.fetch([letter.encode() for letter in letters], computer), computer.asked


def test_a_row_is_computed_once_and_each_gets_its_own():
    cache = ScoreCache(10)
    rows, asked = ask(cache, "aba")
    assert (rows, asked) == ([(97.0, 0.5), (98.0, 0.5), (97.0, 0.5)], ["a", "b"])
    rows, asked = ask(cache, "bca")
    assert (rows, asked) == ([(98.0, 0.5), (99.0, 0.5), (97.0, 0.5)], ["c"])
    assert ask(cache, "cab")[1] == []
    assert (cache.hits, cache.misses) == (1 + 2 + 3, 2 + 1)


def test_the_least_recently_used_go_first_and_there_are_never_more_than_allowed():
    cache = ScoreCache(2)
    ask(cache, "ab")
    ask(cache, "a")  # b is the older one now
    ask(cache, "c")
    assert len(cache) == 2
    assert ask(cache, "ac")[1] == []
    assert ask(cache, "b")[1] == ["b"]
    rows, _ = ask(cache, "vwxyz")
    assert [row[0] for row in rows] == [float(ord(letter)) for letter in "vwxyz"]
    assert len(cache) == 2


def test_what_fails_is_not_kept():
    cache = ScoreCache(2)

    def fail(places):
        raise ScoringError("busy")

    with pytest.raises(ScoringError):
        cache.fetch([b"a"], fail)
    assert len(cache) == 0
    assert ask(cache, "a")[1] == ["a"]


def test_the_key_changes_with_everything_that_a_scorer_may_read():
    prompt = make_prompt("a b", {"answer": "4", "n": [1, 2]}, ids=[2, 3])
    [rollout] = make_rollouts(prompt, [[5, 1]])
    first = content_key("v1", prompt, rollout, "five")
    assert first == content_key("v1", prompt, replace(rollout, rollout_id="other"), "five")
    [shorter] = make_rollouts(make_prompt(ids=[2, 3, 5]), [[1]])  # the same ids, cut elsewhere
    [other] = make_rollouts(make_prompt(ids=[2, 4]), [[5, 1]])
    others = [
        content_key("v2", prompt, rollout, "five"),
        content_key("v1", make_prompt("a  b", prompt.columns), rollout, "five"),
        content_key("v1", make_prompt("a b", {"answer": "5", "n": [1, 2]}), rollout, "five"),
        content_key("v1", make_prompt("a b", {"answer": "4", "n": [1, 3]}), rollout, "five"),
        content_key("v1", prompt, make_rollouts(prompt, [[5, 5, 1]])[0], "five"),
        content_key("v1", prompt, shorter, "five"),
        content_key("v1", prompt, other, "five"),
        content_key("v1", prompt, rollout, "fives"),
        content_key("v1f", prompt, rollout, "ive"),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert content_key("v1", prompt, rollout, "\ud800") != first, "text of a broken character"
