"""A single learner rank, the whole of it: the same sharded code path that many ranks take."""

import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.errors import (
    ConfigError,
    DivergenceError,
    RunError,
    StalenessError,
    StalledError,
    WeightError,
)
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.sharding.sharded_model import assert_float32
from rlhf_cluster.records import ExperienceGroup
from rlhf_cluster.util.process_group import (
    join_group,
    serve_store,
)
from tests.support.builders.tiny_learner import (
    build_llama,
    learner_config,
    make_group,
    make_prompt,
    make_scored,
    random_groups,
    save_llama,
    sft_examples,
)


def _weights(learner: LearnerRank) -> dict[str, torch.Tensor]:
    return {
        n: p.full_tensor().detach().clone()  # type: ignore[attr-defined]
        for n, p in learner.policy.named_parameters()
    }


def _moved(learner: LearnerRank, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(p, before[n]) for n, p in _weights(learner).items())


def _sampled_by_the_model(temperature: float, num_tokens: int = 6) -> list[ExperienceGroup]:
    """Responses that the plain model sampled itself, token by token, with its own logprobs."""
    lm, draw = build_llama(), torch.Generator().manual_seed(3)
    groups = []
    for number in range(2):
        prompt = make_prompt(number, [7 + number] if number else [2, 9, 4])
        scored = []
        for index in range(4):
            tokens, logprobs = prompt.token_ids.tolist(), []
            for _ in range(num_tokens + index):
                with torch.no_grad():
                    logits = lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
                distribution = (logits / temperature).log_softmax(-1)
                token = int(torch.multinomial(distribution.exp(), 1, generator=draw))
                tokens.append(token)
                logprobs.append(distribution[token].item())
            response = tokens[len(prompt.token_ids) :]
            scored.append(
                make_scored(
                    f"{number}/{index}",
                    prompt,
                    response,
                    logprobs,
                    reward=float(index),
                    temperature=temperature,
                    ref_logprobs=logprobs,
                )
            )
        groups.append(make_group(number, prompt, scored))
    return groups


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_s12_rescoring_own_samples_gives_ratio_one_for_every_token(
    start_learner: Any, temperature: float, batching: str
) -> None:
    learner = start_learner(learner={"batching": batching}, generation={"temperature": temperature})
    metrics = learner.train_step(_sampled_by_the_model(temperature)).metrics
    assert metrics["importance/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["importance/logprob_diff_mean"] < 1e-5
    assert metrics["importance/effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert metrics["importance/outside_band_fraction"] == 0
    # the reference is the same model: its divergence is zero, and no token is off by one
    assert metrics["learner/kl_ref"] == pytest.approx(0, abs=1e-8)


def test_s9_a_step_moves_the_weights_and_raises_the_probability_of_good_answers(
    start_learner: Any,
) -> None:
    learner = start_learner(learner={"learning_rate": 1e-3})
    groups, before = _sampled_by_the_model(1.0), _weights(learner)
    first = learner.train_step(groups).metrics
    again = learner.train_step(groups).metrics
    assert _moved(learner, before)
    assert again["learner/loss"] < first["learner/loss"]
    assert learner.version == 2


@pytest.mark.parametrize("eps", [1e-8, pytest.param(0.1, id="test_l13_eps")])
def test_one_step_matches_a_plain_pytorch_loop(start_learner: Any, eps: float) -> None:
    keys = {"learning_rate": 1e-3, "beta1": 0.8, "weight_decay": 0.1, "adam_eps": eps}
    learner = start_learner(learner=keys)
    groups = random_groups(5)
    report = learner.train_step(groups)
    lm, total, count = build_llama(), torch.zeros(()), 0
    for group in groups:
        rewards = np.array([s.reward for s in group.scored])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for scored, advantage in zip(group.scored, advantages, strict=True):
            rollout = scored.rollout
            tokens = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            ids = torch.from_numpy(tokens).long()
            logits = lm(input_ids=ids[None], use_cache=False).logits[0, :-1]
            chosen = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
            learner_logprobs = chosen[len(rollout.prompt_ids) - 1 :]
            sampled = torch.from_numpy(rollout.sampled_logprobs)
            weight = (learner_logprobs.detach() - sampled).exp().clamp(max=2.0)
            mask = torch.from_numpy(rollout.response_mask)
            total = total - (weight * float(advantage) * learner_logprobs)[mask].sum()
            count += int(mask.sum())
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0).item()
    assert report.metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert report.metrics["learner/tokens"] == count
    matrices = [p for p in lm.parameters() if p.ndim > 1]
    vectors = [p for p in lm.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.8, 0.95),
        eps=eps,
    )
    optimizer.step()
    found = _weights(learner)
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(found[f"lm.{name}"], parameter.detach(), atol=1e-5, rtol=0)


