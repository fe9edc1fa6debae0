"""How examples are drawn, a tiny model in a folder, and a learner rank on it.

`make test` draws the same examples everywhere, so that a run that is green here is green there;
`make explore` draws new ones, and more of them.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# A process forked by a test hangs in torch where its parent had computed with several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=400)
settings.load_profile("repeatable")

# Of tests/component and tests/system what takes longest, in that order, by `pytest --durations=0`.
LONGEST_FIRST = (
    *("learner_loss", "job_on_nodes", "submitted_jobs", "run", "resume", "chaos", "shrinking"),
    *("moving_reference", "given_cluster", "weight_transport", "hot_spares", "replay"),
    *("generating", "ensemble", "killed_training", "stages", "worker_quarantine", "bad_input"),
    *("process_rewards", "prometheus", "segmented_groups", "online_dpo"),
    *("loop", "configured_runs", "rejection_sampling", "vllm_formats", "learner_ranks"),
    *("learner_backends", "learner_checkpoints", "vllm_draft", "vllm_engine", "vllm_caches"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So that no process is alone with a long file while the others have nothing left to do. Within
    a file the order stays."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.support.builders.tiny_learner import save_llama

    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start_learner(tiny_model_dir: str) -> Iterator[Any]:
    """start_learner(**sections) -> a rank that is set up; closed after the test."""
    from rlhf_cluster.learner.learner_rank import LearnerRank
    from tests.support.builders.tiny_learner import learner_config

    started: list[LearnerRank] = []

    def begin(folder: str = tiny_model_dir, **sections: dict[str, Any]) -> LearnerRank:
        for learner in started:
            learner.close()
        learner = LearnerRank(learner_config(folder, **sections), folder, 0, 1, None)
        learner.setup()
        started.append(learner)
        return learner

    yield begin
    for learner in started:
        learner.close()
