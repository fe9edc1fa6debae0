"""What the learner made of a traced rollout: its log-probabilities and correction weights, from the
samples of the step (`observe.samples`), or the reason why there are none.

Promise: a column is shown only where it is of this very response, from a step that trained it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cluster.observe.samples import Row

Column = list[float | None]


def learner_facts(
    row: Row | None, step: int | None, uses: Sequence[int], response_ids: Sequence[int]
) -> tuple[dict[str, str], dict[str, Column]]:
    """The facts `learner` and `correction`, and their columns [T], None at tokens that are not trained.

    Args:
        row: of the samples, None where they have none of the rollout.
        step: whose samples the row is of.
        uses: the steps that trained the rollout, in order.
        response_ids: [T] of the rollout that is traced.
    """
    why = _reason(row, step, uses, response_ids)
    if row is None or why:
        return {"learner": why, "correction": why}, {}
    logprobs, weights = row["learner_logprobs"], row["correction_weights"]
    untrained = ", - at a token that is not trained" if None in logprobs else ""
    columns = {"learner_logprob": logprobs}
    told = "none: the algorithm's loss has no weight for the distance to the sampler"
    if weights is not None:
        columns["correction_weight"] = weights
        told = f"{_range(weights)}, the weight at the first pass of step {step}"
    return {
        "learner": f"log-probabilities at the first pass of step {step}{untrained}",
        "correction": told,
    }, columns


def _reason(
    row: Row | None, step: int | None, uses: Sequence[int], response_ids: Sequence[int]
) -> str:
    """Why nothing can be shown; empty where something can."""
    if not uses:
        return "not known: no step has trained it"
    if row is None:
        return (
            f"not recorded: not among the samples of step {uses[-1]}, which are of the first rollouts "
            "of a step (observe.samples_per_step)"
        )
    if step not in uses:
        return f"not recorded: the sample is of step {step}, which no longer counts as its training"
    if list(row["response_ids"]) != list(response_ids):
        return f"not known: the sample of step {step} is of another response"
    if "learner_logprobs" not in row:
        return f"not recorded: the samples of step {step} have no such column"
    if row["learner_logprobs"] is None:
        return (
            f"none: step {step} left it out of its passes, since no token of it is trained or all its "
            "advantages are 0, and so its loss"
        )
    return ""


def _range(weights: Column) -> str:
    found = [weight for weight in weights if weight is not None]
    low, high = min(found), max(found)
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
