"""What only a GPU can show: streams, graphs, running out of memory, devices. conftest.py collects it on CUDA alone."""

import shutil
import subprocess
import sys

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

SHAPE = (300, 64, 5003)


def step(head, backend="native"):
    """Log-probs and the gradients of hidden and weight."""
    leaves = T.leaves_of(head[:2])
    logprobs = rk.linear_logprobs(leaves[0], leaves[1], head.targets, backend=backend).logprobs
    return logprobs.detach(), *torch.autograd.grad(logprobs.sum(), leaves)


def test_under_graph_capture(native, device):
    """Nothing waits for the device, and masks may change between replays: rows are masked, not compacted."""
    heads = [
        T.make_head(*SHAPE, dtype=torch.bfloat16, masked=m, seed=s, device=device) for m, s in ((0.3, 1), (0.6, 2))
    ]
    static = T.Head(*(t if t is None else t.clone() for t in heads[0]))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(static)  # the GEMM library sets itself up outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for head in heads:
        for to, value in zip(static[:3], head[:3], strict=True):
            to.copy_(value)
        graph.replay()
        logprobs, *gradients = step(head)
        assert torch.equal(captured[0], logprobs), "a row's bits do not depend on compaction"
        for got, want in zip(captured[1:], gradients, strict=True):
            assert T.relative_error(got, want) <= 4e-3


def test_waits_for_the_device_once(native, device):
    """Forward and backward may each read one count back, and nothing else."""
    head = T.make_head(*SHAPE, masked=0.5, device=device)
    step(head)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            step(head)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) <= 2


def test_two_streams_at_once(native, device):
    heads = [T.make_head(*SHAPE, seed=s, device=device) for s in (1, 2)]
    alone = [step(head) for head in heads]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(step(heads[i]))
    torch.cuda.synchronize()
    for results, want in zip(found, alone, strict=True):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


def test_out_of_memory_is_told_and_survived(native, device):
    head = T.make_head(4096, 1024, 32000, dtype=torch.bfloat16, device=device)
    want = step(head)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (16 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            step(head)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(a, b) for a, b in zip(step(head), want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_on_another_device_than_the_current_one(native):
    here, there = (T.make_head(*SHAPE, device=f"cuda:{i}") for i in (0, 1))
    with torch.cuda.device(0):
        for a, b in zip(step(here), step(there), strict=True):
            assert b.device.index == 1
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)


def test_tf32_only_where_torch_allows_it(native, device):
    head = T.make_head(256, 512, 4096, device=device)
    truth = T.plain_linear_logprobs(head.hidden.double(), head.weight.double(), head.targets).logprobs
    exact = (step(head)[0].double() - truth).abs().max()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = (step(head)[0].double() - truth).abs().max()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert exact < 2e-5
    assert torch.cuda.get_device_capability(device)[0] < 8 or rounded > exact


SANITIZED = """
import torch, rlhf_kernels as rk
from rlhf_kernels import testing as T
for dtype in (torch.float32, torch.bfloat16):
    head = T.make_head(67, 33, 1003, dtype=dtype, bias=True, masked=0.3, device="cuda")
    leaves = T.leaves_of((head.hidden, head.weight, head.bias))
    out = rk.linear_logprobs(leaves[0], leaves[1], head.targets, leaves[2], outputs=T.OUTPUTS, logit_softcap=5.0)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    kl = T.make_kl_inputs(67, 40, 1003, dtype=dtype, masked=0.3, device="cuda")
    hidden = kl.hidden.requires_grad_()
    rk.linear_kl(hidden, kl.weight, kl.ref_hidden, kl.ref_weight, kl.mask).sum().backward()
    x = torch.randn(35, device="cuda", requires_grad=True)
    pairs = torch.arange(34, device="cuda"), torch.arange(1, 35, device="cuda")
    (rk.dpo_loss(x, x.detach() * 0.5, *pairs).losses.sum() + rk.kl_penalty(x, x.detach() * 0.5, "k3").sum()
     + rk.bradley_terry_loss(x, x.detach() * 0.5).sum()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_the_sanitizer(native, tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
