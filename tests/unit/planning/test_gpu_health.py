"""The health of GPUs, by a library that is made up, and the stress test on the processor."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cluster.cli.commands import main
from rlhf_cluster.planning.doctor import GIB, report
from rlhf_cluster.planning.gpu_health import check_gpus, judge_gpus, load_nvml, read_gpus
from rlhf_cluster.planning.gpu_stress import Stress, judge_stress, stress, stress_gpus


class NvmlFailure(Exception):
    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


NOT_SUPPORTED = NvmlFailure(3, "Not Supported")
LOST = NvmlFailure(15, "GPU is lost")
BUSY = SimpleNamespace(total=80 * GIB, used=60 * GIB)


@dataclass(frozen=True)
class Board:
    """One made-up GPU. A value that is an exception is raised."""

    memory: Any = field(default_factory=lambda: SimpleNamespace(total=80 * GIB, used=GIB))
    ecc: Any = (0, 0)
    rows: Any = (0, 0, 0, 0)
    reasons: Any = 0x1  # idle
    clock: Any = 345
    celsius: Any = 40
    links: Any = (1,) * 18


@dataclass
class FakeNvml:
    boards: tuple[Board, ...] = (Board(),)
    init: Exception | None = None
    count: Exception | None = None
    lost: frozenset[int] = frozenset()
    opened: int = 0
    NVMLError: Any = NvmlFailure

    def nvmlInit(self) -> None:
        self.opened += value(1, self.init)

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        return value(len(self.boards), self.count)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Board:
        return value(self.boards[index], LOST if index in self.lost else None)

    def nvmlDeviceGetName(self, handle: Board) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: Board) -> Any:
        return value(handle.memory)

    def nvmlDeviceGetTotalEccErrors(self, handle: Board, errorType: int, counterType: int) -> int:
        assert counterType == 0  # since the driver was loaded
        return value(handle.ecc)[errorType]

    def nvmlDeviceGetRemappedRows(self, device: Board) -> Any:
        return value(device.rows)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Board) -> int:
        return value(handle.reasons)

    def nvmlDeviceGetClockInfo(self, handle: Board, type: int) -> int:
        return value(handle.clock)

    def nvmlDeviceGetMaxClockInfo(self, handle: Board, type: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: Board, sensor: int) -> int:
        return value(handle.celsius)

    def nvmlDeviceGetTemperatureThreshold(self, handle: Board, threshold: int) -> int:
        return 89

    def nvmlDeviceGetNvLinkState(self, device: Board, link: int) -> int:
        return value(value(device.links)[link])


def value(given: Any, error: Exception | None = None) -> Any:
    """Return `given`, or raise it or `error`."""
    if error is not None or isinstance(given, Exception):
        raise error or given
    return given


def found(nvml: FakeNvml) -> dict[str, tuple[str, str]]:
    """Verdict and value of each finding that is not ok, by name."""
    findings = judge_gpus(read_gpus(nvml))
    assert nvml.opened == 0
    for finding in findings:
        assert bool(finding.cure) == (finding.verdict != "ok"), finding
    return {f.name: (f.verdict, f.value) for f in findings if f.verdict != "ok"}


def test_a_healthy_machine_has_nothing_to_cure():
    nvml = FakeNvml((Board(), Board(ecc=(3, 0), rows=(2, 1, 0, 0))))
    assert found(nvml) == {}
    lines = list(report(judge_gpus(read_gpus(nvml))))
    assert lines[0].split() == ["ok", "GPU", "driver", "580.95.05"]
    assert "NVIDIA H100, 79.0 of 80.0 GiB free, 345 of 1980 MHz, 40 °C, 0 corrected" in lines[1]
    assert "3 corrected errors, 18 NVLinks up" in lines[2]


@pytest.mark.parametrize(
    ("board", "name", "verdict", "text"),
    [
        (Board(ecc=(0, 2)), "GPU 0 ECC", "wrong", "2 uncorrected errors"),
        (Board(rows=(0, 1, 0, 1)), "GPU 0 memory", "wrong", "could not be remapped"),
        (Board(rows=(0, 1, 1, 0)), "GPU 0 memory", "note", "wait to be remapped"),
        (Board(reasons=0x4), "GPU 0 clocks", "note", "slowed down by power cap"),
        (Board(reasons=0x80), "GPU 0 clocks", "note", "slowed down by power brake"),
        (Board(reasons=0x20), "GPU 0 clocks", "note", "slowed down by heat"),
        (Board(reasons=0x40 | 0x8), "GPU 0 clocks", "note", "hardware slowdown, heat (hardware)"),
        (Board(celsius=89), "GPU 0 clocks", "note", "slowed down by heat"),
        (Board(links=(1,) * 15 + (0,) * 3), "GPU 0 NVLink", "note", "3 of 18 links down"),
        (Board(links=(0,) * 18), "GPU 0 NVLink", "note", "18 of 18 links down"),
        (Board(links=NOT_SUPPORTED), "GPU 0 NVLink", "note", "18 of 18 links down"),
        (Board(memory=BUSY), "GPU 0 memory", "note", "60.0 GiB"),
        (Board(clock=LOST), "GPU 0", "wrong", "GPU is lost"),
    ],
)  # fmt: skip
def test_each_fault_is_found_on_the_gpu_that_has_it(board, name, verdict, text):
    faults = found(FakeNvml((board, Board())))
    assert list(faults) == [name]
    assert faults[name][0] == verdict
    assert text in faults[name][1]


def test_heat_and_power_have_different_cures():
    def cure(reasons: int) -> str:
        findings = judge_gpus(read_gpus(FakeNvml((Board(reasons=reasons),))))
        return next(f.cure for f in findings if f.name == "GPU 0 clocks")

    assert "fans" in cure(0x20)
    assert "power limit" in cure(0x4)


def test_a_gpu_without_a_feature_has_no_fault_of_it():
    plain = Board(ecc=NOT_SUPPORTED, rows=NOT_SUPPORTED, links=NOT_SUPPORTED, celsius=NOT_SUPPORTED)
    assert found(FakeNvml((plain, plain))) == {}
    assert "no ECC" in judge_gpus(read_gpus(FakeNvml((plain,))))[1].value
    idle_links = replace(plain, links=(0,) * 18)  # a card without a bridge
    assert found(FakeNvml((idle_links, idle_links))) == {}


def test_a_lost_gpu_does_not_hide_the_others():
    faults = found(FakeNvml((Board(), Board(ecc=(0, 1))), lost=frozenset({0})))
    assert faults["GPU 0"] == ("wrong", "GPU is lost")
    assert faults["GPU 1 ECC"][0] == "wrong"


def test_a_missing_driver_matters_only_where_gpus_are():
    nvml = FakeNvml(init=NvmlFailure(12, "NVML Shared Library Not Found"))
    assert check_gpus(nvml, seen=0) == []
    (note,) = check_gpus(nvml, seen=0, wanted=8.0)
    assert (note.verdict, note.name) == ("note", "GPU driver")
    (wrong,) = check_gpus(nvml, seen=2)
    assert (wrong.verdict, wrong.value) == ("wrong", "NVML Shared Library Not Found")


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(init=NvmlFailure(18, "RM has detected an NVML/RM version mismatch.")),
        FakeNvml(count=NvmlFailure(999, "Unknown Error")),
        FakeNvml(count=AttributeError("no nvmlDeviceGetCount")),
    ],
)
def test_a_library_that_fails_is_one_finding(nvml):
    (fault,) = check_gpus(nvml, seen=0)
    assert (fault.verdict, fault.name) == ("wrong", "GPU driver")
    assert fault.value == str(nvml.init or nvml.count)


def test_a_driver_that_does_not_answer_is_given_up():
    release = threading.Event()

    class Hanging(FakeNvml):
        def nvmlInit(self) -> None:
            release.wait(30)

    try:
        (fault,) = check_gpus(Hanging(), seen=1, limit_s=0.01)
        assert fault.value == "no answer within 0.01 s"
    finally:
        release.set()


def test_without_the_library_it_is_asked_for_only_where_gpus_are():
    assert check_gpus(None, seen=0, wanted=8.0) == []
    (note,) = check_gpus(None, seen=1)
    assert "pip install nvidia-ml-py" in note.cure
    assert load_nvml() is None or hasattr(load_nvml(), "nvmlInit")


def test_stress_multiplies_and_copies_until_its_time_is_over():
    times = iter(float(n) for n in range(100))
    done = stress("cpu", 7.0, 32, lambda: next(times))
    assert (done.products, done.wrong_products, done.wrong_copies) == (3, 0, 0)
    assert math.isclose(done.flops, 2 * 32**3)  # each product and each copy took one tick
    assert math.isclose(done.copied, 2 * 2 * 32 * 32)


def test_stress_runs_in_a_process_of_its_own_and_reports_its_failure():
    fine, absent = stress_gpus(["cpu", "nowhere"], seconds=0.0, size=32)
    assert (fine.name, fine.verdict) == ("stress cpu", "ok")
    assert (absent.name, absent.verdict) == ("stress nowhere", "wrong")
    assert "ended with code 1" in absent.value


def test_stress_ends_at_its_deadline():
    (late,) = stress_gpus(["cpu"], seconds=0.0, start_s=0.01, size=32)
    assert (late.verdict, late.value) == ("wrong", "not done within 0.01 s")


def test_wrong_results_and_slow_gpus_are_judged():
    good = Stress(products=100, flops=6e14, copied=2e10, wrong_products=0, wrong_copies=0)
    findings = judge_stress(
        {
            "cuda:0": good,
            "cuda:1": replace(good, wrong_products=1),
            "cuda:2": replace(good, wrong_copies=2),
            "cuda:3": replace(good, flops=5e14),
            "cuda:4": replace(good, flops=5.5e14),
        }
    )
    assert [f.verdict for f in findings] == ["ok", "wrong", "wrong", "note", "ok"]
    assert "1 products and 0 copies of 100 differ" in findings[1].value
    assert "600.0 TFLOP/s, copies 20.0 GB/s" in findings[0].value


def test_stress_is_refused_without_a_gpu(capsys):
    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["doctor", "--stress"]) == 1
    assert "torch finds no GPU" in capsys.readouterr().err
