"""The reference of configuration keys has all of them, each with a true description."""

import tomllib
from typing import Literal

import pytest
from pydantic import Field, PositiveInt

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config.reference import (
    KINDS,
    REQUIRED,
    Key,
    all_keys,
    conditions,
    facts_of,
    first_sentence,
    keys_of,
    resolve,
    sections,
    types_of,
    variants,
)
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.offline import STAGES
from rlhf_cluster.rewards import REWARDS
from rlhf_cluster.sections.section import Section

NO_TOML = ("none", REQUIRED, "its defaults")


class Documented(Section):
    """A section of this test.

    Its second paragraph.
    """

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the
    whole. 1: all."""
    names: tuple[str, ...] = ()
    """Names."""
    count: PositiveInt | None = None
    """Number. Default: all."""
    mode: Literal["slow", "fast"] = "slow"
    """Way."""
    given: str = Field(pattern="^a")
    """Text."""
    inner: dict[str, int] = Field(default_factory=dict)
    """Table."""
    bare: int = 0


class Narrower(Documented):
    """A section that has another default."""

    share: float = 0.25


class Holder(Section):
    """A section that holds another one."""

    own: Documented | None = None


def fact(model: type[Section], name: str) -> Key:
    return next(key for key in facts_of(model) if key.name == name)


def key(path: str) -> Key:
    [found] = [key for key in all_keys() if key.path == path]
    return found


def test_every_key_has_a_description():
    bare = [f"{key.path} ({conditions(key)})" for key in all_keys() if not key.description]
    assert not bare, f"write a docstring under the attribute of: {', '.join(bare)}"


def test_every_section_has_a_description():
    bare = sorted({v.model.__name__ for v in variants() if not v.description})
    assert not bare, f"write a docstring of the class: {', '.join(bare)}"


def test_every_description_is_of_whole_sentences():
    odd = [key.path for key in all_keys() if not key.description.endswith((".", ")"))]
    assert not odd, odd


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_and_no_key_of_a_run_file_is_left_out(kind):
    schema = KINDS[kind].model_json_schema()
    models = {**schema["$defs"], KINDS[kind].__name__: schema}
    expected = {(name, key) for name, each in models.items() for key in each["properties"]}
    walked = {v.model for v in variants() if v.kind == kind}
    assert {(m.__name__, fact.name) for m in walked for fact in facts_of(m)} == expected


@pytest.mark.parametrize(
    ("section", "table"),
    [("algorithm", ALGORITHMS), ("scoring.rewards", REWARDS), ("stage", [*STAGES, "generate"])],
)
def test_every_built_in_type_is_there(section, table):
    assert set(types_of(section)) == set(table)
    assert set(keys_of(section)[0].types) == set(table)


def test_every_default_is_toml_that_reads_as_the_default():
    compared = 0
    for model in {v.model for v in variants()}:
        for each in facts_of(model):
            default = model.model_fields[each.name].get_default(call_default_factory=True)
            if each.default in NO_TOML or each.default.startswith(("{", "a text of")):
                continue
            value = tomllib.loads(f"x = {each.default}")["x"]
            assert value == (list(default) if isinstance(default, tuple) else default), each.name
            compared += 1
    assert compared > 200


def test_equal_facts_are_one_key_with_all_its_kinds_of_run_files():
    assert key("observe.live").kinds == ("run", "stage", "data set")
    assert key("weights.transport").kinds == ("run",)
    steps = {k.kinds: k.default for k in all_keys() if k.path == "run.steps"}
    assert steps == {("run",): REQUIRED, ("stage",): "none"}


def test_a_key_of_some_types_names_them():
    assert conditions(key("algorithm.overlong_penalty")) == "dapo"
    assert conditions(key("algorithm.kl_coef")) == "all but online_dpo"
    assert (
        conditions(key("stage.loss.margins")) == 'bradley_terry; within stage.type = "reward_model"'
    )
    assert conditions(key("staleness.on_stale")) == ""


@pytest.mark.parametrize(
    ("name", "type_", "default", "bounds", "description"),
    [
        ("share", "number", "0.5", "greater than 0, at most 1", "Share of the whole. 1: all."),
        ("names", "list of strings", "[]", "", "Names."),
        ("count", "integer", "none", "greater than 0", "Number. Default: all."),
        ("mode", '"slow" or "fast"', '"slow"', "", "Way."),
        ("given", "string", REQUIRED, "matches ^a", "Text."),
        ("inner", "table", "{}", "", "Table."),
        ("bare", "integer", "0", "", ""),
    ],
)
def test_the_facts_of_a_key(name, type_, default, bounds, description):
    found = fact(Documented, name)
    facts = (found.type, found.default, found.bounds, found.description)
    assert facts == (type_, default, bounds, description)


def test_a_key_without_its_own_text_has_that_of_the_base_or_of_its_section():
    assert fact(Narrower, "share").description == "Share of the whole. 1: all."
    assert fact(Narrower, "share").default == "0.25"
    assert fact(Holder, "own").description.startswith("A section of this test.")


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("staleness.on_stale", "staleness.on_stale"),
        ("[learner]", "learner"),
        ("[[scoring.rewards]]", "scoring.rewards"),
        ("scoring.rewards.0.weight", "scoring.rewards.weight"),
        ("scoring.pools.judges.workers", "scoring.pools.NAME.workers"),
        ("model.init.tokenizer.vocab_size", "model.init.tokenizer.vocab_size"),
    ],
)
def test_a_key_is_found_as_a_run_file_writes_it(query, path):
    assert resolve(query) == path
    assert path in {*sections(), *(key.path for key in all_keys())}


@pytest.mark.parametrize(
    ("query", "near"),
    [
        ("stalness.on_stale", "did you mean staleness.on_stale"),
        ("temperature", "generation.temperature, scoring.rewards.temperature"),
        ("learning_rte", "learner.learning_rate"),
        ("§", "`rlhf-cluster config` lists the sections"),
    ],
)
def test_an_unknown_key_names_the_near_ones(query, near):
    with pytest.raises(ConfigError, match=f"^{query}: no run file has this key") as caught:
        resolve(query)
    assert near in str(caught.value)


def test_the_first_sentence_ends_at_its_full_stop():
    assert first_sentence("A file, .jsonl or not. `x`: more. End.") == "A file, .jsonl or not."
    assert first_sentence("0: none; 1.5 of it") == "0: none; 1.5 of it"
