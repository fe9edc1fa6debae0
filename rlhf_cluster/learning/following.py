"""A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656).

    soft   reference <- (1 - share) reference + share policy, weight by weight
    hard   share = 1: reference <- policy, to the bit

Promises: its weights are float32 whatever the passes compute in, so that small moves are not lost, and
a policy equal to it still has a KL of exactly 0; its shards are all that a checkpoint needs of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from rlhf_cluster.config.sections import HeadDtype
from rlhf_cluster.learning.backend import ShardedModel
from rlhf_cluster.learning.fsdp import shards_of
from rlhf_cluster.learning.reference import FrozenCopy
from rlhf_cluster.weights.manifest import LocalPart


class FollowingCopy(FrozenCopy):
    """The model of a folder, loaded a second time, which `follow` moves: a `Reference`."""

    def __init__(
        self,
        model_dir: str | Path,
        mesh: DeviceMesh,
        device: torch.device,
        compute_dtype: torch.dtype,
        head_dtype: HeadDtype = "float32",
    ) -> None:
        """Raises `ConfigError` as `policy.load_policy`."""
        super().__init__(
            model_dir, mesh, device, compute_dtype, dtype=torch.float32, head_dtype=head_dtype
        )

    def shards(self) -> Iterator[LocalPart]:
        """This rank's part of every weight, by its name in the policy; flat views."""
        return shards_of(self._policy)

    @torch.no_grad()
    def follow(self, policy: ShardedModel, share: float) -> None:
        """Become (1 - share) of what it is and `share`, in (0, 1], of the policy.

        The policy is FSDP2's, whole, and sharded over the same ranks.
        """
        own = {part.name: part.tensor for part in self.shards()}
        for part in policy.shards():
            if share == 1:
                own[part.name].copy_(part.tensor)
            else:
                own[part.name].mul_(1 - share).add_(part.tensor, alpha=share)
