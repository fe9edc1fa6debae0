"""Distillation: a student learns the whole distribution of a frozen teacher at each trained token.

    loss = mean over the trained tokens of D(student, teacher) - nll_coef log student(token)

Rows, chat templates and which tokens are trained are those of `sft`. D is `forward_kl` (the student
covers all that the teacher may say), `reverse_kl` (it says only what the teacher would) or `js`, the
generalised Jensen-Shannon divergence between them, at temperature 1; formulas in
`models.divergence`. Hinton et al. 2015, arXiv 1503.02531; Agarwal et al. 2023, arXiv 2306.13649
(GKD), whose part on the student's own samples is the algorithm `on_policy_distillation`.

The teacher is a frozen model of any size with the policy's tokenizer. Every rank holds it as a second
model, sharded by FSDP2 like the student and in the type of the passes. Where its vocabulary is padded
further than the student's, the extra entries are not used.

Promises:
- logits of both models exist for a chunk of tokens at a time;
- no gradient flows into the teacher;
- the loss is the mean over all trained tokens of the batch, whatever the ranks, micro-batches and
  packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import RunError
from rlhf_cluster.models.divergence import (
    Divergence,
    Kind,
)
from rlhf_cluster.offline.stage import (
    Passes,
    StageContext,
)
from rlhf_cluster.offline.train_sft import DialogueStage
from rlhf_cluster.sections.offline_stage import StageSectionBase

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.algorithms.micro_batch_loss import (
        TokenLoss,
        TrainedTokens,
    )


class DistillationConfig(StageSectionBase):
    """A student learns from a teacher, token by token, on dialogues or prompts and completions."""

    type: Literal["distillation"] = "distillation"
    teacher: str = Field(min_length=1)
    """Folder of the teacher, a Hugging Face causal language model with the policy's tokenizer."""
    divergence: Kind = "forward_kl"
    """Divergence between the two distributions that is minimised; see `models.divergence`."""
    alpha: float = Field(default=0.5, gt=0, lt=1)
    """Teacher's share of the mixture, with divergence = "js" only.

    Near 0 it acts like forward_kl, near 1 like reverse_kl.
    """
    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood of the data's tokens."""


class DistillationStage(DialogueStage[DistillationConfig]):
    headline = "distillation/divergence"

    def __init__(self, section: DistillationConfig, context: StageContext) -> None:
        super().__init__(section, context)
        self.teacher = section.teacher
        self.divergence = Divergence(kind=section.divergence, alpha=section.alpha)

    def loss(self, units: Sequence[Unit], passes: Passes) -> TokenLoss:
        num_tokens = sum(unit.num_trained for unit in units)

        def share(tokens: TrainedTokens) -> tuple[Tensor, Sums]:
            if tokens.kl is None:
                raise RunError("a distillation stage without its teacher; the rank must hold it")
            divergence, nll = tokens.kl.sum(), -tokens.logprobs.sum()
            count = nll.new_tensor(tokens.logprobs.numel())
            sums = {
                "distillation/divergence": (divergence, count),
                "distillation/nll": (nll, count),
                "distillation/entropy": (tokens.entropy.sum(), count),
            }
            total = divergence
            if self.section.nll_coef > 0:
                total = total + self.section.nll_coef * nll
            return total / num_tokens, sums

        return share

    def metrics(self, units: Sequence[Unit]) -> Mapping[str, float]:
        return {"distillation/tokens": float(sum(unit.num_trained for unit in units))}
