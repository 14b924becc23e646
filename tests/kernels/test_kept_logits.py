"""Logits that forward keeps for backward, as many as the budget has room for: they spare products and change no bit."""

import itertools
import sys

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _workspace
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

CPU = torch.device("cpu")
N, D, V = 130, 40, 1500  # three blocks of rows, the last one padded; several tiles, the last one short
# Of a tile's rows of the vocabulary, of some tiles, and of all: shares in fp32 logits.
SHARES = {"less than a tile": 0.02, "some tiles": 0.6, "all but the last tile": 0.95, "all": 1.0}
OPTIONS = {"plain": {}, "affine": {"logit_scale": 0.5, "temperature": 0.7}, "soft cap": {"logit_softcap": 3.0}}


def results(native, head, options):
    leaves = T.leaves_of(head[:2]) + T.leaves_of((head.bias,))
    out = rk.linear_logprobs(*leaves[:2], head.targets, leaves[2], outputs=("entropy",), backend=native, **options)
    weights = T.randn(2, len(head.targets), device=head.hidden.device)
    loss = (weights[0] * out.logprobs + weights[1] * out.entropy).sum()
    arguments = [leaf for leaf in leaves if leaf is not None]
    return [out.logprobs.detach(), *torch.autograd.grad(loss, arguments)]


