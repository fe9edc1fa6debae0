"""The learner's numbers on a CUDA device against those on the CPU."""

import pytest
import torch

from rlhf_cluster.learning.logprobs import linear_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_logprobs_and_gradients_agree_with_the_cpu(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=draw).to(dtype)
    weight = (0.1 * torch.randn(1000, 64, generator=draw)).to(dtype)
    labels = torch.randint(0, 1000, (300,), generator=draw)

    def run(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = hidden.to(device, torch.float32 if device == "cpu" else dtype).requires_grad_()
        w = weight.to(device, torch.float32 if device == "cpu" else dtype).requires_grad_()
        logprobs, _ = linear_logprobs(h, w, labels.to(device), 0.7, chunk_tokens=64)
        logprobs.sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        return logprobs.detach().cpu().float(), h.grad.cpu().float(), w.grad.cpu().float()

    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    )
    for found, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
