"""What `on_gpu.py` measures: contenders, the truth of a few rows in fp64, and jobs: one op at one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from benchmarks.peers import eager_logprobs

SHAPES = [(8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 151936), (4096, 1024, 50257)]  # N, D, V
TINY = [(72, 32, 133)]  # more rows than are judged
TILE = 8192  # vocabulary rows of a streamed bare GEMM
OURS = ("native", "triton")  # the backends that are measured
ROWS = 64  # rows that are judged: by fp64, and alone against within the batch


class CannotRun(Exception):
    """Why a contender cannot do a case."""


class Contender(NamedTuple):
    """`run(*job.inputs())` returns a value per row, or their sum."""

    name: str
    run: Callable[..., Tensor]
    note: str = ""
    slow_start: bool = False  # it compiles for a while: it starts only in the first half of the time


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)


# --- this project's, by backend: named, never "auto", so that none stands in for another ---


def our_logprobs(backend: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return rk.linear_logprobs(hidden, weight, targets, backend=backend).logprobs


def our_kl(backend: str, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    return rk.linear_kl(hidden, weight, ref_hidden, ref_weight, backend=backend)


def our_dpo(
    backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    return rk.linear_dpo_loss(hidden, weight, labels, **reference, backend=backend).loss


OUR_OPS = {"linear_logprobs": our_logprobs, "linear_kl": our_kl, "linear_dpo_loss": our_dpo}


def tuner_choices(op: str) -> dict[str, str]:
    """What Triton's tuner took for the kernels of an op that ran last."""
    if op == "linear_kl":
        from rlhf_kernels.kl import triton_kernels as kl

        kernels = (kl.fold_kl, kl.differentiate_kl)
    else:
        from rlhf_kernels.logprob import triton_kernels as logprob

        kernels = (logprob.fold, logprob.differentiate)
    return {kernel.base_fn.__name__: str(kernel.best_config) for kernel in kernels if hasattr(kernel, "best_config")}


# --- log-probs: (hidden, weight, targets) -> [N] ---


