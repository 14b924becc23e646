"""csrc/common/online_softmax.h by itself: the maths that CPU and CUDA kernels share, one number at a time."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from rlhf_kernels import testing as T

HERE = Path(__file__).parent
INF = float("inf")
PARTS = [1, 3, 64, 1000]  # alone; odd; a warp or two; one part


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("online_softmax") / "online_softmax.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([*command, "-o", path, HERE / "online_softmax.cpp"], check=True)
    return ctypes.CDLL(str(path))


def call(function, *arguments, size):
    """Tensors go in as fp32 pointers, whole numbers as int64; returns the last argument, a fresh tensor."""
    to, kept = torch.full((size,), float("nan")), []
    for argument in (*arguments, to):
        if isinstance(argument, torch.Tensor):
            kept.append(argument.float().contiguous() if argument is not to else to)
            argument = ctypes.c_void_p(kept[-1].data_ptr())
        elif isinstance(argument, bool):
            argument = ctypes.c_bool(argument)
        elif isinstance(argument, int):
            argument = ctypes.c_int64(argument)
        else:
            argument = ctypes.c_float(argument)
        kept.append(argument)
    function(*(a for a in kept if not isinstance(a, torch.Tensor)))
    return to


def logits(kind, count=1000):
    deviation, mean = T.LOGITS[kind]
    return T.randn(count, seed=3) * deviation + mean


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", list(T.LOGITS))
def test_statistics(library, kind, part):
    z = logits(kind)
    got = call(library.softmax, z, len(z), part, size=5)
    logp, plain = z.double().log_softmax(0), z.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    truth = torch.stack(
        [logp[0], z.max().double(), z.double().logsumexp(0) - z.max(), entropy, (2 * logp).logsumexp(0)]
    )
    eager = [plain[0], z.max(), (z - z.max()).logsumexp(0), -(plain.exp() * plain).sum(), (2 * plain).logsumexp(0)]
    for value, fp32, exact in zip(got, eager, truth, strict=True):
        # 1000 states merged one by one: each merge rounds once more than a sum would
        T.assert_no_worse_than_eager(value[None], fp32[None], exact[None], slack=3)


@pytest.mark.parametrize("place", [0, 1, 999])
def test_impossible_tokens_count_for_nothing(library, place):
    z = logits("normal")
    with_hole = torch.cat([z[:place], torch.tensor([-INF]), z[place:]])
    for part in PARTS:
        got = call(library.softmax, with_hole, len(with_hole), part, size=5)[1:]
        torch.testing.assert_close(got, call(library.softmax, z, len(z), part, size=5)[1:], rtol=3e-6, atol=3e-6)


def test_a_vocabulary_without_possible_tokens_has_no_nan_in_its_maximum(library):
    got = call(library.softmax, torch.full((5,), -INF), 5, 2, size=5)
    assert got[1] == -INF
    assert got[2] == -INF


@pytest.mark.parametrize("kind", list(T.LOGITS))
@pytest.mark.parametrize("upstream", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, -0.7, 1.1)])
def test_gradient(library, kind, upstream):
    z = logits(kind)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = z.clone().to(dtype).requires_grad_()
        logp = leaf.log_softmax(0)
        entropy = -(logp.exp() * logp).sum()
        (upstream[0] * logp[0] + upstream[1] * leaf.logsumexp(0) + upstream[2] * entropy).backward()
        results.append((leaf.grad, entropy.detach().item()))
    (truth, entropy), (eager, _) = results
    row = torch.tensor([z.max(), (z.double() - z.max()).logsumexp(0), *upstream, entropy])
    got = call(library.softmax_gradient, z, len(z), row, upstream[2] != 0, size=len(z))
    assert T.relative_error(got, truth) <= T.gradient_limit(T.relative_error(eager, truth), torch.float32)


@pytest.mark.parametrize("direction", ["weighing", "other"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "step", [1e-4, 1e-2, 1.0, 10.0]
)  # KL from 1e-9 to far beyond where the second-order form holds
def test_kl(library, step, part, direction):
    z = logits("normal")
    y = z + step * T.randn(len(z), seed=4) + 5.0  # a constant offset is no difference
    leaves = [t.double().requires_grad_() for t in (z, y)]
    log_p, log_q = (leaf.log_softmax(0) for leaf in leaves)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    kl.backward()
    got = call(library.kl, z, y, len(z), part, size=7)
    truth = kl.detach()
    assert abs(got[0] - truth) <= (0.02 if truth < 1e-6 else 2e-3) * truth
    gradient = call(library.kl_gradient, z, y, len(z), got, direction == "weighing", size=len(z))
    exact = leaves[0 if direction == "weighing" else 1].grad
    # logits of size 10 carry rounding of 5e-7, which is what a step of 1e-4 is known to
    assert T.relative_error(gradient, exact) <= 1e-5 + 2e-6 / step


def test_kl_of_equal_distributions_is_zero(library):
    z = logits("normal")
    assert call(library.kl, z, z, len(z), 64, size=7)[0] == 0


def test_kl_without_support_is_infinite(library):
    z, y = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -INF])
    assert call(library.kl, z, y, 2, 1, size=7)[0] == INF
    assert call(library.kl, y, z, 2, 1, size=7)[0].item() == pytest.approx(0.6931472, rel=1e-6)


def test_expm1_minus_identity(library):
    """Relative, from far below where expm1(u) - u cancels to beyond its switch at 1."""
    u = torch.cat([torch.logspace(-8, 1, 200), -torch.logspace(-8, 1, 200), torch.tensor([1.0, -1.0, 0.0])])
    got = call(library.expm1_minus_identity, u, len(u), size=len(u)).double()
    x = u.double()
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    truth = torch.where(x.abs() < 0.01, series, torch.expm1(x) - x)
    torch.testing.assert_close(got, truth, rtol=5e-7, atol=0)


@pytest.mark.parametrize("bias", [None, 0.5])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.25, 0.7), (-2.0, 1.3)])
def test_final_logits(library, scale, temperature, softcap, bias):
    x = T.randn(100, seed=5) * 5
    leaf = x.double().requires_grad_()
    z = (leaf + (bias or 0.0)) * scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    z.sum().backward()
    got = torch.empty_like(x)
    options = (float(bias or 0.0), bias is not None, len(x), scale, softcap, temperature)
    slope = call(library.final_logits, x, *options, got, size=len(x))
    torch.testing.assert_close(got.double(), z.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(slope.double(), leaf.grad, rtol=1e-5, atol=2e-6)
