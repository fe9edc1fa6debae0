"""A run whose pools have a size, in simulated time (simpy): what one more worker really gives.

The real buffer and gates decide what may start; workers serve one group at a time, in order; the
learner takes whole steps. The records are those of metrics.jsonl, made by the product's `Occupancy`.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.observe.occupancy import Occupancy
from rlhf_cluster.records import GroupSummary, Ticket, TrainingGroup

GROUPS = 16


@dataclass
class SimulatedServices:
    """Mean seconds of one group at one worker, and of one training step. Times vary by `spread`.

    `proxies` workers of a pool of their own take `proxy_s` beside scoring; 0: there is no such pool.
    """

    generate_s: float
    score_s: float
    train_s: float
    generation: int = 1
    scoring: int = 1
    proxies: int = 0
    proxy_s: float = 0.0
    max_staleness: int = 2
    depth: int = 2
    num_steps: int = 44
    spread: float = 0.3
    live_s: float = 0.2  # from the end of a step to its weights live
    records: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> SimulatedServices:
        gate = AdmissionGate(
            max_staleness=self.max_staleness,
            pipeline_depth=self.depth,
            groups_per_step=GROUPS,
            num_steps=self.num_steps,
        )
        self.env, self.buffer = simpy.Environment(), ExperienceBuffer(gate)
        self.rng, self._changed = random.Random(7), self.env.event()
        self.stations = {
            name: (simpy.Resource(self.env, size), Occupancy(self._now, lambda size=size: size))
            for name, size in self._sizes().items()
        }
        self.buffer.set_live_version(0)
        self._admit()
        self.env.run(self.env.process(self._learn()))
        return self

    @property
    def step_s(self) -> float:
        """Mean wall time of a step, once the pipeline is full."""
        steps = [record["time/step_s"] for record in self.records[10:]]
        return sum(steps) / len(steps)

    def _sizes(self) -> dict[str, int]:
        apart = {"proxies": self.proxies} if self.proxies else {}
        return {"generation": self.generation, "scoring": self.scoring, **apart}

    def _now(self) -> float:
        return self.env.now

    def _takes(self, mean_s: float) -> simpy.Event:
        return self.env.timeout(mean_s * (1 + self.spread * (2 * self.rng.random() - 1)))

    def _admit(self) -> None:
        while (ticket := self.buffer.admit()) is not None:
            self.env.process(self._group(ticket))
        self._changed.succeed()
        self._changed = self.env.event()

    def _group(self, ticket: Ticket) -> Generator[simpy.Event, Any, None]:
        version = self.buffer.live_version
        yield from self._served("generation", self.generate_s)
        parts = [self.env.process(self._served("scoring", self.score_s))]
        if self.proxies:
            parts.append(self.env.process(self._served("proxies", self.proxy_s)))
        yield self.env.all_of(parts)
        summary = GroupSummary(
            group_id=ticket.group_id,
            oldest_version=version,
            num_rollouts=1,
            num_tokens=1,
            rewards=(0.0,),
        )
        self.buffer.finish(TrainingGroup(ticket=ticket, handle=None, summary=summary))
        self._admit()

    def _served(self, pool: str, mean_s: float) -> Generator[simpy.Event, Any, None]:
        workers, occupancy = self.stations[pool]
        occupancy.enter()
        with workers.request() as turn:
            yield turn
            yield self._takes(mean_s)
        occupancy.leave()

    def _learn(self) -> Generator[simpy.Event, Any, None]:
        for step in range(1, self.num_steps + 1):
            start = self._now()
            while not self.buffer.ready(GROUPS):
                yield self._changed
            self.buffer.take(GROUPS)
            got = self._now()
            self._admit()
            yield self._takes(self.train_s)
            spent = {name: occupancy.take() for name, (_, occupancy) in self.stations.items()}
            generation, scoring = spent["generation"], spent["scoring"]
            apart = {f"time/pool_busy_s/{name}": own.busy_s for name, own in spent.items()}
            sizes = {f"pool/size/{name}": float(size) for name, size in self._sizes().items()}
            self.records.append(
                {
                    **{k: v for k, v in apart.items() if k.endswith("proxies")},
                    **sizes,
                    "step": step,
                    "time/step_s": self._now() - start,
                    "time/learner_wait_s": got - start,
                    "time/generation_wait_s": generation.idle_s,
                    "time/generation_busy_s": generation.busy_s,
                    "time/scoring_busy_s": scoring.busy_s,
                }
            )
            self.buffer.set_learner_version(step)
            self.env.process(self._publish(step))
            self._admit()

    def _publish(self, version: int) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(self.live_s)
        self.buffer.set_live_version(version)
        self._admit()