@pytest.mark.parametrize(
    ("dtype", "share", "options"), every_pair([torch.float32, torch.bfloat16, torch.float16], SHARES, OPTIONS)
)
def test_what_is_kept_changes_nothing(native, device, on_cuda, monkeypatch, dtype, share, options):
    """No bit."""
    share, options = SHARES[share], OPTIONS[options]
    if on_cuda and share < 1:
        pytest.skip("on CUDA all logits are kept or none")
    head = T.make_head(N, D, V, dtype=dtype, masked=0.3, bias="softcap" not in str(options), device=device)
    recomputed = results(native, head, options)
    padded = -(-N // 64) * 64 * -(-V // 64) * 64
    monkeypatch.setattr(_workspace, "logits_to_keep", lambda *_: int(share * padded))
    kept = results(native, head, options)
    assert torch.equal(kept[0], recomputed[0])
    assert all(torch.equal(a, b) for a, b in zip(kept[1:], recomputed[1:], strict=True))


def kl_results(native, inputs, **options):
    leaves = T.leaves_of((inputs.hidden, inputs.weight, inputs.bias))
    kl = rk.linear_kl(
        *leaves[:2], *inputs[2:5], bias=leaves[2], ref_bias=inputs.ref_bias, backend=native, **options
    )  # fmt: skip
    arguments = [leaf for leaf in leaves if leaf is not None]
    return [kl.detach(), *torch.autograd.grad((kl * T.randn(len(kl), device=kl.device)).sum(), arguments)]


@pytest.mark.parametrize(
    ("dtype", "share", "options", "direction"),
    every_pair([torch.float32, torch.bfloat16], SHARES, OPTIONS, ["policy_ref", "ref_policy"]),
)
def test_what_is_kept_of_both_models_changes_nothing(
    native, device, on_cuda, monkeypatch, dtype, share, options, direction
):
    """The models differ in width; the wider one decides how large a tile is."""
    share, options = SHARES[share], OPTIONS[options]
    if on_cuda and share < 1:
        pytest.skip("on CUDA all logits are kept or none")
    bias = "softcap" not in str(options)
    inputs = T.make_kl_inputs(N, D, V, ref_d=D + 9, dtype=dtype, masked=0.3, bias=bias, device=device)
    recomputed = kl_results(native, inputs, direction=direction, **options)
    padded = -(-N // 64) * 64 * -(-V // 64) * 64
    monkeypatch.setattr(_workspace, "logits_to_keep", lambda *_: int(2 * share * padded))
    kept = kl_results(native, inputs, direction=direction, **options)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_backward_of_a_kl_reads_what_is_kept(native, device):
    """And recomputes nothing: it does not notice that hidden states are others by then."""
    inputs = T.make_kl_inputs(N, D, V, masked=0.3, device=device)
    heads = [(weight, None, 1.0, 0.0, 1.0, torch.float32) for weight in (inputs.weight, inputs.ref_weight)]
    rest = (inputs.mask, True)
    ops, up, needs = torch.ops.rlhf_kernels, torch.ones(N, device=device), (True, False, False)
    size = 2 * -(-N // 64) * 64 * -(-V // 64) * 64
    results = ops.linear_kl(inputs.hidden, *heads[0], inputs.ref_hidden, *heads[1], *rest, size)
    grads = [
        ops.linear_kl_backward(up, *results, x, *heads[0], y, *heads[1], *rest, *needs)[0]
        for x, y in ((inputs.hidden, inputs.ref_hidden), (inputs.hidden * 0, inputs.ref_hidden * 0))
    ]
    assert torch.equal(*grads) and bool(grads[0].norm() > 0)


def test_kept_logits_are_shared_by_the_rows_that_count(native, monkeypatch):
    """Room for a tenth of all logits is room for all of the tenth of the rows that counts."""
    head = T.make_head(640, D, V, masked=0.92)
    recomputed = results(native, head, {})
    monkeypatch.setattr(_workspace, "logits_to_keep", lambda *_: 640 * V // 10)
    assert all(torch.equal(a, b) for a, b in zip(results(native, head, {}), recomputed, strict=True))


@pytest.mark.parametrize("masked", [0.0, 1.0])
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_keep(native, kept_logits, n, masked):
    head = T.make_head(n, D, V, masked=masked)
    assert all(r.isfinite().all() for r in results(native, head, {}))


def test_only_a_call_that_has_a_backward_keeps(native, monkeypatch):
    def fail(*_):
        raise AssertionError("nothing is differentiated")

    monkeypatch.setattr(_workspace, "logits_to_keep", fail)
    head = T.make_head(N, D, V)
    rk.linear_logprobs(*head, backend=native)
    hidden = head.hidden.clone().requires_grad_()
    with torch.no_grad():
        rk.linear_logprobs(hidden, *head[1:], backend=native)
    rk.linear_logprobs(hidden, *head[1:], backend="reference")
    rk.linear_logprobs(hidden, *head[1:], backend=native)  # of a frozen head backward needs no logits
    weight = head.weight.clone().requires_grad_()
    with pytest.raises(AssertionError, match="nothing is differentiated"):
        rk.linear_logprobs(head.hidden, weight, *head[2:], backend=native)

    model, ref = (head.hidden, head.weight), (hidden, head.weight)
    rk.linear_kl(*model, *ref, backend=native)  # its gradient does not go to the reference
    rk.linear_kl(*ref, *model, backend="reference")
    with pytest.raises(AssertionError, match="nothing is differentiated"):
        rk.linear_kl(*ref, *model, backend=native)


def test_how_much_is_kept(native, kept_logits):
    half = (32 << 20) // 4
    try:
        rk.set_workspace_budget(64)
        assert _workspace.logits_to_keep(64, 1000, 64, CPU) == 64_000, "all that fits half of 64 MiB"
        assert _workspace.logits_to_keep(1, 1000, 64, CPU) == 64_000, "rows come in blocks"
        assert _workspace.logits_to_keep(128, 151936, 1024, CPU) == half, "two fifths"
        assert _workspace.logits_to_keep(1024, 151936, 1024, CPU) == 0, "5% are not worth it"
        assert _workspace.logits_to_keep(1024, 30000, 4096, CPU) == 0, "backward needs the room"
        assert _workspace.logits_to_keep(64, 1000, 64, CPU, 96) == 128_000, "of both models"
        assert _workspace.logits_to_keep(128, 151936, 1024, CPU, 1024) == half, "a fifth"
        rk.set_workspace_budget(2048)
        assert _workspace.logits_to_keep(1024, 151936, 1024, CPU) == 1024 * 151936
        rk.set_workspace_budget(None)
        gpu = torch.device("cuda")
        assert _workspace.logits_to_keep(256, 151937, 4096, gpu) == 256 * 152000, "of 256 MiB three quarters"
        assert _workspace.logits_to_keep(512, 151937, 4096, gpu) == 0, "all or none"
        assert _workspace.logits_to_keep(128, 151937, 4096, gpu, 64) == 256 * 152000, "of both models"
        assert _workspace.logits_to_keep(256, 151937, 4096, gpu, 64) == 0
    finally:
        rk.set_workspace_budget(None)


@pytest.mark.parametrize("vocab", [3000, 50257, 256000])
@pytest.mark.parametrize("width", [64, 1024, 4096])
@pytest.mark.parametrize("budget", [8, 64, 1000])
def test_backward_keeps_its_plan(native, kept_logits, budget, width, vocab):
    """Whatever is kept, and however many of the rows count: or sums would be in another order, and slower."""
    from rlhf_kernels import _C

    try:
        rk.set_workspace_budget(budget)
        for rows in (1, 64, 300, 1024, 5000):
            for ref_width in (0, width // 2, width * 2):
                left = (budget << 20) - 4 * _workspace.logits_to_keep(rows, vocab, width, CPU, ref_width)
                for counted, size in itertools.product({1, rows // 3, rows // 2, rows - 1, rows} - {0}, (2, 4)):
                    plans = [
                        _C.plan_backward(counted, vocab, width, size, room, ref_width) for room in (budget << 20, left)
                    ]
                    assert plans[0] == plans[1], (rows, counted, size, ref_width)
    finally:
        rk.set_workspace_budget(None)


# --- their memory, which one call leaves to the next ---


def memory_of_a_call(native, device, masked=0.0, head=None):
    """The op's last result, as autograd saves it."""
    if device.type != "cpu":
        pytest.skip("on a GPU torch's allocator holds memory")
    head = head or T.make_head(N, D, V, masked=masked)
    size, flags = -(-len(head.hidden) // 64) * 64 * len(head.weight), (False,) * 4
    options = (None, 1.0, 0.0, 1.0, -100, torch.float32, *flags, size)
    return torch.ops.rlhf_kernels.linear_logprobs(*head[:3], *options)[-1]


def test_memory_serves_the_next_call_once_it_is_free(native, device):
    first = memory_of_a_call(native, device)
    address = first.data_ptr()
    second = memory_of_a_call(native, device)
    assert second.data_ptr() != address, "the first is still in use"
    del first
    third = memory_of_a_call(native, device)
    assert third.data_ptr() == address, "the second is still in use"
    assert address % 64 == 0


def test_memory_shows_nothing_of_the_call_before(native, device):
    """Behind what is written are zeros, as in new memory: the op's results follow from its arguments."""
    memory_of_a_call(native, device)
    used_before = memory_of_a_call(native, device, masked=0.9)
    new = memory_of_a_call(native, device, masked=0.9)
    assert torch.equal(used_before, new) and bool((new == 0).any())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_smaller_budget_gives_memory_back(native, device):
    def is_mapped(address):
        with open("/proc/self/maps") as lines:
            ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        return any(start <= address < end for start, end in ranges)

    head = T.make_head(256, D, 100_000)
    try:
        rk.set_workspace_budget(512)
        middle = memory_of_a_call(native, device, head=head).data_ptr() + (49 << 20)  # of 98 MiB
        rk.set_workspace_budget(256)
        assert is_mapped(middle), "98 MiB fit half of it"
        rk.set_workspace_budget(128)
        assert not is_mapped(middle)
        middle = memory_of_a_call(native, device, head=head).data_ptr() + (49 << 20)
        assert not is_mapped(middle), "nothing that exceeds the budget is held"
    finally:
        rk.set_workspace_budget(None)
