"""linear_logprobs: values and gradients against fp64, over shapes, dtypes, kinds of logits, options and layouts."""

import functools

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [  # N, D, V
    (0, 33, 129),  # no rows at all: empty results, zero gradients
    (1, 64, 1),  # a vocabulary of one: log-prob, entropy and gradients are 0
    (1, 1, 2),  # the smallest real softmax, and D = 1
    (2, 1, 3),  # D = 1: no vector lane is full, the GEMM's K is less than any block
    (63, 33, 127),  # one row, and one token, short of a tile; odd D
    (64, 64, 128),  # exactly one row tile, one 128-token tile
    (65, 33, 129),  # one row, and one token, over
    (64, 64, 255),  # the same around 256
    (65, 2, 256),  # D = 2: one pair of 16-bit values, the unit of the bf16 dot-product instructions
    (130, 64, 257),  # three row tiles, the last nearly empty
    (70, 1040, 300),  # D over 1024 and no multiple of 64: several blocks along K and a remainder, narrower tiles
    (33, 64, 2047),  # around 2048
    (65, 48, 2048),
    (64, 31, 2049),
    (66, 64, 32003),  # a prime: divisible by no tile, lane or thread count; many tiles, many splits
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {"temperature": 0.7},  # sharpens
    {"temperature": 3.0},  # flattens
    {"logit_scale": 0.0625},  # Cohere
    {"logit_scale": -1.5},  # negative: the largest product becomes the smallest logit
    {"logit_scale": 0.0},  # every logit 0: uniform, and no gradient to hidden
    {"logit_softcap": 30.0},  # Gemma 2
    {"logit_softcap": 0.5},  # cap far below the logits: tanh saturates and its derivative vanishes
    {"logit_scale": 0.5, "logit_softcap": 3.0, "temperature": 0.5},  # the order of the three
]


def run(backend):
    return functools.partial(rk.linear_logprobs, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape, dtype):
    T.check_linear_logprobs(run(backend), T.make_head(*shape, dtype=dtype, bias=True, masked=0.25, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_logit_options(backend, device, options, dtype):
    head = T.make_head(65, 33, 257, dtype=dtype, bias=True, masked=0.25, device=device)
    T.check_linear_logprobs(run(backend), head, **options)


BIASES = [False, True, torch.float32]  # none; in the head's dtype; in fp32 whatever that is


@pytest.mark.parametrize(("kind", "dtype", "bias"), every_pair(list(T.LOGITS), DTYPES, BIASES))
def test_kinds_of_logits(backend, device, kind, dtype, bias):
    head = T.make_head(66, 64, 2050, dtype=dtype, bias=bias, logits=kind, masked=0.1, device=device)
    T.check_linear_logprobs(run(backend), head)


@pytest.mark.parametrize("masked", [0.0, 0.5, 0.99, 1.0])  # none ignored; half; one row of 100 left; all ignored
def test_masked_fraction(backend, device, masked):
    T.check_linear_logprobs(run(backend), T.make_head(100, 33, 257, bias=True, masked=masked, device=device))


@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 1 << 40])  # a custom one; two that are valid tokens; past int32
def test_ignore_index(backend, device, ignore_index):
    head = T.make_head(65, 33, 129, masked=0.4, ignore_index=ignore_index, device=device)
    assert (head.targets == ignore_index).sum() == 26
    T.check_linear_logprobs(run(backend), head, ignore_index=ignore_index)


