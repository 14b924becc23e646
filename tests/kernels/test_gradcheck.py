"""Derivatives of every op in plain torch against differences in fp64: first ones, and second ones where they are
promised. The compiled ops are differentiable once, and say what to do about it.

opcheck of the compiled ops is in test_compile.py.
"""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels.dpo.reference import LOSS_TYPES
from tests.kernels.packed_batches import Packed

F64 = torch.float64
CASES = {}  # name -> builder of (op, leaves) on a device
ONCE = set()  # names of those whose second derivatives are nobody's promise: sums of ops that are checked twice


def case(name, *, twice=True, **options):
    def register(build):
        CASES[name] = lambda device: build(device, **options)
        if not twice:
            ONCE.add(name)
        return build

    return register


def numbers(size, device, *seeds):
    return [T.randn(size, seed=seed, dtype=F64, device=device) for seed in seeds]


@case("linear_logprobs")
@case("linear_logprobs, transformed", logit_scale=-0.7, logit_softcap=2.0, temperature=0.6)
@case("linear_logprobs, a token ignored", ignore_index=0)
def linear_logprobs(device, **options):
    ignored = options.get("ignore_index", -100)
    head = T.make_head(5, 4, 7, dtype=F64, bias=True, masked=0.4, ignore_index=ignored, device=device)

    def op(hidden, weight, bias):
        out = rk.linear_logprobs(
            hidden, weight, head.targets, bias, outputs=("entropy",), backend="reference", **options
        )
        return out.logprobs, out.logsumexp, out.entropy

    return op, (head.hidden, head.weight, head.bias)


@case("sequence_logprobs", twice=False)
@case("sequence_logprobs, average", twice=False, average=True)
def sequence_logprobs(device, **options):
    head = T.make_head(8, 3, 5, dtype=F64, bias=True, masked=0.3, device=device)
    labels = head.targets.view(2, 4)

    def op(hidden, weight, bias):
        return rk.sequence_logprobs(hidden, weight, labels, bias, backend="reference", **options).logprobs

    return op, (head.hidden.view(2, 4, 3), head.weight, head.bias)


@case("sequence_logprobs, packed", twice=False)
@case("sequence_logprobs, packed, average", twice=False, average=True)
def packed_logprobs(device, **options):
    batch = Packed([3, 0, 1, 4], d=3, v=5, dtype=F64, masked=0.0, device=device)
    options |= {"cu_seqlens": batch.cu, "backend": "reference"}
    return lambda h, w, b: rk.sequence_logprobs(h, w, batch.labels, b, **options).logprobs, batch.leaves


@case("linear_kl, far", direction="policy_ref", kl=None)
@case("linear_kl, near", direction="policy_ref", kl=1e-3)
@case("linear_kl, the other way, far", direction="ref_policy", kl=None)
@case("linear_kl, the other way, near", direction="ref_policy", kl=1e-3)
def linear_kl(device, direction, kl):
    inputs = T.make_kl_inputs(3, 2, 4, kl=kl, dtype=F64, bias=True, masked=0.25, device=device)
    inputs = T.KLInputs(*(t.clone() for t in inputs))  # numeric differences must not move the reference's tensors too

    def op(hidden, weight, bias):
        return rk.linear_kl(
            hidden, weight, inputs.ref_hidden, inputs.ref_weight, inputs.mask, bias=bias, ref_bias=inputs.ref_bias,
            direction=direction, logit_softcap=3.0, temperature=0.8, backend="reference",
        )  # fmt: skip

    return op, (inputs.hidden, inputs.weight, inputs.bias)


@case("linear_dpo_loss, sigmoid", twice=False, loss_type="sigmoid", label_smoothing=0.2)
@case("linear_dpo_loss, ipo_mean", twice=False, loss_type="ipo_mean")  # divides by the numbers of tokens
@case("linear_dpo_loss, simpo", twice=False, loss_type="simpo")  # and has no reference
@case("linear_dpo_loss, aot", twice=False, loss_type="aot", label_smoothing=0.2)  # couples its pairs
def linear_dpo_loss(device, **options):
    head = T.make_head(16, 3, 5, dtype=F64, bias=True, device=device)
    labels = head.targets.view(4, 4).clone()
    labels[:, :2] = -100
    ref_logps = None if options["loss_type"] == "simpo" else -torch.arange(4.0, dtype=F64, device=device)

    def op(hidden, weight, bias):
        return rk.linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, backend="reference", **options).loss

    return op, (head.hidden.view(4, 4, 3), head.weight, head.bias)


