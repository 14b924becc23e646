"""Every instance of every kernel, at the least once, on small shapes with tails, against the fp64 truth.

For the compiled part of plugin.py; `make cuda-on-host` runs it, also under AddressSanitizer and in other orders of
threads. What it has in common with tests/kernels it has so that it can be run alone, in seconds.
"""

import itertools
import os
import sys

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _workspace
from rlhf_kernels import testing as T
from rlhf_kernels._logits import LMHead, LogitTransform, Side
from rlhf_kernels.kl import ops as kl_ops
from rlhf_kernels.logprob import ops as logprob_ops

pytestmark = [pytest.mark.cuda_on_host, pytest.mark.usefixtures("on_host")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {  # of logits, each a template instance: (bias, options)
    "identity": (False, {}),
    "affine": (True, {"logit_scale": 0.7}),
    "softcap": (True, {"logit_softcap": 5.0}),
}
SHAPES = [  # N, D, V
    (1, 1, 1),
    (3, 8, 4099),  # one tile; a block holds 2048 logits at a time: three are left
    (5, 9, 256),  # 256 is a whole tile: what is read beyond a row's end is beyond the memory's end
    (4, 8, 260),  # full loads of four to the very end
    (3, 344, 515),
    (261, 3, 343),
]
SEVERAL = (133, 2, 4099)  # in 8 MiB: two slices of the vocabulary, and two chunks of rows, the last of five


@pytest.fixture(scope="module")
def on_host():
    plugin = sys.modules.get("tests.cuda_on_host.plugin")
    if plugin is None:
        pytest.fail("needs -p tests.cuda_on_host.plugin, see `make cuda-on-host`")
    return plugin


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN (or the largest integer), so an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def logprobs(*args, **options):
    return rk.linear_logprobs(*args, backend="native", **options)


def kl(*args, **options):
    return rk.linear_kl(*args, backend="native", **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprob_shapes(shape, dtype):
    T.check_linear_logprobs(logprobs, T.make_head(*shape, dtype=dtype, bias=True, masked=0.3))


@pytest.fixture
def small_budget():
    rk.set_workspace_budget(8)
    yield
    rk.set_workspace_budget(None)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_several_tiles(small_budget, dtype):
    T.check_linear_logprobs(logprobs, T.make_head(*SEVERAL, dtype=dtype, bias=True, masked=0.02))


def test_several_tiles_of_a_kl(small_budget):
    n, d, v = SEVERAL
    T.check_linear_kl(kl, T.make_kl_inputs(n, d, v, ref_d=d + 1, bias=True, masked=0.02))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 1), (1, 1, 70), (2, 33, 70)])
