"""Randomised search over shapes, dtypes, strides, masks and options; what hypothesis finds is judged as in the grid.

A handful of fixed examples run always. `pytest -m fuzz tests/kernels/test_fuzz.py` searches; RLHF_KERNELS_FUZZ_EXAMPLES
sets for how long. A failure prints the arguments; they are all it takes to repeat it.
"""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels.dpo.reference import LOSS_TYPES

EXAMPLES = int(os.environ.get("RLHF_KERNELS_FUZZ_EXAMPLES", "300"))
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "print_blob": True}
a_few = settings(max_examples=6, derandomize=True, database=None, **COMMON)
many = settings(max_examples=EXAMPLES, **COMMON)


def slack(shape):
    """Of the limits of the grid, see `assert_no_worse_than_eager`. Where the gradient is a handful of numbers, each a
    sum that may cancel to nothing, only gross errors can be told from rounding."""
    return 4.0 if shape["n"] * shape["d"] >= 256 else 200.0


near_tiles = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "every second column", "every second row", "transposed", "padded"]
head_options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 0.9, 2.0]),
        "logit_scale": st.sampled_from([-1.0, 0.125, 1.5]),
        "logit_softcap": st.sampled_from([1.0, 10.0, 50.0]),
    },
)
shapes = st.fixed_dictionaries(
    {
        "n": st.one_of(st.integers(0, 70), near_tiles),
        "d": st.one_of(st.integers(1, 80), near_tiles),
        "v": st.one_of(st.integers(1, 600), st.sampled_from([255, 256, 257, 1023, 2047, 2048, 2049, 4097])),
    }
)
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "bias": st.sampled_from([False, True]),
        "masked": st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
        "seed": st.integers(0, 10_000),
    }
)


def laid_out(t, layout):
    """The same values under other strides."""
    if layout == "every second column":
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if layout == "every second row":
        return t.repeat_interleave(2, 0)[::2]
    if layout == "transposed":
        return t.T.contiguous().T
    if layout == "padded":
        return torch.cat([t, t], -1)[..., : t.shape[-1]]
    return t


def check_logprobs(
    backend, device, shape, tensor, weight_dtype, logits, layouts, outputs, upstream, ignore_index, options
):
    head = T.make_head(
        **shape, **tensor, weight_dtype=weight_dtype, logits=logits, ignore_index=ignore_index, device=device
    )
    if shape["v"] == 1 and ignore_index == 0:
        return  # then the only token is the one to ignore
    head = head._replace(hidden=laid_out(head.hidden, layouts[0]), weight=laid_out(head.weight, layouts[1]))
    op = functools.partial(rk.linear_logprobs, backend=backend)
    through = [name for name in upstream if name != "entropy" or "entropy" in outputs] or ["logprobs"]
    T.check_linear_logprobs(
        op, head, outputs=outputs, upstream=through, ignore_index=ignore_index, seed=tensor["seed"], slack=slack(shape),
        **options,
    )  # fmt: skip


