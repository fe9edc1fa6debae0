"""Preference optimisation: a policy from pairs of responses, or from single ones with a verdict (KTO).

Rows are in any layout of `data.preferences`; with `loss = { type = "kto" }` labelled responses too,
and a pair is then two of them. Losses and their keys are in `algorithms.preference_loss_config`.

The reference is the policy as the stage began, or moves towards it (`reference_update`; TR-DPO,
Gorbatovski et al. 2024, arXiv 2404.09656). A moving reference is saved with each checkpoint. Its
log-probabilities of a unit are computed when the unit is first met. They are kept until the reference
moves, as far as `reference_cache_bytes` hold them; those of further units are computed each time.

KTO's baseline is computed once per step on unmatched responses: each prompt of the batch with the
responses of the next one, cut where they do not fit. A batch of one prompt has the baseline 0.

Promises:
- the loss is the mean over the pairs (labelled responses) of the batch, whatever the ranks,
  micro-batches and packing;
- while the policy is the reference every log-ratio is exactly 0;
- truncation drops the oldest tokens of the prompt, the same ones for both responses, and never touches
  a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from xxhash import xxh3_128

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.preference_loss_config import (
    DpoConfig,
    KtoConfig,
    PairLoss,
    PreferenceLoss,
)
from rlhf_cluster.algorithms.preference_losses import Labelled, Pairs, kto_baseline
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.preferences import parse_labelled, parse_pair, split_key
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit, cut_end
from rlhf_cluster.offline.scorer_report import validation_report
from rlhf_cluster.offline.stage import Passes, Stage, StageContext, cut_prompt, encode_answers
from rlhf_cluster.sections.offline_stage import StageSectionBase
from rlhf_cluster.sections.values import FixedReference, PeriodicReference, ReferenceUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.algorithms.micro_batch_loss import TokenLoss, TrainedTokens


UNIT_BYTES = 500
"""Bytes that a kept unit takes on top of its numbers: two arrays, a tuple, a name, a dict entry."""


class PreferenceConfig(StageSectionBase):
    """Preference optimisation against the policy that the stage starts from."""

    type: Literal["preference"] = "preference"
    loss: PreferenceLoss = DpoConfig()
    """Preference loss and its keys."""
    reference_update: ReferenceUpdate = FixedReference()
    """Rule by which the reference moves.

    It stays as the stage began (`fixed`), becomes the policy (`periodic`), or moves part of the way
    (`ema`). `every` counts optimizer steps, and 1 - decay is TR-DPO's alpha.
    """
    reference_cache_bytes: int = Field(default=2**30, ge=0)
    """Host memory of each rank, in bytes, for log-probabilities of the reference. 0: none.

    They take 4 bytes per response token and about 500 per unit. A unit that does not fit costs a pass
    of the reference in every epoch.
    """

    @model_validator(mode="after")
    def _update_has_a_reference(self) -> PreferenceConfig:
        update = self.reference_update.type
        if update != "fixed" and not self.loss.needs_reference:
            raise ValueError(
                f"reference_update.type = {update!r} with loss.type = {self.loss.type!r}, which has no "
                "reference. Remove it, or take a loss that has one"
            )
        return self

    @property
    def max_unit_size(self) -> int:
        return 2


class PreferenceStage(Stage[PreferenceConfig]):
    headline = "preference/accuracy"
    lower_is_better = False
    needs_reference = True

    def __init__(self, section: PreferenceConfig, context: StageContext) -> None:
        super().__init__(section, context)
        self.needs_reference = section.loss.needs_reference
        self.reference_moves = not isinstance(section.reference_update, FixedReference)
        self._kept: dict[bytes, tuple[np.ndarray, ...]] = {}  # of the reference, by token ids
        self._room = section.reference_cache_bytes

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        where = f"{name}, {row.place}"
        if self.section.loss.paired:
            pair = parse_pair(row.columns, where)
            prompt, answers, verdicts = pair.prompt, [pair.chosen, pair.rejected], [True, False]
        else:
            found = parse_labelled(row.columns, where)
            prompt, answers = found[0].prompt, [r.completion for r in found]
            verdicts = [r.desirable for r in found]
        prompt_ids, ids = encode_answers(prompt, answers, where, self.context, self.tokenizer)
        return [
            Unit(
                sequences=tuple(TokenSequence(prompt_ids=prompt_ids, target_ids=a) for a in ids),
                key=split_key(prompt),
                content=repr((prompt, answers, verdicts)),
                place=where,
                values={"desirable": float(verdicts[0])},
            )
        ]

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        longest = max(len(s.target_ids) for s in unit.sequences)
        # the last target is predicted and never read
        cut = cut_prompt(unit.sequences[0].prompt_ids, longest, max_tokens + 1)
        if cut is None:
            return None
        return replace(unit, sequences=tuple(replace(s, prompt_ids=cut) for s in unit.sequences))

    def loss(self, units: Sequence[Unit], passes: Passes) -> TokenLoss:
        loss = self.section.loss
        reference = self._of_reference(units, passes) if loss.needs_reference else None
        if isinstance(loss, PairLoss):
            return _pair_loss(loss, len(units), reference)
        assert reference is not None
        return _labelled_loss(loss, _verdicts(units), reference, self._baseline(units, passes))

    def reference_share(self, step: int) -> float:
        update = self.section.reference_update
        if isinstance(update, FixedReference) or step % update.every:
            return 0.0
        return 1.0 if isinstance(update, PeriodicReference) else 1 - update.decay

    def reference_moved(self) -> None:
        self._kept.clear()
        self._room = self.section.reference_cache_bytes

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        """Report how well the policy separates held-out responses, and likelihood displacement.

        Displacement: chosen responses have become less likely (Razin et al. 2024, arXiv 2410.08847).
        """
        policy = _sums(passes.logprobs(units))
        if not self.needs_reference:
            return _comparison(self.section.loss, units, policy, None)
        return _comparison(self.section.loss, units, policy, _sums(passes.reference(units)))

    def _of_reference(self, units: Sequence[Unit], passes: Passes) -> list[np.ndarray]:
        """Return the reference's log-probabilities, [T] for every sequence in order.

        All ranks meet the same units in the same order, so all keep and miss the same ones.
        """
        by_name = {_token_digest(unit): unit for unit in units}
        missing = [unit for name, unit in by_name.items() if name not in self._kept]
        names = [name for name in by_name if name not in self._kept]
        found = dict(zip(names, passes.reference(missing), strict=True)) if missing else {}
        for name, own in found.items():
            self._keep(name, own)
        known = {name: found.get(name) or self._kept[name] for name in by_name}
        return [own for unit in units for own in known[_token_digest(unit)]]

    def _keep(self, name: bytes, found: tuple[np.ndarray, ...]) -> None:
        """Keep a unit's log-probabilities while there is memory.

        Nothing is evicted for them: an epoch meets every unit once, so no unit is worth more.
        """
        size = UNIT_BYTES + sum(values.nbytes for values in found)
        if size <= self._room:
            self._room -= size
            # a view would keep the whole batch that it is of
            self._kept[name] = tuple(values.copy() for values in found)

    def _baseline(self, units: Sequence[Unit], passes: Passes) -> float:
        """Compute KTO's baseline, in nats."""
        import torch

        unmatched = _swap_responses(units, self.context.data.max_tokens)
        if not unmatched:
            return 0.0
        policy, ref = _sums(passes.logprobs(unmatched)), _sums(passes.reference(unmatched))
        return float(kto_baseline(torch.from_numpy(policy), torch.from_numpy(ref)))