def test_strides_of_sizes_of_one(shape, dtype):
    """A size of 1 may have any stride and is contiguous all the same: a GEMM gets rows that do not overlap, and that
    start where it wants them, whatever D."""
    head = T.make_head(*shape, dtype=dtype)
    transform, all_rows = LogitTransform(1.0, 0.0, 1.0), torch.ones(shape[0], dtype=torch.bool)

    def strided(tensor):
        strides = [1 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        memory = torch.zeros(1 << 13, dtype=dtype)
        memory = memory[-memory.data_ptr() % 256 // dtype.itemsize :]  # hidden states are read in place
        return memory.as_strided(tensor.shape, strides).copy_(tensor)

    def results(hidden, weight):  # past the public functions, which reshape
        leaves = T.leaves_of((hidden, weight))
        side = Side.made_of(*leaves, None, transform, dtype)
        values = logprob_ops.linear_logprobs(side, head.targets, -100, ())[0]
        other = kl_ops.linear_kl(
            side, Side.made_of(hidden * 0.9, weight, None, transform, dtype), all_rows, "policy_ref"
        )
        return [values, other, *torch.autograd.grad((values + other).sum(), leaves)]

    strange = strided(head.hidden), strided(head.weight)
    assert all(tensor.is_contiguous() for tensor in strange)
    for got, want in zip(results(*strange), results(head.hidden, head.weight), strict=True):
        assert torch.equal(got, want)
    T.check_linear_logprobs(logprobs, head)


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("is_top1", "mean_logit", "log_sum_sq_probs"), T.OUTPUTS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logprob_instances(kind, dtype, outputs):
    bias, options = KINDS[kind]
    T.check_linear_logprobs(logprobs, T.make_head(5, 33, 301, dtype=dtype, bias=bias), outputs=outputs, **options)


def check_frozen(head, **options):
    hidden = head.hidden.clone().requires_grad_()
    out = logprobs(hidden, head.weight, head.targets, head.bias, **options).logprobs
    weights = T.randn(len(out))
    (gradient,) = torch.autograd.grad((out * weights).sum(), [hidden])
    exact = [None if t is None else t.detach().double() for t in (head.hidden, head.weight, head.bias)]
    exact[0].requires_grad_()
    truth = rk.linear_logprobs(*exact[:2], head.targets, exact[2], backend="reference", **options).logprobs
    (expected,) = torch.autograd.grad((truth * weights.double()).sum(), exact[:1])
    assert (
        T.relative_error(gradient, expected)
        < {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[hidden.dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_head_instances(kind, dtype):
    bias, options = KINDS[kind]
    check_frozen(T.make_head(5, 33, 301, dtype=dtype, bias=bias), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_head_shapes(shape):
    check_frozen(T.make_head(*shape, bias=True, masked=0.3))


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_shapes(shape, direction):
    n, d, v = shape
    T.check_linear_kl(kl, T.make_kl_inputs(n, d, v, ref_d=d + 1, bias=True, masked=0.3), direction=direction)


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "ref_kind"), list(itertools.product(KINDS, KINDS)))
def test_kl_instances(kind, ref_kind, dtype, direction):
    (bias, options), (ref_bias, ref_options) = KINDS[kind], KINDS[ref_kind]
    inputs = T.make_kl_inputs(5, 33, 301, dtype=dtype, bias=True)
    inputs = inputs._replace(bias=inputs.bias if bias else None, ref_bias=inputs.ref_bias if ref_bias else None)
    plain = {"logit_scale": 1.0, "logit_softcap": UNCAPPED}
    options, ref_options = plain | options, {f"ref_{name}": value for name, value in (plain | ref_options).items()}
    T.check_linear_kl(kl_of_kinds, inputs, direction=direction, **options, **ref_options)


UNCAPPED = 1e9  # for the truth, by far; for the kernels none at all, which a reference cannot have by the public name


def kl_of_kinds(hidden, weight, ref_hidden, ref_weight, mask, *, bias, ref_bias, direction, **options):
    def head_of(prefix, weight, bias):
        softcap = options[f"{prefix}logit_softcap"] % UNCAPPED
        return LMHead(weight, bias, options[f"{prefix}logit_scale"], softcap)

    policy = Side.of(hidden, head_of("", weight, bias), 1.0)
    ref = Side.of(ref_hidden, head_of("ref_", ref_weight, ref_bias), 1.0)
    return kl_ops.linear_kl(policy, ref, torch.ones(len(hidden), dtype=torch.bool), direction)


@pytest.mark.parametrize("gemm", DTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_between_formats(dtype, gemm):
    def autocast(*args, **options):
        with torch.autocast("cpu", dtype=gemm):
            return logprobs(*args, **options)

    T.check_linear_logprobs(autocast, T.make_head(5, 33, 301, dtype=dtype, masked=0.4), autocast=gemm)


@pytest.mark.parametrize(("dtype", "weight_dtype"), list(itertools.permutations(DTYPES, 2)))
def test_hidden_and_weight_of_different_formats(dtype, weight_dtype):
    T.check_linear_logprobs(logprobs, T.make_head(5, 33, 301, dtype=dtype, weight_dtype=weight_dtype, masked=0.4))


@pytest.mark.parametrize("v", [256, 301])
def test_kept_logits(v, monkeypatch):
    """Rows follow each other without padding: the last one ends with the memory, and few are aligned."""
    head = T.make_head(64, 5, v, bias=True)

    def results(keep):
        monkeypatch.setattr(_workspace, "logits_to_keep", lambda rows, *_: keep and rows * -(-v // 64) * 64)
        leaves = T.leaves_of((head.hidden, head.weight, head.bias))
        hidden, weight, bias = leaves
        side = Side.of(hidden, LMHead(weight, bias, 1.0, None), 1.0)
        out = logprob_ops.linear_logprobs(side, head.targets, -100, ())
        return [out[0], *torch.autograd.grad(out[0].sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(results(True), results(False), strict=True))


def test_kept_logits_of_a_kl(monkeypatch):
    """Of both models, whose widths differ."""
    n, v = 130, 301
    inputs = T.make_kl_inputs(n, 5, v, ref_d=9, bias=True, masked=0.3)

    def results(keep):
        monkeypatch.setattr(_workspace, "logits_to_keep", lambda *_: keep and 2 * n * -(-v // 64) * 64)
        leaves = T.leaves_of((inputs.hidden, inputs.weight, inputs.bias))
        value = kl(*leaves[:2], *inputs[2:5], bias=leaves[2], ref_bias=inputs.ref_bias)
        return [value, *torch.autograd.grad(value.sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(results(True), results(False), strict=True))


@pytest.mark.parametrize("n", [15, 4096, 8500])  # below a thread's rows; all threads once; a third round of few rows
def test_rows_that_count_are_found(n):
    head = T.make_head(n, 1, 3, masked=0.9)
    head.targets[: n // 3] = -100  # rounds and warps differ in what they find
    T.check_linear_logprobs(logprobs, head, outputs=())
    head.targets[n // 2], head.targets[-1] = 3, 4
    if os.environ.get("RK_CUDA_ON_HOST_CAPTURING"):  # nothing can be read back, so nothing is raised
        values = logprobs(*head).logprobs
        assert values[n // 2].isnan() and values[-1].isnan()
        return
    with pytest.raises(IndexError, match="target 3 is outside"):
        logprobs(*head)


def test_sequences():
    """The kernels of log-probs and those of pairs, one after the other."""
    hidden, weight, labels, _ = T.make_head(4 * 7, 9, 131, masked=0.2)
    leaf = hidden.view(4, 7, 9).requires_grad_()
    losses = [
        rk.linear_dpo_loss(leaf, weight, labels.view(4, 7), torch.zeros(4), backend=backend).loss
        for backend in ("native", "reference")
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
    assert T.relative_error(got, want) < 1e-5


PAIRS = 259  # two blocks of 128 threads, or one of 256, and three


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_dpo(loss_type):
    policy, ref = (T.randn(PAIRS + 5, seed=seed) for seed in (1, 2))
    order = torch.randperm(PAIRS + 5, generator=torch.Generator().manual_seed(3))
    pairs = order[:PAIRS], order.roll(7)[:PAIRS]
    results = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        leaf = policy.to(dtype, copy=True).requires_grad_()
        out = rk.dpo_loss(
            leaf, ref.to(dtype), *pairs, beta=0.3, loss_type=loss_type, label_smoothing=0.1 * (loss_type == "robust"),
            backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.losses, leaf, T.randn(PAIRS, seed=4, dtype=dtype))
        results.append([*out, grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["bradley_terry_loss", "kl_penalty"])
def test_elementwise(op):
    values = [T.randn(PAIRS, seed=seed) for seed in (1, 2)]
    options = {"estimator": "k3"} if op == "kl_penalty" else {"label_smoothing": 0.1, "center_coefficient": 0.01}
    results = []
    for backend, dtype in (("native", None), ("reference", torch.float64)):
        leaves = T.leaves_of(values, dtype)
        out = getattr(rk, op)(*leaves, **options, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, T.randn(PAIRS, seed=4).to(out.dtype))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
