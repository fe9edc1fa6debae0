"""What a PromQL expression of ours refers to, and what is wrong with it. Not a parser: it knows the few
forms that our expressions have."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf_cluster.observe.metric_table import (
    METRICS,
    Kind,
    Metric,
    Role,
)
from tests.support.checks.deployed import ALERTS, DASHBOARDS, RECORDED

NAME = re.compile(r"ray_rlhf_\w+|rlhf:[\w:]+")
AGGREGATION = re.compile(r"\b(?:sum|min|max|avg|count|quantile)\s+by\s+\(([^)]*)\)\s*\(")
EXPRESSIONS = [
    *((x.name, x.expr) for x in (*ALERTS, *RECORDED)),
    *(
        (f"{board.uid} / {panel.title}", query.expr)
        for board in DASHBOARDS
        for panel in board.panels
        for query in panel.queries
    ),
]
OTHER_NAMES = {"up", "ALERTS"}
BY_NAME = {f"ray_{metric.prometheus_name}": metric for metric in METRICS.values()}
RECORDED_BY_NAME = {rule.name: rule for rule in RECORDED}
WORKER_ROLES = (Role.GENERATION, Role.SCORING, Role.LEARNER)
SUFFIXES = ("_bucket", "_sum", "_count")


NOT_IN_A_PLAIN_RUN = {
    "ray_rlhf_evaluation_reward_mean": "it has no held-out prompts",
    "ray_rlhf_learner_kl_ref_response": "it has no reference",
    "ray_rlhf_importance_engine_mismatch_mean": "scoring.exact_logprobs is not set",
    "ray_rlhf_buffer_discarded_total": "nothing is discarded",
    "ray_rlhf_generation_errors_total": "no group fails",
    "ray_rlhf_scoring_errors_total": "no reward fails",
    "ray_rlhf_generation_tokens_resampled_total": "no segment is tried again",
    "ray_rlhf_pool_restarts_total": "no worker is replaced",
    "ray_rlhf_learner_restarts_total": "the learner lives",
    "ray_rlhf_checkpoint_failed_total": "every checkpoint is written",
    "ray_rlhf_pool_autoscaled_total": "it has no [autoscale] section",
    "ray_rlhf_generation_prefix_tokens_total": "the scripted engine has no cache",
    "ray_rlhf_generation_prefix_hit_tokens_total": "the scripted engine has no cache",
    "ray_rlhf_generation_draft_tokens_total": "nothing proposes tokens",
    "ray_rlhf_generation_draft_accepted_tokens_total": "nothing proposes tokens",
}
"""What dashboards and alerts look at, and an undisturbed run of the tests has no values of."""


def metric_of(name: str) -> tuple[Metric | None, str]:
    """The metric of a series, and its suffix where it is one of a histogram's."""
    for suffix in SUFFIXES:
        metric = BY_NAME.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if metric is not None and metric.kind is Kind.HISTOGRAM:
            return metric, suffix
    return BY_NAME.get(name), ""


def looked_at() -> set[str]:
    """Names of all exported series that an alert, a rule or a panel uses."""
    found = {name for _, expr in EXPRESSIONS for name in NAME.findall(expr)}
    return found - set(RECORDED_BY_NAME)


def series_behind(expr: str) -> set[str]:
    """Names of the exported series that an expression comes from, through recorded ones too."""
    found = set(NAME.findall(expr))
    for name in found & set(RECORDED_BY_NAME):
        found |= series_behind(RECORDED_BY_NAME[name].expr)
    return found


def faults(expr: str) -> list[str]:
    """Why the expression is not about what this project exports; empty when it is."""
    return [*_names(expr), *_kinds(expr), *_labels(expr)]


def _names(expr: str) -> Iterator[str]:
    found = NAME.findall(expr)
    if not found and not set(re.findall(r"\w+", expr)) & OTHER_NAMES:
        yield f"no metric of ours in {expr!r}"
    for name in found:
        if name in RECORDED_BY_NAME:
            continue
        metric, suffix = metric_of(name)
        if metric is None:
            yield f"{name}: not in the table of metrics"
        elif metric.kind is Kind.HISTOGRAM and not suffix:
            yield f"{name}: a histogram needs one of {SUFFIXES}"


def _kinds(expr: str) -> Iterator[str]:
    for match in NAME.finditer(expr):
        metric, suffix = metric_of(match[0])
        if metric is None:
            continue
        before, after = expr[: match.start()], expr[match.end() :]
        rated = bool(re.search(r"\b(rate|increase|irate)\($", before))
        grown = "offset" in after or re.search(r"offset \w+ or 0 \* $", before)
        cumulative = metric.kind is Kind.COUNTER or bool(suffix)
        if cumulative and not rated and not (metric.kind is Kind.COUNTER and grown):
            yield f"{match[0]}: grows for ever, it needs rate() or increase()"
        if not cumulative and rated:
            yield f"{match[0]}: a gauge, rate() makes no sense of it"


def _labels(expr: str) -> Iterator[str]:
    for match in re.finditer(rf"({NAME.pattern})\{{([^}}]*)\}}", expr):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match[2]):
            if label not in labels_of(match[1]):
                yield f"{match[1]}: has no label {label!r}"
    for match in AGGREGATION.finditer(expr):
        inner = _inside(expr, match.end())
        for name in NAME.findall(inner):
            for label in (part.strip() for part in match[1].split(",")):
                if label not in labels_of(name):
                    yield f"{name}: grouped by {label!r}, which it has not"


def labels_of(name: str) -> set[str]:
    """Ours, of a series as it is exported, or of a recorded one."""
    if name in RECORDED_BY_NAME:
        found = AGGREGATION.search(RECORDED_BY_NAME[name].expr)
        return {part.strip() for part in found[1].split(",")} if found else set()
    metric, suffix = metric_of(name)
    if metric is None:
        return set()
    labels = {"run", "role"} | ({"worker"} if metric.role in WORKER_ROLES else set())
    return labels | ({metric.label} if metric.label else set()) | ({"le"} if suffix else set())


def _inside(expr: str, start: int) -> str:
    """From `start`, behind an opening bracket, to the one that closes it."""
    depth = 1
    for place in range(start, len(expr)):
        depth += {"(": 1, ")": -1}.get(expr[place], 0)
        if depth == 0:
            return expr[start:place]
    raise AssertionError(f"unbalanced brackets in {expr!r}")
