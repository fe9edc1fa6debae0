"""`python -m tests.support.engines.run_with_engine CONFIG ENGINE`: what a file runs, with another
engine than vLLM."""

import sys
from typing import Any

from actors.drivers.dataset_driver import DatasetDriver
from actors.drivers.driver import drive
from actors.drivers.offline_driver import StageDriver
from actors.drivers.rl_driver import RLDriver
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
    kinds = {StageConfig: StageDriver, GenerateConfig: DatasetDriver}
    return drive(kinds.get(type(config), RLDriver), config, sys.argv[1:], False, False, engine)


if __name__ == "__main__":
    sys.exit(main())
