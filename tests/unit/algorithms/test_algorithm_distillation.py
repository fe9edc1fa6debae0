"""On-policy distillation: its gradient, the teacher that rates, and what a student learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms.on_policy_distillation import (
    OnPolicyDistillation,
    OnPolicyDistillationConfig,
)
from rlhf_cluster.buffer.group_file import (
    Header,
    decode,
    encode,
)
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError, RecordError, ScoringError
from rlhf_cluster.planning.run_inputs import check_inputs
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)
from tests.support.builders.scored_groups import make_group as group_of
from tests.support.builders.scored_groups import make_prompt as prompt_of
from tests.support.builders.scored_groups import make_rollouts
from tests.support.builders.tiny_learner import (
    build_llama,
    loss_inputs,
    random_groups,
    response_logprobs,
)
from tests.support.fakes.checked_metrics import CheckedMetrics

UNBOUNDED = {"clip_low": 0.999, "clip_high": 1e6}


def algorithm(**keys: Any) -> OnPolicyDistillation:
    return OnPolicyDistillation(OnPolicyDistillationConfig.model_validate(keys))


def logits(seed: int) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("proximal", ["recompute", "bypass"])
@pytest.mark.parametrize("stale", [False, True])
def test_the_expected_gradient_is_that_of_the_reverse_kl_whatever_sampled(
    stale: bool, proximal: str
) -> None:
    """Over all five tokens, each as often as the sampler would give it."""
    policy = logits(0).requires_grad_()
    teacher, sampler = logits(1).log_softmax(0), logits(2 if stale else 0).log_softmax(0)
    correction = {"type": "token_tis", "cap": 1e6}
    own = policy.log_softmax(0)
    inputs = loss_inputs(own, sampler, torch.zeros(5, dtype=torch.float64), lengths=[1] * 5)
    losses, sums = algorithm(correction=correction, proximal=proximal, **UNBOUNDED).loss(
        replace(inputs, teacher_logprobs=teacher)
    )
    (found,) = torch.autograd.grad((losses * sampler.exp()).sum(), policy)
    own = policy.log_softmax(0)
    (expected,) = torch.autograd.grad((own.exp() * (own - teacher)).sum(), policy)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 0.05
    gap = (own - teacher).detach()
    torch.testing.assert_close(sums["distillation/teacher_gap"][0], gap.sum())
    assert sums["distillation/teacher_kl"][0] > 0


def test_a_policy_that_is_its_teacher_is_left_alone() -> None:
    policy = logits(0).requires_grad_()
    own = policy.log_softmax(0)
    inputs = loss_inputs(own, own.detach(), torch.zeros(5, dtype=torch.float64))
    losses, _ = algorithm().loss(replace(inputs, teacher_logprobs=own.detach()))
    losses.sum().backward()
    assert (losses == 0).all()
    assert policy.grad is not None
    assert (policy.grad == 0).all()


def test_the_reward_has_its_own_weight_beside_the_teacher() -> None:
    groups = random_groups(0, num_groups=2, group_size=2, rewards=[1.0, 0.0, 3.0, 3.0])
    found = [
        float(a[0])
        for own in algorithm(group_size=2, reward_coef=0.5).advantages(groups)
        for a in own
    ]
    half = 0.5 * np.sqrt(0.5)
    assert found == pytest.approx([half, -half, 0, 0], abs=1e-3)
    assert not any(a.any() for own in algorithm().advantages(groups) for a in own)
    inputs = loss_inputs(logits(0).requires_grad_(), logits(0), torch.full((5,), 0.3).double())
    losses, _ = algorithm().loss(replace(inputs, teacher_logprobs=logits(0) + 0.2))
    torch.testing.assert_close(losses, torch.full((5,), -0.5, dtype=torch.float64))


def test_without_the_teachers_log_probabilities_nothing_is_trained() -> None:
    values = torch.zeros(2)
    with pytest.raises(RecordError, match="no teacher_logprobs. Set scoring.teacher"):
        algorithm().loss(loss_inputs(values, values, values))


def test_a_student_comes_near_its_teacher_on_samples_of_older_students() -> None:
    """A table of logits for each of 6 states; each batch is of the student two steps before."""
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(6, 12, generator=draw).requires_grad_()
    teacher = (2 * torch.randn(6, 12, generator=draw)).log_softmax(-1)
    optimizer, own = torch.optim.Adam([student], lr=0.05), algorithm()
    students, found = [student.detach().clone()] * 3, []
    state = torch.arange(6).repeat_interleave(64)
    for _ in range(60):
        sampler, students = students[0], [*students[1:], student.detach().clone()]
        token = torch.multinomial(
            sampler.softmax(-1), 64, replacement=True, generator=draw
        ).flatten()
        now, mu = (x.log_softmax(-1)[state, token] for x in (student, sampler))
        inputs = loss_inputs(
            now, mu, torch.zeros(len(token)), staleness=torch.full(token.shape, 2.0)
        )
        losses, _ = own.loss(replace(inputs, teacher_logprobs=teacher[state, token]))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        logs = student.detach().log_softmax(-1)
        found.append(float((logs.exp() * (logs - teacher)).sum(-1).mean()))
    assert found[0] > 1
    assert found[-1] < 0.2


def test_a_step_of_the_learner_is_that_of_a_plain_loop(start_learner: Any) -> None:
    learner = start_learner(
        algorithm={"type": "on_policy_distillation", "group_size": 4, "reward_coef": 0.5},
        scoring={"teacher": "nowhere"},
        learner={"max_grad_norm": 1e9},
    )
    draw, groups = np.random.default_rng(0), []
    found = iter(response_logprobs(learner, random_groups(0)))
    for group in random_groups(0):
        scored = []
        for s in group.scored:
            own = next(found)
            rated = (own + draw.normal(size=len(own))).astype(np.float32)
            rollout = replace(s.rollout, sampled_logprobs=own)
            scored.append(replace(s, rollout=rollout, teacher_logprobs=rated))
        groups.append(replace(group, scored=tuple(scored)))
    lm, losses, gaps = build_llama(), [], []
    for group in groups:
        rewards = np.array([s.reward for s in group.scored])
        scaled = 0.5 * (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for scored, reward in zip(group.scored, scaled, strict=True):
            rollout, mask = scored.rollout, torch.from_numpy(scored.rollout.response_mask)
            ids = torch.from_numpy(
                np.concatenate([rollout.prompt_ids, rollout.response_ids])
            ).long()
            first = len(rollout.prompt_ids)
            logs = lm(input_ids=ids[None]).logits[0, first - 1 : -1].log_softmax(-1)
            own = logs.gather(-1, ids[first:, None]).squeeze(-1)[mask]
            gap = own.detach() - torch.from_numpy(scored.teacher_logprobs)[mask]
            losses.append(-(reward - gap) * own)
            gaps.append(gap)
    torch.cat(losses).mean().backward()
    gradients = [p.grad for p in lm.parameters() if p.grad is not None]
    metrics = learner.train_step(groups).metrics
    CheckedMetrics().record(metrics)
    norm = torch.nn.utils.get_total_norm(gradients).item()
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["distillation/teacher_gap"] == pytest.approx(
        torch.cat(gaps).mean().item(), abs=1e-5
    )
    assert metrics["distillation/teacher_kl"] > 0


# The scoring pool


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama.save(tiny_llama.build(seed=2, max_position=48), folder)
    return folder


DISTILLING = {"algorithm": {"type": "on_policy_distillation"}}


def scorer(model_dir: Path, teacher: Path) -> ScoringWorker:
    tree = tiny_tree(
        model={"path": str(model_dir)}, scoring={"teacher": str(teacher), "tokens_per_batch": 16}
    )
    del tree["model"]["init"]
    config = validate(RunConfig, {**tree, **DISTILLING}, source="test")
    return ScoringWorker(config, str(model_dir), "scoring-0")


def test_every_sampled_token_is_rated_by_the_teacher_and_kept(
    model_dir: Path, teacher_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    own = scorer(model_dir, teacher_dir)
    own.start()
    prompt = prompt_of(ids=[2, 3, 0, 4], columns={"answer": "x"})
    rollouts = make_rollouts(prompt, ([9, 8, 7, 1], [5]), temperature=0.7)
    _, found = own.score(group_of(prompt, rollouts))
    lm = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    for scored in found.scored:
        response = torch.from_numpy(scored.rollout.response_ids).long()
        ids = torch.cat([torch.tensor([2, 3, 0, 4]), response])
        with torch.no_grad():
            table = (lm(input_ids=ids[None]).logits[0, 3:-1] / 0.7).log_softmax(-1)
        expected = table.gather(1, response[:, None]).squeeze(1).numpy()
        assert scored.teacher_logprobs is not None
        np.testing.assert_allclose(scored.teacher_logprobs, expected, atol=2e-5)
        assert scored.ref_logprobs is None
    image = encode(found, Header(newest_version=0, made_by="0" * 32))
    for before, after in zip(found.scored, decode(image)[0].scored, strict=True):
        np.testing.assert_array_equal(after.teacher_logprobs, before.teacher_logprobs)
    _, held_out = own.score(group_of(prompt, rollouts, purpose="evaluate"))
    assert held_out.scored[0].teacher_logprobs is None
    long = make_rollouts(prompt, ([9] * 14,), temperature=0.7)
    with pytest.raises(ScoringError, match="17 positions"):
        own.score(group_of(prompt, long))
    own.close()


def test_a_teacher_with_other_tokens_is_refused_before_anything_starts(
    model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "teacher"
    tiny_llama.save(tiny_llama.build(seed=2, max_position=48), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ConfigError, match=r"scoring.teacher = .*differ in 1 tokens, such as '<new>'"
    ):
        scorer(model_dir, folder).start()
    with pytest.raises(ConfigError, match=r"scoring.teacher: .*no such folder"):
        scorer(model_dir, tmp_path / "gone").start()
    config = tiny_config(scoring={"teacher": str(folder)}, **DISTILLING)
    with pytest.raises(ConfigError, match=r"scoring.teacher = .*differ in \d+ tokens"):
        check_inputs(config, tmp_path)


# The run file


@pytest.mark.parametrize(
    ("algorithm", "scoring", "words"),
    [
        ({}, {}, ["algorithm.type = 'on_policy_distillation' without scoring.teacher"]),
        (
            {"type": "grpo"},
            {"teacher": "t"},
            ["scoring.teacher = 't' with algorithm.type = 'grpo'", "'on_policy_distillation'"],
        ),
        (
            {"group_size": 1, "reward_coef": 1.0},
            {"teacher": "t"},
            ["reward_coef = 1 with group_size = 1"],
        ),
        (
            {"kl_coef": 0.1, "kl_in": "reward"},
            {"teacher": "t", "reference": True},
            ["kl_in = 'reward' with type = 'on_policy_distillation'"],
        ),
    ],
    ids=["no teacher", "nobody's teacher", "no group", "a KL in the reward"],
)
def test_what_cannot_work_is_refused_with_the_reason(
    algorithm: dict[str, Any], scoring: dict[str, Any], words: list[str]
) -> None:
    tree = tiny_tree(scoring=scoring)
    tree["algorithm"] = {"type": "on_policy_distillation", **algorithm}
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tree, source="run.toml")
    for word in words:
        assert word in str(error.value)