def test_leaving_out_rollouts_without_advantage_changes_nothing(start_learner: Any) -> None:
    rewards = [1.0, 0.0, 1.0, 0.0, *[0.5] * 12]
    groups = random_groups(2, rewards=rewards)
    learner = start_learner()
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/dropped_rollouts"] == 12
    dropped = _weights(learner)
    learner = start_learner()
    learner._algorithm.__class__ = type(
        "AllCount", (type(learner._algorithm),), {"zero_advantage_is_zero_loss": False}
    )
    kept = learner.train_step(groups).metrics
    assert kept["learner/dropped_rollouts"] == 0
    for key in ("learner/grad_norm", "learner/tokens", "learner/loss"):
        assert kept[key] == pytest.approx(metrics[key], rel=1e-5)
    for name, weight in _weights(learner).items():
        torch.testing.assert_close(weight, dropped[name], atol=1e-6, rtol=0)


def test_a_batch_without_any_advantage_is_a_step_of_zero_gradient(start_learner: Any) -> None:
    learner = start_learner()
    before = _weights(learner)
    report = learner.train_step(random_groups(0, rewards=[1.0] * 16))
    assert (report.step, report.metrics["learner/loss"]) == (1, 0)
    assert report.metrics["learner/grad_norm"] == 0
    assert not _moved(learner, before)


def test_s39_metrics_do_not_depend_on_how_tokens_fall_into_micro_batches(
    start_learner: Any,
) -> None:
    groups = random_groups(0, with_reference=True)
    reports = [
        start_learner(learner={"tokens_per_micro_batch": budget}).train_step(groups).metrics
        for budget in (16384, 32)
    ]
    first, second = ({k: v for k, v in r.items() if not k.endswith("_s")} for r in reports)
    assert first == pytest.approx(second, rel=1e-5, abs=1e-7)
    expected = {
        "learner/loss",
        "learner/grad_norm",
        "learner/learning_rate",
        "learner/entropy",
        "learner/clip_fraction",
        "learner/kl_ref",
        "learner/tokens",
        "importance/ratio_mean",
        "importance/ratio_max",
        "importance/capped_fraction",
        "importance/effective_sample_size",
        "importance/logprob_diff_mean",
        "importance/outside_band_fraction",
        "staleness/mean",
        "staleness/max",
    }
    assert expected <= set(first)
    entries = [s.rollout for g in groups for s in g.scored]
    assert first["learner/tokens"] == sum(int(r.response_mask.sum()) for r in entries)


def test_phases_are_timed_by_the_given_clock(tiny_model_dir: str) -> None:
    ticks = iter([0.0, 1.0, 11.0, 111.0, 111.0])
    config = learner_config(tiny_model_dir)
    learner = LearnerRank(config, tiny_model_dir, 0, 1, None, clock=lambda: next(ticks))
    learner.setup()
    metrics = learner.train_step(random_groups(0)).metrics
    learner.close()
    assert metrics["learner/prepare_s"] == 1
    assert metrics["learner/forward_backward_s"] == 10
    assert metrics["learner/optimizer_s"] == 100


def test_a_stale_token_raises_before_any_weight_is_touched(start_learner: Any) -> None:
    learner = start_learner(staleness={"max_staleness": 1})
    for version in (0, 0):
        learner.train_step(random_groups(1, version=version))
    before = _weights(learner)
    with pytest.raises(StalenessError, match="max_staleness = 1"):
        learner.train_step(random_groups(1, version=0))
    assert learner.version == 2
    assert not _moved(learner, before)


def _poison(learner: LearnerRank, value: float) -> None:
    with torch.no_grad():
        norm = learner.policy.lm.base_model.norm.weight
        norm.to_local().fill_(value)  # type: ignore[union-attr,operator]


def test_gradients_that_are_not_finite_change_nothing_and_raise_after_five_in_a_row(
    start_learner: Any,
) -> None:
    learner = start_learner(
        staleness={"max_staleness": 20}, run={"steps": 20, "groups_per_step": 4}
    )
    learner.train_step(random_groups(0))
    before = _weights(learner)
    _poison(learner, math.nan)
    for number in range(1, 5):
        metrics = learner.train_step(random_groups(0)).metrics
        assert metrics["learner/skipped_steps"] == number
        assert "learner/grad_norm" not in metrics
    _poison(learner, 1.0)
    learner.train_step(random_groups(0))  # a good step starts the count again
    assert all(torch.isfinite(w).all() for w in _weights(learner).values())
    assert _moved(learner, before)
    _poison(learner, math.nan)
    poisoned = _weights(learner)
    for _ in range(4):
        learner.train_step(random_groups(0))
    with pytest.raises(DivergenceError, match="5 steps in a row"):
        learner.train_step(random_groups(0))
    finite = {n: w for n, w in poisoned.items() if torch.isfinite(w).all()}
    assert finite
    assert all(torch.equal(_weights(learner)[n], w) for n, w in finite.items())


def test_skipped_steps_advance_the_version(start_learner: Any) -> None:
    learner = start_learner()
    _poison(learner, math.inf)
    assert learner.train_step(random_groups(0)).step == learner.version == 1


def test_the_learning_rate_follows_optimizer_steps(start_learner: Any) -> None:
    learner = start_learner(learner={"warmup_steps": 2, "schedule": "linear"})
    reports = [learner.train_step(random_groups(s, version=s)) for s in range(4)]
    rates = [r.metrics["learner/learning_rate"] for r in reports]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 1e-4 * 7 / 8])


