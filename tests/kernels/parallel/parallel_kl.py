"""Cases of test_parallel.py about `parallel.linear_kl`: as exact near the reference and far from it as one process."""

import itertools

import torch

from rlhf_kernels import testing as T
from tests.kernels.parallel import parallel_ranks as R

DIRECTIONS = ("policy_ref", "ref_policy")


def kl_near_and_far():
    """1e-8 nats as 10, both directions: a small KL does not cancel, and its gradient neither."""
    for kl, dtype in itertools.product((1e-8, 1e-6, 1e-2, 1.0, 10.0), (torch.float32, torch.bfloat16)):
        inputs = T.make_kl_inputs(33, 16, 257, kl=kl, dtype=dtype, bias=True, masked=0.25)
        for direction, backend in itertools.product(DIRECTIONS, R.BACKENDS):
            T.check_linear_kl(R.linear_kl("uneven", backend), inputs, direction=direction)


def kl_gradient_near_the_reference():
    """Logits of a fresh model: their differences of 1e-4 are exact, and the shards' log-sums of 8 are not to blur them.
    The difference of those would be off by 1e-4 here, eager torch is off by 2e-4."""
    inputs = T.make_kl_inputs(33, 16, 4096, kl=1e-8, logits="flat")
    for direction, backend in itertools.product(DIRECTIONS, R.BACKENDS):
        results = []
        for function, dtype in ((R.linear_kl("uneven", backend), None), (T.plain_linear_kl, torch.float64)):
            hidden = T.leaves_of((inputs.hidden,), dtype)[0]
            kl = function(hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight, None, direction=direction)
            results.append((kl, torch.autograd.grad(kl.sum(), hidden)[0]))
        for got, exact in zip(*results, strict=True):
            assert T.relative_error(got, exact) < 1e-5


def kl_in_fp64():
    closed = torch.where(torch.arange(257) < 129, -torch.inf, 0.0).double()
    for kl, direction in itertools.product((1e-6, 1e-2, 1.0, None, "closed"), DIRECTIONS):
        if kl == "closed":  # the policy allows no token of some shards, where the reference has about 1e-7
            inputs = T.make_kl_inputs(33, 16, 257, kl=0, dtype=torch.float64, bias=True)
            inputs = inputs._replace(bias=inputs.bias + closed, ref_bias=inputs.bias + closed.clamp(min=-16))
            if direction == "ref_policy":
                continue  # infinite
        else:
            inputs = T.make_kl_inputs(33, 16, 257, kl=kl, ref_d=None if kl else 9, dtype=torch.float64, bias=True)
        leaves = T.leaves_of((inputs.hidden, inputs.weight, inputs.bias))
        results = []
        for function in (R.linear_kl("even"), T.plain_linear_kl):
            values = function(
                leaves[0], leaves[1], inputs.ref_hidden, inputs.ref_weight, None, bias=leaves[2],
                ref_bias=inputs.ref_bias, direction=direction,
            )  # fmt: skip
            results.append((values, *torch.autograd.grad(values.sum(), leaves)))
        for got, exact in zip(*results, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-13)


def kl_of_identical_models():
    inputs = T.make_kl_inputs(33, 16, 257, kl=0, bias=True)
    for direction, backend in itertools.product(DIRECTIONS, R.BACKENDS):
        assert (R.linear_kl("uneven", backend)(*inputs[:5], bias=inputs.bias, ref_bias=inputs.ref_bias) == 0).all()
        T.check_linear_kl(R.linear_kl("even", backend), inputs, direction=direction)


def kl_with_every_option():
    options = {**R.OPTIONS, "ref_logit_scale": 1.5, "ref_logit_softcap": 2.0}
    for direction, backend in itertools.product(DIRECTIONS, R.BACKENDS):
        inputs = T.make_kl_inputs(33, 16, 257, ref_d=20, bias=True, masked=0.25)
        T.check_linear_kl(R.linear_kl("uneven", backend), inputs, direction=direction, **options)


def kl_where_only_other_shards_differ():
    """The shards' masses shift against each other, and inside a shard nothing does: KL(a || b) alone, at 1e-8."""
    h = R.head(33, 16, 64, masked=0.0)
    for size, direction, backend in itertools.product((1.5e-4, 3.0), DIRECTIONS, R.BACKENDS):
        moved = h.bias + torch.where(torch.arange(64) < 32, size, 0.0)
        inputs = T.KLInputs(h.hidden, h.weight, h.hidden, h.weight, None, moved, h.bias)
        truth = T.check_linear_kl(R.linear_kl("even", backend), inputs, direction=direction)
        assert size > 1 or 1e-9 < truth.max() < 1e-8


def kl_of_models_that_share_no_shard():
    """Each model has next to no mass where the other has its own: e^-2000, or e^-720, which has few digits in fp64."""
    h = R.head(12, 8, 40, masked=0.0)
    first = torch.arange(40) < 20
    for size, direction, backend in itertools.product((2000.0, 720.0), DIRECTIONS, R.BACKENDS):
        low, high = torch.where(first, -size, 0.0), torch.where(first, 0.0, -size)
        inputs = T.KLInputs(h.hidden, h.weight, h.hidden.flip(0), h.weight, None, h.bias + low, h.bias + high)
        T.check_linear_kl(R.linear_kl("even", backend), inputs, direction=direction)


def kl_over_shards_without_mass():
    """Tokens that neither allows add nothing; a shard that only the policy allows makes KL(policy || ref) infinite."""
    for backend in R.BACKENDS:
        h = R.head(12, 8, 40, masked=0.0)
        closed = torch.where(torch.arange(40) >= 20, -torch.inf, 0.0)
        inputs = T.KLInputs(h.hidden, h.weight, h.hidden.flip(0), h.weight, None, h.bias + closed, h.bias + closed)
        T.check_linear_kl(R.linear_kl("even", backend), inputs)
        wider = inputs._replace(bias=h.bias)
        assert R.linear_kl("even", backend)(*wider[:5], bias=wider.bias, ref_bias=wider.ref_bias).isposinf().all()
        narrower = inputs._replace(ref_bias=h.bias)
        T.check_linear_kl(R.linear_kl("even", backend), narrower)


CASES = {
    case.__name__: case
    for case in (
        kl_near_and_far,
        kl_gradient_near_the_reference,
        kl_in_fp64,
        kl_of_identical_models,
        kl_with_every_option,
        kl_where_only_other_shards_differ,
        kl_of_models_that_share_no_shard,
        kl_over_shards_without_mass,
    )
}
