"""The CPU kernels are compiled once for each instruction set and chosen at run time: all of them are right."""

import functools
import sys

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, native):
    from rlhf_kernels import _C

    able = _C.cpu_isas().split()
    if request.param not in able:
        pytest.skip(f"this CPU runs {', '.join(able)}")
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    assert _C.cpu_isa() == request.param
    yield request.param
    _C.set_cpu_isa(before)


def test_the_best_one_is_chosen(native):
    from rlhf_kernels import _C

    assert _C.cpu_isas().split()[-1] == "baseline"
    assert rk.build_info()["cpu_isa"] == _C.cpu_isa() == _C.cpu_isas().split()[0]


def test_an_unknown_one_raises(native):
    from rlhf_kernels import _C

    with pytest.raises(ValueError, match=r"must be one of .*baseline.*sse9"):
        _C.set_cpu_isa("sse9")


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    every_pair(
        [(65, 33, 257), (64, 1040, 300), (70, 64, 2049)],
        [torch.float32, torch.bfloat16, torch.float16],
        [{}, {"logit_scale": 0.5, "logit_softcap": 3.0, "temperature": 0.7}],
    ),
)
def test_linear_logprobs(isa, device, shape, dtype, options):
    op = functools.partial(rk.linear_logprobs, backend="native")
    T.check_linear_logprobs(op, T.make_head(*shape, dtype=dtype, bias=True, masked=0.2, device=device), **options)


@pytest.mark.parametrize("kind", list(T.LOGITS))
def test_kinds_of_logits(isa, device, kind):
    op = functools.partial(rk.linear_logprobs, backend="native")
    T.check_linear_logprobs(op, T.make_head(66, 64, 2050, logits=kind, masked=0.1, device=device))


@pytest.mark.parametrize("kl", [None, 1e-8, 1e-2])
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_kl(isa, device, dtype, direction, kl):
    inputs = T.make_kl_inputs(66, 48, 300, kl=kl, dtype=dtype, bias=True, masked=0.2, device=device)
    T.check_linear_kl(functools.partial(rk.linear_kl, backend="native"), inputs, direction=direction)


def flags_of_this_cpu():
    with open("/proc/cpuinfo") as lines:
        return next((line.split() for line in lines if line.startswith("flags")), [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_bf16_is_multiplied_as_it_is_where_the_cpu_can(native):
    able = not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags_of_this_cpu())
    assert rk.build_info()["cpu_bf16"] == f"multiplied as {'bf16' if able else 'float32'}"


@pytest.fixture
def without_onednn(native):
    """Whose products are ATen's BLAS's then, bf16 goes in as float32, whatever the CPU."""
    with torch.backends.mkldnn.flags(enabled=False):
        assert rk.build_info()["cpu_bf16"] == "multiplied as float32"
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# GEMMs of 16 and of 64 columns. Not fewer than 13: eager's product of some ten rows takes another kernel of MKL's, five
# times as exact on some processors as the one that both of them take from there on.
@pytest.mark.parametrize("rows", [13, 65, 70])
def test_without_onednn(without_onednn, device, rows, dtype):
    head = T.make_head(rows, 264, 2049, dtype=dtype, bias=True, masked=0.2, device=device)
    op = functools.partial(rk.linear_logprobs, backend="native")
    T.check_linear_logprobs(op, head)
    inputs = T.make_kl_inputs(rows, 48, 300, kl=1e-2, dtype=dtype, masked=0.2, device=device)
    T.check_linear_kl(functools.partial(rk.linear_kl, backend="native"), inputs, direction="policy_ref")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_without_onednn(without_onednn, device, dtype):
    """One BLAS for all numbers of rows, too."""
    head = T.make_head(70, 264, 2049, dtype=dtype, device=device)
    whole = rk.linear_logprobs(*head[:3], backend="native").logprobs
    for begin, end in ((0, 1), (3, 20), (64, 70), (10, 60)):
        part = rk.linear_logprobs(head.hidden[begin:end], head.weight, head.targets[begin:end], backend="native")
        assert torch.equal(part.logprobs, whole[begin:end])


def test_small_losses(isa, device):
    """They may use the same vector code: k3 near 0, DPO and Bradley-Terry in between."""
    policy, ref = (T.randn(37, seed=s, device=device) for s in (1, 2))
    ref[:9] = policy[:9] + 1e-4
    pairs = torch.arange(36, device=device), torch.arange(1, 37, device=device)
    for op in (
        lambda a, b, backend: rk.kl_penalty(a, b, "k3", backend=backend),
        lambda a, b, backend: rk.bradley_terry_loss(a, b, label_smoothing=0.1, backend=backend),
        lambda a, b, backend: rk.dpo_loss(a, b, *pairs, 0.5, backend=backend).losses,
    ):
        leaves, exact = T.leaves_of((policy, ref)), T.leaves_of((policy, ref), torch.float64)
        got, want = op(*leaves, "native"), op(*exact, "reference")
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)
        for grad, true in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), exact), strict=True
        ):
            assert T.relative_error(grad, true) < 1e-6