def _token_digest(unit: Unit) -> bytes:
    digest = xxh3_128()
    for ids in (ids for s in unit.sequences for ids in (s.prompt_ids, s.target_ids)):
        digest.update(len(ids).to_bytes(4, "little") + ids.astype(np.int32).tobytes())
    return digest.digest()


def _pair_loss(loss: PairLoss, num_pairs: int, reference: Sequence[np.ndarray] | None) -> TokenLoss:
    def share(tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        sums = tokens.sums(tokens.logprobs)
        counts = tokens.sums(tokens.logprobs.detach().new_ones(tokens.logprobs.shape))
        ref = None if reference is None else _reference_sums(tokens, reference)
        pairs = Pairs(
            chosen=sums[0::2],
            rejected=sums[1::2],
            chosen_tokens=counts[0::2],
            rejected_tokens=counts[1::2],
            ref_chosen=None if ref is None else ref[0::2],
            ref_rejected=None if ref is None else ref[1::2],
        )
        losses, metrics = loss.losses(pairs)
        return losses.sum() / num_pairs, metrics

    return share


def _labelled_loss(
    loss: KtoConfig, verdicts: Sequence[bool], reference: Sequence[np.ndarray], baseline: float
) -> TokenLoss:
    def share(tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        sums = tokens.sums(tokens.logprobs)
        desirable = sums.detach().new_tensor([float(verdicts[i]) for i in tokens.members])
        labelled = Labelled(
            policy=sums, ref=_reference_sums(tokens, reference), desirable=desirable.bool()
        )
        losses, metrics = loss.losses(labelled, sums.detach().new_tensor(baseline))
        return losses.sum() / len(verdicts), metrics

    return share


def _reference_sums(tokens: TrainedTokens, reference: Sequence[np.ndarray]) -> Tensor:
    """Sum the reference's log-probabilities per sequence of the micro-batch.

    The sums are made like the policy's, so equal log-probabilities give equal sums.
    """
    own = [reference[index] for index in tokens.members]
    values = np.concatenate([np.zeros(0, dtype=np.float32), *own])
    return tokens.sums(tokens.logprobs.detach().new_tensor(values))


def _swap_responses(units: Sequence[Unit], max_tokens: int) -> list[Unit]:
    """Join each prompt with the responses of the next unit, where that has another prompt."""
    found = []
    for index, unit in enumerate(units):
        other = units[(index + 1) % len(units)]
        prompt_ids = unit.sequences[0].prompt_ids
        if np.array_equal(prompt_ids, other.sequences[0].prompt_ids):
            continue
        moved = [cut_end(replace(s, prompt_ids=prompt_ids), max_tokens) for s in other.sequences]
        if sequences := tuple(sequence for sequence in moved if sequence is not None):
            found.append(replace(unit, sequences=sequences))
    return found


def _verdicts(units: Sequence[Unit]) -> list[bool]:
    """Return for every sequence in order whether it is desirable; of a pair, the first one is."""
    return [
        verdict
        for unit in units
        for verdict in (
            (True, False) if len(unit.sequences) == 2 else (bool(unit.values["desirable"]),)
        )
    ]


def _sums(found: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    """Sum the log-probabilities of every sequence in order, float64."""
    return np.array([values.sum(dtype=np.float64) for unit in found for values in unit])


def _comparison(
    loss: PairLoss | KtoConfig, units: Sequence[Unit], policy: np.ndarray, ref: np.ndarray | None
) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"num_responses": len(policy)}
    if isinstance(loss, PairLoss):
        lengths = np.array([len(s.target_ids) for unit in units for s in unit.sequences])
        columns = (policy, lengths) if ref is None else (policy, lengths, ref)
        sides = [[torch.from_numpy(c[start::2].copy()) for c in columns] for start in (0, 1)]
        (chosen, chosen_tokens, *ref_chosen), (rejected, rejected_tokens, *ref_rejected) = sides
        pairs = Pairs(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            ref_chosen=ref_chosen[0] if ref_chosen else None,
            ref_rejected=ref_rejected[0] if ref_rejected else None,
        )
        rewards = [side.numpy() for side in loss.rewards(pairs)]
        found |= validation_report(rewards[0], rewards[1], lengths[0::2], lengths[1::2]).as_dict()
    if ref is None:
        return found
    verdicts = np.array(_verdicts(units))
    for side, chosen_ones in (("chosen", verdicts), ("rejected", ~verdicts)):
        if chosen_ones.any():
            found[f"{side}_log_ratio"] = float((policy - ref)[chosen_ones].mean())
    fell = found.get("chosen_log_ratio", 0.0)
    found["displaced"] = fell < 0
    if fell < 0:
        warning = (
            f"chosen responses are less likely than under the reference, by {-fell:.3g} nats in the "
            "mean (likelihood displacement). Raise nll_coef or beta, or take the loss 'dpop'"
        )
        found["warnings"] = [*found.get("warnings", []), warning]
    return found
