"""kl_penalty: k1, k2, k3 against their closed forms, their expectations, their sign, and tiny log-ratios."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ESTIMATORS = ["k1", "k2", "k3"]
CLOSED_FORMS = {  # of log r = ref - policy, in fp64
    "k1": lambda log_r: -log_r,
    "k2": lambda log_r: log_r**2 / 2,
    "k3": lambda log_r: torch.expm1(log_r) - log_r,
}
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (257,), (3, 5), (2, 0, 4)]  # scalar, empty, around a vector, [B, T]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("estimator", "shape", "dtype"), every_pair(ESTIMATORS, SHAPES, DTYPES))
def test_closed_forms_and_gradients(backend, device, estimator, shape, dtype):
    policy = (-T.randn(*shape, seed=1, device=device).abs() * 3).to(dtype).requires_grad_()
    ref = (-T.randn(*shape, seed=2, device=device).abs() * 3).to(dtype).requires_grad_()
    upstream = T.randn(*shape, seed=3, device=device)
    got = rk.kl_penalty(policy, ref, estimator, backend=backend)
    assert got.shape == shape and got.dtype == torch.float32
    exact = T.leaves_of((policy, ref), torch.float64)
    truth = CLOSED_FORMS[estimator](exact[1] - exact[0])
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-6)
    grads = torch.autograd.grad(got, (policy, ref), upstream.to(got.dtype))
    wants = torch.autograd.grad(truth, exact, upstream.double())
    for grad, want in zip(grads, wants, strict=True):
        assert grad.dtype == dtype
        assert T.relative_error(grad, want) <= T.gradient_limit(1e-7, dtype)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float64_in_float64_out(device, estimator):
    policy, ref = (T.randn(9, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    got = rk.kl_penalty(policy, ref, estimator)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, CLOSED_FORMS[estimator](ref - policy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.5, 0.999, 1.001, 5.0])  # both sides of where the series stops
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits_at_small_log_ratios(backend, device, size, sign):
    """expm1(x) - x in fp32 has none left at 1e-4 (x^2 / 2 = 5e-9): a sum of such errors drowns the penalty."""
    policy = torch.zeros(33, device=device)
    ref = (T.randn(33, device=device).abs() + 0.1).clamp(max=1.0) * size * sign
    leaves = T.leaves_of((policy, ref))
    got = rk.kl_penalty(*leaves, "k3", backend=backend)
    x = ref.double()
    truth = (torch.expm1(x) - x) if size > 0.1 else x**2 / 2 + x**3 / 6 + x**4 / 24 + x**5 / 120 + x**6 / 720
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=0)
    grad_policy, grad_ref = torch.autograd.grad(got.sum(), leaves)
    torch.testing.assert_close(grad_ref.double(), torch.expm1(x), rtol=2e-6, atol=0)  # r - 1 by expm1, too
    torch.testing.assert_close(grad_policy, -grad_ref, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("distance", [0.1, 1.0])
def test_the_expectation_under_the_policy_is_the_kl(backend, device, estimator, distance):
    """Every token weighed by its probability, no sampling: k1 and k3 are unbiased, and not for KL(ref || policy)."""
    z = T.randn(200, seed=1, device=device)
    log_p = z.double().log_softmax(-1)
    log_q = (z.double() + distance * T.randn(200, seed=2, dtype=torch.float64, device=device)).log_softmax(-1)
    log_p, log_q = log_p.float(), log_q.float()
    expectation = (log_p.double().exp() * rk.kl_penalty(log_p, log_q, estimator, backend=backend).double()).sum()
    p, q = log_p.double(), log_q.double()
    kl, other = ((a.exp() * (a - b)).sum() for a, b in ((p, q), (q, p)))
    assert abs(expectation - kl) < 1e-3 * kl
    assert abs(expectation - other) > 1e-3 * kl


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_expectations_and_those_of_the_gradients_against_the_exact_kl(backend, device, estimator):
    """Every token of a vocabulary of 30 weighed by its probability. As estimates of KL(policy || ref), k1 and k3 are
    unbiased and k2 is not. As losses they differ: k1's gradient expects to nothing, k2's to that of KL(policy || ref),
    and k3's to that of the other one, KL(ref || policy)."""
    head, ref = T.make_head(1, 8, 30, seed=1, device=device), T.make_head(1, 8, 30, seed=2, device=device)
    hidden, weight = (x.requires_grad_() for x in (head.hidden, head.weight))
    tokens = torch.arange(30, device=device)

    def logprobs(hidden, weight):  # of every token, at one position
        return rk.linear_logprobs(hidden.expand(30, 8), weight, tokens, backend=backend).logprobs

    policy, other = logprobs(hidden, weight), logprobs(ref.hidden, ref.weight)
    expectation = (policy.detach().exp() * rk.kl_penalty(policy, other, estimator, backend=backend)).sum()
    exact = {
        direction: rk.linear_kl(hidden, weight, ref.hidden, ref.weight, direction=direction, backend=backend).sum()
        for direction in ("policy_ref", "ref_policy")
    }
    kl = exact["policy_ref"].item()
    assert abs(exact["ref_policy"].item() - kl) > 0.05 * kl  # or the test could not tell them apart
    assert (abs(expectation.item() - kl) < 1e-5 * kl) == (estimator != "k2")
    results = torch.autograd.grad(expectation, (hidden, weight))
    grads = {name: torch.autograd.grad(value, (hidden, weight)) for name, value in exact.items()}
    assert all(T.relative_error(a, b) > 0.1 for a, b in zip(*grads.values(), strict=True))
    for i, grad in enumerate(results):
        if estimator == "k1":
            assert grad.norm() < 1e-5 * grads["policy_ref"][i].norm()
        else:
            want = grads["policy_ref" if estimator == "k2" else "ref_policy"][i]
            assert T.relative_error(grad, want) < 1e-5


