"""Log-probabilities by chunks against those from full logits, at a vocabulary of 128k.

Every repeat is a fresh process, `python benchmarks/chunked_logprobs.py SIDE DTYPE`, that runs one
forward and backward and prints {"peak_bytes", "seconds"}: no memory that an earlier pass left behind
flatters a later one. Peak bytes are those over the inputs'; both sides' hold the gradients.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checks import RELATIVE_BOUND, check_equal
from benchmarks.harness import spread

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 128_256  # Llama 3's
NUM_TOKENS, HIDDEN = 2048, 256
CHUNK = 256
DTYPES = ("bfloat16", "float32")


def measure(repeats: int) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Figures and every repeat. The unsuffixed figures are those of bfloat16."""
    figures, runs = {}, {}
    for dtype in DTYPES:
        _compare(dtype)
        found = []
        for _ in range(repeats):
            found.append({side: _child(side, dtype) for side in ("chunked", "full")})
            print(dtype, found[-1], flush=True)
        suffix = "" if dtype == "bfloat16" else f"_{dtype}"
        for figure, key in (("memory", "peak_bytes"), ("time", "seconds")):
            ratios = [run["chunked"][key] / run["full"][key] for run in found]
            figures[f"chunked_logprob_{figure}_ratio{suffix}"] = statistics.median(ratios)
            print(dtype, figure, spread(ratios), flush=True)
        runs[f"logprobs_{dtype}"] = found
    return figures, runs


def _child(side: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).absolute()), side, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)


def _run_once(side: str, dtype: str) -> None:
    """One forward and backward in this fresh process; prints peak bytes over the inputs' and time.

    What both sides need counts on both: hidden states' and weight's gradients.
    """
    import torch

    torch.set_num_threads(1)
    run = _sides(_inputs(NUM_TOKENS, dtype))[side]
    _sides(_inputs(2, dtype))[side]()  # loads what is loaded lazily
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    base = _memory_bytes("VmRSS")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": _memory_bytes("VmHWM") - base, "seconds": seconds}))


def _memory_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _inputs(num_tokens: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    draw = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(num_tokens, HIDDEN, generator=draw).to(kind).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw).mul_(0.1).to(kind)
    labels = torch.randint(0, VOCABULARY, (num_tokens,), generator=draw)
    return hidden, weight.requires_grad_(), labels


def _sides(inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """Each side gives log-probabilities, entropies (reported, not trained) and both gradients."""
    import torch

    from rlhf_cluster.models.logprobs import linear_logprobs

    hidden, weight, labels = inputs

    def gradients(logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
        return [logprobs, entropy, *torch.autograd.grad(logprobs.mean(), (hidden, weight))]

    def chunked() -> list[Tensor]:
        return gradients(*linear_logprobs(hidden, weight, labels, 1.0, CHUNK))

    def full() -> list[Tensor]:
        logs = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(logs.exp() * logs).sum(-1)
        return gradients(logs.gather(-1, labels[:, None]).squeeze(-1), entropy)

    return {"chunked": chunked, "full": full}


def _compare(dtype: str) -> None:
    sides = _sides(_inputs(NUM_TOKENS // 4, dtype))
    names = ("logprobs", "entropy", "hidden", "weight")
    found, expected = (dict(zip(names, sides[s](), strict=True)) for s in ("chunked", "full"))
    check_equal(found, expected, RELATIVE_BOUND[dtype])


if __name__ == "__main__":
    _run_once(*sys.argv[1:])
