"""torch.compile(fullgraph=True) gives eager's values and gradients; every op passes torch.library.opcheck."""

import shutil

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels.dpo.reference import LOSS_TYPES

OPS = [
    "linear_logprobs",
    "sequence_logprobs",
    "linear_kl",
    "kl_penalty",
    "dpo_loss",
    "bradley_terry_loss",
    "linear_dpo_loss",
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def case(name, n, device, backend):
    """(function of leaves, leaves): n is the size that may be dynamic, with masked rows among the rows."""
    head = T.make_head(2 * n, 16, 300, masked=0.3, bias=True, device=device)
    labels = head.targets.view(2, n)
    x, y = T.randn(n, seed=1, device=device), T.randn(n, seed=2, device=device)
    if name == "linear_logprobs":

        def op(h, w, b):
            out = rk.linear_logprobs(h, w, head.targets, b, outputs=T.OUTPUTS, temperature=0.7, backend=backend)
            return out.logprobs.sum() + (out.entropy * out.is_top1).sum() + out.logsumexp.mean() + out.mean_logit.sum()

        return op, (head.hidden, head.weight, head.bias)
    if name == "sequence_logprobs":

        def op(h, w, b):
            out = rk.sequence_logprobs(h, w, labels, b, average=True, backend=backend)
            return (out.logprobs * out.token_counts).sum()

        return op, (head.hidden.view(2, n, 16), head.weight, head.bias)
    if name == "linear_kl":
        ref = T.make_head(2 * n, 8, 300, seed=50, device=device)
        mask = head.targets != -100
        return (
            lambda h, w, b: rk.linear_kl(h, w, ref.hidden, ref.weight, mask, bias=b, backend=backend).sum(),
            (head.hidden, head.weight, head.bias),
        )
    if name == "kl_penalty":
        return lambda p, r: rk.kl_penalty(p, r, "k3", backend=backend).sum(), (x, y)
    if name == "dpo_loss":
        chosen, rejected = torch.arange(n, device=device), torch.arange(n, device=device).flip(0)

        def op(p, r):
            out = rk.dpo_loss(p, r, chosen, rejected, 0.3, label_smoothing=0.1, backend=backend)
            return out.losses.sum() + out.rewards.sum()

        return op, (x, y)
    if name == "bradley_terry_loss":
        return lambda c, r: rk.bradley_terry_loss(
            c, r, margin=x.abs(), center_coefficient=0.1, backend=backend
        ).sum(), (x, y)

    def op(h, w, b):
        out = rk.linear_dpo_loss(h, w, labels, torch.zeros(2, device=device), bias=b, beta=0.05, backend=backend)
        return out.loss + out.chosen_rewards.sum()

    return op, (head.hidden.view(2, n, 16), head.weight, head.bias)


def compare(name, op, tensors, compiled):
    eager_leaves, leaves = T.leaves_of(tensors), T.leaves_of(tensors)
    want, got = op(*eager_leaves), compiled(*leaves)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    grads = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, eager_leaves), strict=True)
    for grad, expected in grads:
        assert grad.dtype == expected.dtype and T.relative_error(grad, expected) < 3e-6, name