def test_s33_bfloat16_passes_leave_weights_gradients_and_moments_in_float32(
    start_learner: Any,
) -> None:
    learner = start_learner(learner={"dtype": "bfloat16"})
    before = _weights(learner)
    learner.train_step(random_groups(0))
    assert {p.dtype for p in learner.policy.parameters()} == {torch.float32}
    assert learner._updater is not None
    optimizer = learner.model.optimizer
    moments = [v for s in optimizer.state.values() for v in s.values()]
    assert {m.dtype for m in moments} == {torch.float32}
    # an update of 1e-4 on a weight of 1 is lost in bfloat16
    norm = _weights(learner)["lm.model.norm.weight"] - before["lm.model.norm.weight"]
    assert 0 < norm.abs().max().item() < 1.1e-4
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"exp_avg is torch\.bfloat16"):
        assert_float32(learner.model)


def test_supervised_loss_is_the_mean_over_target_tokens_and_falls(start_learner: Any) -> None:
    learner = start_learner(sft={"learning_rate": 3e-3, "warmup_steps": 2})
    examples, lm = sft_examples(), build_llama()
    total, count = 0.0, 0
    for example in examples:
        ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.target_ids])).long()
        logprobs = lm(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[1:, None]).squeeze(-1)
        total -= chosen[2:].sum().item()
        count += len(example.target_ids)
    reports = [learner.sft_step(examples) for _ in range(10)]
    assert reports[0]["sft/loss"] == pytest.approx(total / count, rel=1e-5)
    assert reports[0]["sft/tokens"] == count
    assert [r["sft/learning_rate"] for r in reports[:3]] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert reports[-1]["sft/loss"] < reports[0]["sft/loss"] - 0.5
    assert learner.version == 0


def test_reinforcement_learning_starts_with_a_fresh_optimizer_after_supervised_steps(
    start_learner: Any,
) -> None:
    learner = start_learner(sft={"warmup_steps": 0})
    learner.sft_step(sft_examples())
    learner.train_step(random_groups(0))
    assert learner._updater is not None
    steps = {s["step"].item() for s in learner.model.optimizer.state.values()}
    assert steps == {1}
    assert learner._sft_updater is None
    with pytest.raises(RunError, match="supervised step after version 1"):
        learner.sft_step(sft_examples())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_snapshot_is_the_checkpoint_with_its_names_and_outlives_the_next_step(
    start_learner: Any, tmp_path: Path, tie: bool, dtype: str
) -> None:
    from safetensors.torch import load_file

    folder = save_llama(tmp_path / "model", tie=tie)
    learner = start_learner(folder, weights={"dtype": dtype})
    learner.train_step(random_groups(0))
    wanted = _weights(learner)
    assert learner.snapshot() == 1
    learner.train_step(random_groups(1, version=1))
    assert _moved(learner, wanted)
    report = learner.write_snapshot(str(tmp_path / "weights"))
    assert (report.version, report.rank) == (1, 0)
    stored = load_file(f"{folder}/model.safetensors")
    assert set(report.parts) == set(stored) == set(learner.tensor_shapes())
    [written] = (tmp_path / "weights").rglob(report.file)
    found = load_file(written)
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype)
        expected = wanted[f"lm.{name}"]
        assert learner.tensor_shapes()[name] == expected.shape
        assert torch.equal(tensor.reshape(expected.shape), expected.to(tensor.dtype))


def test_writing_needs_a_snapshot_and_each_is_written_once(
    start_learner: Any, tmp_path: Path
) -> None:
    learner = start_learner()
    with pytest.raises(WeightError, match="no snapshot"):
        learner.write_snapshot(str(tmp_path))
    learner.snapshot()
    learner.write_snapshot(str(tmp_path))
    with pytest.raises(WeightError, match="no snapshot"):
        learner.write_snapshot(str(tmp_path))


def test_a_snapshot_that_could_not_be_written_is_kept(start_learner: Any, tmp_path: Path) -> None:
    learner = start_learner()
    learner.snapshot()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises((WeightError, OSError)):
        learner.write_snapshot(str(blocked))
    assert learner.write_snapshot(str(tmp_path / "weights")).version == 0


def test_a_rank_that_waits_for_missing_ranks_says_so() -> None:
    store = serve_store(socket.create_server(("127.0.0.1", 0)))
    address = f"tcp://{store.host}:{store.port}"
    with pytest.raises(StalledError, match=r"group of 3 ranks did not form.*ranks \[0, 2\]"):
        join_group(address, 1, 3, "cpu", start_timeout_s=0.2, collective_timeout_s=1)


def test_calls_before_setup_and_addresses_that_are_none_are_refused(tiny_model_dir: str) -> None:
    config = learner_config(tiny_model_dir)
    with pytest.raises(RunError, match="not set up"):
        LearnerRank(config, tiny_model_dir, 0, 1, None).snapshot()
    with pytest.raises(ConfigError, match="tcp://host:port"):
        join_group("file:///x", 0, 1, "cpu", 1, 1)
    with pytest.raises(ConfigError, match="tcp://host:port"):
        join_group(None, 0, 2, "cpu", 1, 1)
