"""torch.compile sees through the Triton ops: graphs hold their kernels, not opaque calls. Traced here without a GPU.

Whole functions are traced on CPU tensors, which only the choice of a backend tells from a GPU's; the ops by themselves
on fake tensors of a GPU. A driver that names one lets torch read from the kernels what they write.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import rlhf_kernels as rk
from rlhf_kernels import _triton

triton = pytest.importorskip("triton")

D, V = 64, 300
FORWARD, BACKWARD = {"fold", "merge"}, {"differentiate"}


class Hopper:
    """The part of a driver that triton's compiler uses."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    from rlhf_kernels._triton import launch

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_triton, "why_not_on", lambda device: None)
    monkeypatch.setattr(launch, "generation", lambda device: 9)  # tracing must not ask for addresses
    torch.compiler.reset()
    kernel_side_table.reset_table()
    yield
    torch.compiler.reset()


class Traced(Exception):
    """Raised where a graph would run, which takes a GPU."""


def tracer(graphs):
    def keep(graph, inputs):
        graphs.append(graph)

        def run(*args):
            raise Traced

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def launches(graph):
    """Name of each launched kernel -> the arguments that it writes, which torch copies before."""
    results = {}
    for node in graph.graph.nodes:
        assert "rlhf_kernels" not in str(node.target), f"opaque call of {node.target}"
        if node.target is triton_kernel_wrapper_functional:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            kernel = getattr(kernel, "fn", None) if hasattr(kernel, "configs") else kernel
            results.setdefault(kernel.fn.__name__, set()).update(node.kwargs["tensors_to_clone"])
    return results


def head(rows, dtype=torch.bfloat16):
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=make).to(dtype).requires_grad_()
    return hidden, torch.randn(V, D, generator=make).to(dtype).requires_grad_(), torch.arange(rows) % V


def logprobs(hidden, weight, targets):
    out = rk.linear_logprobs(hidden, weight, targets, outputs=("entropy", "is_top1"), backend="triton")
    return (out.logprobs + out.entropy + out.is_top1).sum()


def capped_logprobs(hidden, weight, targets):
    bias = weight.float().sum(1)
    out = rk.linear_logprobs(hidden, weight, targets, bias, logit_softcap=30.0, temperature=0.7, backend="triton")
    return out.logsumexp.sum()


def frozen_logprobs(hidden, weight, targets):
    out = rk.linear_logprobs(hidden, weight.detach(), targets, outputs=("entropy",), backend="triton")
    return (out.logprobs + out.entropy.detach()).sum()


def exact_kl(hidden, weight, targets):
    ref = hidden[:, : D // 2].detach(), weight[:, : D // 2].detach()
    return rk.linear_kl(hidden, weight, *ref, targets > 3, backend="triton").sum()


def penalty(hidden, weight, targets):
    return rk.kl_penalty(hidden[:, 0], hidden[:, 1], "k3", backend="triton").sum()


def pair_losses(hidden, weight, targets):
    chosen = torch.arange(hidden.shape[0])
    return rk.dpo_loss(hidden[:, 0], hidden[:, 1], chosen, chosen.flip(0), backend="triton").losses.sum()


def reward_losses(hidden, weight, targets):
    return rk.bradley_terry_loss(hidden[:, 0], hidden[:, 1], center_coefficient=0.1, backend="triton").sum()


def preference(hidden, weight, targets):
    batch = hidden.view(2, -1, D), weight, targets.view(2, -1)
    return rk.linear_dpo_loss(*batch, torch.zeros(2), backend="triton").loss


CASES = {  # the function, what it launches forward and backward
    logprobs: (FORWARD, BACKWARD),
    capped_logprobs: (FORWARD, BACKWARD),
    frozen_logprobs: (FORWARD | {"restate", "combine"}, set()),
    exact_kl: ({"fold_kl", "merge_kl_splits"}, {"differentiate_kl"}),
    penalty: ({"estimate"}, {"differentiate_estimate"}),
    pair_losses: ({"pair_forward"}, {"pair_backward"}),
    reward_losses: ({"reward_forward"}, {"reward_backward"}),
    preference: (FORWARD | {"pair_forward"}, BACKWARD | {"pair_backward"}),
}


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_one_graph_for_every_number_of_rows(op):
    graphs = []
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=tracer(graphs))
    for rows in (140, 192, 262):  # 192 is a multiple of 16; a single block of rows would be a graph of its own
        with pytest.raises(Traced):
            compiled(*head(rows))
    assert len(graphs) == 2, f"{len(graphs) // 2} graphs for three sizes"
    for graph, kernels in zip(graphs, CASES[op], strict=True):
        results = launches(graph)
        assert set(results) == kernels
        # a copy of the head would cost more than the op
        written = set().union(*results.values())
        assert not written & {"hidden", "head", "ref_hidden", "ref_head", "targets", "policy"}, results


def test_autocast_is_traced():
    def op(hidden, weight, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return rk.linear_logprobs(hidden, weight, targets, backend="triton").logprobs.sum()

    graphs = []
    with pytest.raises(Traced):
        torch.compile(op, fullgraph=True, dynamic=True, backend=tracer(graphs))(*head(70, torch.float32))
    assert [set(launches(graph)) for graph in graphs] == [FORWARD, BACKWARD]
    products = [node for node in graphs[1].graph.nodes if node.target in PRODUCTS]
    assert products and all(node.meta["val"].dtype == torch.float32 for node in products), "sums are rounded"


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm")} | {
    getattr(torch.ops.aten, name).dtype for name in ("mm", "addmm")
}