@pytest.mark.parametrize("name", OPS)
def test_one_graph_has_eager_values(backend, device, name):
    """The graph is traced for forward and backward together; "aot_eager" runs it without generating code."""
    op, tensors = case(name, 35, device, backend)
    compare(name, op, tensors, torch.compile(op, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_kl", "linear_dpo_loss"])
def test_dynamic_shapes(backend, device, name):
    """One graph for every number of rows. The targets travel as arguments, or they would be constants of the graph."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if name == "linear_kl":
        ref_weight = T.make_head(1, 8, 300, seed=50, device=device).weight

        def op(h, w, targets):
            kl = rk.linear_kl(h, w, h[:, :8].detach(), ref_weight, targets != -100, backend=backend)
            return kl.sum()
    elif name == "linear_dpo_loss":

        def op(h, w, targets):
            batch = h.view(2, -1, 16), w, targets.view(2, -1)
            return rk.linear_dpo_loss(*batch, torch.zeros(2, device=device), backend=backend).loss
    else:

        def op(h, w, targets):
            out = rk.linear_logprobs(h, w, targets, outputs=("entropy",), backend=backend)
            return (out.logprobs + out.entropy).sum()

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counting)
    for n in (6, 64, 70, 130):
        head = T.make_head(n, 16, 300, masked=0.3, device=device)
        eager_leaves, leaves = T.leaves_of(head[:2]), T.leaves_of(head[:2])
        want, got = op(*eager_leaves, head.targets), compiled(*leaves, head.targets)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        grads = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, eager_leaves), strict=True)
        assert all(T.relative_error(g, w) < 3e-6 for g, w in grads)
    assert len(graphs) <= 2, f"{len(graphs)} graphs for four sizes"


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_generates_code(native, device):
    """Around two ops, linear_logprobs and dpo_loss. (With entropy, in a whole model: tests/integrations, slow.)"""
    op, tensors = case("linear_dpo_loss", 35, device, native)
    compare("linear_dpo_loss", op, tensors, torch.compile(op, fullgraph=True))


def responses(device):
    policy, ref = T.randn(6, seed=1, device=device), T.randn(6, seed=2, device=device)
    return policy, ref, torch.arange(6, device=device) % 3 == 0, torch.tensor(0.5, device=device)


def tokens(device):
    """new, old, sampler's and reference's log-probs [6, 9], advantages [6], mask."""
    old = -T.randn(6, 9, seed=1, device=device).abs()
    new, sampler, ref = (old + 0.3 * T.randn(6, 9, seed=seed, device=device) for seed in (2, 3, 4))
    mask = torch.arange(9, device=device) < torch.tensor([9, 4, 0, 7, 1, 9], device=device)[:, None]
    return new, old, sampler, ref, T.randn(6, seed=5, device=device), mask


def pairwise(device):
    """Every type that has no compiled op, in one graph."""
    chosen, rejected = torch.arange(6, device=device), torch.arange(6, device=device).roll(1)
    policy, ref, *_ = responses(device)
    types = {name: kind for name, kind in LOSS_TYPES.items() if kind.kernel is None}

    def op(policy):
        losses = [
            rk.dpo_loss(
                policy, None if kind.reference_free else ref, chosen, rejected, loss_type=name,
                label_smoothing=0.2 if kind.smoothing else 0.0, token_counts=chosen + 1,
            ).losses
            for name, kind in types.items()
        ]  # fmt: skip
        return torch.stack(losses)

    return op, policy, [()]


def orpo(device):
    chosen, rejected = torch.arange(6, device=device), torch.arange(6, device=device).roll(1)
    policy = -T.randn(6, seed=1, device=device).abs() - 0.1
    return lambda x: rk.orpo_loss(x, chosen + 1, chosen, rejected).losses, policy, [()]


def unpaired(loss):
    def build(device):
        policy, ref, desirable, shift = responses(device)
        return lambda x: loss(x, ref, desirable, shift).losses, policy, [()]

    return build


def ppo(device):
    new, old, _, advantages, _, mask = tokens(device)

    def op(x, low, high):
        loss = rk.ppo_loss(x, old, advantages, mask, clip_low=low, clip_high=high, dual_clip=3.0)
        return loss, rk.clip_fraction(x, old, advantages, mask, low, high)

    return op, new, [(0.2, 0.2), (0.1, 0.3), (0.05, 0.4)]  # as an annealed bound


def value(device):
    values, old, _, returns, _, mask = tokens(device)
    return lambda x, clip: rk.value_loss(x, old, returns, mask, clip=clip), values, [(0.2,), (0.3,), (None,)]


def grpo(variant):
    def build(device):
        new, old, sampler, ref, advantages, mask = tokens(device)

        def op(x, beta, low, cap):
            return rk.grpo_loss(
                x, old, advantages, mask, variant=variant, ref_logprobs=ref, beta=beta, clip_low=low,
                sampler_logprobs=sampler, is_cap=cap, max_length=20,
            )  # fmt: skip

        return op, new, [(0.1, 0.2, 2.0), (0.2, 0.1, 1.5)]  # an adaptive beta changes often

    return build


PLAIN = {  # name -> builder of (function of a leaf and constants, the leaf, several constants)
    "dpo_loss": pairwise, "bco_loss": unpaired(rk.bco_loss), "kto_loss": unpaired(rk.kto_loss), "orpo_loss": orpo,
    "ppo_loss": ppo, "value_loss": value, "grpo_loss, dr_grpo": grpo("dr_grpo"), "grpo_loss, dapo": grpo("dapo"),
    "grpo_loss, gspo": grpo("gspo"), "grpo_loss, cispo": grpo("cispo"),
}  # fmt: skip  # of grpo_loss every branch


@pytest.mark.parametrize("name", PLAIN)
def test_losses_in_plain_torch_have_no_graph_break(device, name):
    """Nor one for other constants: one function serves several floats."""
    op, tensor, constants = PLAIN[name](device)
    leaf = tensor.requires_grad_()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for arguments in constants:
        got, want = compiled(leaf, *arguments), op(leaf, *arguments)
        torch.testing.assert_close(got, want)
        if name == "ppo_loss":
            (got, share), (want, expected) = got, want
            assert share == expected
        torch.testing.assert_close(*(torch.autograd.grad(losses.sum(), leaf)[0] for losses in (got, want)))


def test_compiled_under_autocast(backend, device):
    head = T.make_head(70, 16, 300, masked=0.3, device=device)

    def op(h, w):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return rk.linear_logprobs(h, w, head.targets, backend=backend).logprobs.sum()

    compare("autocast", op, head[:2], torch.compile(op, fullgraph=True, backend="aot_eager"))


def samples(device):
    """Arguments for every op that the extension registers, by op name."""
    h = T.make_head(70, 16, 300, masked=0.3, bias=True, device=device)
    ref = T.make_head(70, 8, 300, seed=50, bias=True, device=device)
    transform, mask, up = (0.5, 3.0, 0.7), h.targets != -100, T.randn(70, seed=9, device=device)
    fp32, bf16 = torch.float32, torch.bfloat16
    flags = (True, True, True, True)
    ops = torch.ops.rlhf_kernels
    x, y, pairs = T.randn(9, seed=1, device=device), T.randn(9, seed=2, device=device), torch.arange(9, device=device)

    def leaf(t):
        return t.detach().clone().requires_grad_()

    def policy(need):
        return tuple((leaf if need else torch.clone)(t) for t in (h.hidden, h.weight, h.bias))

    def kl_args(need):
        hidden, weight, bias = policy(need)
        return (
            hidden,
            weight,
            bias,
            *transform,
            fp32,
            ref.hidden,
            ref.weight,
            ref.bias,
            1.0,
            0.0,
            0.7,
            fp32,
            mask,
            True,
        )

    arguments = {"linear_logprobs": [], "linear_logprobs_backward": [], "linear_kl": [], "linear_kl_backward": []}
    every = -(-len(h.hidden) // 64) * 64 * -(-len(h.weight) // 64) * 64  # logits, and what pads them
    for gemm, kept in ((fp32, 0), (fp32, every), (bf16, 0)):
        hidden, weight, bias = policy(True)
        arguments["linear_logprobs"].append((hidden, weight, h.targets, bias, *transform, -100, gemm, *flags, kept))
        hidden, weight, bias = policy(False)
        out = ops.linear_logprobs(hidden, weight, h.targets, bias, *transform, -100, gemm, *flags, kept)
        arguments["linear_logprobs_backward"].append(
            (up, up, up, hidden, weight, h.targets, bias, out[1], out[2], out[3], out[-1], *transform, -100, gemm,
             True, not kept, True)
        )  # fmt: skip
    arguments["linear_logprobs"].append((*policy(True)[:2], h.targets, None, *transform, -100, fp32, *[False] * 4, 0))
    frozen = [(policy(True)[0], h.weight, h.targets, h.bias, *transform, -100, gemm, *flags) for gemm in (fp32, bf16)]
    directions = T.randn(70, 16, seed=10, device=device)
    for kept in (0, 2 * every):
        arguments["linear_kl"].append((*kl_args(True), kept))
        args = kl_args(False)
        results = ops.linear_kl(*args, kept)
        arguments["linear_kl_backward"].append((up, *results, *args, not kept, True, not kept))
    return arguments | {
        "linear_logprobs_frozen": frozen,
        "linear_logprobs_frozen_backward": [(up, directions, h.targets, -100, dtype) for dtype in (fp32, bf16)],
        "kl_penalty": [(leaf(x), leaf(y), k) for k in range(3)],
        "kl_penalty_backward": [(x, x, y, k) for k in range(3)],
        "dpo_loss": [(leaf(x), leaf(y), pairs, pairs.flip(0), 0.3, k, 0.1 * (k == 0)) for k in range(4)]
        + [(leaf(x), None, pairs, pairs.flip(0), 0.3, 0, 0.0)],
        "dpo_loss_backward": [(x, x, y, pairs, pairs.flip(0), 0.3, k, 0.0) for k in range(4)],
        "bradley_terry_loss": [(leaf(x), leaf(y), None, 0.1, 0.5), (leaf(x), leaf(y), x.abs(), 0.0, 0.0)],
        "bradley_terry_loss_backward": [(x, x, y, x.abs(), 0.1, 0.5)],
    }


def registered():
    names = torch._C._dispatch_get_all_op_names()
    ours = (name.split("::")[1] for name in names if name.startswith("rlhf_kernels::"))
    return sorted(name for name in ours if not name.startswith("triton_"))  # which other tests may have registered


def test_every_registered_op_has_a_sample(native, device):
    assert registered() == sorted(samples(device))


@pytest.mark.parametrize("name", sorted({*OPS, "linear_logprobs_frozen"} - {"sequence_logprobs", "linear_dpo_loss"}))
@pytest.mark.parametrize("which", ["", "_backward"])
def test_opcheck(native, device, name, which):
    op = getattr(torch.ops.rlhf_kernels, name + which).default
    for args in samples(device)[name + which]:
        torch.library.opcheck(op, args)
