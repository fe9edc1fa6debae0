"""Health of the GPUs of this machine, as NVIDIA's driver reports it: memory, ECC, clocks, NVLink.

`read_gpus` asks NVML for facts, `judge_gpus` is pure and returns findings of `doctor`.

Promises: nothing is changed on a GPU; a value that a GPU does not have is None; a failure of one
GPU is a finding, and the others are still read; a driver that does not answer costs `LIMIT_S`.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from rlhf_cluster.planning.doctor import GIB, Finding

T = TypeVar("T")

LIMIT_S = 20.0
"""Deadline of reading all GPUs in seconds."""
BUSY_BYTES = 2 * GIB
"""Memory in use from which on another process is taken to hold the GPU."""
MAX_LINKS = 18
"""NVLinks that are looked for on each GPU."""

# Constants of nvml.h.
_CORRECTED, _UNCORRECTED, _SINCE_BOOT = 0, 1, 0
_SM_CLOCK, _GPU_SENSOR, _SLOWDOWN = 1, 0, 1
_NOT_THERE = (3, 13)  # not supported, and a function that this driver lacks
_NO_DRIVER = (9, 12)  # driver not loaded, library not found
_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


class Nvml(Protocol):
    """Functions of `pynvml` (package nvidia-ml-py) that are used here. All may raise `NVMLError`."""

    NVMLError: Any

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...
    def nvmlDeviceGetTotalEccErrors(self, handle: Any, errorType: int, counterType: int) -> int: ...
    def nvmlDeviceGetRemappedRows(self, device: Any) -> Sequence[int]: ...
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int: ...
    def nvmlDeviceGetClockInfo(self, handle: Any, type: int) -> int: ...
    def nvmlDeviceGetMaxClockInfo(self, handle: Any, type: int) -> int: ...
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int: ...
    def nvmlDeviceGetTemperatureThreshold(self, handle: Any, threshold: int) -> int: ...
    def nvmlDeviceGetNvLinkState(self, device: Any, link: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Facts of one GPU. None: the GPU does not have the value, or it could not be read (`faults`)."""

    index: int
    name: str = "unknown"
    total_bytes: int | None = None
    used_bytes: int | None = None
    corrected: int | None = None  # ECC errors since the driver was loaded
    uncorrected: int | None = None
    remap_pending: bool = False
    remap_failed: bool = False
    throttled_by: tuple[str, ...] = ()
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    celsius: int | None = None
    slowdown_celsius: int | None = None
    links: tuple[bool, ...] = ()  # of each NVLink, whether it is up
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """Facts of all GPUs and the driver. `fault`: why there are none; `no_driver`: it is not loaded."""

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    fault: str = ""
    no_driver: bool = False


def load_nvml() -> Nvml | None:
    """Return the module `pynvml`, or None where nvidia-ml-py is not installed."""
    try:
        return cast(Nvml, importlib.import_module("pynvml"))
    except ImportError:
        return None


def read_gpus(nvml: Nvml, limit_s: float = LIMIT_S) -> GpuReport:
    """Ask NVML for the facts of all GPUs. Raises nothing that NVML raises. Waits at most `limit_s`."""
    answers: queue.SimpleQueue[GpuReport] = queue.SimpleQueue()
    reading = threading.Thread(target=lambda: answers.put(_read(nvml)), name="nvml", daemon=True)
    reading.start()
    try:
        return answers.get(timeout=limit_s)
    except queue.Empty:
        return GpuReport(fault=f"no answer within {limit_s:g} s")


def _read(nvml: Nvml) -> GpuReport:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return GpuReport(fault=str(error), no_driver=_code(error) in _NO_DRIVER)
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        number = nvml.nvmlDeviceGetCount()
        return GpuReport(driver=driver, gpus=tuple(_read_gpu(nvml, i) for i in range(number)))
    except (nvml.NVMLError, AttributeError) as error:  # the latter of another package's pynvml
        return GpuReport(fault=str(error))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


@dataclass(slots=True)
class _Reading:
    """Values of one GPU as they are read. A failure is kept, and the value is then None."""

    nvml: Nvml
    faults: list[str] = field(default_factory=list)

    def get(self, call: Callable[..., T], *args: Any) -> T | None:
        try:
            return call(*args)
        except self.nvml.NVMLError as error:
            if _code(error) not in _NOT_THERE:
                self.faults.append(str(error))
            return None


def _read_gpu(nvml: Nvml, index: int) -> Gpu:
    reading = _Reading(nvml)
    gpu = reading.get(nvml.nvmlDeviceGetHandleByIndex, index)
    if gpu is None:
        return Gpu(index=index, faults=tuple(reading.faults) or ("not accessible",))
    memory = reading.get(nvml.nvmlDeviceGetMemoryInfo, gpu)
    rows = reading.get(nvml.nvmlDeviceGetRemappedRows, gpu) or (0, 0, 0, 0)
    reasons = reading.get(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) or 0
    states = [reading.get(nvml.nvmlDeviceGetNvLinkState, gpu, link) for link in range(MAX_LINKS)]
    ecc = nvml.nvmlDeviceGetTotalEccErrors
    return Gpu(
        index=index,
        name=reading.get(nvml.nvmlDeviceGetName, gpu) or "unknown",
        total_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        corrected=reading.get(ecc, gpu, _CORRECTED, _SINCE_BOOT),
        uncorrected=reading.get(ecc, gpu, _UNCORRECTED, _SINCE_BOOT),
        remap_pending=bool(rows[2]),
        remap_failed=bool(rows[3]),
        throttled_by=tuple(name for bit, name in _REASONS.items() if reasons & bit),
        clock_mhz=reading.get(nvml.nvmlDeviceGetClockInfo, gpu, _SM_CLOCK),
        max_clock_mhz=reading.get(nvml.nvmlDeviceGetMaxClockInfo, gpu, _SM_CLOCK),
        celsius=reading.get(nvml.nvmlDeviceGetTemperature, gpu, _GPU_SENSOR),
        slowdown_celsius=reading.get(nvml.nvmlDeviceGetTemperatureThreshold, gpu, _SLOWDOWN),
        links=tuple(bool(state) for state in states if state is not None),
        faults=tuple(dict.fromkeys(reading.faults)),
    )


