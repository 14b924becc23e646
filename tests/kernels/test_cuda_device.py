"""Promises that only a GPU can show: streams, graphs, running out of memory, devices. Collected on CUDA alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _workspace
from rlhf_kernels import testing as T

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (300, 64, 5003)


def step(head, backend="native"):
    """Log-probs and the gradients of hidden and weight."""
    leaves = T.leaves_of(head[:2])
    logprobs = rk.linear_logprobs(leaves[0], leaves[1], head.targets, backend=backend).logprobs
    return logprobs.detach(), *torch.autograd.grad(logprobs.sum(), leaves)


BOTH = pytest.mark.parametrize("kernels", ["native", "triton"])


@BOTH
def test_under_graph_capture(kernels, device):
    """Nothing waits for the device or is timed by a tuner, and masks may change between replays: rows are masked, not
    compacted."""
    heads = [
        T.make_head(*SHAPE, dtype=torch.bfloat16, masked=m, seed=s, device=device) for m, s in ((0.3, 1), (0.6, 2))
    ]
    static = T.Head(*(t if t is None else t.clone() for t in heads[0]))
    unmasked = T.make_head(*SHAPE, dtype=torch.bfloat16, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up, and kernels are loaded, outside the graph
        step(unmasked, kernels)  # goes over all rows, as under capture: in Triton a variant of its own
        step(static, kernels)  # copies the rows that count, by kernels that native takes under capture too
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static, kernels)
    for head in heads:
        for to, value in zip(static[:3], head[:3], strict=True):
            to.copy_(value)
        graph.replay()
        logprobs, *gradients = step(head, kernels)
        assert torch.equal(captured[0], logprobs), "a row's bits do not depend on compaction"
        for got, want in zip(captured[1:], gradients, strict=True):
            assert T.relative_error(got, want) <= 4e-3


@BOTH
def test_waits_for_the_device_once(kernels, device):
    """Forward and backward may each read one count back, and nothing else."""
    head = T.make_head(*SHAPE, masked=0.5, device=device)
    step(head, kernels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            step(head, kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) <= 2


def test_two_streams_at_once(native, device):
    heads = [T.make_head(*SHAPE, seed=s, device=device) for s in (1, 2)]
    alone = [step(head) for head in heads]
    torch.cuda.synchronize()
    streams, values = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                values[i].append(step(heads[i]))
    torch.cuda.synchronize()
    for results, want in zip(values, alone, strict=True):
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


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision"])
def test_tf32_only_where_torch_allows_it(native, device, setting):
    head = T.make_head(256, 512, 4096, device=device)
    truth = T.plain_linear_logprobs(head.hidden.double(), head.weight.double(), head.targets).logprobs
    exact = (step(head)[0].double() - truth).abs().max()
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, setting)
    setattr(matmul, setting, True if setting == "allow_tf32" else "tf32")
    try:
        rounded = (step(head)[0].double() - truth).abs().max()
    finally:
        setattr(matmul, setting, before)
    assert exact < 2e-5
    assert torch.cuda.get_device_capability(device)[0] < 8 or rounded > exact


# Only this project's kernels, rk::, are looked at; memory comes straight from CUDA, so that each tensor has its bounds.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_the_sanitizer(native, tool):
    options = ["--tool", tool, "--kernel-name", "kns=_ZN2rk", "--error-exitcode", "9"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks CUDA questions that may fail
    done = subprocess.run(
        ["compute-sanitizer", *options, sys.executable, "-m", "tests.support.every_op", "native"],
        cwd=ROOT, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("what", ["linear_logprobs", "linear_dpo_loss", "linear_kl"])
def test_peak_memory_stays_in_the_budget(native, device, kept_logits, monkeypatch, what):
    """256 MiB beside the gradients and the fp32 dH, where logits are recomputed and where they are kept."""
    s, t, d, v = 4, 384, 512, 30011
    head = T.make_head(s * t, d, v, dtype=torch.bfloat16, masked=0.25, device=device)
    assert 4 * s * t * v < 0.75 * 256 * 2**20, "small enough to be kept"

    def dpo():
        hidden = head.hidden.view(s, t, d).detach().requires_grad_()
        weight = head.weight.detach().requires_grad_()
        rk.linear_dpo_loss(hidden, weight, head.targets.view(s, t), torch.zeros(s, device=device)).loss.backward()

    def kl():
        hidden, weight = T.leaves_of((head.hidden[:512], head.weight))
        rk.linear_kl(hidden, weight, 0.9 * head.hidden[:512], head.weight).sum().backward()

    if what == "linear_logprobs":
        monkeypatch.setattr(_workspace, "logits_to_keep", lambda *_: 0)
    else:
        assert _workspace.logits_to_keep(512, v, d, device, d) > 0, "small enough to be kept"
    run = {"linear_dpo_loss": dpo, "linear_kl": kl}.get(what, lambda: step(head))
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    extra = torch.cuda.max_memory_allocated() - before - 4 * s * t * d - head.hidden.nbytes - head.weight.nbytes
    assert extra <= 260 << 20, f"{extra >> 20} MiB"
