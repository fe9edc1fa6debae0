"""Policy-optimisation algorithms: one file each, one entry in `ALGORITHMS`, one in the union.

An algorithm turns scored groups into per-token advantages (numpy) and per-token log-probabilities
into per-token losses (torch). The learner knows none of them by name. `type` chooses the algorithm;
the default is grpo. Importing this package loads no torch.

Where to begin: `docs/examples/grpo_in_60_lines.py` computes GRPO with the defaults step by step from
plain tensors. Then `policy_gradient.py`, the loss that all algorithms but online DPO share, and the
file of one algorithm, such as `grpo.py`.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlhf_cluster.algorithms.cispo import Cispo, CispoConfig
from rlhf_cluster.algorithms.dapo import Dapo, DapoConfig
from rlhf_cluster.algorithms.dr_grpo import DrGrpo, DrGrpoConfig
from rlhf_cluster.algorithms.gdpo import Gdpo, GdpoConfig
from rlhf_cluster.algorithms.grpo import Grpo, GrpoConfig
from rlhf_cluster.algorithms.gspo import Gspo, GspoConfig
from rlhf_cluster.algorithms.on_policy_distillation import (
    OnPolicyDistillation,
    OnPolicyDistillationConfig,
)
from rlhf_cluster.algorithms.online_dpo import OnlineDpo, OnlineDpoConfig
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient
from rlhf_cluster.algorithms.policy_gradient_config import AlgorithmSection
from rlhf_cluster.algorithms.ppo import Ppo, PpoConfig
from rlhf_cluster.algorithms.reinforce import Reinforce, ReinforceConfig
from rlhf_cluster.algorithms.reinforce_pp import ReinforcePp, ReinforcePpConfig
from rlhf_cluster.algorithms.remax import Remax, RemaxConfig
from rlhf_cluster.algorithms.rloo import Rloo, RlooConfig
from rlhf_cluster.algorithms.sapo import Sapo, SapoConfig
from rlhf_cluster.sections.extensions import FromOtherPackages, Table

_BUILT_IN: dict[str, type[PolicyGradient[Any]] | type[OnlineDpo]] = {
    "cispo": Cispo,
    "dapo": Dapo,
    "dr_grpo": DrGrpo,
    "gdpo": Gdpo,
    "grpo": Grpo,
    "gspo": Gspo,
    "on_policy_distillation": OnPolicyDistillation,
    "online_dpo": OnlineDpo,
    "ppo": Ppo,
    "reinforce": Reinforce,
    "reinforce_pp": ReinforcePp,
    "remax": Remax,
    "rloo": Rloo,
    "sapo": Sapo,
}
ALGORITHMS = Table("algorithm", "rlhf_cluster.algorithms", _BUILT_IN, AlgorithmSection)


def _with_type(section: Any) -> Any:
    return {"type": "grpo", **section} if isinstance(section, dict) else section


AlgorithmConfig = Annotated[
    CispoConfig
    | DapoConfig
    | DrGrpoConfig
    | GdpoConfig
    | GrpoConfig
    | GspoConfig
    | OnPolicyDistillationConfig
    | OnlineDpoConfig
    | PpoConfig
    | ReinforceConfig
    | ReinforcePpConfig
    | RemaxConfig
    | RlooConfig
    | SapoConfig,
    Field(discriminator="type"),
    FromOtherPackages(ALGORITHMS),
    BeforeValidator(_with_type),
]


def build_algorithm(
    config: AlgorithmConfig, max_response_tokens: int
) -> PolicyGradient[Any] | OnlineDpo:
    """Build the algorithm of a run; `max_response_tokens` is `generation.max_response_tokens`."""
    return ALGORITHMS[config.type](config, max_response_tokens)


__all__ = ["ALGORITHMS", "AlgorithmConfig", "Grpo", "GrpoConfig", "build_algorithm"]