def check_gpus(
    nvml: Nvml | None, seen: int, wanted: float = 0.0, limit_s: float = LIMIT_S
) -> list[Finding]:
    """Return the findings of this machine's GPUs.

    Args:
        nvml: NVIDIA's library; None where it is not installed.
        seen: GPUs that nvidia-smi lists.
        wanted: GPUs that the run asks for.
        limit_s: deadline of reading them.
    """
    if nvml is not None:
        return judge_gpus(read_gpus(nvml, limit_s), seen, wanted)
    if not seen:
        return []
    cure = "pip install nvidia-ml-py, for ECC errors, throttling and NVLink"
    return [Finding(name="GPU health", verdict="note", value="not read", cure=cure)]


def judge_gpus(report: GpuReport, seen: int = 0, wanted: float = 0.0) -> list[Finding]:
    """Return the findings of a report: the driver, then each GPU with what is wrong with it."""
    if report.no_driver and not seen:
        if not wanted:
            return []
        cure = "Right on a head node without GPUs. Otherwise install NVIDIA's driver"
        return [Finding(name="GPU driver", verdict="note", value=report.fault, cure=cure)]
    if report.fault:
        cure = "Reload the driver or restart the machine; nvidia-smi must work first"
        return [Finding(name="GPU driver", verdict="wrong", value=report.fault, cure=cure)]
    most_links = max((sum(gpu.links) for gpu in report.gpus), default=0)
    findings = [Finding(name="GPU driver", verdict="ok", value=report.driver or "unknown")]
    for gpu in report.gpus:
        findings.append(Finding(name=f"GPU {gpu.index}", verdict="ok", value=_summary(gpu)))
        findings += _faults(gpu, most_links)
    return findings


def _summary(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.total_bytes is not None and gpu.used_bytes is not None:
        free = (gpu.total_bytes - gpu.used_bytes) / GIB
        parts.append(f"{free:.1f} of {gpu.total_bytes / GIB:.1f} GiB free")
    if gpu.clock_mhz is not None and gpu.max_clock_mhz is not None:
        parts.append(f"{gpu.clock_mhz} of {gpu.max_clock_mhz} MHz")
    if gpu.celsius is not None:
        parts.append(f"{gpu.celsius} °C")
    parts.append("no ECC" if gpu.uncorrected is None else f"{gpu.corrected or 0} corrected errors")
    if any(gpu.links):
        parts.append(f"{sum(gpu.links)} NVLinks up")
    return ", ".join(parts)


def _faults(gpu: Gpu, most_links: int) -> Iterator[Finding]:
    """Yield what is wrong with a GPU. `most_links`: NVLinks that are up on the best of the machine."""
    name = f"GPU {gpu.index}"
    if gpu.faults:
        cure = "Take the node out and restart it: a GPU that does not answer stops a run"
        yield Finding(name=name, verdict="wrong", value="; ".join(gpu.faults), cure=cure)
    if gpu.uncorrected:
        value = f"{gpu.uncorrected} uncorrected errors since the driver was loaded"
        cure = "Take the node out and reset the GPU; replace it if they come again"
        yield Finding(name=f"{name} ECC", verdict="wrong", value=value, cure=cure)
    if gpu.remap_failed:
        value, cure = (
            "memory rows could not be remapped",
            "Replace the GPU: its spare rows are used",
        )
        yield Finding(name=f"{name} memory", verdict="wrong", value=value, cure=cure)
    elif gpu.remap_pending:
        value, cure = "memory rows wait to be remapped", "Reset the GPU before a long run"
        yield Finding(name=f"{name} memory", verdict="note", value=value, cure=cure)
    if gpu.used_bytes is not None and gpu.used_bytes > BUSY_BYTES:
        value = f"{gpu.used_bytes / GIB:.1f} GiB in use"
        cure = "nvidia-smi names the processes: end them, unless they are a run of yours"
        yield Finding(name=f"{name} memory", verdict="note", value=value, cure=cure)
    hot = (gpu.celsius or 0) >= (gpu.slowdown_celsius or 1000)
    reasons = gpu.throttled_by or (("heat",) if hot else ())
    if reasons:
        heat = any("heat" in reason for reason in reasons)
        cure = "Check fans and the air of the rack" if heat else "Check power limit and supply"
        value = f"slowed down by {', '.join(reasons)}"
        cure += "; every rank waits for the slowest GPU"
        yield Finding(name=f"{name} clocks", verdict="note", value=value, cure=cure)
    down = max(len(gpu.links), most_links) - sum(gpu.links)
    if most_links and down:
        value = f"{down} of {down + sum(gpu.links)} links down"
        cure = "nvidia-smi nvlink --status; with links down, ranks exchange tensors more slowly"
        yield Finding(name=f"{name} NVLink", verdict="note", value=value, cure=cure)


def _code(error: Any) -> int | None:
    """Return the number of an error of NVML."""
    return getattr(error, "value", None)
