"""Which adapter a request samples with, and which ones vLLM is asked to load and to forget."""

import asyncio
import copy
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from safetensors import SafetensorError

from actors.vllm.vllm_adapters import Adapter, Adapters
from actors.vllm.vllm_engine import VllmEngine
from actors.vllm.vllm_requests import Requests
from rlhf_cluster.errors import DataError, WeightError, WorkerError
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.builders import tiny_llama
from tests.support.builders.engine_models import adapted, engine_config, make_request


def module(name: str, **values: object) -> ModuleType:
    made = ModuleType(name)
    for key, value in values.items():
        setattr(made, key, value)
    return made


@pytest.fixture(autouse=True)
def plain_vllm(monkeypatch):
    """As much of vLLM's names as the code under test imports."""
    status = SimpleNamespace(WAITING="waiting", RUNNING="running")
    for made in (
        module("vllm", SamplingParams=SimpleNamespace),
        module("vllm.lora"),
        module("vllm.lora.request", LoRARequest=SimpleNamespace),
        module("vllm.exceptions", VLLMClientError=type("VLLMClientError", (Exception,), {})),
        module("vllm.sampling_params", RequestOutputKind=SimpleNamespace(FINAL_ONLY=2)),
        module("vllm.v1"),
        module("vllm.v1.request", RequestStatus=status),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)


class FakeLlm:
    """Keeps what it was told; `requests` by number of submission, as the scheduler has them."""

    def __init__(self) -> None:
        self.loaded: dict[int, SimpleNamespace] = {}
        self.calls: list[tuple[str, object]] = []
        self.requests: dict[int, SimpleNamespace] = {}
        self.refusal: Exception | None = None
        self.refused: dict[str, Exception] = {}  # by request
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_lora(self, request):
        if self.refusal is not None:
            raise self.refusal
        self.loaded[request.lora_int_id] = request

    def remove_lora(self, number):
        del self.loaded[number]

    def add_request(self, request_id, prompt, params, lora_request=None):
        if request_id in self.refused:
            raise self.refused[request_id]
        made = SimpleNamespace(name=request_id, lora=lora_request, status="waiting")
        self.requests[len(self.requests)] = made

    def has_unfinished_requests(self):
        return False

    def abort_request(self, names):
        self.calls.append(("abort", names))

    def running(self, request_id):
        for made in self.requests.values():
            if made.name == request_id:
                made.status = "running"

    def lora_of(self, request_id):
        lora = [r for r in self.requests.values() if r.name == request_id][-1].lora
        return None if lora is None else lora.lora_int_id


def adapter(number: int, version: int | None = None) -> Adapter:
    return Adapter(
        version=number if version is None else version,
        number=number,
        folder=Path(f"/nowhere/v-{number}"),
        digest="d",
        num_tensors=1,
    )


def finished(name: str, num_tokens: int):
    """A response whose steps vLLM labels with the version that the engine had at each of them."""
    ids = list(range(num_tokens))
    choice = SimpleNamespace(
        token_ids=ids,
        logprobs=SimpleNamespace(token_ids=ids, logprobs=[-1.0] * num_tokens),
        finish_reason="stop",
        spec_decode_metrics=None,
        weight_versions=[SimpleNamespace(version="99", start=0, end=num_tokens)],
    )
    return SimpleNamespace(
        request_id=name, outputs=[choice], prompt_token_ids=[1], num_cached_tokens=0
    )


def serving(llm: FakeLlm, serves: bool = True) -> Requests:
    return Requests(llm, SimpleNamespace(requests=llm.requests), False, -1, serves)  # type: ignore[arg-type]


async def test_a_request_that_runs_keeps_its_adapter_and_one_that_waits_takes_the_new_one():
    llm = FakeLlm()
    requests, future = serving(llm), asyncio.get_running_loop().create_future
    requests.follow(1, adapter(1))
    for name in ("runs", "waits"):
        requests.add(make_request(name), future())
    llm.running("runs")
    requests.follow(2, adapter(2))
    assert (llm.lora_of("runs"), llm.lora_of("waits")) == (1, 2)
    assert llm.calls == [("abort", ["waits"])]
    assert requests.adapters_used == {1, 2}
    answers = requests.collect([finished("runs", 3), finished("waits", 2)])
    spans = [result[0].version_spans for _, result in answers]
    assert spans == [[(1, 0, 3)], [(2, 0, 2)]]
    assert requests.adapters_used == set()


