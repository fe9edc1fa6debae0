"""Groups generated in segments by one worker after another."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.errors import RecordError, WorkerError
from rlhf_cluster.records import (
    FinishReason,
    PartialGroup,
    PartialResponse,
    RolloutGroup,
    Ticket,
)
from tests.support.engines.prefix_engine import (
    END,
    PROMPT,
    TICKET,
    PrefixEngine,
    arrays,
    sampling,
    start_worker,
    to_the_end,
)


@given(
    segment=st.integers(1, 45),
    max_tokens=st.integers(1, 40),
    samples=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 0.7]),
    greedy_baseline=st.booleans(),
)
@settings(max_examples=60)
def test_segments_make_the_greedy_group_that_one_call_makes(
    segment, max_tokens, samples, temperature, greedy_baseline
):
    how = sampling(samples, temperature, max_tokens=max_tokens, greedy_baseline=greedy_baseline)

    async def both() -> None:
        cut = await start_worker(segment)
        group, metas = await to_the_end([cut], how)
        whole, (only,) = await to_the_end([await start_worker(None)], how)
        if temperature == 0:
            assert arrays(group) == arrays(whole)
            assert sum(meta["num_tokens"] for meta in metas) == only["num_tokens"]
        elif greedy_baseline:
            assert arrays(group)[-1] == arrays(whole)[-1]
        assert [a[0] for a in arrays(group)] == [a[0] for a in arrays(whole)]
        for request in cut._engine.requests:
            assert 0 < request.max_tokens <= segment
            assert len(request.prompt_ids) - 3 + request.max_tokens <= max_tokens
        for _, ids, _, _, _, reason in arrays(group):
            assert END not in ids[:-1]
            assert (reason is FinishReason.STOP) == (ids[-1] == END)
            assert ids[-1] == END or len(ids) == max_tokens
        longest = max(len(a[1]) for a in arrays(group))
        assert len(metas) == math.ceil(longest / segment)

    asyncio.run(both())


async def test_whole_responses_are_one_request_with_the_seed_of_the_group():
    worker = await start_worker(None)
    group, metas = await to_the_end([worker], sampling())
    (request,) = worker._engine.requests
    assert (request.num_samples, request.max_tokens, request.prompt_ids) == (4, 40, [5, 9, 3])
    assert len(metas) == 1
    assert {r.worker for r in group.rollouts} == {"w-0"}


async def test_a_token_keeps_the_version_that_sampled_it_and_what_came_before_stays():
    engine = PrefixEngine()
    first, second = [await start_worker(5, f"w-{i}", engine) for i in range(2)]
    _, one = await first.generate(TICKET, PROMPT, sampling(max_tokens=12))
    assert isinstance(one, PartialGroup)
    engine.version = 3
    _, two = await second.generate(TICKET, PROMPT, sampling(max_tokens=12), one)
    assert isinstance(two, PartialGroup)
    for before, after in zip(one.responses, two.responses, strict=True):
        kept = len(before.response_ids)
        assert after.response_ids[:kept].tolist() == before.response_ids.tolist()
        assert after.sampled_logprobs[:kept].tolist() == before.sampled_logprobs.tolist()
        assert set(after.versions[:kept].tolist()) == {0}
        assert set(after.versions[kept:].tolist()) <= {3}
    engine.version = 4
    _, group = await first.generate(TICKET, PROMPT, sampling(max_tokens=12), two)
    longest = max(group.rollouts, key=lambda r: len(r.response_ids))
    assert longest.versions.tolist() == [0] * 5 + [3] * 5 + [4] * 2
    assert longest.worker == "w-0, w-1, w-0"
    assert longest.oldest_version == 0
    assert longest.started_s == one.started_s


async def test_only_unfinished_responses_are_asked_for_again():
    worker = await start_worker(3)
    how = sampling(8, max_tokens=12, greedy_baseline=True)
    partial, asked = None, 9
    while not isinstance(partial, RolloutGroup):
        worker._engine.requests.clear()
        meta, partial = await worker.generate(TICKET, PROMPT, how, partial)
        assert sum(r.num_samples for r in worker._engine.requests) == asked
        assert meta["num_unfinished"] <= asked
        asked = meta["num_unfinished"]
    assert any(len(r.response_ids) < 12 for r in partial.rollouts)


async def test_s36_a_segment_issued_again_is_the_same_on_any_worker():
    first, second = [await start_worker(4, f"w-{i}") for i in range(2)]
    _, partial = await first.generate(TICKET, PROMPT, sampling())
    _, third = await first.generate(TICKET, PROMPT, sampling(), partial)
    _, again = await second.generate(TICKET, PROMPT, sampling(), partial)
    assert third.num_tokens > partial.num_tokens
    for a, b in zip(third.responses, again.responses, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.sampled_logprobs.tolist() == b.sampled_logprobs.tolist()


async def test_s36_no_two_groups_samples_or_segments_share_a_stream():
    worker = await start_worker(2)
    for number in range(20):
        how = sampling(8, max_tokens=20)
        await to_the_end([worker], how, Ticket(number=number, version=0))
        await to_the_end([worker], how, Ticket(number=number, version=0, purpose="evaluate"))
    requests = worker._engine.requests
    streams = [r.seed + index for r in requests for index in range(r.num_samples)]
    assert len(streams) > 1000
    assert len(set(streams)) == len(streams)
    assert len({r.request_id for r in requests}) == len(requests)


async def test_a_prefix_of_another_group_is_refused():
    worker = await start_worker(2)
    _, partial = await worker.generate(TICKET, PROMPT, sampling())
    with pytest.raises(RecordError, match="g00000008 cannot continue g00000007"):
        await worker.generate(Ticket(number=8, version=0), PROMPT, sampling(), partial)


async def test_a_failing_request_ends_those_beside_it():
    engine = PrefixEngine()
    worker = await start_worker(1, engine=engine)
    _, partial = await worker.generate(TICKET, PROMPT, sampling())
    engine.fail_on = len(engine.requests) + 2
    with pytest.raises(WorkerError, match="scripted failure"):
        await worker.generate(TICKET, PROMPT, sampling(), partial)
    await asyncio.sleep(0)  # one turn of the loop: the others end
    assert engine.num_cancelled == partial.num_unfinished - 1 > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampled_logprobs": np.zeros(1, np.float32)}, "sampled_logprobs has 1 entries"),
        ({"sampled_logprobs": np.full(2, np.nan, np.float32)}, "must be finite"),
        ({"versions": np.zeros(2, np.int64)}, "versions must be int32"),
    ],
)
def test_a_partial_response_with_arrays_that_do_not_fit_is_refused(changes, message):
    values: dict[str, Any] = {
        "rollout_id": "g00000007/0",
        "response_ids": np.array([4, 5], dtype=np.int32),
        "sampled_logprobs": np.zeros(2, dtype=np.float32),
        "versions": np.zeros(2, dtype=np.int32),
        "temperature": 1.0,
    }
    with pytest.raises(RecordError, match=message):
        PartialResponse(**(values | changes))
