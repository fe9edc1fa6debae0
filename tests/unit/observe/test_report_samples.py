"""Samples in the report: which are shown, and the colours of their tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.observe.report.html_text import MAX_TEXT
from rlhf_cluster.observe.report.read_run import RunRecord, choose_extremes
from rlhf_cluster.observe.report.samples_section import samples
from rlhf_cluster.observe.report.token_pieces import MAX_PIECES, find_decoder, split_tokens

WORDS = ["<", "b", ">", "a", " & ", "c"]


def row(reward: float = 1.0, prompt: str = "p", step: int = 1, **changes: Any) -> dict[str, Any]:
    ids = list(range(len(WORDS)))
    return {
        "rollout_id": f"{prompt}/{step}", "prompt_id": prompt, "prompt": prompt, "step": step,
        "response": "".join(WORDS), "reward": reward, "reward_parts": "{}", "watched": "{}",
        "version_min": 0, "version_max": 0, "staleness": 0, "finish_reason": "stop",
        "worker": "w", "scorer": "s", "response_ids": ids, "sampled_logprobs": [-1.0] * len(ids),
        "learner_logprobs": None, "correction_weights": None, "step_ends": None,
        "step_rewards": None, **changes,
    }  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


def shown(path: Path, *rows: dict[str, Any]) -> str:
    run = RunRecord(path=path, active=False, samples={1: list(rows)}, best=list(rows))
    return "".join(samples(run, several=False))


def test_best_and_worst_are_of_different_prompts():
    rows = [row(1.0, "a", 1), row(1.0, "a", 2), row(0.9, "b"), row(0.1, "c"), row(0.0, "a", 3)]
    best, worst = choose_extremes(rows, 2)
    assert [(r["prompt_id"], r["step"]) for r in best] == [("a", 2), ("b", 1)]
    assert [(r["prompt_id"], r["reward"]) for r in worst] == [("c", 0.1)]
    assert choose_extremes([], 2) == ([], [])


def test_tokens_have_the_colour_of_their_ratio_and_the_mask(tmp_path):
    write_tokenizer(tmp_path / "final")
    found = shown(
        tmp_path,
        row(
            learner_logprobs=[-2.0, -1.2, -1.0, -0.8, 0.0, None],
            correction_weights=[0.37, 0.8, 1.0, 1.2, 0.0, None],
        ),
    )
    spans = re.findall(r'<span( class="[^"]*")? title="(.*?)">(.*?)</span>', found)
    assert spans[:6] == [
        (' class="q0"', "ratio 0.368, weight 0.37", "&lt;"),
        (' class="q1"', "ratio 0.819, weight 0.8", "b"),
        ("", "ratio 1, weight 1", "&gt;"),
        (' class="q3"', "ratio 1.22, weight 1.2", "a"),
        (' class="q4 masked"', "ratio 2.72, weight 0", " &amp; "),
        (' class="masked"', "not trained", "c"),
    ]
    assert "Struck through" in found


def test_rewards_of_reasoning_steps_stand_behind_their_last_tokens(tmp_path):
    write_tokenizer(tmp_path / "model")
    found = shown(tmp_path, row(step_ends=[2, 5, 5], step_rewards=[0.5, 1.0, -1.0]))
    assert '&lt;b&gt;<span class="step-reward">0.5</span>a &amp; c' in found
    assert 'c<span class="step-reward">1</span><span class="step-reward">-1</span></pre>' in found
    assert "Struck through" not in found, "no ratio is known, and none is explained"


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_without_a_readable_tokenizer_the_text_is_plain(tmp_path, content):
    if content is not None:
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "tokenizer.json").write_text(content)
    found = shown(tmp_path, row(learner_logprobs=[-2.0] * 6))
    assert '<pre dir="auto">&lt;b&gt;a &amp; c</pre>' in found


def test_a_tokenizer_of_another_model_gives_no_colours(tmp_path):
    write_tokenizer(tmp_path / "final")
    found = shown(tmp_path, row(response="something else", learner_logprobs=[-2.0] * 6))
    assert '<pre dir="auto">something else</pre>' in found


def test_a_long_response_is_cut_between_tokens(tmp_path):
    write_tokenizer(tmp_path / "final")
    long = row(response_ids=[3] * 700, response="a" * 700, sampled_logprobs=[-1.0] * 700)
    assert f"... {700 - MAX_PIECES:,} characters more" in shown(tmp_path, long)
    decode = find_decoder(tmp_path, {})
    assert decode is not None
    assert split_tokens([3] * 700, "a" * 700, decode) == ["a"] * MAX_PIECES
    plain = row(response="b" * (MAX_TEXT + 7))
    assert "... 7 characters more" in shown(tmp_path, plain)


def test_a_character_of_several_tokens_belongs_to_its_last():
    parts = [b"a", "\u20ac".encode()[:1], "\u20ac".encode()[1:], b"b"]

    def decode(ids):
        return b"".join(parts[i] for i in ids).decode(errors="replace")

    assert split_tokens([0, 1, 2, 3], "a\u20acb", decode) == ["a", "", "\u20ac", "b"]
