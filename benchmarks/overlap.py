"""What overlap of generation and training is worth: synchronous, one step ahead, fully asynchronous.

Same task, same model, same tokens a step (the learning rate is so small that the policy stays what it
was, and every response is trained). A case is who is slower times how long the responses are:

balanced, generation_bound, train_bound    the learner passes over each batch as often as `EPOCHS` says
short       a warmed-up policy: all responses have 7 tokens
long_tail   a policy that knows nothing: the end comes at random, lengths are geometric, cut at 160

Every repeat runs all three modes of a case, starting with another one each time. The figures are
`async_over_slower_side_CASE` and `async_over_sync_CASE` (and the same for `one_ahead`), medians over
the repeats; the slower side is the larger of generation and training in the synchronous run.

    python benchmarks/overlap.py                                  # all cases, about 90 minutes
    python benchmarks/overlap.py --cases balanced_short --repeats 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import ENVIRONMENT, machine, run_steps, spread, step_times, write_result

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
REPEATS = 5
TOKENS_TOLERANCE = 0.05  # of a step's mean response tokens, between the modes

COMMON = ["run.steps=18", "learner.learning_rate=1e-7", "algorithm.kl_coef=1e-6"]
MODES = {
    "sync": ["staleness.max_staleness=0", "staleness.pipeline_depth=0"],
    "one_ahead": ["staleness.max_staleness=2", "staleness.pipeline_depth=1"],
    "async": ["staleness.max_staleness=4", "staleness.pipeline_depth=3"],
}
EPOCHS = {
    "short": {"balanced": 2, "generation_bound": 1, "train_bound": 5},
    "long_tail": {"balanced": 4, "generation_bound": 1, "train_bound": 9},
}
LENGTHS = {
    "short": [],
    "long_tail": [
        "sft.steps=0",
        "model.init.max_position=168",
        "generation.max_response_tokens=160",
        "learner.batching=packed",
        "run.groups_per_step=8",
    ],
}
CASES = {
    f"{side}_{length}": [*COMMON, f"learner.epochs={epochs}", *settings]
    for length, settings in LENGTHS.items()
    for side, epochs in EPOCHS[length].items()
}


def measure(case: str, repeat: int, folder: str) -> dict[str, Any]:
    """One repeat: the three modes after each other, starting with mode number `repeat`."""
    names = list(MODES)
    times, tokens = {}, {}
    for name in names[repeat % 3 :] + names[: repeat % 3]:
        settings = [*CASES[case], *MODES[name]]
        records = run_steps(QUICKSTART, folder, f"{case}-{name}-{repeat}", settings, 900.0)
        times[name] = step_times(records)
        tokens[name] = statistics.fmean(r["step/response_tokens"] for r in records)
    if max(tokens.values()) > (1 + TOKENS_TOLERANCE) * min(tokens.values()):
        raise SystemExit(
            f"{case}: the modes trained different amounts, {tokens}; no speed to report"
        )
    sync = times["sync"]
    slower = max(sync["generation_s"], sync["train_s"])
    ratios = {}
    for name in ("one_ahead", "async"):
        ratios[f"{name}_over_slower_side"] = times[name]["step_s"] / slower
        ratios[f"{name}_over_sync"] = times[name]["step_s"] / sync["step_s"]
    return {"case": case, **ratios, "tokens_per_step": tokens["sync"], "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    before = machine()
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            runs = [measure(case, repeat, folder) for repeat in range(arguments.repeats)]
        names = [name for name in runs[0] if "_over_" in name]
        figures = {f"{n}_{case}": statistics.median(run[n] for run in runs) for n in names}
        for name in names:
            print(case, name, spread([run[name] for run in runs]), flush=True)
        write_result("overlap", figures, {case: runs}, machine=before)


if __name__ == "__main__":
    main()
