"""Groups on disk: what comes back is what went in, and what is damaged is never used."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cluster.buffer import group_file
from rlhf_cluster.buffer.group_file import Header
from rlhf_cluster.buffer.group_store import (
    ExperienceStore,
    collect,
)
from rlhf_cluster.errors import StoreError
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    Prompt,
    Rollout,
    ScoredRollout,
    StoredGroup,
    Ticket,
)
from tests.support.builders.stored_groups import (
    assert_same,
    sample,
)
from tests.support.processes.dying_process import survives

HEADER = Header(newest_version=7, made_by="ab" * 16)
FAST = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def bits(dtype: Any, num: int, finite: bool = True) -> st.SearchStrategy[np.ndarray]:
    """Arrays of `num` values with every bit pattern, NaN's payloads and negative zero included."""

    def view(data: bytes) -> np.ndarray:
        array = np.frombuffer(data, dtype=dtype).copy()
        if finite and array.dtype.kind == "f":
            array[~np.isfinite(array)] = -0.0
        return array

    size = np.dtype(dtype).itemsize * num
    return st.binary(min_size=size, max_size=size).map(view)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(st.characters(codec="utf-8"), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def scored(draw: Any) -> ScoredRollout:
    num, num_steps = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    has_steps = draw(st.booleans())
    ends = np.sort(
        np.array(
            draw(st.lists(st.integers(0, num - 1), min_size=num_steps, max_size=num_steps)),
            dtype=np.int32,
        )
    )
    rollout = Rollout(
        rollout_id=draw(NAMES),
        prompt_id=draw(NAMES),
        prompt_ids=draw(bits(np.int32, draw(st.integers(0, 3)))),
        response_ids=draw(bits(np.int32, num)),
        sampled_logprobs=draw(bits(np.float32, num)),
        versions=draw(bits(np.int32, num)),
        response_mask=np.array(draw(st.lists(st.booleans(), min_size=num, max_size=num))),
        finish_reason=draw(st.sampled_from(FinishReason)),
        temperature=draw(FLOATS),
        worker=draw(NAMES),
        started_s=draw(FLOATS),
        finished_s=draw(FLOATS),
    )
    return ScoredRollout(
        rollout=rollout,
        reward=draw(FLOATS),
        reward_parts=draw(st.dictionaries(NAMES, st.floats(), max_size=2)),
        ref_logprobs=draw(optional(bits(np.float32, num, finite=False))),
        scorer=draw(NAMES),
        exact_logprobs=draw(optional(bits(np.float32, num))),
        reference_kl=draw(optional(bits(np.float32, num, finite=False))),
        step_ends=ends if has_steps else None,
        step_rewards=draw(bits(np.float64, num_steps)) if has_steps else None,
        watched=draw(st.dictionaries(NAMES, st.floats(), max_size=2)),
        scorer_version=draw(NAMES),
    )


@st.composite
def groups(draw: Any) -> ExperienceGroup:
    return ExperienceGroup(
        ticket=Ticket(
            number=draw(st.integers(0, 10**10)),
            version=draw(st.integers(-1, 10**6)),
            attempt=draw(st.integers(0, 10**6)),
        ),
        prompt=Prompt(
            prompt_id=draw(NAMES),
            token_ids=draw(bits(np.int32, draw(st.integers(1, 4)))),
            source=draw(st.text(max_size=8) | st.just([{"role": "user", "content": "\ud800 x"}])),
            columns=draw(st.dictionaries(st.text(max_size=4), JSON, max_size=2)),
        ),
        scored=tuple(draw(st.lists(scored(), min_size=1, max_size=3))),
        greedy_reward=draw(optional(FLOATS)),
    )


@FAST
@given(groups())
def test_every_field_comes_back_to_the_bit(group):
    found, header = group_file.decode(group_file.encode(group, HEADER))
    assert_same(group, found)
    assert header == HEADER


def test_every_field_of_every_record_is_a_column_and_any_arrow_reader_opens_it(tmp_path):
    path = ExperienceStore(tmp_path).write(sample())
    table = pa.ipc.open_file(str(path)).read_all()
    records = {
        "ticket": Ticket,
        "prompt": Prompt,
        "rollout": Rollout,
        "scored": ScoredRollout,
        "group": ExperienceGroup,
    }
    nested = {"scored.rollout", "group.ticket", "group.prompt", "group.scored"}
    of_one_step = {"group.uses", "group.weight"}
    fields = {
        f"{name}.{f.name}" for name, kind in records.items() for f in dataclasses.fields(kind)
    }
    assert set(table.column_names) == fields - nested - of_one_step
    assert table.num_rows == 3
    assert table["scored.reward"].to_pylist() == [0.0, 1.0, 0.5]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_seal_in_the_data_is_no_seal():
    group = sample()
    for text in ("0" * 32, f"{1:032x}"):
        trap = f"rlhf_cluster group format=0003 newest_version=000000009 made_by={text} xxh3_128={text}"
        prompt = dataclasses.replace(group.prompt, source=trap, columns={trap: trap})
        trapped = dataclasses.replace(group, prompt=prompt)
        found, header = group_file.decode(group_file.encode(trapped, HEADER))
        assert_same(trapped, found)
        assert header == HEADER


def test_a_file_that_is_cut_or_changed_anywhere_is_named_and_never_used(tmp_path):
    store = ExperienceStore(tmp_path)
    path = store.write(sample())
    whole = path.read_bytes()
    damages = [whole[:end] for end in range(0, len(whole), 97)]
    for at in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        damages.append(bytes(changed))
    damages += [whole + b"\0", b"", b"\0" * len(whole), whole[:4096] + b"\0" * (len(whole) - 4096)]
    for damaged in damages:
        with pytest.raises(StoreError):
            group_file.decode(damaged)
    path.write_bytes(damages[50])
    with pytest.raises(StoreError, match=r"g00000012\.arrow: .* damaged after it was written"):
        store.read(12)
    path.write_bytes(whole)
    assert_same(store.read(12), sample())


def test_the_checksum_is_what_finds_a_flipped_value(tmp_path):
    """A change that Arrow itself would read without a word."""
    store = ExperienceStore(tmp_path)
    path = store.write(sample())
    whole = path.read_bytes()
    logprob = np.float32(-0.5).tobytes() * 3
    path.write_bytes(whole.replace(logprob, np.float32(-0.25).tobytes() + logprob[4:], 1))
    assert pa.ipc.open_file(str(path)).read_all().num_rows == 3
    with pytest.raises(StoreError, match=r"checksum .*, expected .*: damaged"):
        store.read(12)


def test_a_missing_a_renamed_and_a_future_file_are_told_apart(tmp_path):
    store = ExperienceStore(tmp_path)
    with pytest.raises(StoreError, match="there is no such file; group 12 is lost"):
        store.read(12)
    path = store.write(sample())
    path.rename(store.path(13))
    with pytest.raises(StoreError, match="holds group g00000012; the file was renamed"):
        store.read(13)
    assert store.numbers() == [13]
    store.path(13).write_bytes(store.path(13).read_bytes().replace(b"format=0003", b"format=0004"))
    with pytest.raises(StoreError, match="has format 4, this version reads 3"):
        store.read(13)


def test_the_header_says_the_newest_version_of_tokens_and_reference(tmp_path):
    store = ExperienceStore(tmp_path, made_by="cd" * 16)
    store.write(sample(version=3))
    assert store.header(12) == Header(newest_version=3, made_by="cd" * 16)
    store.write(sample(version=3), reference_version=5)
    assert store.header(12).newest_version == 5


def test_a_group_of_a_number_beyond_eight_digits_is_found(tmp_path):
    store = ExperienceStore(tmp_path)
    store.write(sample(number=1234567890))
    assert store.numbers() == [1234567890]
    assert store.read(1234567890).ticket.number == 1234567890


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_full_disk_is_an_error_with_path_bytes_and_cure_and_leaves_nothing(tmp_path, fails_at):
    calls = []

    def write_file(fd: int, data: memoryview) -> int:
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calls.append(data)
        return os.write(fd, data[:100])

    store = ExperienceStore(tmp_path / "x", write_file=write_file)
    with pytest.raises(StoreError) as caught:
        store.write(sample())
    message = str(caught.value)
    for word in (str(store.path(12)), "bytes", "No space left", "run.root", "buffer.durable"):
        assert word in message
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), StoreError)
    assert list((tmp_path / "x").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        ExperienceStore(tmp_path / "file" / "x", attempt=0).write(sample())


@pytest.mark.parametrize("before", [None, 1])
def test_a_writer_that_dies_at_any_step_leaves_the_file_before_it_or_a_whole_one(tmp_path, before):
    versions = set()
    for die_at in range(1, 30):
        store = ExperienceStore(tmp_path / str(die_at))
        if before is not None:
            store.write(sample(version=before))

        def write_some(fd: int, data: memoryview, root: Path = store.root) -> int:
            sys.audit("os.truncate", str(root))  # one step more at which to die
            return os.write(fd, data[:1500])

        slow = ExperienceStore(store.root, write_file=write_some)
        done = survives(store.root, die_at, lambda slow=slow: slow.write(sample(version=2)))
        if store.has(12):
            version = store.read(12).summary().oldest_version
            assert_same(store.read(12), sample(version=version))
            versions.add(version)
        else:
            versions.add(None)
        store.remove_partial()
        left = [path.name for path in store.root.iterdir()] if store.root.is_dir() else []
        assert left == (["g00000012.arrow"] if store.has(12) else [])
        if done:
            assert die_at > 6, "the audit hook saw too few steps to prove anything"
            break
    assert versions == {before, 2}


def test_short_writes_make_a_whole_file_and_fsync_is_a_setting(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    short = ExperienceStore(tmp_path, write_file=lambda fd, data: os.write(fd, data[:999]))
    short.write(sample())
    assert synced == []
    assert_same(short.read(12), sample())
    ExperienceStore(tmp_path, fsync="group").write(sample())
    assert len(synced) == 2, "the file and its folder"


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path):
    store = ExperienceStore(tmp_path)
    store.write(sample())
    (tmp_path / ".g00000013.abc.partial").write_bytes(b"half")
    (tmp_path / "trained.json").write_text("{}")
    assert store.numbers() == [12]
    store.remove_partial()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g00000012.arrow", "trained.json"]
    store.remove([12, 99])
    assert store.numbers() == []


def test_a_lost_or_stored_group_is_read_from_its_file_and_the_others_are_fetched(tmp_path):
    store = ExperienceStore(tmp_path)
    for number in (1, 2):
        store.write(sample(number))
    objects = {"a": sample(0), "lost": None, "b": sample(3)}
    asked: list[Any] = []

    def fetch(handles: Any) -> Any:
        asked.extend(handles)
        return [objects[handle] for handle in handles]

    found = collect([(0, "a"), (1, StoredGroup(1)), (2, "lost"), (3, "b")], fetch, store)
    assert asked == ["a", "lost", "b"]
    for number, group in enumerate(found):
        assert_same(group, sample(number))
    with pytest.raises(StoreError, match="group 2 was lost .* buffer.durable = false"):
        collect([(2, "lost")], fetch, None)
    store.remove([2])
    with pytest.raises(StoreError, match="group 2 is lost"):
        collect([(2, "lost")], fetch, store)
    assert collect([(1, StoredGroup(1))], lambda handles: pytest.fail("asked"), store)


def test_a_handle_survives_the_way_between_processes():
    assert pickle.loads(pickle.dumps(StoredGroup(3))) == StoredGroup(3)
