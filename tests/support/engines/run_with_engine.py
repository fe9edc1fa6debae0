"""`python -m tests.support.engines.run_with_engine CONFIG ENGINE`: what a file runs, with another
engine than vLLM."""

import sys
from typing import Any

from actors.drivers.dataset_driver import run_generate
from actors.drivers.offline_driver import run_stage
from actors.drivers.rl_driver import run_config
from rlhf_cluster.cli.commands import explain
from rlhf_cluster.config import GenerateConfig, StageConfig
from rlhf_cluster.config.load import AnyConfig, load_all
from rlhf_cluster.errors import RlhfError


def main() -> int:
    path, engine = sys.argv[1:3]
    try:
        for config in load_all(path):
            print(run(config, engine))
    except RlhfError as error:
        print(f"error: {type(error).__name__}: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def run(config: AnyConfig, engine: str) -> dict[str, Any]:
    if isinstance(config, StageConfig):
        return run_stage(config, sys.argv[1:], False)
    if isinstance(config, GenerateConfig):
        return run_generate(config, sys.argv[1:], False, engine)
    return run_config(config, sys.argv[1:], False, engine_factory=engine)


if __name__ == "__main__":
    sys.exit(main())
