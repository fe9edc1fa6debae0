"""A process reward model, trained on labelled steps, as the reward of reinforcement learning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.data.reasoning_steps import step_spans
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.run.run_record import read_metrics
from tests.component.conftest import SCRIPTED, RunProcess, starting
from tests.support.builders.offline_stages import stage_tree, write_rows
from tests.support.builders.run_configs import tiny_tree

SEPARATOR = "5"


def labelled_rows(num: int) -> list[dict[str, Any]]:
    """Sorted digits and unsorted ones; a step is right while all is sorted up to its end."""
    draw, rows = random.Random(0), []
    for index in range(num):
        digits = "".join(draw.choices("0123456789", k=6))
        wanted = "".join(sorted(digits))
        answer = wanted if index % 2 else digits
        spans = step_spans(answer, SEPARATOR)
        labels = [float(wanted.startswith(answer[:end])) for _, end in spans]
        rows.append({"prompt": f"{digits}=", "completion": answer, "labels": labels})
    return rows


def pipeline_tree(**sections: dict[str, Any]) -> dict[str, Any]:
    reward = {
        "type": "process_reward_model",
        "path": "{stages.prm.final}",
        "reduce": "none",
        "dtype": "float32",
    }
    prm = stage_tree(
        run={"steps": 6, "units_per_step": 16},
        stage={"type": "process_reward_model", "step_separator": SEPARATOR},
        data={"sources": [{"path": sections["data"]["path"]}], "max_tokens": 24, "held_out": 0.1},
        learner={"learning_rate": 1e-2},
    )
    policy = tiny_tree(
        run={"steps": 2, "groups_per_step": 4},
        algorithm={"type": "grpo", "advantage": "process", "group_size": 4},
        scoring={"rewards": [reward], "step_separator": SEPARATOR},
    )
    for stage in (prm, policy):
        stage["observe"] = sections["observe"]
        for key in ("name", "root"):
            stage["run"] = {k: v for k, v in stage["run"].items() if k != key}
    return {"pipeline": sections["run"], "stages": {"prm": prm, "policy": policy}}


@pytest.fixture
def start_pipeline(ray_address: str, tmp_path: Path) -> Iterator[Callable[..., RunProcess]]:
    yield from starting(
        ray_address, tmp_path, pipeline_tree, "tests.support.engines.run_with_engine", SCRIPTED
    )


def chances(folder: Path, ids: list[int], ends: list[int]) -> np.ndarray:
    """What the model in `folder` says after each of `ends`, computed by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        logits = model.score(hidden).squeeze(-1)
    return torch.sigmoid(logits[ends].double()).numpy()


def test_a_run_is_paid_for_its_steps_by_the_model_that_an_earlier_stage_trained(
    start_pipeline, tmp_path
):
    path = write_rows(tmp_path / "steps.jsonl", labelled_rows(160))
    run = start_pipeline(data={"path": path})
    code, output = run.finish(500)
    assert code == 0, output

    final, policy = run.path / "prm" / "final", run.path / "policy"
    tokenizer = load_tokenizer(str(policy / "model"))
    samples = [row for p in (policy / "samples").glob("*.parquet") for row in read_samples(p)]
    assert len(samples) == 2 * 4 * 4
    paid: list[float] = []
    for row in samples:
        text = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        # one token a character: a step ends with its last digit, the last one with the response
        ends = [end - 1 for _, end in step_spans(text, SEPARATOR)][:-1]
        ends.append(len(row["response_ids"]) - 1)
        assert list(row["step_ends"]) == ends
        ids = [*row["prompt_ids"], *row["response_ids"]]
        wanted = chances(final, ids, [len(row["prompt_ids"]) + end for end in ends])
        np.testing.assert_allclose(row["step_rewards"], wanted, atol=1e-5)
        assert row["reward"] == pytest.approx(sum(row["step_rewards"]))
        paid += row["step_rewards"]
    assert max(len(row["step_ends"]) for row in samples) > 1, "responses of several steps were met"
    assert np.std(paid) > 1e-3, "the model tells steps apart"

    records = [r for r in read_metrics(policy / "metrics.jsonl") if "reward/mean" in r]
    assert [r["step"] for r in records] == [1, 2]
    assert np.mean([r["reward/mean"] for r in records]) == pytest.approx(
        np.mean([row["reward"] for row in samples])
    )
    assert all(r["reward/reasoning_steps_mean"] >= 1 for r in records)
    assert all(r["learner/grad_norm"] > 0 for r in records)