logprobs_cases = given(
    shape=shapes,
    tensor=tensors,
    weight_dtype=st.sampled_from([None, None, *DTYPES]),
    logits=st.sampled_from(["normal", "normal", "flat", "peaked"]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    outputs=st.lists(st.sampled_from(T.OUTPUTS), unique=True).map(tuple),
    upstream=st.lists(st.sampled_from(T.DIFFERENTIABLE), unique=True, min_size=1),
    ignore_index=st.sampled_from([-100, -1, 0]),
    options=head_options,
)


@a_few
@logprobs_cases
def test_linear_logprobs_examples(backend, device, poisoned_memory, **case):
    check_logprobs(backend, device, **case)


@pytest.mark.fuzz
@many
@logprobs_cases
def test_linear_logprobs(backend, device, poisoned_memory, **case):
    check_logprobs(backend, device, **case)


def check_kl(backend, device, shape, tensor, ref_d, kl, layouts, direction, options, ref_scale):
    inputs = T.make_kl_inputs(**shape, **tensor, ref_d=ref_d if kl is None else None, kl=kl, device=device)
    inputs = inputs._replace(
        hidden=laid_out(inputs.hidden, layouts[0]), ref_hidden=laid_out(inputs.ref_hidden, layouts[1])
    )
    op = functools.partial(rk.linear_kl, backend=backend)
    # float16 cannot hold the gradients of a tiny KL without a loss scaler
    scale = 2.0**15 if tensor["dtype"] == torch.float16 and kl is not None and kl < 1e-2 else 1.0
    T.check_linear_kl(
        op, inputs, direction=direction, ref_logit_scale=ref_scale if kl is None else None, upstream_scale=scale,
        seed=tensor["seed"], slack=slack(shape), **options,
    )  # fmt: skip


kl_cases = given(
    shape=shapes.filter(lambda s: s["n"] > 0 and s["v"] > 8),  # a KL is asked for: there must be rows, and freedom
    tensor=tensors,
    ref_d=st.integers(1, 80),
    kl=st.sampled_from([None, None, 1e-8, 1e-5, 1e-3, 0.1, 3.0]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    direction=st.sampled_from(["policy_ref", "ref_policy"]),
    options=head_options,
    ref_scale=st.sampled_from([None, 0.5, 1.0]),
)


@a_few
@kl_cases
def test_linear_kl_examples(backend, device, poisoned_memory, **case):
    check_kl(backend, device, **case)


@pytest.mark.fuzz
@many
@kl_cases
def test_linear_kl(backend, device, poisoned_memory, **case):
    check_kl(backend, device, **case)


def check_pairs(backend, device, size, pairs, beta, eps, loss_type, dtype, seed, scale, strided):
    """dpo_loss and bradley_terry_loss: the backend against fp64, at any size of log-ratio."""
    policy, ref = (T.randn(size, seed=seed + s, dtype=dtype, device=device) * scale for s in (0, 1))
    if strided:
        policy, ref = policy.repeat_interleave(2)[::2], ref.repeat_interleave(3)[::3]
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (torch.randint(size, (pairs,), generator=generator).to(device) for _ in range(2))
    counts = torch.randint(0, 9, (size,), generator=generator).to(device)
    kind = LOSS_TYPES[loss_type]
    eps = max(eps, 1e-3 * kind.needs_smoothing) if kind.smoothing else 0.0
    upstream = T.randn(pairs, seed=seed + 2, device=device)

    def dpo(policy, ref, backend):
        return rk.dpo_loss(
            policy, None if loss_type == "simpo" else ref, chosen, rejected, beta, loss_type=loss_type,
            label_smoothing=eps, token_counts=counts, backend=backend,
        ).losses  # fmt: skip

    def bradley_terry(chosen_rewards, rejected_rewards, backend):
        margin = rejected_rewards.detach().abs()
        return rk.bradley_terry_loss(
            chosen_rewards, rejected_rewards, margin=margin, label_smoothing=eps, backend=backend
        )

    for op, tensors_of_op in ((dpo, (policy, ref)), (bradley_terry, (policy[chosen], ref[rejected]))):
        leaves, exact = T.leaves_of(tensors_of_op), T.leaves_of(tensors_of_op, torch.float64)
        got, truth = op(*leaves, backend), op(*exact, "reference")
        size_of_terms = max(1.0, truth.abs().max().item()) if pairs else 1.0
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=2e-6 * size_of_terms)
        wanted = 1 if op is dpo and loss_type == "simpo" else 2
        grads = torch.autograd.grad(got, leaves[:wanted], upstream)
        wants = torch.autograd.grad(truth, exact[:wanted], upstream.double())
        for grad, want in zip(grads, wants, strict=True):
            off = (grad.double() - want).norm()
            assert grad.dtype == dtype
            assert off <= T.gradient_limit(5e-6, dtype) * want.norm() + 1e-6 * size_of_terms * max(beta, 1.0), float(
                off
            )


pair_cases = given(
    size=st.integers(1, 70),
    pairs=st.integers(0, 200),
    beta=st.sampled_from([0.01, 0.1, 1.0, 5.0]),
    eps=st.sampled_from([0.0, 0.1, 0.49]),
    loss_type=st.sampled_from([t for t in LOSS_TYPES if t not in ("hinge", "aot")]),  # a kink; ranks that fp32 ties
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    strided=st.booleans(),
)


@a_few
@pair_cases
def test_pair_losses_examples(backend, device, poisoned_memory, **case):
    check_pairs(backend, device, **case)


@pytest.mark.fuzz
@many
@pair_cases
def test_pair_losses(backend, device, poisoned_memory, **case):
    check_pairs(backend, device, **case)
