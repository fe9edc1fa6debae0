"""Samples of a report: best and worst of different prompts, then samples of steps from first to last.

A response is shown token by token where the run's tokenizer is at hand: the ratio of learner and
sampler as the colour of the background, masked tokens struck through, rewards of reasoning steps at
their ends.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from rlhf_cluster.observe.record.samples import Row
from rlhf_cluster.observe.report.html_text import MAX_TEXT, cut_text, text
from rlhf_cluster.observe.report.read_run import RunRecord
from rlhf_cluster.observe.report.token_pieces import Decode, find_decoder, split_tokens

RATIO_BINS = ((0.7, "q0"), (0.9, "q1"), (1.1, ""), (1.4, "q3"), (math.inf, "q4"))
"""Upper ends of ranges of the ratio, each with the class of its colour. Around 1 there is none."""

LEGEND = (
    '<p class="note legend-of-tokens">Background: learner over sampler probability, '
    '<span class="q0">below 0.7</span> <span class="q1">below 0.9</span> about 1 '
    '<span class="q3">above 1.1</span> <span class="q4">above 1.4</span>. '
    '<span class="masked">Struck through</span>: masked, not trained or of weight 0. '
    "Point at a token for its numbers.</p>"
)


def samples(run: RunRecord, several: bool) -> Iterator[str]:
    """Yield the parts of a run's samples; nothing without any."""
    if not run.samples:
        return
    if several:
        yield f"<h3>{text(run.name)}</h3>"
    decode = find_decoder(run.path, run.config)
    shown = [row for rows in (run.best, run.worst, *run.samples.values()) for row in rows]
    if decode is not None and any(row.get("learner_logprobs") for row in shown):
        yield LEGEND
    for title, rows in (("Best", run.best), ("Worst", run.worst)):
        if rows:
            yield f"<h3>{title} of the last steps, by prompt</h3>"
            yield '<div class="grid-of">'
            yield from (_sample(row, decode) for row in rows)
            yield "</div>"
    yield "<h3>From the first step to the last</h3>"
    for step, rows in run.samples.items():
        mean = sum(row["reward"] for row in rows) / len(rows) if rows else 0.0
        yield f"<details><summary>step {step}: {len(rows)} samples, reward {mean:.3g}</summary>"
        yield from (_sample(row, decode) for row in rows)
        yield "</details>"


def _sample(row: Row, decode: Decode | None) -> str:
    versions = f"{row['version_min']}..{row['version_max']}"
    about = (
        f"{row['rollout_id']} | reward {row['reward']:.4g} | parts {row['reward_parts']} | "
        f"watched {row.get('watched', '-')} | versions {versions} | staleness {row['staleness']} | "
        f"ended by {row['finish_reason']} | {row['worker']}, {row['scorer']}"
    )
    step = f"step {row['step']}" if "step" in row else ""
    return (
        f'<div class="card sample"><p class="reward">reward {row["reward"]:.4g}'
        f' <span class="dim">{text(step)}</span></p>'
        f'<pre dir="auto" class="prompt">{cut_text(row["prompt"])}</pre>'
        f'<pre dir="auto">{_response(row, decode)}</pre>'
        f'<div class="dim">{text(about)}</div></div>'
    )


def _response(row: Row, decode: Decode | None) -> str:
    """Return the response with the colours of its tokens, or plain if their texts are not known."""
    whole, ids = row["response"], row.get("response_ids") or []
    pieces = [] if decode is None else split_tokens(ids, whole, decode)
    ends = list(accumulate(map(len, pieces)))
    pieces = pieces[: bisect_right(ends, MAX_TEXT)]
    if not pieces:
        return cut_text(whole)
    rewards: dict[int, list[float]] = {}
    for end, reward in zip(row.get("step_ends") or (), row.get("step_rewards") or (), strict=False):
        rewards.setdefault(end, []).append(reward)
    parts = []
    for i, piece in enumerate(pieces):
        parts.append(_token(row, i, piece))
        parts += [f'<span class="step-reward">{r:.3g}</span>' for r in rewards.get(i, ())]
    more = len(whole) - ends[len(pieces) - 1]
    tail = f" <i>... {more:,} characters more</i>" if more > 0 else ""
    return "".join(parts) + tail


def _token(row: Row, i: int, piece: str) -> str:
    """Return one token with its colour, and its numbers as its title."""
    learner, weight = _at(row, "learner_logprobs", i), _at(row, "correction_weights", i)
    sampled = _at(row, "sampled_logprobs", i)
    if learner is None or sampled is None:
        if row.get("learner_logprobs"):  # there was a first pass, and it left this token out
            return f'<span class="masked" title="not trained">{text(piece)}</span>'
        return text(piece)
    ratio = math.exp(min(50.0, learner - sampled))
    colour = next((name for limit, name in RATIO_BINS if ratio < limit), "q4")
    classes = " ".join(name for name in (colour, "masked" if weight == 0 else "") if name)
    numbers = f"ratio {ratio:.3g}" + ("" if weight is None else f", weight {weight:.3g}")
    kind = f' class="{classes}"' if classes else ""
    return f'<span{kind} title="{numbers}">{text(piece)}</span>'


def _at(row: Row, name: str, i: int) -> float | None:
    values = row.get(name)
    return None if values is None or i >= len(values) else values[i]
