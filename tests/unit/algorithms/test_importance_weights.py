"""Correction rules against hand numbers; finite for any length; blind to other rollouts."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rlhf_cluster.algorithms.importance_weights import (
    interpolated_proximal,
    sequence_means,
    sequence_sums,
    token_cap,
)
from rlhf_cluster.algorithms.off_policy_correction import (
    PRESETS,
    Correction,
    Rule,
)
from rlhf_cluster.algorithms.policy_gradient import ImportanceWeights, weigh
from rlhf_cluster.errors import RecordError

RULES: TypeAdapter[Any] = TypeAdapter(Correction)


def rules_of(*parts: Any, **keys: Any) -> tuple[Rule, ...]:
    """Of a single rule by its keys, or of a list of rules."""
    return RULES.validate_python(list(parts) or keys).rules()


def apply(rules: Sequence[Rule], ratios: list[float], lengths: list[int]) -> ImportanceWeights:
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    return weigh(rules, logs - 3.0, torch.full_like(logs, -3.0), sequence, len(lengths))


RATIOS, LENGTHS = [0.6, 2.5, 6.0, 1.0, 1.02], [2, 1, 2]
# products 1.5, 6, 1.02; geometric means sqrt(1.5) = 1.2247, 6, sqrt(1.02) = 1.00995


@pytest.mark.parametrize(
    ("keys", "weights", "capped", "masked"),
    [
        ({"type": "none"}, [1, 1, 1, 1, 1], 0, 0),
        ({"type": "token_tis"}, [0.6, 2, 2, 1, 1.02], 2, 0),
        ({"type": "sequence_tis"}, [1.5, 1.5, 2, 1.02, 1.02], 1, 0),
        ({"type": "geometric_tis"}, [1.5**0.5, 1.5**0.5, 2, 1.02**0.5, 1.02**0.5], 1, 0),
        ({"type": "icepop"}, [0.6, 2.5, 0, 1, 1.02], 0, 1),
        ({"type": "sequence_mis"}, [1.5, 1.5, 0, 1.02, 1.02], 0, 1),
        ({"type": "geometric_mask"}, [0, 0, 0, 1, 1], 0, 3),
        ({"type": "sequence_mask"}, [1, 1, 0, 1, 1], 0, 1),
        ({"type": "token_tis_geometric_mask", "low": 0.8, "high": 1.2}, [0, 0, 0, 1, 1.02], 0, 3),
        ({"type": "token_tis_geometric_mask", "high": 1.3}, [0.6, 2, 0, 1, 1.02], 1, 1),
        ({"type": "sequence_tis_geometric_mask", "high": 1.3}, [1.5, 1.5, 0, 1.02, 1.02], 0, 1),
        (
            {
                "type": "combined",
                "parts": [{"type": "icepop", "high": 2}, {"type": "sequence_mask"}],
            },
            [0.6, 0, 0, 1, 1.02],
            0,
            2,
        ),
        (
            {"type": "custom", "level": "token", "action": "truncate", "low": 0.75, "high": 4},
            [0.75, 2.5, 4, 1, 1.02],
            2,
            0,
        ),
        (
            {"type": "custom", "level": "sequence", "action": "mask", "high": 2, "keep": "one"},
            [1, 1, 0, 1, 1],
            0,
            1,
        ),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_every_rule_gives_the_weights_worked_out_by_hand(keys, weights, capped, masked) -> None:
    found = apply(rules_of(**keys), RATIOS, LENGTHS)
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(found.weights, expected, rtol=1e-12, atol=0)
    assert (found.capped.sum(), found.masked.sum()) == (capped, masked)


def test_the_defaults_are_the_documented_bands() -> None:
    bands = {"token_tis": (0, 2), "sequence_tis": (0, 2), "geometric_tis": (0, 2)}
    bands |= {"icepop": (0.5, 5), "sequence_mis": (0.5, 2), "geometric_mask": (0.99, 1.01)}
    for name, band in bands.items():
        (rule,) = rules_of(type=name)
        assert (rule.low, rule.high) == band


def test_every_preset_is_a_row_of_the_table_and_takes_its_bounds_from_the_keys() -> None:
    for name, rows in PRESETS.items():
        rules = rules_of(type=name)
        assert tuple((r.level, r.action, r.keep_ratio) for r in rules) == rows
    truncation, mask = rules_of(type="token_tis_geometric_mask", cap=3.0, low=0.5, high=4.0)
    assert (truncation.low, truncation.high, mask.low, mask.high) == (0.0, 3.0, 0.5, 4.0)


@pytest.mark.parametrize("ratio", [0.7, 1.3])
@pytest.mark.parametrize(
    "name", ["token_tis", "sequence_tis", "geometric_tis", "sequence_mis", "geometric_mask"]
)
def test_s10_a_long_product_neither_vanishes_nor_overflows(name: str, ratio: float) -> None:
    # 0.7^300 = 3e-47 is 0 in float32 and cap / 0 is infinite; 1.3^300 is 1e34
    logs = torch.full((300,), math.log(ratio))
    found = weigh(rules_of(type=name), logs, torch.zeros(300), torch.zeros(300).long(), 1)
    assert torch.isfinite(found.weights).all()
    floor = math.exp(-20) if name == "sequence_tis" and ratio < 1 else None
    if floor is not None:
        torch.testing.assert_close(found.weights, torch.full((300,), floor), rtol=1e-5, atol=0)
    if name in ("token_tis", "geometric_tis"):
        torch.testing.assert_close(found.weights, torch.full((300,), min(ratio, 2.0)))
    if name in ("sequence_mis", "geometric_mask"):
        assert found.masked.all()


def test_s10_weights_are_finite_for_any_finite_logprobs() -> None:
    learner = torch.tensor([0.0, -1e30, -200.0, 0.0])
    sampled = torch.tensor([-1e30, 0.0, 0.0, -200.0])
    for level in ("token", "sequence", "geometric"):
        for action in ("truncate", "mask"):
            rule = Rule(level=level, action=action, low=0.0, high=1e8)
            weights = weigh([rule], learner, sampled, torch.tensor([0, 0, 1, 1]), 2).weights
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()
            assert torch.isfinite(weights.square()).all()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_rollout_weighs_the_same_whoever_its_neighbours_are(level: Any) -> None:
    rules = [Rule(level=level, action="truncate", low=0.0, high=2.0)]
    together = apply(rules, RATIOS, LENGTHS).weights
    alone = [
        apply(rules, part, [len(part)]).weights for part in (RATIOS[:2], RATIOS[2:3], RATIOS[3:])
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=0)


def test_no_gradient_flows_through_weights() -> None:
    learner = torch.tensor([-1.0, -2.0], requires_grad=True)
    for level in ("token", "sequence", "geometric"):
        rule = Rule(level=level, action="truncate", low=0.0, high=2.0)
        found = weigh([rule], learner, torch.tensor([-2.0, -2.0]), torch.tensor([0, 0]), 1)
        assert not found.weights.requires_grad


def test_sums_and_means_over_sequences_keep_gradients_and_survive_empty_sequences() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    sequence = torch.tensor([0, 2, 2])
    assert sequence_sums(values, sequence, 4).tolist() == [1, 0, 8, 0]
    means = sequence_means(values, sequence, 4)
    assert means.tolist() == [1, 0, 4, 0]
    means.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 0.5, 0.5]


def test_the_weight_of_a_token_term_is_a_token_weight_whatever_the_level() -> None:
    assert token_cap(rules_of(type="token_tis", cap=3.0)) == 3.0
    assert token_cap(rules_of(type="sequence_mis", high=9.0)) == 2.0
    assert token_cap(rules_of({"type": "sequence_mask"}, {"type": "icepop"})) == 5.0
    assert token_cap(rules_of(type="none")) is None


def test_the_named_lists_are_those_of_their_source() -> None:
    for name, level in (("token_tis", "token"), ("sequence_tis", "sequence")):
        truncation, mask = rules_of(type=f"{name}_geometric_mask")
        assert truncation == rules_of(type=name)[0]
        assert (truncation.level, truncation.high) == (level, 2.0)
        assert (mask,) == rules_of(type="geometric_mask", low=0.999, high=1.001)


PARTS = ["token_tis", "icepop", "sequence_tis", "sequence_mask", "geometric_tis", "geometric_mask"]


@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=2, max_size=3),
    ratios=st.lists(st.floats(min_value=0.3, max_value=6), min_size=6, max_size=6),
)
@settings(max_examples=60)
def test_the_weights_of_a_list_are_the_product_of_its_rules_alone(
    parts: list[str], ratios: list[float]
) -> None:
    try:
        rules = rules_of(*({"type": name} for name in parts))
    except ValidationError:
        # several weights by a ratio, or a rule twice
        weighing = [name for name in parts if not name.endswith("mask")]
        assert len(weighing) > 1 or len(set(parts)) < len(parts)
        return
    found = apply(rules, ratios, [1, 2, 3])
    alone = [apply(rules_of(type=name), ratios, [1, 2, 3]) for name in parts]
    product = math.prod((a.weights for a in alone), start=torch.ones(6).double())
    torch.testing.assert_close(found.weights, product, rtol=1e-12, atol=0)
    assert torch.equal(found.masked, torch.stack([a.masked for a in alone]).any(0))
    assert torch.equal(found.masked, found.weights == 0)
    assert not (found.capped & found.masked).any()
    for own in alone:
        ((name, outside),) = own.outside.items()
        assert torch.equal(found.outside[name], outside)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["token_tis", "sequence_mis"], ["'token_tis' and 'sequence_mis'", "twice"]),
        (["icepop", "icepop"], ["'icepop' and 'icepop'", "twice"]),
        (["sequence_mask", "sequence_mask"], ["level 'sequence' with action 'mask'"]),
        (["geometric_mask", "token_tis_geometric_mask"], ["level 'geometric'", "Write one"]),
        (["token_tis", "none"], ["none"]),
        ([], ["type = 'none'"]),
    ],
)
def test_lists_that_count_something_twice_are_refused(parts: list[str], words: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        RULES.validate_python([{"type": name} for name in parts])
    for word in words:
        assert word in str(error.value)


def test_a_list_is_written_and_read_again_as_the_same_rules() -> None:
    own = RULES.validate_python([{"type": "icepop"}, {"type": "sequence_mask", "high": 3}])
    assert RULES.validate_python(RULES.dump_python(own, mode="json")) == own


def test_the_interpolated_policy_is_one_step_from_the_learner() -> None:
    staleness = torch.tensor([0.0, 1.0, 2.0, 5.0])
    found = interpolated_proximal(torch.full((4,), -1.0), torch.full((4,), -2.0), staleness)
    # alpha 1, 1, 1/2, 1/5 of the sampler's -2, the rest of the learner's -1
    torch.testing.assert_close(found, torch.tensor([-2.0, -2.0, -1.5, -1.2]))


def test_s11_a_column_against_a_row_is_refused() -> None:
    rules = rules_of(type="token_tis")
    with pytest.raises(RecordError, match=r"both must be \[N\]"):
        weigh(rules, torch.zeros(2, 1), torch.zeros(2), torch.zeros(2).long(), 1)


@pytest.mark.parametrize(
    "keys",
    [
        {"type": "token_tis", "cap": 0.5},
        {"type": "icepop", "low": 1.2},
        {"type": "sequence_mis", "high": 0.9},
        {"type": "custom", "level": "token", "action": "truncate", "high": 2, "keep": "one"},
        {"type": "custom", "level": "token", "action": "truncate"},
        {"type": "token_tis", "cap": 1e12},
    ],
)
def test_bands_that_leave_out_an_unchanged_policy_or_overflow_are_refused(keys: Any) -> None:
    with pytest.raises(ValidationError):
        RULES.validate_python(keys)