def test_the_choice_of_a_backend_is_traced(monkeypatch):
    monkeypatch.undo()  # the real one

    def chosen(x):
        return x + (1 if _triton.why_not_on(torch.device("cuda")) is None else 0)

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(())) == 1


@pytest.mark.parametrize(
    ("product", "to"),
    [("add_product", torch.float32), ("write_product", torch.float32), ("write_product", torch.bfloat16)],
)
def test_products_of_a_gpu_are_traced(monkeypatch, product, to):
    """Their fp32 sums are written into a tensor (out=), which a graph has to state without mutation. In fp32 whatever
    dtype they are for: a graph may run where torch lets the sums of a bf16 product be rounded."""
    from rlhf_kernels._triton import gradient

    monkeypatch.setattr(
        torch.Tensor, "copy_", torch.Tensor.add_
    )  # torch without CUDA cannot trace copy_ of its tensors
    with FakeTensorMode():
        a, b = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in ((6, 4), (4, 8)))
        sums = torch.empty(6, 8, device="cuda", dtype=to)
        graph = make_fx(dispatch_functionalize(lambda *args: getattr(gradient, product)(*args)))(sums, a, b)
    (node,) = (node for node in graph.graph.nodes if node.target in PRODUCTS)
    assert node.meta["val"].dtype == torch.float32 and node.meta["val"].device.type == "cuda"


@pytest.mark.parametrize("setting", [True, False, (False, False)])
def test_the_settings_of_torchs_products_are_put_back(monkeypatch, setting):
    """While a product is computed no partial sum may be rounded."""
    from rlhf_kernels._triton import gradient

    matmul, seen = torch.backends.cuda.matmul, []
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]

    def settings():
        return [getattr(matmul, name) for name in (*names, *(f"{n}_split_k" for n in names), "allow_fp16_accumulation")]

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(settings())
            return super().__torch_function__(function, types, args, kwargs or {})

    before = settings()
    try:
        for name in names:
            setattr(matmul, name, setting)
        matmul.allow_fp16_accumulation = True
        chosen = settings()
        a = torch.ones(2, 2).as_subclass(Watched)
        gradient.write_product(torch.empty(2, 2), a, a)
        gradient.add_product(torch.zeros(2, 2), a, a)
        assert settings() == chosen
        with pytest.raises(RuntimeError):
            gradient.write_product(torch.empty(2, 2), a, torch.ones(3, 3))
        assert settings() == chosen
        assert [False, False, *chosen[2:4], False] in seen
    finally:
        for name, reduced, split_k in zip(names, before, before[2:], strict=False):
            setattr(matmul, name, (reduced, split_k))
        matmul.allow_fp16_accumulation = before[-1]


@pytest.mark.parametrize("rows", [2047, 2048])  # 15 blocks of 128 rows and a part of one, and 16 blocks
def test_many_rows_are_tuned_and_kept_on_disk_and_nothing_is_tuned_in_a_captured_graph(rows, monkeypatch, tmp_path):
    """A captured graph takes what has run before: the tuner's choice, or the first."""
    from rlhf_kernels._logits import LMHead, Side
    from rlhf_kernels.logprob import triton_kernels as kernels

    timed, ran, captured = [], [], []

    def bench(*args, config, **options):
        timed.append(config)
        return [float(-config.num_stages)] * 3  # the last choice but one is the best

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)  # as in eager mode
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(captured))
    monkeypatch.setattr(kernels.fold, "_bench", bench)
    monkeypatch.setattr(kernels.merge, "run", lambda *args, **options: None)
    monkeypatch.setattr(kernels.fold.fn, "run", lambda *args, **options: ran.append(options["num_stages"]))
    hidden, weight, targets = head(rows)
    side = Side(hidden, LMHead(weight, None, 1.0, None), 1.0, torch.bfloat16)
    few, many = kernels.fold.configs[0].num_stages, max(config.num_stages for config in kernels.fold.configs)
    assert few != many
    kernels.fold.cache.clear()
    captured.append(True)
    kernels.forward(side, targets, None, True, False)
    assert ran == [few] and not timed and not list(tmp_path.rglob("*.autotune.json"))
    captured.clear()
    kernels.forward(side, targets, None, True, False)
    kernels.fold.cache.clear()
    kernels.forward(side, targets, None, True, False)  # from the disk
    captured.append(True)
    kernels.forward(side, targets, None, True, False)
    kernels.fold.cache.clear()
    tuned = rows == 2048
    assert ran == [few, *[many if tuned else few] * 3]
    assert len(timed) == (len(kernels.fold.configs) if tuned else 0)
    assert bool(list(tmp_path.rglob("*.autotune.json"))) == tuned


def test_few_rows_are_a_graph_without_choices():
    """Traced, rows below 16 blocks take the first choice too, so that there is nothing to tune."""
    graphs = []
    compiled = torch.compile(logprobs, fullgraph=True, dynamic=True, backend=tracer(graphs))
    choices = []
    for rows in (262, 2100):
        with pytest.raises(Traced):
            compiled(*head(rows))
        (fold,) = (
            node for node in graphs[-2].graph.nodes
            if node.target is triton_kernel_wrapper_functional and "target_logit" in node.kwargs["kwargs"]
            and "hidden" in node.kwargs["kwargs"]
        )  # fmt: skip
        choices.append(len(kernel_side_table.get_kernel(fold.kwargs["kernel_idx"]).configs))
    assert choices == [1, 4]
