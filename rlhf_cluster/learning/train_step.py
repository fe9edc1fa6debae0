"""One optimizer step of reinforcement learning, for any algorithm.

    staleness gate -> advantages -> sequences -> passes -> metrics reduced -> clip -> step

Every rank is given ALL groups of the step and computes its own share by the same plan; the only
communication is that of the sharded policy, one reduction of metric sums, and the gradient norm.
Promises: a batch that breaks the staleness bound raises before a weight is touched; the loss is
the sum over trained tokens divided by ALL trained tokens of the batch. Rollouts whose advantages
are all zero are left out of the passes, but stay in that denominator, when the algorithm's loss is
a multiple of the advantage (it needs no reference); metrics of tokens are over those computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rlhf_cluster.algorithms.base import Algorithm, LossInputs, Sums
from rlhf_cluster.learning.experience import TrainingBatch, check_staleness, training_batch
from rlhf_cluster.learning.passes import Layout, run_passes
from rlhf_cluster.learning.policy import PolicyLM
from rlhf_cluster.learning.update import Updater
from rlhf_cluster.records import ExperienceGroup

Clock = Callable[[], float]


def train_step(
    policy: PolicyLM,
    updater: Updater,
    algorithm: Algorithm,
    groups: Sequence[ExperienceGroup],
    version: int,
    max_staleness: int,
    layout: Layout,
    clock: Clock,
) -> dict[str, float]:
    """Train on `groups` once; the learner's version before the step is `version`.

    Returns:
        Metrics, the same on every rank but for the phases' seconds (`learner/prepare_s`,
        `learner/forward_backward_s`, `learner/optimizer_s`).

    Raises:
        StalenessError: a trained token breaks the bound. No weight was touched.
        RecordError: experience that cannot be trained on.
        DivergenceError: gradients were not finite for several steps in a row.
    """
    started = clock()
    metrics = check_staleness(groups, version, max_staleness)
    batch = training_batch(groups, algorithm.advantages(groups), not algorithm.needs_reference)
    prepared = clock()
    metrics |= _backward(policy, algorithm, batch, layout)
    computed = clock()
    metrics |= updater.apply(version)
    finished = clock()
    return metrics | {
        "learner/tokens": float(batch.num_tokens),
        "learner/rollouts": float(batch.num_rollouts),
        "learner/dropped_rollouts": float(batch.num_dropped),
        "learner/prepare_s": prepared - started,
        "learner/forward_backward_s": computed - prepared,
        "learner/optimizer_s": finished - computed,
    }


def _backward(
    policy: PolicyLM, algorithm: Algorithm, batch: TrainingBatch, layout: Layout
) -> dict[str, float]:
    def loss(
        logprobs: Tensor, entropy: Tensor, streams: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        inputs = LossInputs(
            learner_logprobs=logprobs,
            sampled_logprobs=streams["sampled_logprobs"],
            ref_logprobs=streams.get("ref_logprobs"),
            advantages=streams["advantages"],
            entropy=entropy,
        )
        loss_sum, sums = algorithm.loss(inputs)
        count = loss_sum.new_tensor(logprobs.numel())
        own = {"learner/loss": (loss_sum, count), "learner/entropy": (entropy.sum(), count)}
        return loss_sum, {**sums, **own}

    sums = run_passes(
        policy,
        batch.sequences,
        batch.streams,
        batch.num_tokens,
        batch.temperature,
        layout,
        loss,
    )
    means = dict(algorithm.derive(sums.reduce()))
    # the mean over computed tokens becomes that over all trained ones: the rest have loss 0
    share = batch.num_computed_tokens / batch.num_tokens
    return means | {"learner/loss": means.get("learner/loss", 0.0) * share}
