"""Stress test of GPUs, for `doctor --stress`: matrix products and copies, whose results must repeat.

    python -m rlhf_cluster.planning.gpu_stress cuda:0 10 4096      # what the test starts for each GPU

Promises: each GPU is tested in a separate process, which is killed at its deadline; a product or a
copy that differs from the first one is an error of the hardware.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rlhf_cluster.planning.doctor import Finding

SECONDS = 10.0
"""Time of products and copies on each GPU."""
START_S = 120.0
"""Time that a process may take beyond them: imports, the first use of the GPU, its end."""
SIZE = 4096
SLOW = 0.9
"""Share of the fastest GPU's rate below which a GPU is called slow."""

NO_GPU = (
    "--stress: torch finds no GPU on this machine. Run it where nvidia-smi lists one, with torch's "
    "build for CUDA"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stress:
    """Rates of one device, in operations and in bytes per second, and results that differed."""

    products: int
    flops: float
    copied: float
    wrong_products: int
    wrong_copies: int


def stress(device: str, seconds: float, size: int, clock: Callable[[], float]) -> Stress:
    """Multiply and copy square matrices of `size` on `device` for `seconds`, at least once."""
    import torch

    generator = torch.Generator().manual_seed(0)
    host = torch.randn((size, size), generator=generator).to(torch.bfloat16)
    left, right = host.to(device), host.T.contiguous().to(device)
    wait = torch.cuda.synchronize if left.is_cuda else lambda: None
    expected = left @ right
    wait()
    products = wrong_products = wrong_copies = 0
    multiplying = copying = 0.0
    start = clock()
    while True:
        begin = clock()
        result = left @ right
        wait()
        between = clock()
        back = left.cpu()
        there = back.to(device)
        wait()
        end = clock()
        products += 1
        multiplying += between - begin
        copying += end - between
        wrong_products += not torch.equal(result, expected)
        wrong_copies += not (torch.equal(back, host) and torch.equal(there, left))
        if end - start >= seconds:
            break
    return Stress(
        products=products,
        flops=2 * size**3 * products / max(multiplying, 1e-9),
        copied=2 * host.numel() * host.element_size() * products / max(copying, 1e-9),
        wrong_products=wrong_products,
        wrong_copies=wrong_copies,
    )


def count_gpus() -> int:
    """Return the number of GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def stress_gpus(
    devices: Sequence[str],
    seconds: float = SECONDS,
    start_s: float = START_S,
    size: int = SIZE,
) -> list[Finding]:
    """Test each device in turn."""
    done = {device: _in_child(device, seconds, start_s, size) for device in devices}
    return judge_stress(done)


def judge_stress(done: dict[str, Stress | str]) -> list[Finding]:
    """Return a finding for each device: its rates, or why there are none."""
    best = max((each.flops for each in done.values() if isinstance(each, Stress)), default=0.0)
    findings = []
    for device, each in done.items():
        name, replace = f"stress {device}", "Take the node out: this GPU spoils what it computes"
        if isinstance(each, str):
            cure = "See dmesg for Xid errors, and reset the GPU"
            findings.append(Finding(name=name, verdict="wrong", value=each, cure=cure))
            continue
        value = f"{each.flops / 1e12:.1f} TFLOP/s, copies {each.copied / 1e9:.1f} GB/s"
        if each.wrong_products or each.wrong_copies:
            value += (
                f"; {each.wrong_products} products and {each.wrong_copies} copies of "
                f"{each.products} differ"
            )
            findings.append(Finding(name=name, verdict="wrong", value=value, cure=replace))
        elif each.flops < SLOW * best:
            cure = f"Under {SLOW:g} of the fastest here: every rank waits for it. See its clocks"
            findings.append(Finding(name=name, verdict="note", value=value, cure=cure))
        else:
            findings.append(Finding(name=name, verdict="ok", value=value))
    return findings


def _in_child(device: str, seconds: float, start_s: float, size: int) -> Stress | str:
    """Run the test in a process. Return its result, or why there is none."""
    command = [sys.executable, "-m", __name__, device, str(seconds), str(size)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + start_s, check=True
        )
        return Stress(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return f"not done within {seconds + start_s:g} s"
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return f"ended with code {error.returncode}: {last[0] if last else 'no message'}"


def main(arguments: Sequence[str]) -> None:
    """Print the result for a device, a number of seconds and a size as JSON."""
    device, seconds, size = arguments
    print(json.dumps(asdict(stress(device, float(seconds), int(size), time.perf_counter))))


if __name__ == "__main__":
    main(sys.argv[1:])