@case("linear_dpo_loss, packed", twice=False)
def packed_dpo_loss(device):
    batch = Packed([4, 3, 0, 5], d=3, v=5, dtype=F64, masked=0.0, device=device)
    ref_logps = -torch.arange(4.0, dtype=F64, device=device)
    options = {"cu_seqlens": batch.cu, "backend": "reference"}
    return lambda h, w, b: rk.linear_dpo_loss(h, w, batch.labels, ref_logps, bias=b, **options).loss, batch.leaves


@case("kl_penalty, k1", estimator="k1")
@case("kl_penalty, k2", estimator="k2")
@case("kl_penalty, k3", estimator="k3")
def kl_penalty(device, estimator):
    policy, ref = numbers(7, device, 1, 2)
    ref[0] = policy[0] + 1e-3  # a small log-ratio: the series
    return lambda p, r: rk.kl_penalty(p, r, estimator, backend="reference"), (policy, ref)


PAIRWISE = [  # type, beta, label smoothing
    ("sigmoid", 0.1, 0.0),
    ("sigmoid", 2.0, 0.2),  # cDPO
    ("sigmoid", 0.0, 0.0),
    ("hinge", 0.5, 0.0),
    ("ipo", 0.1, 0.0),
    ("ipo_mean", 0.3, 0.0),
    ("robust", 0.5, 0.3),
    ("simpo", 2.0, 0.1),
    ("apo_zero", 1.0, 0.0),
    ("apo_down", 1.0, 0.0),
    ("sppo", 0.1, 0.0),
    ("nca", 1.0, 0.0),
    ("exo", 0.1, 1e-3),
    ("exo", 0.5, 0.3),
    ("aot", 0.5, 0.2),
    ("discopop", 0.05, 0.0),  # the narrow zone where its two losses are mixed
    ("discopop", 0.5, 0.0),
]


def dpo_loss(device, loss_type, beta, label_smoothing):
    policy, ref = (2 * x for x in numbers(4, device, 1, 2))
    chosen, rejected = torch.tensor([0, 1, 2, 0, 3], device=device), torch.tensor([1, 2, 3, 2, 0], device=device)
    counts = torch.tensor([3, 1, 7, 2], device=device)
    options = {"loss_type": loss_type, "label_smoothing": label_smoothing, "token_counts": counts}

    def op(policy, ref=None):
        return rk.dpo_loss(policy, ref, chosen, rejected, beta, backend="reference", **options).losses

    return op, (policy,) if loss_type == "simpo" else (policy, ref)


for loss_type, beta, eps in PAIRWISE:
    case(f"dpo_loss, {loss_type}, {beta}, {eps}", loss_type=loss_type, beta=beta, label_smoothing=eps)(dpo_loss)


@case("bradley_terry_loss")
@case("bradley_terry_loss, smoothed", label_smoothing=0.1)
@case("bradley_terry_loss, centred", center_coefficient=0.01)
@case("bradley_terry_loss, margin", margin=True)
@case("bradley_terry_loss, everything", margin=True, label_smoothing=0.3, center_coefficient=0.5)
def bradley_terry_loss(device, margin=False, **options):
    chosen, rejected, margins = numbers(7, device, 1, 2, 3)
    options |= {"margin": margins.abs() if margin else None, "backend": "reference"}
    return lambda c, r: rk.bradley_terry_loss(c, r, **options), (chosen, rejected)


DESIRABLE = [True, False, False, True, True, False]


@case("bco_loss", function=rk.bco_loss, options=(0.3,))
@case("kto_loss", function=rk.kto_loss, options=(0.3, 1.5, 0.5))
def unpaired_loss(device, function, options):
    desirable = torch.tensor(DESIRABLE, device=device)
    shift = torch.tensor(0.5, device=device)  # fp32 beside fp64
    return lambda p, r: function(p, r, desirable, shift, *options).losses, numbers(6, device, 1, 2)


