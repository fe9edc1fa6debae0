"""Driver of a data set, from its configuration to its file: pools without learner and buffer.

    pools -> answers (groups.jsonl, prompt by prompt) -> selection -> data.jsonl -> summary

Promises:
- rerunning the command resumes a stage that was killed, was stopped or failed. Prompts whose answers
  are written are not sampled again;
- no pool is started if no answer is missing;
- however the stage ends, all its actors and placement groups are removed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.drivers.driver import Driver, Opened
from rlhf_cluster.util.slow_disk import run_in_thread

# isort: split
from actors.cluster.calls import answer
from actors.drivers.run_observer import StageObserver
from actors.drivers.supervisor import Supervisor
from actors.services.control_actor import open_channel
from actors.services.start_services import generation_pool, scoring_pools, started_pools
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.dataset_config import GenerateConfig
from rlhf_cluster.data.tokenizer import load_tokenizer, render
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.planning.run_inputs import Inputs, check_inputs
from rlhf_cluster.records import Handle
from rlhf_cluster.synthetic_data.answers_file import GROUPS, Answers, AnswersFile, Progress
from rlhf_cluster.synthetic_data.dataset import write_dataset
from rlhf_cluster.synthetic_data.produce import Completions, Producer, Revisions
from rlhf_cluster.synthetic_data.revise_answers import EndpointAsker
from rlhf_cluster.util.durable_files import write_json

HEADLINE = "generate/reward_mean"
REPORT = "report.json"


class DatasetDriver(Driver[GenerateConfig, Inputs, StageObserver]):
    """A stage that makes a data set."""

    def __init__(self, opened: Opened[GenerateConfig, Inputs]) -> None:
        super().__init__(opened)
        config, inputs = self.config, self.inputs
        self.num_prompts = inputs.prompts.epoch_size or 0
        self.tokenizer = load_tokenizer(config.model.tokenizer or str(inputs.model_dir))
        config.data_file.unlink(missing_ok=True)  # left by an earlier selection
        self.file = AnswersFile(self.rundir.path / GROUPS)
        self.observer = StageObserver(
            config, self.rundir, self.num_prompts, HEADLINE, {}, self.show, self.started_s
        )
        self.progress = Progress(config.run.record_every, len(self.file.done), config.stage.samples)

    @staticmethod
    def check_inputs(config: GenerateConfig, scratch: Path) -> Inputs:
        """Check the inputs like those of a run, and that the key of an endpoint is set."""
        if config.stage.revise is not None and config.stage.revise.endpoint is not None:
            EndpointAsker.of(config.stage.revise.endpoint)
        return check_inputs(config.as_run, scratch)

    @property
    def services_config(self) -> RunConfig:
        return self.config.as_run

    def stopped_text(self) -> str:
        return (
            f"run {self.config.run.name} was stopped by a signal: {len(self.file.done)} of "
            f"{self.num_prompts} prompts are written, and the same command continues with the others"
        )

    def close(self) -> None:
        self.file.close()
        super().close()

    async def work(self) -> dict[str, Any]:
        if self.file.done:
            self.observer.event(f"{len(self.file.done)} prompts are written already")
        discarded: dict[str, int] = {}
        if len(self.file.done) < self.num_prompts:
            discarded = await self._sample_missing()
        return await run_in_thread(self._finish, discarded)

    async def _sample_missing(self) -> dict[str, int]:
        """Sample the answers of all prompts that have none. Returns discarded prompts by reason.

        Waits for: these answers.
        """
        launcher, observer = self.launcher, self.observer
        control = await run_in_thread(
            open_channel, launcher.config, self.patience_s, observer.event
        )
        generation, scoring = generation_pool(launcher), scoring_pools(launcher)
        self.pools, self.clients = (generation[0], *scoring[0]), (generation[1], scoring[1])
        for pool in self.pools:
            pool.tell = observer.event
        producer = self._producer()
        supervisor = Supervisor(control, self.pools, observer)  # type: ignore[arg-type]
        try:
            async with (
                started_pools(launcher.config, self.pools) as started,
                supervisor.watching(started),
            ):
                await asyncio.shield(started)
                self.progress.begin(time.monotonic())
                await producer.run()
            if self.progress.is_open:
                self._record()
            return dict(producer.num_discarded)
        finally:
            control.close()

    def _producer(self) -> Producer:
        config = self.config
        completions = None
        if config.stage.completions is not None:
            completions = Completions(
                number=config.stage.completions,
                separator=config.scoring.step_separator,
                silent=frozenset(self.tokenizer.all_special_ids),
            )
        return Producer(
            generation=self.clients[0],
            scoring=self.clients[1],
            fetch=self._fetch,
            decode=self._text,
            prompts=self.inputs.prompts,
            num_prompts=self.num_prompts,
            sampling=config.as_run.sampling,
            completions=completions,
            revisions=self._revisions(),
            file=self.file,
            patience=self.observer.patience,
            max_in_flight=config.run.max_in_flight_groups,
            max_error_rate=config.scoring.max_error_rate,
            finished=self._finished,
            discarded=self._record_discard,
        )

    def _revisions(self) -> Revisions | None:
        """Build the revision of answers, if it is configured.

        Raises: `ConfigError` if the key of an endpoint is not set.
        """
        how, data = self.config.stage.revise, self.config.data
        if how is None:
            return None
        return Revisions(
            how=how,
            asker=None if how.endpoint is None else EndpointAsker.of(how.endpoint),
            render=lambda text: render(text, "stage.revise", data, self.tokenizer),
            encode=self._tokens,
            max_prompt_tokens=data.max_prompt_tokens,
            seed=self.config.run.seed,
        )

    async def _fetch(self, handle: Handle) -> Any:
        """Fetch the record of a group. Waits for: it, at most `scoring.request_timeout_s`."""
        return await answer(handle, self.config.scoring.request_timeout_s, "a group of responses")

    def _tokens(self, text: str) -> list[int]:
        """Return the token ids of a response, including the end token."""
        tokenizer: Any = self.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]

    def _text(self, ids: Sequence[int]) -> str:
        """Decode a response in the form that rewards get."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _finished(self, answers: Answers) -> None:
        if self.progress.add(answers):
            self._record()

    def _record_discard(self, number: int, error: RlhfError) -> None:
        self.progress.discard(error)
        self.observer.event(f"prompt {number} discarded: {error}")

    def _record(self) -> None:
        values = dict(self.progress.take(time.monotonic()))
        for client in self.clients:
            values |= client.metrics()
        for pool in self.pools:
            values[f"pool/size/{pool.kind}"] = float(len(pool.live))
            values[f"pool/wanted/{pool.kind}"] = float(pool.wanted)
            values[f"pool/restarts_total/{pool.kind}"] = float(pool.restarts.total)
        self.observer.progress(
            self.progress.prompts, values, values["generate/tokens_per_s"], self.progress.prompt_s
        )

    def _finish(self, discarded: dict[str, int]) -> dict[str, Any]:
        config, rundir = self.config, self.rundir
        report = write_dataset(rundir.path / GROUPS, config.data_file, config.stage, discarded)
        write_json(rundir.path / REPORT, report)
        return self.write_summary(
            stage=config.stage.type, report=report, data_file=str(config.data_file)
        )