def torch_chunked(reduction: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise CannotRun("not in this torch")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def trl_logprobs(masked: bool, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = (1.0, 32768, None, 1.0, ())  # temperature, TRL's own chunk size, softcap, scale, no optional outputs
    if not masked:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[0]
    counted = (targets != -100).nonzero()[:, 0]  # it knows no ignore_index
    logprobs = ChunkedLogProbFunction.apply(hidden[counted], weight, None, targets[counted], *options)[0]
    return logprobs.new_zeros(len(targets)).index_copy(0, counted, logprobs)


def liger_logprobs(reduction: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction=reduction)(weight, hidden, targets)


def cce_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def logprob_rivals(device: torch.device, masked: bool) -> list[Contender]:
    torch._dynamo.reset()  # or one function at every shape would soon be past the limit and run uncompiled
    cuda = device.type == "cuda"
    compiled = torch.compile(eager_logprobs, dynamic=False, backend="inductor" if cuda else "aot_eager")
    at_once = "its forward computes the gradients, for a loss that is the plain sum: three GEMMs, no value per token"
    return [
        Contender("eager", eager_logprobs),
        Contender("TRL", partial(trl_logprobs, masked), "masked rows are taken out before it" if masked else ""),
        Contender("Liger", partial(liger_logprobs, "none"), "reduction='none': its backward computes logits again"),
        Contender("Liger, sum", partial(liger_logprobs, "sum"), f"reduction='sum': {at_once}"),
        Contender("CCE", cce_logprobs, "reduction='none', default filter: small gradients are left out"),
        Contender("torch chunked", partial(torch_chunked, "none"), "linear_cross_entropy, default options"),
        Contender("torch chunked, sum", partial(torch_chunked, "sum"), f"reduction='sum': {at_once}"),
        Contender("torch.compile", compiled, "of eager" if cuda else "of eager, by aot_eager", slow_start=cuda),
    ]


# --- KL: (hidden, weight, ref_hidden, ref_weight) -> [N] ---


def eager_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    log_p, log_q = ((h @ w.T).float().log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def eager_kl_in_chunks(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    parts = zip(hidden.split(1024), ref_hidden.split(1024), strict=True)
    return torch.cat([checkpoint(eager_kl, h, weight, r, ref_weight, use_reentrant=False) for h, r in parts])


def trl_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    reverse = 1.0  # KL(student || teacher)
    return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, reverse)[0]


KL_RIVALS = [
    Contender("eager", eager_kl),
    Contender("eager in chunks", eager_kl_in_chunks, "of 1024 rows, each checkpointed"),
    Contender("TRL", trl_kl, "ChunkedDivergenceFunction, beta = 1; its forward computes the student's entropy too"),
]


# --- DPO: (hidden [S, T, D], weight, labels [S, T], ref_hidden, ref_weight) -> the mean loss ---


def mean_dpo_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def eager_dpo(hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    def sums(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = eager_logprobs(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())
        return logps.view(len(labels), -1).sum(-1)

    with torch.no_grad():
        ref = sums(ref_hidden, ref_weight)
    return mean_dpo_loss(sums(hidden, weight), ref)


def liger_dpo(
    compiled: bool, hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, _ = LigerFusedLinearDPOLoss(beta=0.1, compiled=compiled)(
        weight, hidden[:, :-1], labels[:, 1:], None, ref_hidden[:, :-1], ref_weight
    )
    return loss


def dpo_rivals(device: torch.device) -> list[Contender]:
    at_once = "its forward computes the gradients"
    rivals = [
        Contender("eager", eager_dpo),
        Contender("Liger", partial(liger_dpo, False), f"compiled=False; {at_once}"),
    ]
    if device.type == "cuda":
        compiled = partial(liger_dpo, True)
        rivals.append(Contender("Liger, compiled", compiled, f"its default; {at_once}", slow_start=True))
    return rivals


# --- the truth of a few rows, in fp64, a part of the vocabulary at a time ---


def true_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log-probs [R], and the gradient of their sum in hidden [R, D]; both exactly 0 where masked."""
    hidden, counted, rows = hidden.double(), targets != -100, targets.clamp(min=0)
    log_sum = torch.stack([(hidden @ part.double().T).logsumexp(-1) for part in weight.split(TILE)]).logsumexp(0)
    at_target = weight[rows].double()
    gradient = at_target.clone()
    for part in weight.split(TILE):
        part = part.double()
        gradient -= (hidden @ part.T - log_sum[:, None]).exp() @ part
    logprobs = (hidden * at_target).sum(-1) - log_sum
    return torch.where(counted, logprobs, 0.0), torch.where(counted[:, None], gradient, 0.0)


def true_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for policy, ref in zip(weight.split(TILE), ref_weight.split(TILE), strict=True):
            yield hidden.double() @ policy.double().T, ref_hidden.double() @ ref.double().T

    sums = [torch.stack([z.logsumexp(-1), r.logsumexp(-1)]) for z, r in parts()]
    log_sum, ref_log_sum = torch.stack(sums).logsumexp(0)[:, :, None]
    terms = [((z - log_sum).exp() * (z - log_sum - r + ref_log_sum)).sum(-1) for z, r in parts()]
    return torch.stack(terms).sum(0)


# --- jobs ---


@dataclass
class Job:
    """One op at one shape, by `backends` of this project and, with `rivals`, by others."""

    op: str
    n: int
    d: int
    v: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    pairs: tuple[int, int] | None = None  # S, T of DPO; N is their product
    backends: tuple[str, ...] = OURS
    rivals: bool = True
    contenders: list[Contender] = field(default_factory=list)

    def label(self) -> dict:
        shape = {"s": self.pairs[0], "t": self.pairs[1]} if self.pairs else {}
        label = {"op": self.op, "dtype": str(self.dtype).removeprefix("torch."), "n": self.n, "d": self.d, "v": self.v}
        return label | shape | {"masked": self.masked}

    def make(self) -> None:
        """Inputs, contenders and the truth; not before it is this job's turn."""
        new = partial(normal, dtype=self.dtype, device=self.device)
        self.hidden = new(*(self.pairs or (self.n,)), self.d, seed=1).requires_grad_()
        self.weight = new(self.v, self.d, seed=2, scale=self.d**-0.5).requires_grad_()
        generator = torch.Generator(self.device).manual_seed(3)
        shape = self.pairs or (self.n,)
        self.targets = torch.randint(self.v, shape, generator=generator, device=self.device)
        if self.masked:
            drawn = torch.rand(shape, generator=generator, device=self.device)
            self.targets[drawn < self.masked] = -100
        self.counted = int((self.targets[..., 1 if self.pairs else 0 :] != -100).sum())
        if self.op != "linear_logprobs":
            moved = self.hidden.detach().float() + 0.1 * normal(
                *self.hidden.shape, seed=4, dtype=torch.float32, device=self.device
            )
            self.ref_hidden, self.ref_weight = moved.to(self.dtype), self.weight.detach().clone()
        # products of forward; of total: each product of the policy again, dH, dW
        self.forward_products = 1 if self.op == "linear_logprobs" else 2
        self.total_products = self.forward_products + (2 if self.op == "linear_kl" else 1) + 2
        self.true_gradient: Tensor | None = None
        compiles = {"triton": "first_s holds its compilation and tuning"}
        ours = [Contender(name, partial(OUR_OPS[self.op], name), compiles.get(name, "")) for name in self.backends]
        with torch.no_grad():
            if self.op == "linear_logprobs":
                rivals = logprob_rivals(self.device, self.masked > 0)
                self.truth, self.true_gradient = true_logprobs(*self.inputs(ROWS))
            elif self.op == "linear_kl":
                rivals = KL_RIVALS
                self.truth = true_kl(*self.inputs(ROWS))
            else:
                rivals = dpo_rivals(self.device)
                self.truth = self.true_dpo_loss()
        self.contenders = ours + (rivals if self.rivals else [])

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        """A contender's arguments; with `rows`, of the first ones alone (DPO: with the labels of so many alone)."""
        if self.op == "linear_logprobs":
            return self.hidden[:rows], self.weight, self.targets[:rows]
        if self.op == "linear_kl":
            return self.hidden[:rows], self.weight, self.ref_hidden[:rows], self.ref_weight
        labels = self.targets
        if rows:
            labels = labels.clone()
            labels[:, 1 + rows // len(labels) :] = -100
        return self.hidden, self.weight, labels, self.ref_hidden, self.ref_weight

    def true_dpo_loss(self) -> Tensor:
        size = len(self.targets)
        labels = self.targets[:, 1 : 1 + ROWS // size]
        both = ((self.hidden, self.weight), (self.ref_hidden, self.ref_weight))
        heads = [(hidden[:, : labels.shape[1]].flatten(0, 1), weight) for hidden, weight in both]
        logps = [true_logprobs(*head, labels.flatten())[0].view(size, -1).sum(-1) for head in heads]
        return mean_dpo_loss(*logps)

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def call(self, contender: Contender) -> Tensor:
        with torch.no_grad():
            return contender.run(*(tensor.detach() for tensor in self.inputs()))  # some decide by requires_grad

    def step(self, contender: Contender) -> None:
        contender.run(*self.inputs()).sum().backward()

    def bare_gemms(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Those products alone, streamed over the vocabulary, of all rows: forward, total."""
        hidden = self.hidden.detach().flatten(0, -2)
        dlogits = normal(len(hidden), TILE, seed=5, dtype=self.dtype, device=self.device)
        tile, grad_hidden = torch.empty_like(dlogits), torch.empty_like(hidden)

        @torch.no_grad()
        def forward(products: int = self.forward_products) -> None:
            for part in self.weight.split(TILE):
                for _ in range(products):
                    torch.mm(hidden, part.T, out=tile[:, : len(part)])

        @torch.no_grad()
        def total() -> None:
            forward(self.total_products - 2)
            grad_weight = torch.empty_like(self.weight)
            for part, grad_part in zip(self.weight.split(TILE), grad_weight.split(TILE), strict=True):
                dz = dlogits[:, : len(part)]
                torch.mm(dz.T, hidden, out=grad_part)
                torch.mm(dz, part, out=grad_hidden)

        return forward, total


def jobs(device: torch.device, tiny: bool, backends: tuple[str, ...] = OURS, rivals: bool = True) -> Iterator[Job]:
    """The most wanted first."""
    new = partial(Job, device=device, backends=backends, rivals=rivals)
    shapes = TINY if tiny else SHAPES
    small = sorted(shapes, key=lambda shape: shape[0] * shape[1] * shape[2])
    for shape in shapes:
        yield new("linear_logprobs", *shape, masked=0.5 if tiny else 0.0)
    for shape in small[:2]:
        yield new("linear_kl", *shape)
    s, t = (4, 18) if tiny else (8, 1024)
    yield new("linear_dpo_loss", s * t, *shapes[0][1:], pairs=(s, t))
    if not tiny:
        yield new("linear_logprobs", *shapes[0], masked=0.5)
        yield new("linear_logprobs", *small[0], dtype=torch.float32)
