"""The reference that moves: when, to which weights, and that everybody gets the same ones."""

import asyncio
import time
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from rlhf_cluster.errors import WeightError
from rlhf_cluster.scoring.moving_reference import ReferenceKeeper
from rlhf_cluster.sections.values import ReferenceUpdate
from rlhf_cluster.weights import store
from rlhf_cluster.weights.sync import WeightSync
from tests.support.builders.small_weights import (
    assert_same,
    publish,
    small_model,
)
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
)

FIXED = {"type": "fixed"}
PERIODIC = {"type": "periodic", "every": 3}


def update(tree) -> ReferenceUpdate:
    return TypeAdapter(ReferenceUpdate).validate_python(tree)


def keeper(root: Path, tree, **keys) -> ReferenceKeeper:
    return ReferenceKeeper(root / "reference", update(tree), **keys)


def policy(version: int) -> dict[str, torch.Tensor]:
    """Weights of a policy version, with a tensor of whole numbers among them."""
    return {**small_model(seed=version), "steps": torch.tensor([version])}


def live(root: Path, version: int, tensors=None):
    return publish(root / "weights", version, tensors or policy(version))


def weights_of(version) -> dict[str, torch.Tensor]:
    return dict(store.read(version.path, expected_digest=version.digest))


@pytest.mark.parametrize("tree", [FIXED, PERIODIC], ids=["fixed", "periodic"])
def test_s38_the_first_reference_is_the_first_live_version_bit_for_bit(tmp_path, tree):
    first = live(tmp_path, 0)
    reference = keeper(tmp_path, tree).follow(first)
    assert_same(weights_of(reference), policy(0))
    assert (reference.version, reference.digest) == (0, first.digest)


def test_a_fixed_reference_stays(tmp_path):
    one = keeper(tmp_path, FIXED)
    assert [one.follow(live(tmp_path, v)).version for v in range(5)] == [0] * 5


def test_a_periodic_reference_becomes_the_version_that_is_live_when_it_is_due(tmp_path):
    """Versions 3 and 8 are never published: the move is due at the next one that is."""
    one = keeper(tmp_path, PERIODIC)
    found = {v: one.follow(live(tmp_path, v)) for v in (0, 1, 2, 4, 5, 6, 7, 9, 10)}
    moves = {v: reference.version for v, reference in found.items()}
    assert moves == {0: 0, 1: 0, 2: 0, 4: 4, 5: 4, 6: 4, 7: 7, 9: 7, 10: 10}
    assert_same(weights_of(found[10]), policy(10))
    assert store.versions(tmp_path / "reference") == [7, 10], "the last two are kept"


def test_the_average_is_the_recursion_in_float64_to_float32_rounding(tmp_path):
    """Every second version, one of them never published: it forgets as if it had been."""
    decay = 0.9
    one = keeper(tmp_path, {"type": "ema", "every": 2, "decay": decay})
    expected = {n: t.double() for n, t in small_model(seed=0).items()}
    last = 0
    for version in (0, 1, 2, 3, 6, 8):
        reference = one.follow(live(tmp_path, version))
        if version - last >= 2:
            kept = decay ** ((version - last) / 2)
            now = small_model(seed=version)
            expected = {n: kept * t + (1 - kept) * now[n].double() for n, t in expected.items()}
            last = version
        assert reference.version == last
    found = weights_of(reference)
    assert found.pop("steps").tolist() == [8], "what is no number of weights is the policy's"
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-6)


def test_a_small_step_is_not_lost_to_bfloat16(tmp_path):
    """One bfloat16 unit at 1.0 is 1/128; a hundredth of it is kept, and a hundred of them add up."""
    one = keeper(tmp_path, {"type": "ema", "decay": 0.99})
    one.follow(live(tmp_path, 0, {"w": torch.ones(3, dtype=torch.bfloat16)}))
    moved = {"w": torch.full((3,), 1 + 1 / 128, dtype=torch.bfloat16)}
    for version in range(1, 101):
        reference = one.follow(live(tmp_path, version, moved))
    expected = 1 + (1 - 0.99**100) / 128
    assert weights_of(reference)["w"].tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_s38_an_average_of_equal_policies_is_that_policy(tmp_path):
    one = keeper(tmp_path, {"type": "ema", "decay": 0.7})
    weights = small_model(seed=3)
    for version in range(4):
        reference = one.follow(live(tmp_path, version, weights))
    assert_same(weights_of(reference), {n: t.float() for n, t in weights.items()})


@pytest.mark.parametrize("tree", [PERIODIC, {"type": "ema", "every": 3}], ids=["periodic", "ema"])
def test_a_keeper_that_starts_again_goes_on_as_if_it_had_not_ended(tmp_path, tree):
    """Another process, smaller files: the same bytes. Digests say so."""
    versions = [live(tmp_path, v) for v in range(8)]
    whole = [keeper(tmp_path / "a", tree).follow(version).digest for version in versions]
    one = keeper(tmp_path / "b", tree, max_file_bytes=1)
    again = [one.follow(version).digest for version in versions]
    assert whole == again
    assert len(set(whole)) == 3
    files = list((tmp_path / "b" / "reference" / "v000006").glob("*.safetensors"))
    assert len(files) == len(policy(0)), "a file a tensor"


def test_a_policy_of_other_tensors_is_refused(tmp_path):
    one = keeper(tmp_path, {"type": "ema"})
    one.follow(live(tmp_path, 0))
    other = policy(1)
    other["renamed"] = other.pop("scale")
    with pytest.raises(WeightError, match="scale"):
        one.follow(live(tmp_path, 1, other))
    assert one.follow(live(tmp_path, 2)).version == 2, "the next version is averaged again"


def test_the_reference_has_moved_before_a_version_counts_as_live():
    """So a group that is admitted because of a version is scored with the reference it brought."""
    told = []

    class Buffer:
        async def set_live_version(self, version: int) -> None:
            told.append(("live", version))

    async def follow(version) -> None:
        told.append(("reference", version.version))

    async def run() -> None:
        learner, generation = FakeLearner(), FakeGeneration()
        sync = WeightSync(learner, generation, Buffer(), 1, time.monotonic, follow)  # type: ignore[arg-type]
        for version in (0, 1):
            learner.version = version
            await sync.after_step(version)
            await sync.drain(10.0)
        assert generation.pulled == [0, 1]

    asyncio.run(run())
    assert told == [("reference", 0), ("live", 0), ("reference", 1), ("live", 1)]
