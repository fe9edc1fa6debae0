"""Configuration, metrics, commands and file formats change on purpose only."""

from __future__ import annotations

import json

from tests.unit.repository.golden import DUMP, as_text, dump


def test_the_golden_dump_is_what_the_code_says():
    found, kept = json.loads(as_text(dump())), json.loads(DUMP.read_text())
    assert found.keys() == kept.keys()
    hint = "if that is on purpose: python -m tests.unit.repository.golden"
    for part, before in kept.items():
        changed = {
            key
            for key in before.keys() | found[part].keys()
            if before.get(key) != found[part].get(key)
        }
        assert not changed, f"{part}: {sorted(changed)} changed; {hint}"