async def test_before_the_first_version_the_model_folder_samples_as_version_minus_one():
    llm = FakeLlm()
    requests = serving(llm)
    requests.add(make_request("early"), asyncio.get_running_loop().create_future())
    assert llm.lora_of("early") is None
    ((_, (sample,)),) = requests.collect([finished("early", 4)])
    assert sample.version_spans == [(-1, 0, 4)]


async def test_merged_versions_keep_vllms_own_labels():
    llm = FakeLlm()
    requests = serving(llm, serves=False)
    requests.add(make_request("merged"), asyncio.get_running_loop().create_future())
    ((_, (sample,)),) = requests.collect([finished("merged", 4)])
    assert sample.version_spans == [(99, 0, 4)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama.build(seed=0, max_position=64)


@pytest.fixture
def adapters(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiny_llama.save(model, tmp_path / "model")
    return Adapters(str(tmp_path / "model"), "w0")


def publish(root, number, model, seed):
    parts = adapted(model, seed, copy.deepcopy(model))
    return store.commit(root, number, [store.write_shard(root, number, 0, parts)], keep=9)


def test_the_same_version_twice_has_two_names_numbers_and_folders(adapters, model, tmp_path):
    """As after the loss of a learner: the number comes again, with other weights."""
    llm, found = FakeLlm(), []
    for seed in (1, 2):
        version = publish(tmp_path / f"store{seed}", 1, model, seed)
        written = adapters.write(version, Deadline("t", 60))
        assert (written.digest, written.num_tensors) == (version.digest, version.num_tensors)
        adapters.add(llm, written)
        found.append(llm.loaded[written.number])
    for field in ("lora_name", "lora_int_id", "lora_path"):
        assert len({getattr(request, field) for request in found}) == 2


def test_adapters_that_no_request_uses_are_forgotten_and_their_folders_go(
    adapters, model, tmp_path
):
    llm, written = FakeLlm(), []
    for number in (1, 2, 3):
        version = publish(tmp_path / "store", number, model, number)
        written.append(adapters.write(version, Deadline("t", 60)))
        adapters.add(llm, written[-1])
        adapters.retire(llm, used={1})
    assert set(llm.loaded) == {1, 3}
    adapters.retire(llm, used=())
    assert set(llm.loaded) == {3}
    adapters.write(publish(tmp_path / "store", 4, model, 4), Deadline("t", 60))
    assert [w.folder.exists() for w in written] == [False, False, True]
    adapters.close()
    assert not written[-1].folder.parent.exists()


def test_an_adapter_that_vllm_refuses_leaves_the_others(adapters, model, tmp_path):
    llm = FakeLlm()
    first = adapters.write(publish(tmp_path / "store", 1, model, 1), Deadline("t", 60))
    adapters.add(llm, first)
    second = adapters.write(publish(tmp_path / "store", 2, model, 2), Deadline("t", 60))
    llm.refusal = ValueError("unexpected modules")
    with pytest.raises(WeightError, match="version 2 was not loaded: .*unexpected modules"):
        adapters.add(llm, second)
    adapters.retire(llm, used=())
    assert set(llm.loaded) == {1}


def test_a_read_that_hangs_is_not_overtaken(adapters, model, tmp_path):
    version = publish(tmp_path / "store", 1, model, 1)
    with adapters._writing, pytest.raises(WeightError, match="still being read"):
        adapters.write(version, Deadline("t", 60))
    adapters.write(version, Deadline("t", 60))


async def test_a_waiting_request_that_vllm_refuses_under_the_new_adapter_is_answered_alone():
    llm = FakeLlm()
    requests, future = serving(llm), asyncio.get_running_loop().create_future
    answers = {name: future() for name in ("runs", "refused", "waits")}
    for name, answer in answers.items():
        requests.add(make_request(name), answer)
    llm.running("runs")
    llm.refused = {"refused": ValueError("no block is free")}
    owed = dict(requests.follow(1, adapter(1)))
    assert set(owed) == {answers["refused"]}
    assert isinstance(owed[answers["refused"]], DataError)
    assert "refused request refused: no block is free" in str(owed[answers["refused"]])
    assert llm.lora_of("waits") == 1
    assert set(requests.drop_all()) == {answers["runs"], answers["waits"]}


class FakeEngine(VllmEngine):
    """The engine's thread and queue over a fake vLLM, which has no steps to do."""

    def __init__(self, llm: FakeLlm, adapters: Adapters) -> None:
        super().__init__(engine_config(), "unused", "w0")
        self._serves = True
        self._fake = llm, adapters

    def _build(self) -> None:
        self._llm, self._adapters = self._fake  # type: ignore[assignment]
        self._scheduler = SimpleNamespace(requests=self._fake[0].requests)
        self._requests = serving(self._fake[0])


@pytest.fixture
def start_engine(monkeypatch):
    """Start a `FakeEngine` with the served adapters given."""
    monkeypatch.setattr("actors.vllm.vllm_engine.engine_arguments", lambda *_: {})

    @asynccontextmanager
    async def start(llm: FakeLlm, adapters: Adapters):
        engine = FakeEngine(llm, adapters)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()

    return start


async def test_the_caller_of_a_refused_request_gets_the_error_when_the_adapter_changes(
    adapters, model, tmp_path, start_engine
):
    llm = FakeLlm()
    async with asyncio.timeout(60), start_engine(llm, adapters) as engine:
        asked = asyncio.ensure_future(engine.generate(make_request("waits")))
        await engine._call(lambda: None)  # the request is submitted
        llm.refused = {"waits": ValueError("too long for this adapter")}
        loaded = await engine.load_weights(publish(tmp_path / "store", 1, model, 1))
        assert loaded.version == 1
        with pytest.raises(DataError, match="refused request waits: too long for this adapter"):
            await asked
        engine.check()


async def test_an_engine_that_breaks_while_the_adapter_changes_is_dead_and_answers_everyone(
    adapters, model, tmp_path, start_engine
):
    llm = FakeLlm()
    async with asyncio.timeout(60), start_engine(llm, adapters) as engine:
        asked = [asyncio.ensure_future(engine.generate(make_request(n))) for n in ("one", "two")]
        await engine._call(lambda: None)  # both are submitted
        llm.refused = {"one": KeyError("the engine process died")}
        with pytest.raises(WorkerError, match="vLLM failed: KeyError: 'the engine process died'"):
            await engine.load_weights(publish(tmp_path / "store", 1, model, 1))
        for answer in asked:
            with pytest.raises(WorkerError, match="the engine process died"):
                await answer
        with pytest.raises(WorkerError, match="the engine process died"):
            engine.check()


async def test_an_engine_that_refuses_an_adapter_samples_on_with_the_one_before(
    adapters, model, tmp_path, start_engine
):
    llm = FakeLlm()
    async with asyncio.timeout(60), start_engine(llm, adapters) as engine:
        llm.refusal = ValueError("unexpected modules")
        with pytest.raises(WeightError, match="unexpected modules"):
            await engine.load_weights(publish(tmp_path / "store", 1, model, 1))
        engine.check()


def folders(adapters: Adapters) -> list[str]:
    return sorted(path.name for path in adapters._root.iterdir())


def test_a_folder_that_was_written_too_late_is_removed(adapters, model, tmp_path, monkeypatch):
    deadline = Deadline("t", 60)

    def write(folder, *_):
        folder.mkdir()
        deadline.cancel()

    monkeypatch.setattr("actors.vllm.vllm_adapters.write_peft_folder", write)
    with pytest.raises(WeightError, match="t was cancelled"):
        adapters.write(publish(tmp_path / "store", 1, model, 1), deadline)
    assert folders(adapters) == []


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_folder_that_cannot_be_written_whole_is_removed(
    adapters, model, tmp_path, monkeypatch, failure
):
    def full(_, path):
        path.write_bytes(b"the first block")
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WeightError, match="No space left on device"):
        adapters.write(publish(tmp_path / "store", 1, model, 1), Deadline("t", 60))
    assert folders(adapters) == []


def test_an_adapter_that_no_caller_waits_for_goes_with_the_next_version(adapters, model, tmp_path):
    llm = FakeLlm()
    forgotten = adapters.write(publish(tmp_path / "store", 1, model, 1), Deadline("t", 60))
    newer = adapters.write(publish(tmp_path / "store", 2, model, 2), Deadline("t", 60))
    assert folders(adapters) == [newer.folder.name]
    with pytest.raises(WeightError, match="version 1 was not loaded: a later one was written"):
        adapters.add(llm, forgotten)
    adapters.add(llm, newer)
    adapters.write(publish(tmp_path / "store", 3, model, 3), Deadline("t", 60))
    assert newer.folder.exists(), "it is served"


def test_a_write_that_ends_after_close_leaves_nothing(adapters, model, tmp_path):
    version = publish(tmp_path / "store", 1, model, 1)
    adapters.close()
    adapters.write(version, Deadline("t", 60))
    assert not adapters._root.exists()
