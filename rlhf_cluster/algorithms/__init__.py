"""Policy-optimisation algorithms: one file each, one entry in `ALGORITHMS`.

An algorithm turns scored groups into per-token advantages (numpy) and per-token log-probabilities
into a loss sum (torch). The learner knows none of them by name. Importing this loads no torch.
"""

from rlhf_cluster.algorithms.grpo import Grpo, GrpoConfig

AlgorithmConfig = GrpoConfig

ALGORITHMS = {"grpo": Grpo}

__all__ = ["ALGORITHMS", "AlgorithmConfig", "Grpo", "GrpoConfig"]
