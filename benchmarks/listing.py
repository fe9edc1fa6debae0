"""The committed results: which code each has measured, whether that is today's, and which aims it met.

    python benchmarks/listing.py

A result names a hash of the files that it measured (`code_of`), and the hash of a result that is older
than its code differs from today's. An aim that was missed is listed; its cause stands in the documents.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PRODUCT = ("rlhf_cluster", "actors")
MEASURED: Mapping[str, Sequence[str]] = {
    "verifiers": (
        "rlhf_cluster/rewards",
        "benchmarks/verifiers.py",
        "benchmarks/presentations.py",
        *(f"benchmarks/verifier_{part}.py" for part in ("cases", "targets", "templates")),
    ),
    "mutants": (*PRODUCT, "tests/mutants"),
    "lora_rounding": (
        "rlhf_cluster/weights/formats",
        "rlhf_cluster/models/int8_linear.py",
        "benchmarks/lora_rounding.py",
    ),
    "staleness_study": (
        *("rlhf_cluster/algorithms", "rlhf_cluster/learner", "rlhf_cluster/models"),
        *("benchmarks/in_process.py", "configs/quickstart.toml"),
    ),
    "scale": (
        *("rlhf_cluster/buffer", "rlhf_cluster/weights", "rlhf_cluster/pipeline.py"),
        *(
            "rlhf_cluster/run/worker_pool.py",
            "rlhf_cluster/run/pool_version.py",
            "actors/services/generation_client.py",
            "rlhf_cluster/run/worker_loads.py",
        ),
        *(
            f"tests/support/simulation/simulated_{part}.py"
            for part in ("cluster", "mirror", "network")
        ),
        *("rlhf_cluster/generation/generation_worker.py", "benchmarks/scale.py"),
    ),
}
"""Files and folders by result; the whole product where nothing is said."""

Bound = tuple[str, float]
AIMS: Mapping[str, Mapping[str, Bound]] = {
    "chaos": {
        "kills": (">=", 200),
        "groups_lost": ("<=", 0),
        "groups_trained_twice": ("<=", 0),
        "bound_violations": ("<=", 0),
        "orphans": ("<=", 0),
    },
    "mutants": {"mutants": (">=", 60), "survived": ("<=", 0), "not_judged": ("<=", 0)},
    "recovery": {
        **{f"{role}_max_s": ("<=", 60) for role in ("generation", "scoring", "controller")},
        **{f"{role}_max_s": ("<=", 120) for role in ("buffer", "learner")},
        "spare_over_none": ("<=", 1),
    },
    "scale": {
        "over_storage_limit": ("<=", 1.3),
        "over_storage_limit_after_a_slow_minute": ("<=", 1.3),
        "ram_versions_held": ("<=", 2),
        "healthy_workers_killed": ("<=", 0),
        "runs_ended": ("<=", 0),
    },
    "soak": {"steps": (">=", 2000), "violations": ("<=", 0)},
    "staleness_study": {"difference": ("<=", 0.05)},
    "verifiers": {
        "presentations": (">=", 20),
        "numeric_accuracy_min": (">=", 0.999),
        "maths_accuracy_min": (">=", 0.999),
        "restated_problem_accepted": ("<=", 0),
        **{
            f"counted_{kind}_{figure}": bound
            for kind in ("numeric", "maths")
            for figure, bound in (
                ("accuracy", (">=", 0.995)),
                ("right_seen", (">=", 2000)),
                ("wrong_seen", (">=", 3000)),
            )
        },
        "wrong_accepted_upper_bound": ("<=", 0.001),
        "restated_accepted": ("<=", 0),
    },
    "weight_sync": {
        "delta_bytes_ratio": ("<=", 0.05),
        "publish_pull_over_copy": ("<=", 1.5),
        "delta_publish_pull_over_copy": ("<=", 1.5),
        "requests_lost": ("<=", 0),
    },
    "advisor": {
        f"{case}/measured_over_foretold": (bound, value)
        for case in ("generation", "scoring", "learner")
        for bound, value in ((">=", 0.8),)
    },
}


def code_of(name: str, root: Path = ROOT) -> dict[str, Any]:
    """What result `name` measures, and its hash now."""
    measured = list(MEASURED.get(name, PRODUCT))
    return {"measured": measured, "hash": code_hash(root, measured)}


def code_hash(root: Path, measured: Iterable[str], extra: str = "") -> str:
    """Hash the names and bytes of all Python files and tables at these paths below `root`."""
    files: set[Path] = set()
    for path in measured:
        found = root / path
        files |= {found} if found.is_file() else {*found.rglob("*.py"), *found.rglob("*.toml")}
    parts = (
        f"{path.relative_to(root)} {xxh3_128_hexdigest(path.read_bytes())}\n"
        for path in sorted(files)
    )
    return xxh3_128_hexdigest(("".join(parts) + extra).encode())


def missed(figures: Mapping[str, float], aims: Mapping[str, Bound]) -> list[str]:
    """The aims that `figures` do not meet, and figures that are missing."""
    found = []
    for name, (bound, value) in aims.items():
        if name not in figures:
            found.append(f"{name} is missing")
        elif figures[name] < value if bound == ">=" else figures[name] > value:
            found.append(f"{name} = {figures[name]:g}, aim {bound} {value:g}")
    return found


def is_old(name: str, result: Mapping[str, Any], root: Path = ROOT) -> bool:
    """Whether the code that `result` measured is another one now, or is not known."""
    code = result.get("code")
    return code is None or code["hash"] != code_hash(root, code["measured"])


def main() -> int:
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        name = path.stem
        age = "older than its code" if is_old(name, result) else "of today's code"
        wrong = missed(result["figures"], AIMS.get(name, {}))
        print(f"{name:18} {result['date']}  {age}{''.join(f'; MISSED {w}' for w in wrong)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
