"""A deterministic engine without vLLM or torch, for tests of everything around an engine.

It answers the sort_digits task: with probability `skill + skill_per_version * version` the sorted
digits, otherwise the digits as they came. Samples follow from the request's seed and the version.
What follows the prompt's "=" is the answer so far: it is continued.

A JSON object steers it: the file `scripted_engine.json` in the model folder, read again at every
call, or else the environment variable SCRIPTED_ENGINE. The key `workers` holds objects that
override the rest for single workers by name. Keys and defaults:

    start_delay_s 0, generate_delay_s 0, pull_delay_s 0
    in_turn                                             false: one group after the other
    skill 0.1, skill_per_version 0.1
    fail_greedy                                         false: fail at temperature 0
    fail_start, fail_generate, fail_pull, fail_check    false: raise the error of that call
    hang_generate, hang_pull                            false: wait until cancelled
    hang_after_tokens                                   null: the same, with that many tokens so far
    crash_after_groups                                  null: end the process at the group after
    wrong_digest                                        false: report a digest that nobody published
    read_weights                                        false: read the version
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import WeightError, WorkerError
from rlhf_cluster.generation.engine import (
    Engine,
    LoadedWeights,
    Request,
    Sample,
    read_beside,
)
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.transports.transport import Deadline

SCRIPT_FILE = "scripted_engine.json"
SCRIPT_VARIABLE = "SCRIPTED_ENGINE"
_DEFAULTS: dict[str, Any] = {
    "start_delay_s": 0.0,
    "generate_delay_s": 0.0,
    "pull_delay_s": 0.0,
    "in_turn": False,
    "skill": 0.1,
    "skill_per_version": 0.1,
    "fail_start": False,
    "fail_generate": False,
    "fail_greedy": False,
    "fail_pull": False,
    "fail_check": False,
    "hang_generate": False,
    "hang_pull": False,
    "hang_after_tokens": None,
    "crash_after_groups": None,
    "wrong_digest": False,
    "read_weights": False,
}
VOCABULARY = {"<pad>": 0, "<eos>": 1} | {c: i for i, c in enumerate("0123456789=", start=2)}
_LOGPROB_SCALE = 0.5  # logprobs are drawn from (-0.5, 0]


def make_engine(config: RunConfig, model_dir: str, worker_name: str) -> ScriptedEngine:
    return ScriptedEngine(config, model_dir, worker_name)


def write_tokenizer(model_dir: str | Path) -> None:
    """All of a model folder that this engine reads, for tests that make none."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(Path(model_dir) / "tokenizer.json"))


def write_script(model_dir: str | Path, **script: Any) -> None:
    """Steer every engine that serves `model_dir`, from now on."""
    unknown = set(script) - {*_DEFAULTS, "workers"}
    assert not unknown, f"unknown keys of the script: {unknown}"
    file = Path(model_dir) / SCRIPT_FILE
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(script), encoding="utf-8")
    partial.replace(file)