def test_signs(backend, device):
    """A token that the policy likes more than the reference does costs: k1 > 0, and its gradient is +1."""
    policy = torch.tensor([-1.0], device=device, requires_grad=True)
    ref = torch.tensor([-3.0], device=device)
    k1 = rk.kl_penalty(policy, ref, backend=backend)
    assert k1.item() == 2.0
    assert torch.autograd.grad(k1.sum(), policy)[0].item() == 1.0
    for estimator in ("k2", "k3"):
        values = rk.kl_penalty(
            T.randn(999, seed=1).to(device), T.randn(999, seed=2).to(device), estimator, backend=backend
        )
        assert (values >= 0).all()
        assert (rk.kl_penalty(ref, ref, estimator, backend=backend) == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layouts(backend, device, estimator):
    base, other = T.randn(12, 10, seed=1, device=device), T.randn(12, 10, seed=2, device=device)
    want = rk.kl_penalty(base[::2, 1::3].contiguous(), other[::2, 1::3].contiguous(), estimator, backend=backend)
    leaf = base.requires_grad_()
    got = rk.kl_penalty(leaf[::2, 1::3], other[::2, 1::3], estimator, backend=backend)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.sum(), leaf)  # upstream of stride 0
    assert (grad[1::2] == 0).all() and grad.shape == base.shape
    transposed = rk.kl_penalty(base.detach().T, other.T, estimator, backend=backend)
    assert torch.equal(transposed, rk.kl_penalty(base.detach(), other, estimator, backend=backend).T)
    expanded = rk.kl_penalty(base.detach()[:1].expand(12, 10), other, estimator, backend=backend)
    assert torch.equal(expanded, rk.kl_penalty(base.detach()[:1].repeat(12, 1), other, estimator, backend=backend))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_bad_element_stays_alone(backend, device, estimator):
    policy, ref = T.randn(33, seed=1, device=device), T.randn(33, seed=2, device=device)
    want = rk.kl_penalty(policy, ref, estimator, backend=backend)
    policy[17] = float("nan")
    got = rk.kl_penalty(policy, ref, estimator, backend=backend)
    others = torch.arange(33, device=device) != 17
    assert got[17].isnan() and torch.equal(got[others], want[others])


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_needed(backend, device, needs):
    policy, ref = T.randn(9, seed=1, device=device), T.randn(9, seed=2, device=device)
    policy.requires_grad_(needs[0])
    ref.requires_grad_(needs[1])
    out = rk.kl_penalty(policy, ref, "k3", backend=backend)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    assert (policy.grad is not None, ref.grad is not None) == needs


def test_mixed_dtypes(backend, device):
    policy, ref = T.randn(9, seed=1, device=device), T.randn(9, seed=2, dtype=torch.bfloat16, device=device)
    policy.requires_grad_()
    ref.requires_grad_()
    out = rk.kl_penalty(policy, ref, backend=backend)
    torch.testing.assert_close(out, policy - ref.float())
    out.sum().backward()
    assert policy.grad.dtype == torch.float32 and ref.grad.dtype == torch.bfloat16
