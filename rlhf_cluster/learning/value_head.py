"""The critic as a head on the policy's own trunk: one pass gives log-probabilities and values.

    values[t] = value_head(last hidden state of the policy at (prompt, response[:t]))

    loss of an optimizer step = policy loss + critic.coef * value loss

Promises: those of `critic`, but that the trunk receives both gradients, clipped together with the
policy's; the head has an optimizer, a learning rate and a clip of its own (`[critic]`), which see the
gradient of the value loss times `critic.coef`. The head is a sharded module beside the policy and no
part of it, so it is never published. It starts at 0: so do the values, and the trunk's first value
gradient.

The head's passes run inside the policy's backward pass, which torch's FSDP2 allows and a DeepSpeed
engine, which runs the backward pass of its own module alone, does not.

Shapes: B rows, S positions, N trained tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rlhf_cluster.algorithms.base import CriticAlgorithm, PerToken, Sums, ValueInputs
from rlhf_cluster.config.sections import Critic as CriticSection
from rlhf_cluster.errors import RunError
from rlhf_cluster.learning.backend import ShardedModel
from rlhf_cluster.learning.critic import Critic, ValueHead, score_values, start_as
from rlhf_cluster.learning.metrics import MetricSums
from rlhf_cluster.learning.packing import TokenSequence
from rlhf_cluster.learning.passes import Layout, TrainedTokens
from rlhf_cluster.learning.policy import PolicyLM
from rlhf_cluster.learning.schedule import Schedule
from rlhf_cluster.learning.update import Updater
from rlhf_cluster.records import ExperienceGroup

STREAMS = ("start_values", "returns")
"""Streams that `HeadCritic.loss` needs in the policy's passes."""


def sharded_head(policy: PolicyLM, mesh: DeviceMesh) -> ValueHead:
    """A head for this policy's hidden states, sharded over the ranks, in float32."""
    head = ValueHead(policy.config.get_text_config().hidden_size, next(policy.parameters()).device)
    fully_shard(head, mesh=mesh)
    return head


class HeadCritic(Critic):
    """A `Critic` whose value loss is part of the policy's passes."""

    def __init__(
        self,
        policy: ShardedModel,
        head: ShardedModel,
        updater: Updater,
        algorithm: CriticAlgorithm,
        coef: float,
    ) -> None:
        super().__init__(head, updater, algorithm)
        self._policy = policy
        self._coef = coef

    def estimate(
        self, groups: Sequence[ExperienceGroup], layout: Layout
    ) -> tuple[PerToken, PerToken, PerToken]:
        """(advantages, values, returns) of all rollouts, the same on every rank."""

        def values_of(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self._model(self._policy(input_ids, position_ids)).squeeze(-1)

        values = score_values(values_of, groups, layout)
        advantages, returns = self._algorithm.estimate(groups, values)
        return advantages, values, returns

    def loss(self, tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the weighted value loss, a scalar, and metric sums."""
        if tokens.hidden is None:
            raise RunError("a value head needs the hidden states of the pass; ask for them")
        inputs = ValueInputs(
            values=self._model(tokens.hidden).squeeze(-1),
            start_values=tokens.streams["start_values"],
            returns=tokens.streams["returns"],
        )
        losses, metrics = self._algorithm.value_loss(inputs)
        count = losses.new_tensor(losses.numel())
        share = self._coef * (losses * tokens.streams["weight"]).sum()
        return share, {**metrics, "critic/loss": (losses.sum(), count)}

    def backward(
        self, sequences: Sequence[TokenSequence], layout: Layout, sums: MetricSums
    ) -> None:
        """Nothing: the policy's passes did it."""


def new_critic(
    settings: CriticSection, policy: ShardedModel, model: ShardedModel, algorithm: CriticAlgorithm
) -> Critic:
    """The critic around `model`, a head or a value model that begins as the policy is."""
    schedule = Schedule(peak=settings.learning_rate, warmup_steps=settings.warmup_steps)
    updater = Updater(model, schedule, settings.max_grad_norm)
    if settings.kind == "head":
        return HeadCritic(policy, model, updater, algorithm, settings.coef)
    start_as(policy, model)
    return Critic(model, updater, algorithm)
