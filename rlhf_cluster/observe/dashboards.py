"""What the Grafana dashboards show: THE table of panels. `deploy/generate.py` makes the files.

The overview answers on one screen whether the run learns, whether it is healthy, and what bounds it;
a dashboard a service has the rest. Every query is about metrics of `rlhf_cluster.observe.table`, used
as their kind asks, and about ones that the code sends (`tests/unit/test_monitoring.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cluster.observe.panels import (
    RUN,
    Dashboard,
    Panel,
    Query,
    gauge,
    number,
    row,
    series,
    share,
)
from rlhf_cluster.observe.service_dashboards import GENERATION, LEARNER, SCORING

REWARD = Panel(
    title="Reward",
    queries=(
        gauge("reward_mean", "{{run}} step"),
        Query(
            expr=f"max by (run) (avg_over_time({series('reward_mean')}[10m]))",
            legend="{{run}} 10 min",
        ),
        gauge("evaluation_reward_mean", "{{run}} held-out"),
    ),
    help="Is it learning? The mean over 10 minutes should rise; held-out answers are greedy.",
)
WAITS = Panel(
    title="Who waits for whom",
    queries=(
        share("time_learner_wait_s", "{{run}} learner waits"),
        share("time_generation_wait_s", "{{run}} generation waits"),
        share("time_train_s", "{{run}} training"),
    ),
    unit="percentunit",
    help="Shares of the step's wall time. The one that never waits is the bottleneck.",
)
GAINS = Panel(
    title="What one more worker would give",
    queries=(gauge("advisor_gain", "{{run}} {{station}}", by="run, station"),),
    help="Predicted speed over now. 1 is nothing; for the learner: one that is twice as fast.",
)

OVERVIEW = Dashboard(
    uid="rlhf-overview",
    title="RLHF overview",
    help="Is it learning, is it healthy, what is the bottleneck",
    rows=(
        row(
            "Now",
            number("Step", gauge("step_number", "{{run}}")),
            number("Reward now", gauge("reward_mean", "{{run}}")),
            number("Step time", gauge("time_step_s", "{{run}}"), "s"),
            number("Tokens/s", gauge("step_tokens_per_s", "{{run}}")),
            number("Staleness, largest", gauge("staleness_max", "{{run}}")),
            number(
                "Alerts",
                Query(expr='count(ALERTS{alertstate="firing"}) or vector(0)', legend="firing"),
                help="Each has a section in docs/runbook.md.",
            ),
        ),
        row(
            "Is it learning",
            REWARD,
            Panel(
                title="Distance from the reference",
                queries=(
                    gauge("learner_kl_ref_response", "{{run}} KL of a response"),
                    gauge("learner_entropy", "{{run}} entropy"),
                ),
                unit="short",
                help="Nats. KL jumps and entropy towards 0 are bad signs.",
            ),
            Panel(
                title="Response length",
                queries=(gauge("response_length_mean_tokens", "{{run}}"),),
                help="Tokens. A reward that rises with length alone may be a hole in it.",
            ),
        ),
        row(
            "What is the bottleneck",
            WAITS,
            GAINS,
            Panel(
                title="Groups",
                queries=(
                    gauge("buffer_in_flight", "{{run}} in flight"),
                    gauge("buffer_ready", "{{run}} ready"),
                ),
                help="Ready piles up: learner-bound. None ready: generation- or scoring-bound.",
            ),
        ),
        row(
            "Is it healthy",
            Panel(
                title="Workers, and changes by autoscale",
                queries=(
                    gauge("pool_size", "{{run}} {{pool}} live", by="run, pool"),
                    Query(
                        expr=f"sum by (run, pool) (increase({series('pool_autoscaled_total')}[10m]))",
                        legend="{{run}} {{pool}} changed by autoscale",
                    ),
                ),
                help="Changes within 10 minutes; the reason of each is an event of the run.",
            ),
            Panel(
                title="Groups that fail",
                queries=(
                    Query(
                        expr=f"rlhf:generation_failing:fraction10m{{{RUN}}}",
                        legend="{{run}} generation",
                    ),
                    Query(
                        expr=f"rlhf:scoring_failing:fraction10m{{{RUN}}}", legend="{{run}} scoring"
                    ),
                ),
                unit="percentunit",
            ),
            Panel(
                title="Free disk",
                queries=(gauge("run_disk_free_fraction", "{{run}}", how="min"),),
                unit="percentunit",
            ),
        ),
    ),
)

DASHBOARDS: Sequence[Dashboard] = (OVERVIEW, GENERATION, SCORING, LEARNER)
