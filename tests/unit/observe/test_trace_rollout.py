"""What a trace tells of a sample and of a step, and the timeline of a run."""

import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow.parquet as parquet
import pytest

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.cli.commands import main
from rlhf_cluster.errors import RunError, StoreError
from rlhf_cluster.observe.record.samples import (
    read_samples,
    write_samples,
)
from rlhf_cluster.observe.timeline import (
    COUNTERS,
    EVENTS,
    GENERATION,
    LEARNER,
    write_timeline,
)
from rlhf_cluster.observe.trace_rollout import (
    OPEN,
    _number_of,
    escape_control,
    learner_facts,
    trace_sample,
    trace_step,
)
from rlhf_cluster.records import TokenSample
from rlhf_cluster.run.run_directory import RunDir
from tests.support.builders.recorded_run import (
    START_S,
    group,
    record_run,
)

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps of two groups; the groups of the last two are stored, g00000012 is open."""
    path = record_run(tmp_path_factory.mktemp("runs"), steps=STEPS, hostile="1 + 1\x1b[2J =")
    return RunDir.open(path)


def test_a_stored_sample_has_every_token_with_its_version_and_log_probabilities(run):
    found = trace_sample(run, "g00000010/1")
    assert found.step == 6
    assert found.facts["trained at step"] == "6"
    assert found.facts["staleness"] == "1"
    assert found.facts["worker"] == "generation-0"
    assert found.facts["reward"] == "1, exact_match 1"
    assert found.facts["sampled"] == "2023-11-14 22:13:30.000 UTC, 1.5 s"
    assert found.tokens["token"] == [5, 6, 7, 8]
    assert found.tokens["version"] == [4] * 4
    assert found.tokens["sampled_logprob"] == [-0.5] * 4
    assert found.tokens["ref_logprob"] == [-0.75] * 4
    assert "exact_logprob" not in found.tokens, "it was not recorded"


def test_a_stored_sample_has_its_time_at_each_station(tmp_path):
    """Step 6 was recorded at second 12, after 0.75 s of training and 0.25 s of copying."""
    path = record_run(tmp_path, steps=STEPS)
    stored = ExperienceStore(path / "experience").path(10)
    start_s = START_S + 11.5  # the end of sampling
    for written_s, expected in (
        (start_s - 0.25, "2023-11-14 22:13:31.250 UTC"),
        (start_s + 3600, "not known"),
        (START_S, "not known"),
    ):
        os.utime(stored, (written_s, written_s))
        facts = trace_sample(RunDir.open(path), "g00000010/1").facts
        assert facts["scored and stored"] == expected
        assert facts["trained"] == "2023-11-14 22:13:31.000 UTC to 2023-11-14 22:13:31.750 UTC"
    os.utime(ExperienceStore(path / "experience").path(12), (START_S + 20, START_S + 20))
    open_one = trace_sample(RunDir.open(path), "g00000012/0").facts
    assert open_one["scored and stored"] == "2023-11-14 22:13:40.000 UTC"
    assert "trained" not in open_one


def test_the_advantage_is_the_algorithms_own(run):
    best, worst = (trace_sample(run, f"g00000010/{i}") for i in (1, 0))
    std = 0.5  # of the rewards 0 and 1
    expected = 0.5 / (std * 2**0.5 + 1e-4)
    assert best.tokens["advantage"] == pytest.approx([expected] * 4, rel=1e-5)
    assert worst.tokens["advantage"] == pytest.approx([-expected] * 3, rel=1e-5)
    assert best.facts["advantage"].endswith("(computed again)")


def test_without_all_groups_of_the_step_the_advantage_is_not_known(run, tmp_path):
    path = record_run(tmp_path, steps=STEPS)
    ExperienceStore(path / "experience").path(11).unlink()
    found = trace_sample(RunDir.open(path), "g00000010/1")
    assert found.facts["advantage"] == "not known: groups of the same step are no longer stored"
    assert "advantage" not in found.tokens


def test_a_replayed_sample_has_each_of_its_steps_and_the_advantage_of_the_last(tmp_path):
    """Group 8 was trained again at step 6, which had three groups."""
    path = record_run(
        tmp_path,
        steps=STEPS,
        staleness={"max_staleness": 3},
        buffer={"replay": {"fraction": 0.5}},
    )
    uses = {"8": [5, 6], "9": [5], "10": [6], "11": [6]}
    (path / "experience" / "trained.json").write_text(json.dumps(uses))
    run = RunDir.open(path)
    found = trace_sample(run, "g00000008/1")
    assert (found.step, found.facts["trained at step"]) == (6, "5, 6")
    assert found.facts["staleness"] == "1, 2"
    assert "no longer stored" in found.facts["advantage"], "how many there were is not recorded"
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 6, "time_s": 0.0, "step/groups": 3.0}) + "\n")
    assert trace_sample(run, "g00000008/1").facts["advantage"].endswith("(computed again)")
    rollouts = [line.split()[0] for line in trace_step(run, 6) if line.strip().startswith("g0")]
    assert rollouts == [f"g{n:08d}/{i}" for n in (8, 10, 11) for i in range(2)]


def test_a_critics_advantage_is_not_guessed(tmp_path):
    path = record_run(tmp_path, steps=2, algorithm={"type": "ppo", "group_size": 2})
    found = trace_sample(RunDir.open(path), "g00000002/0")
    assert found.facts["advantage"] == "not recorded: the learner's own values decide it"


def test_a_sample_whose_group_is_gone_is_told_from_the_samples(run):
    found = trace_sample(run, "g00000001/0")
    assert found.step == 1
    assert found.facts["kept in"].startswith("the samples of step 1")
    assert set(found.tokens) == {"token", "sampled_logprob"}
    assert len(found.tokens["token"]) == 3


TRAINED = np.array([True, False, True])
LEARNT = TokenSample(
    learner_logprobs=np.array([-0.25, np.nan, -1.0], np.float32),
    correction_weights=np.array([1.5, np.nan, 0.0], np.float32),
    trained=TRAINED,
)


def rewritten(tmp_path, step, number, kept, drop=()):
    """A run whose samples of `step` are of group `number`, as the learner said `kept`."""
    path = record_run(tmp_path, steps=STEPS)
    groups = [group(number, "plain")]
    file = write_samples(path / "samples", step, groups, step - 1, str, limit=4, kept=kept)
    parquet.write_table(parquet.read_table(file).drop_columns(list(drop)), file)
    return RunDir.open(path)


@pytest.mark.parametrize(("step", "number"), [(6, 10), (1, 0)])
def test_the_learners_log_probability_and_the_weight_stand_at_each_token(
    tmp_path, capsys, step, number
):
    """Of a group that is stored, and of one that is in the samples alone."""
    name = f"g{number:08d}/0"
    run = rewritten(tmp_path, step, number, {name: LEARNT})
    found = trace_sample(run, name)
    assert found.tokens["learner_logprob"] == [-0.25, None, -1.0]
    assert found.tokens["correction_weight"] == [1.5, None, 0.0]
    assert found.facts["correction"] == f"0 to 1.5, the weight at the first pass of step {step}"
    assert found.facts["learner"] == (
        f"log-probabilities at the first pass of step {step}, - at a token that is not trained"
    )
    assert main(["trace", str(run.path), "--sample", name, "--token", "0:2"]) == 0
    header, *rows = capsys.readouterr().out.partition("tokens:\n")[2].splitlines()
    assert header.split()[-2:] == ["learner_logprob", "correction_weight"]
    assert [row.split()[-2:] for row in rows] == [["-0.25000", "1.50000"], ["-", "-"]]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("g00000012/0", "not known: no step has trained it"),
        ("g00000011/1", "not recorded: not among the samples of step 6"),
        ("g00000010/0", "none: step 6 left it out of its passes"),
        ("g00000001/0", "none: step 1 left it out of its passes"),
    ],
)
def test_where_the_learner_left_nothing_the_trace_says_why(run, sample, reason):
    found = trace_sample(run, sample)
    assert found.facts["learner"].startswith(reason)
    assert found.facts["correction"] == found.facts["learner"]
    assert not {"learner_logprob", "correction_weight"} & set(found.tokens)


def test_a_loss_without_a_correction_is_told_from_a_weight_that_is_not_recorded(tmp_path):
    kept = {"g00000010/0": replace(LEARNT, correction_weights=None)}
    found = trace_sample(rewritten(tmp_path, 6, 10, kept), "g00000010/0")
    assert found.tokens["learner_logprob"] == [-0.25, None, -1.0]
    assert "correction_weight" not in found.tokens
    assert found.facts["correction"].startswith("none: the algorithm's loss has no weight")


def test_samples_without_the_columns_are_read(tmp_path):
    kept, columns = {"g00000000/0": LEARNT}, ("learner_logprobs", "correction_weights")
    found = trace_sample(rewritten(tmp_path, 1, 0, kept, columns), "g00000000/0")
    assert found.facts["learner"] == "not recorded: the samples of step 1 have no such column"
    assert found.tokens["sampled_logprob"] == [-0.5] * 3


def test_values_of_another_response_or_step_are_not_shown(tmp_path):
    name = "g00000010/0"
    row = read_samples(rewritten(tmp_path, 6, 10, {name: LEARNT}).samples / "step-000006.parquet")[
        0
    ]
    assert learner_facts(row, 6, (6,), row["response_ids"])[1]
    for step, uses, ids, reason in (
        (6, (5,), row["response_ids"], "not recorded: the sample is of step 6"),
        (6, (6,), [*row["response_ids"][:-1], 99], "not known: the sample of step 6 is of another"),
    ):
        facts, columns = learner_facts(row, step, uses, ids)
        assert facts["learner"].startswith(reason)
        assert columns == {}


def test_a_group_that_no_step_trained_says_so(run):
    found = trace_sample(run, "g00000012/0")
    assert found.step is None
    assert found.facts["trained at step"] == OPEN
    assert found.response is None


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("nonsense", "is not the id of a rollout, such as g00000012/3"),
        ("g00000010/7", "group g00000010 has 2 rollouts, no g00000010/7"),
        ("g00000001/1", "neither among the stored groups"),
        ("../../etc/passwd", "is not the id of a rollout"),
    ],
)
def test_what_is_not_kept_is_refused(run, sample, message):
    with pytest.raises(RunError, match=message):
        trace_sample(run, sample)


def test_a_damaged_group_is_named_and_not_shown(tmp_path):
    path = record_run(tmp_path, steps=STEPS)
    stored = ExperienceStore(path / "experience").path(10)
    stored.write_bytes(stored.read_bytes()[:-5])
    with pytest.raises(StoreError, match=r"g00000010\.arrow"):
        trace_sample(RunDir.open(path), "g00000010/1")


def test_a_step_lists_its_metrics_and_its_rollouts(run):
    text = "\n".join(trace_step(run, 6))
    assert "reward/mean                        0.6" in text
    assert "4 rollouts are kept" in text
    rows = [line.split() for line in trace_step(run, 6) if line.startswith("  g0")]
    assert [row[0] for row in rows] == [f"g000000{n}/{i}" for n in (10, 11) for i in (0, 1)]
    assert rows[1][1:5] == ["1", "4..4", "1", "4"]
    assert "3 rollouts are kept" in "\n".join(trace_step(run, 2)), "of the samples"
    with pytest.raises(RunError, match="nothing is recorded of step 77; the last one is 6"):
        trace_step(run, 77)


def test_the_last_row_of_a_rollout_that_was_trained_again_counts(tmp_path):
    path = record_run(tmp_path, steps=STEPS)
    write_samples(path / "samples", 9, [group(0, "again")], 8, lambda ids: "again", limit=4)
    assert trace_sample(RunDir.open(path), "g00000000/0").step == 9


def test_a_terminal_is_not_told_what_a_sample_wants(run, capsys):
    assert main(["trace", str(run.path), "--sample", "g00000010/1"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "1 + 1\\x1b[2J =" in printed
    assert "sampled_logprob" in printed
    assert escape_control("a\u202eb\tc\n") == "a\\x202eb\tc\n"


def test_something_to_trace_must_be_named(run, capsys):
    assert main(["trace", str(run.path)]) == 1
    assert "give --sample ID, --step N or --timeline FILE" in capsys.readouterr().err


@pytest.fixture(scope="module")
def events(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "run.json"
    assert write_timeline(run, path) > 0
    return json.loads(path.read_text())["traceEvents"]


def test_a_timeline_has_whole_numbers_in_order_from_the_first_moment(events):
    timed = [event for event in events if event["ph"] != "M"]
    assert [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)
    assert timed[0]["ts"] == 0
    for event in timed:
        assert type(event["ts"]) is int
        assert event.get("dur", 0) >= 0
    assert {event["pid"] for event in timed} == {LEARNER, GENERATION, COUNTERS, EVENTS}


def test_the_learners_spans_follow_one_another_and_fill_the_step(events):
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 3 * STEPS
    assert [s["name"] for s in spans[:3]] == ["wait for groups 1", "train 1", "copy weights 1"]
    for earlier, later in pairwise(spans):
        assert earlier["ts"] + earlier["dur"] <= later["ts"]
    assert sum(span["dur"] for span in spans) == 2_000_000 * STEPS


def test_every_group_begins_and_ends_once(events):
    ends = [(e["id"], e["ph"]) for e in events if e["pid"] == GENERATION and e["ph"] != "M"]
    assert sorted(ends) == sorted((n, ph) for n in range(8, 13) for ph in "be")
    begin, end = (
        next(e for e in events if e.get("id") == 10 and e["ph"] == ph) for ph in ("b", "e")
    )
    assert end["ts"] - begin["ts"] == 1_500_000
    assert begin["cat"] == end["cat"] == "generation-0"


def test_events_and_counters_are_there(events):
    told = [event["args"]["text"] for event in events if event["ph"] == "i"]
    assert told[0] == "starting"
    assert told[1].startswith("generation-1 died")
    rewards = [e["args"]["value"] for e in events if e["name"] == "reward/mean"]
    assert rewards == pytest.approx([k / 10 for k in range(1, STEPS + 1)])


def test_steps_recorded_too_close_together_do_not_overlap(run, tmp_path):
    from rlhf_cluster.observe.report.read_run import read_run
    from rlhf_cluster.observe.timeline import timeline

    record = read_run(run)
    crowded = [{**r, "time_s": 100.0 + r["step"] / 2} for r in record.records]
    spans = [e for e in timeline(replace(record, records=crowded), []) if e["ph"] == "X"]
    for earlier, later in pairwise(spans):
        assert earlier["ts"] + earlier["dur"] <= later["ts"] + 1, "a microsecond of rounding"


def test_tokens_of_a_sample_alone_are_shown(run, capsys):
    for wanted, places in (("2", ["2"]), ("1:3", ["1", "2"]), ("2:99", ["2", "3"])):
        arguments = ["trace", str(run.path), "--sample", "g00000010/1", "--token", wanted]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        table = printed.partition("tokens:\n")[2].splitlines()
        assert table[0].split()[:2] == ["token", "trained"]
        assert [row.split()[0] for row in table[1:]] == places
        assert "response:" not in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sample", "g00000010/1", "--token", "4"], "has no token 4: its 4 response tokens"),
        (["--sample", "g00000010/1", "--token", "3:3"], "expected a place such as 17"),
        (["--sample", "g00000010/1", "--token", "-1"], "expected a place such as 17"),
        (["--step", "3", "--token", "1"], "--token without --sample"),
    ],
)
def test_tokens_that_are_not_there_are_refused(run, capsys, options, words):
    assert main(["trace", str(run.path), *options]) == 1
    assert words in capsys.readouterr().err


def test_rollouts_are_sorted_by_their_numbers():
    names = ["g00000002/10", "g00000002/9", "g100000000/0", "g99999999/1"]
    assert sorted(names, key=_number_of) == [names[1], names[0], names[3], names[2]]