@case("orpo_loss")
def orpo_loss(device):
    chosen, rejected = torch.tensor([0, 1, 2, 0, 3], device=device), torch.tensor([1, 2, 3, 2, 0], device=device)
    counts = torch.tensor([3, 1, 7, 2], device=device)
    (policy,) = numbers(4, device, 1)
    policy = (-0.02 - policy.abs()) * counts
    return lambda p: rk.orpo_loss(p, counts, chosen, rejected, 0.5).losses, (policy,)


def tokens(device, *seeds):
    """[3, 4] numbers for each seed, and a mask of which every row has a token."""
    mask = torch.tensor([[True, True, True, False], [False, True, True, False], [True] * 4], device=device)
    return *(x.view(3, 4) for x in numbers(12, device, *seeds)), mask


@case("ppo_loss")
def ppo_loss(device):
    old, step, advantages, mask = tokens(device, 1, 2, 3)
    new = old + 0.4 * step  # ratios on either side of the bounds
    return lambda x: rk.ppo_loss(x, old, advantages, mask, dual_clip=1.5), (new,)


@case("value_loss")
def value_loss(device):
    old, step, returns, mask = tokens(device, 1, 2, 3)
    return lambda x: rk.value_loss(x, old, returns, mask), (old + 0.5 * step,)


# Not cispo, whose loss is not its gradient's integral.
@case("grpo_loss, grpo", variant="grpo")
@case("grpo_loss, dr_grpo", variant="dr_grpo")
@case("grpo_loss, dapo", variant="dapo")
@case("grpo_loss, gspo", variant="gspo")
@case("grpo_loss, rloo", variant="rloo")
@case("grpo_loss, reinforce", variant="reinforce")
def grpo_loss(device, variant):
    old, step, drift, ref, kl, mask = tokens(device, 1, 2, 3, 4, 5)
    advantages = T.randn(3, seed=6, dtype=F64, device=device)
    shared = {"variant": variant, "beta": 0.3, "max_length": 20}

    def op(new, kl):
        weighed = {"sampler_logprobs": old + 0.2 * drift, "is_cap": 1.25}
        loss = rk.grpo_loss(new, old, advantages, mask, kl=kl, **weighed, **shared)
        return loss + rk.grpo_loss(new, old, advantages, mask, ref_logprobs=old + 0.8 * ref, **shared)

    return op, (old + 0.4 * step, kl.abs())


def test_every_type_of_pairwise_loss_is_here():
    assert {loss_type for loss_type, *_ in PAIRWISE} == set(LOSS_TYPES)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_the_reference(device, name):
    op, tensors = CASES[name](device)
    leaves = T.leaves_of(tensors)
    results = op(*leaves)
    assert all(result.dtype == F64 for result in (results if isinstance(results, tuple) else (results,)))
    assert torch.autograd.gradcheck(op, leaves)
    if name not in ONCE:  # the errors of the compiled ops send people here
        assert torch.autograd.gradgradcheck(op, leaves)


TARGETS = torch.arange(4)
COMPILED = {
    "linear_logprobs": lambda h, w, b: rk.linear_logprobs(h, w, TARGETS.to(h.device), backend=b).logprobs,
    "linear_kl": lambda h, w, b: rk.linear_kl(h, w, h.detach() + 1, w.detach(), backend=b),
    "frozen linear_logprobs": lambda h, w, b: (
        rk.linear_logprobs(h, w.detach(), TARGETS.to(h.device), backend=b).logprobs
    ),
    "linear_dpo_loss": lambda h, w, b: (
        rk.linear_dpo_loss(
            h.view(2, 2, 4), w, TARGETS.to(h.device).view(2, 2), torch.zeros(2, device=h.device), backend=b
        ).loss
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_double_backward_of_native_says_what_to_do(native, device, name):
    leaves = [T.randn(n, 4, seed=n, device=device).requires_grad_() for n in (4, 7)]
    values = COMPILED[name](*leaves, native)
    (grad,) = torch.autograd.grad(values.sum(), leaves[0], create_graph=True)
    for differentiate in (lambda value: torch.autograd.grad(value, leaves), torch.Tensor.backward):
        with pytest.raises(RuntimeError, match=r"differentiable once.*backend='reference'"):
            differentiate(values.sum() + grad.square().sum())
        values = COMPILED[name](*leaves, native)
        (grad,) = torch.autograd.grad(values.sum(), leaves[0], create_graph=True)