class ScriptedEngine(Engine):
    def __init__(self, config: RunConfig, model_dir: str, worker_name: str) -> None:
        self._config = config
        self._model_dir = Path(model_dir)
        self._name = worker_name
        self._tokenizer: Tokenizer
        self._version = -1
        self._num_requests = 0
        self._num_served = 0
        self._num_groups = 0
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        script = self._script()
        await asyncio.sleep(script["start_delay_s"])
        if script["fail_start"]:
            raise WorkerError(f"{self._name}: scripted failure of start")
        self._tokenizer = Tokenizer.from_file(str(self._model_dir / "tokenizer.json"))

    async def generate(self, request: Request) -> list[Sample]:
        script = self._script()
        groups_to_live = script["crash_after_groups"]
        if groups_to_live is not None and self._num_groups >= groups_to_live:
            os._exit(1)
        if script["fail_generate"] or (script["fail_greedy"] and request.temperature == 0):
            raise WorkerError(f"{self._name}: scripted failure of generate")
        first_version = self._version
        self._num_requests += request.num_samples
        try:
            async with self._turn if script["in_turn"] else nullcontext():
                self._num_served += request.num_samples
                try:
                    if script["hang_generate"] or self._is_long(
                        request, script["hang_after_tokens"]
                    ):
                        await asyncio.Event().wait()
                    await asyncio.sleep(script["generate_delay_s"])
                finally:
                    self._num_served -= request.num_samples
        finally:
            self._num_requests -= request.num_samples
        self._num_groups += 1
        return [self._sample(script, request, i, first_version) for i in range(request.num_samples)]

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        script = self._script()
        if script["hang_pull"]:
            await asyncio.Event().wait()
        await asyncio.sleep(script["pull_delay_s"])
        if script["fail_pull"]:
            raise WeightError(f"{self._name}: scripted failure of pull")
        digest = await self._read(version) if script["read_weights"] else version.digest
        self._version = version.version
        return LoadedWeights(
            version=version.version,
            digest="0" * 32 if script["wrong_digest"] else digest,
            num_tensors=version.num_tensors,
            pause_s=script["pull_delay_s"],
        )

    async def _read(self, version: WeightVersion) -> str:
        from rlhf_cluster.util.tensor_hashing import compute_digest
        from rlhf_cluster.weights import store

        timeout_s = self._config.generation.take_deadline_s(version.num_bytes)
        deadline = Deadline(f"{self._name}: reading version {version.version}", timeout_s)
        return await read_beside(
            lambda: compute_digest(store.read(version.path, deadline=deadline)), deadline
        )

    def stats(self) -> Mapping[str, float]:
        return {
            "num_running": float(self._num_served),
            "num_waiting": float(self._num_requests - self._num_served),
            "kv_cache_use_fraction": 0.0,
        }

    def check(self) -> None:
        if self._script()["fail_check"]:
            raise WorkerError(f"{self._name}: scripted failure of check")

    async def close(self) -> None:
        return None

    def _script(self) -> dict[str, Any]:
        file = self._model_dir / SCRIPT_FILE
        text = file.read_text("utf-8") if file.exists() else os.environ.get(SCRIPT_VARIABLE, "{}")
        script = json.loads(text)
        own = script.pop("workers", {}).get(self._name, {})
        return _DEFAULTS | script | own

    def _question_and_answer(self, request: Request) -> tuple[str, str]:
        """The digits to sort, and those of the answer so far."""
        question, _, answer = self._tokenizer.decode(request.prompt_ids).partition("=")
        digits = ["".join(c for c in text if c.isdigit()) for text in (question, answer)]
        return digits[0], digits[1]

    def _is_long(self, request: Request, limit: int | None) -> bool:
        return limit is not None and len(self._question_and_answer(request)[1]) >= limit

    def _sample(self, script: dict[str, Any], request: Request, index: int, first: int) -> Sample:
        """One answer. An update while it was sampled labels its second half."""
        rng = random.Random(f"{request.seed}/{index}/{self._version}")
        skill = script["skill"] + script["skill_per_version"] * max(self._version, 0)
        correct = request.temperature == 0 or rng.random() < skill
        digits, so_far = self._question_and_answer(request)
        answers = ["".join(sorted(digits)), digits]
        text = next((a for a in answers[not correct :] if a.startswith(so_far)), digits)
        text = text[len(so_far) :]
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(self._tokenizer.token_to_id("<eos>"))
        ended = len(ids) <= request.max_tokens
        ids = ids[: request.max_tokens]
        half, spans = len(ids) // 2, [(self._version, 0, len(ids))]
        if first != self._version and half:
            spans = [(first, 0, half), (self._version, half, len(ids))]
        return Sample(
            token_ids=ids,
            logprobs=[-_LOGPROB_SCALE * rng.random() for _ in ids],
            version_spans=spans,
            finish_reason="stop" if ended else "length",
        )