@pytest.mark.parametrize("name", T.OUTPUTS)
def test_each_output_alone(backend, device, name):
    T.check_linear_logprobs(run(backend), T.make_head(65, 33, 257, masked=0.2, device=device), outputs=(name,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", T.DIFFERENTIABLE)
def test_upstream_into_one_result(backend, device, name, dtype):
    """Signs and sizes differ from token to token, so an upstream collapsed to one number would show."""
    head = T.make_head(65, 33, 257, dtype=dtype, bias=True, masked=0.2, device=device)
    T.check_linear_logprobs(run(backend), head, upstream=(name,))


def test_upstream_of_the_other_outputs_is_none(backend, device):
    head = T.make_head(9, 8, 33, device=device)
    leaves = T.leaves_of(head[:2])
    out = rk.linear_logprobs(*leaves, head.targets, outputs=T.OUTPUTS, backend=backend)
    assert [getattr(out, name).requires_grad for name in out._fields] == [True, True, True, False, False, False]


def test_upstream_from_a_sum_is_expanded(backend, device):
    """.sum() sends an upstream of stride 0, .mean() a scaled one: both equal the explicit vector."""
    hidden, weight, targets, bias = T.make_head(65, 33, 257, bias=True, masked=0.2, device=device)

    def grads(reduce):
        leaves = T.leaves_of((hidden, weight, bias))
        out = rk.linear_logprobs(leaves[0], leaves[1], targets, leaves[2], outputs=("entropy",), backend=backend)
        return torch.autograd.grad(reduce(out), leaves)

    explicit = grads(lambda o: o.logprobs @ torch.ones(65, device=device) + o.entropy @ torch.ones(65, device=device))
    for summed, want in zip(grads(lambda o: (o.logprobs + o.entropy).sum()), explicit, strict=True):
        torch.testing.assert_close(summed, want, rtol=1e-6, atol=1e-6)
    strided = torch.linspace(-1, 1, 130, device=device)[::2]
    for got, want in zip(
        grads(lambda o: (o.logprobs * strided).sum()),
        grads(lambda o: (o.logprobs * strided.clone()).sum()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("need", ["h", "w", "b", "hw", "hb", "wb", "hwb", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_only_where_needed(backend, device, need, dtype):
    hidden, weight, targets, bias = T.make_head(65, 33, 257, dtype=dtype, bias=True, masked=0.2, device=device)
    upstream = T.randn(65, seed=5, device=device)

    def grads(which):
        tensors = dict(zip("hwb", (hidden, weight, bias), strict=True))
        leaves = {k: t.detach().requires_grad_(k in which) for k, t in tensors.items()}
        out = rk.linear_logprobs(leaves["h"], leaves["w"], targets, leaves["b"], backend=backend)
        assert out.logprobs.requires_grad == bool(which)
        if which:
            out.logprobs.backward(upstream)
        assert all((leaves[k].grad is None) == (k not in which) for k in leaves)
        return {k: leaves[k].grad for k in which}

    together = grads("hwb")
    for key, grad in grads(need).items():
        if need == "h" and dtype == torch.bfloat16:  # a frozen head: other numbers are rounded on the way
            assert T.relative_error(grad, together[key]) < 4e-3
        else:
            torch.testing.assert_close(grad, together[key], rtol=1e-5, atol=1e-6)


def test_no_grad_and_no_backward_through_nothing(backend, device):
    head = T.make_head(5, 8, 33, device=device)
    leaves = T.leaves_of(head[:2])
    with torch.no_grad():
        assert not rk.linear_logprobs(*leaves, head.targets, backend=backend).logprobs.requires_grad
    with torch.inference_mode():
        rk.linear_logprobs(head.hidden, head.weight, head.targets, outputs=T.OUTPUTS, backend=backend)


MIXED = [  # hidden, weight, bias
    (torch.bfloat16, torch.float32, False),  # trunk under bf16, fp32 master head
    (torch.float32, torch.bfloat16, torch.float32),  # upcast hidden, frozen bf16 head, fp32 bias
    (torch.bfloat16, torch.bfloat16, torch.float32),  # the bias in fp32
    (torch.float16, torch.float32, torch.float16),
    (torch.bfloat16, torch.float16, False),  # torch promotes the two 16-bit types to fp32
    (torch.float32, torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("hidden", "weight", "bias"), MIXED)
def test_mixed_dtypes(backend, device, hidden, weight, bias):
    head = T.make_head(65, 33, 2050, dtype=hidden, weight_dtype=weight, bias=bias, masked=0.2, device=device)
    T.check_linear_logprobs(run(backend), head)


@pytest.mark.parametrize("leaf", [torch.float32, torch.bfloat16])  # fp32 masters; a model that is bf16 already
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, leaf, autocast):
    """The GEMM reads autocast's dtype, logits stay fp32, gradients come in the leaves' dtypes."""
    head = T.make_head(65, 33, 2050, dtype=leaf, bias=True, masked=0.2, device=device)

    def op(*args, **options):
        with torch.autocast(device.type, dtype=autocast):
            return rk.linear_logprobs(*args, backend=backend, **options)

    T.check_linear_logprobs(op, head, autocast=autocast)


def test_backward_under_autocast(backend, device):
    """Autocast left on around .backward(): the recomputation must not round logits that the forward did not."""
    head = T.make_head(65, 33, 2050, masked=0.2, device=device)
    inside, outside = T.leaves_of(head[:2]), T.leaves_of(head[:2])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rk.linear_logprobs(*inside, head.targets, backend=backend).logprobs.sum().backward()
        out = rk.linear_logprobs(*outside, head.targets, backend=backend)
    out.logprobs.sum().backward()
    for got, want in zip(inside, outside, strict=True):
        assert got.grad.dtype == torch.float32 and T.relative_error(got.grad, want.grad) < 1e-6


def layouts(head):
    """The same numbers under other strides, as models hand them over; hidden and weight keep their values."""
    hidden, weight, targets, bias = head
    n, d = hidden.shape
    wide = torch.stack([hidden, hidden + 1], -1).flatten(1)  # [N, 2D]
    yield "hidden: every second column", head._replace(hidden=wide[:, ::2])
    yield "hidden: every second row", head._replace(hidden=hidden.repeat_interleave(2, 0)[::2])
    yield "hidden: transposed storage", head._replace(hidden=hidden.T.contiguous().T)
    yield "hidden: one row expanded", head._replace(hidden=hidden[:1].expand(n, d))
    yield "hidden: one column expanded", head._replace(hidden=hidden[:, :1].expand(n, d))
    yield "hidden: offset in a larger buffer", head._replace(hidden=torch.cat([hidden[:1], hidden])[1:])
    yield "weight: transposed storage", head._replace(weight=weight.T.contiguous().T)
    yield "weight: columns of a wider one", head._replace(weight=torch.cat([weight, weight], 1)[:, d : 2 * d])
    yield "weight: every second row", head._replace(weight=weight.repeat_interleave(2, 0)[::2])
    yield "targets: strided", head._replace(targets=targets.repeat_interleave(3)[::3])
    yield "targets: one expanded", head._replace(targets=targets[-1:].expand(n))
    yield "bias: strided", head._replace(bias=bias.repeat_interleave(2)[::2])
    yield "bias: one expanded", head._replace(bias=bias[:1].expand(weight.shape[0]))


LAYOUTS = [name for name, _ in layouts(T.make_head(2, 2, 2, bias=True))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(backend, device, name, dtype):
    head = dict(layouts(T.make_head(66, 48, 300, dtype=dtype, bias=True, masked=0.2, device=device)))[name]
    T.check_linear_logprobs(run(backend), head)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3, 2), (2, 0)])  # one row without an axis; empty axis
def test_leading_shapes(backend, device, shape):
    n = int(torch.tensor(shape).prod()) if shape else 1
    hidden, weight, targets, _ = T.make_head(n, 33, 129, device=device)
    flat = rk.linear_logprobs(hidden, weight, targets, outputs=T.OUTPUTS, backend=backend)
    leaf = hidden.view(*shape, 33).requires_grad_()
    out = rk.linear_logprobs(leaf, weight, targets.view(shape), outputs=T.OUTPUTS, backend=backend)
    for value, want in zip(out, flat, strict=True):
        assert value.shape == shape
        torch.testing.assert_close(value.flatten(), want, rtol=1e-6, atol=1e-6)
    out.logprobs.sum().backward()
    assert leaf.grad.shape == leaf.shape


def test_time_sliced_hidden(backend, device):
    """hidden[:, :-1], labels[:, 1:]: the commonest non-contiguous pair there is."""
    hidden, weight, targets, _ = T.make_head(4 * 17, 33, 129, masked=0.3, device=device)
    hidden, targets = hidden.view(4, 17, 33)[:, :-1], targets.view(4, 17)[:, 1:]
    T.check_linear_logprobs(run(backend), T.Head(hidden, weight, targets, None))


def test_budget_of_8_mebibytes_is_still_right(backend, device, small_budget):
    """Rows go through in several chunks, in forward (wide hidden states) and in backward (many rows of dlogits)."""
    for shape in ((1000, 64, 2100), (1700, 1040, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            T.check_linear_logprobs(
                run(backend), T.make_head(*shape, dtype=dtype, bias=True, masked=0.1, device=device)
            )


def test_the_same_gradient_twice_has_the_same_bits(backend, device):
    head = T.make_head(130, 64, 2050, dtype=torch.bfloat16, bias=True, masked=0.2, device=device)

    def grads():
        leaves = T.leaves_of((head.hidden, head.weight, head.bias))
        out = rk.linear_logprobs(leaves[0], leaves[1], head.targets, leaves[2], outputs=("entropy",), backend=backend)
        return torch.autograd.grad((out.logprobs + out.entropy).sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))
