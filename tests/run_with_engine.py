"""`python -m tests.run_with_engine CONFIG ENGINE`: one run with another engine than vLLM."""

import sys

from actors.cluster import run_config
from rlhf_cluster.cli import explain
from rlhf_cluster.config import load_run
from rlhf_cluster.errors import RlhfError


def main() -> int:
    path, engine = sys.argv[1:3]
    try:
        summary = run_config(load_run(path), sys.argv[1:], False, engine_factory=engine)
    except RlhfError as error:
        print(f"error: {type(error).__name__}: {explain(error)}", file=sys.stderr)
        return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
