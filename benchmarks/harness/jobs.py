"""A job is one op at one shape: its inputs, the truth of a few rows in fp64, the GEMMs that nobody can do without, and
the peers that are to do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.peers import (
    OUR_OPS,
    OURS,
    RIVALS,
    Peer,
    capped,
    grpo_loss,
    mean_dpo_loss,
    native_with,
    ours,
    unmasked,
)
from rlhf_kernels._workspace import LEAST_MIB

ROWS = 64  # rows that are judged: by fp64, and alone against within the batch
TRUTH_TILE = 8192  # vocabulary rows that are in fp64 at a time


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)


# --- the truth of a few rows, in fp64, a part of the vocabulary at a time ---


def true_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(logits, their slope in the product, part of the weight), part by part."""
    for part in weight.split(TRUTH_TILE):
        product = hidden.double() @ part.double().T
        slope = torch.ones_like(product) if softcap is None else 1 - torch.tanh(product / softcap) ** 2
        yield capped(product, softcap), slope, part.double()


def true_log_sum(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    return torch.stack([z.logsumexp(-1) for z, _, _ in true_logits(hidden, weight, softcap)]).logsumexp(0)


def true_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """log-probs [R], and the gradient of their sum in hidden [R, D]; both exactly 0 where masked."""
    counted, log_sum = targets != -100, true_log_sum(hidden, weight, softcap)
    at_target = weight[targets.clamp(min=0)].double()
    product = (hidden.double() * at_target).sum(-1)
    slope = 1.0 if softcap is None else (1 - torch.tanh(product / softcap) ** 2)[:, None]
    gradient = at_target * slope
    for z, slope_of, part in true_logits(hidden, weight, softcap):
        gradient -= ((z - log_sum[:, None]).exp() * slope_of) @ part
    logprobs = capped(product, softcap) - log_sum
    return torch.where(counted, logprobs, 0.0), torch.where(counted[:, None], gradient, 0.0)


def true_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """KL(policy || reference) [R], and the gradient of its sum in hidden [R, D]."""
    log_sum, ref_log_sum = (
        true_log_sum(h, w, softcap)[:, None] for h, w in ((hidden, weight), (ref_hidden, ref_weight))
    )

    def parts() -> Iterator[tuple[Tensor, ...]]:
        both = (true_logits(hidden, weight, softcap), true_logits(ref_hidden, ref_weight, softcap))
        for (z, slope, part), (r, _, _) in zip(*both, strict=True):
            log_p = z - log_sum
            yield log_p.exp(), log_p - (r - ref_log_sum), slope, part

    kl = torch.stack([(p * u).sum(-1) for p, u, _, _ in parts()]).sum(0)
    gradient = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for p, u, slope, part in parts():
        gradient += (p * (u - kl[:, None]) * slope) @ part
    return kl, gradient


# --- jobs ---


@dataclass
class Job:
    """One op of hidden states and a head; `backends` of this project and, with `rivals`, others."""

    op: str
    n: int
    d: int
    v: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    sequences: tuple[int, int] | None = None  # S, T of DPO and GRPO; N is their product
    pairs_per_response: int = 1  # of DPO
    softcap: float | None = None
    model: str = ""  # whose head it is
    sweep: str = ""  # what varies, where this is one of several that differ in one thing
    threads: int | None = None
    backends: tuple[str, ...] = OURS
    rivals: bool | tuple[str, ...] = True  # or the names of those wanted
    budgets_mib: dict[str, int] = field(default_factory=dict)  # by name, measured besides the default
    tile: int = 8192  # vocabulary rows of a streamed bare GEMM
    peers: list[Peer] = field(default_factory=list)

    def label(self) -> dict:
        label = {"op": self.op, "dtype": str(self.dtype).removeprefix("torch."), "n": self.n, "d": self.d, "v": self.v}
        if self.sequences:
            label |= {"s": self.sequences[0], "t": self.sequences[1]}
        if self.op == "linear_dpo_loss":
            label |= {"pairs_per_response": self.pairs_per_response}
        label |= {"masked": self.masked, "softcap": self.softcap, "model": self.model, "sweep": self.sweep}
        return label | {"threads": self.threads or torch.get_num_threads()}

    def needs(self) -> set[str]:
        """What of peers.LACKS it takes."""
        found = {self.device.type, "32-bit" if self.dtype == torch.float32 else "16-bit"}
        return found | ({"masked"} if self.masked else set()) | ({"softcap"} if self.softcap else set())

    def choose_peers(self) -> list[Peer]:
        own = [ours(self.op, name) for name in self.backends]
        own += [native_with(self.op, budget, mib) for budget, mib in self.budgets_mib.items()]
        if self.sweep == "masked":
            own += [unmasked(name) for name in self.backends]
        if not self.rivals:
            return own
        rivals = RIVALS[self.op](self.device)
        return own + [peer for peer in rivals if self.rivals is True or peer.name in self.rivals]

    def make(self) -> None:
        """Inputs, peers and the truth; not before it is this job's turn."""
        self.make_inputs()
        self.peers = self.choose_peers()
        with torch.no_grad():
            self.truth, self.true_gradient = self.make_truth()

    def make_inputs(self) -> None:
        new = partial(normal, dtype=self.dtype, device=self.device)
        shape = self.sequences or (self.n,)
        self.hidden = new(*shape, self.d, seed=1).requires_grad_()
        self.weight = new(self.v, self.d, seed=2, scale=self.d**-0.5).requires_grad_()
        generator = torch.Generator(self.device).manual_seed(3)
        self.targets = torch.randint(self.v, shape, generator=generator, device=self.device)
        if self.masked:
            drawn = torch.rand(shape, generator=generator, device=self.device)
            self.targets[drawn < self.masked] = -100
        self.counted = int((self.targets[..., 1 if self.op == "linear_dpo_loss" else 0 :] != -100).sum())
        if self.op in ("linear_kl", "linear_dpo_loss"):
            noise = normal(*self.hidden.shape, seed=4, dtype=torch.float32, device=self.device)
            self.ref_hidden = (self.hidden.detach().float() + 0.1 * noise).to(self.dtype)
            self.ref_weight = self.weight.detach().clone()
        if self.op == "linear_dpo_loss":
            first = torch.arange(shape[0] // 2, device=self.device)
            shifts = range(self.pairs_per_response)
            self.pairs = first.repeat(len(shifts)), torch.cat([len(first) + first.roll(k) for k in shifts])
        if self.op == "grpo":  # of a policy some steps ago, so that some ratios are clipped
            with torch.no_grad():
                now = OUR_OPS["linear_logprobs"]("auto", self.hidden, self.weight, self.targets)
            self.old = now + normal(*shape, seed=5, dtype=torch.float32, device=self.device, scale=0.2)
            self.advantages = normal(shape[0], seed=6, dtype=torch.float32, device=self.device)
        # products of forward; of total: each product of the policy again, dH, dW
        self.forward_products = 2 if self.op in ("linear_kl", "linear_dpo_loss") else 1
        self.total_products = self.forward_products + (2 if self.op == "linear_kl" else 1) + 2

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        """A peer's arguments; with `rows`, of the first ones alone (of sequences: with the targets of so many)."""
        if self.op == "linear_logprobs":
            return self.hidden[:rows], self.weight, self.targets[:rows]
        if self.op == "linear_kl":
            return self.hidden[:rows], self.weight, self.ref_hidden[:rows], self.ref_weight
        targets = self.targets
        if rows:
            targets = targets.clone()
            targets[:, self.judged_tokens(rows)] = -100
        if self.op == "grpo":
            return self.hidden, self.weight, targets, self.old, self.advantages
        return self.hidden, self.weight, targets, self.ref_hidden, self.ref_weight, *self.pairs

    def judged_tokens(self, rows: int) -> slice:
        """The tokens of each sequence that are not judged, where `rows` are."""
        return slice(rows // len(self.targets) + (self.op == "linear_dpo_loss"), None)

    @property
    def head(self) -> dict:
        return {} if self.softcap is None else {"softcap": self.softcap}

    def make_truth(self) -> tuple[Tensor, Tensor | None]:
        """Values of the first rows (of sequences: the loss of so many), and their sum's gradient in hidden."""
        if self.op == "linear_logprobs":
            return true_logprobs(*self.inputs(ROWS), **self.head)
        if self.op == "linear_kl":
            return true_kl(*self.inputs(ROWS), **self.head)
        size = len(self.targets)
        each = ROWS // size
        if self.op == "grpo":
            targets = self.targets[:, :each]
            logps = true_logprobs(self.hidden[:, :each].flatten(0, 1), self.weight, targets.flatten())[0]
            old = self.old[:, :each].double()
            return grpo_loss(logps.view(size, -1), old, self.advantages.double(), targets != -100), None
        labels = self.targets[:, 1 : 1 + each]
        both = ((self.hidden, self.weight), (self.ref_hidden, self.ref_weight))
        heads = [(hidden[:, : labels.shape[1]].flatten(0, 1), weight) for hidden, weight in both]
        logps = [true_logprobs(*head, labels.flatten())[0].view(size, -1).sum(-1) for head in heads]
        return mean_dpo_loss(*logps, *self.pairs), None

    def drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def call(self, peer: Peer, rows: int | None = None) -> Tensor:
        with torch.no_grad():
            return peer.run(*(tensor.detach() for tensor in self.inputs(rows)), **self.head)  # some ask requires_grad

    def step(self, peer: Peer, rows: int | None = None) -> None:
        peer.run(*self.inputs(rows), **self.head).sum().backward()

    def share(self, rows: int) -> float:
        """Of the work, that `rows` alone are."""
        return 1.0 if self.sequences else min(1.0, rows / self.n)

    def bare_gemms(self) -> tuple[Callable[[], object], Callable[[], object]] | None:
        """Those products alone, streamed over the vocabulary, of all rows: forward, total."""
        hidden = self.hidden.detach().flatten(0, -2)
        dlogits = normal(len(hidden), self.tile, seed=5, dtype=self.dtype, device=self.device)
        tile, grad_hidden = torch.empty_like(dlogits), torch.empty_like(hidden)

        @torch.no_grad()
        def forward(products: int = self.forward_products) -> None:
            for part in self.weight.split(self.tile):
                for _ in range(products):
                    torch.mm(hidden, part.T, out=tile[:, : len(part)])

        @torch.no_grad()
        def total() -> None:
            forward(self.total_products - 2)
            grad_weight = torch.empty_like(self.weight)
            for part, grad_part in zip(self.weight.split(self.tile), grad_weight.split(self.tile), strict=True):
                dz = dlogits[:, : len(part)]
                torch.mm(dz.T, hidden, out=grad_part)
                torch.mm(dz, part, out=grad_hidden)

        return forward, total

    def arguments(self) -> dict:
        """What makes this job again, as JSON can hold it; for a process of its own."""
        kept = {key: value for key, value in asdict(self).items() if key != "peers"}
        return kept | {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}


def job_of(arguments: dict) -> Job:
    lists = {key: tuple(value) for key, value in arguments.items() if isinstance(value, list)}
    dtype = getattr(torch, arguments["dtype"])
    return Job(**arguments | lists | {"device": torch.device(arguments["device"]), "dtype": dtype})


def budget_that_keeps(n: int, v: int, device_type: str, models: int = 1) -> int:
    """MiB of scratch in which all logits of so many models are kept for backward: half of it on a CPU, three quarters
    on CUDA."""
    padded = 4 * models * -(-n // 64) * 64 * -(-v // 64) * 64
    return max(LEAST_MIB, -(-padded * (6 if device_type == "cpu" else 4) // (3 << 20)))


GPU_SHAPES = [(8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 151936), (4096, 1024, 50257)]  # N, D, V
TINY = [(72, 32, 133)]  # more rows than are judged


def gpu_jobs(device: torch.device, tiny: bool, backends: tuple[str, ...] = OURS, rivals: bool = True) -> Iterator[Job]:
    """The most wanted first."""
    new = partial(Job, device=device, backends=backends, rivals=rivals)
    shapes = TINY if tiny else GPU_SHAPES
    small = sorted(shapes, key=lambda shape: shape[0] * shape[1] * shape[2])
    keeping = {"budgets_mib": {"larger": budget_that_keeps(shapes[0][0], shapes[0][2], device.type)}}
    for shape in shapes:
        options = keeping if shape == shapes[0] else {}
        yield new("linear_logprobs", *shape, masked=0.5 if tiny else 0.0, **options)
    for shape in small[:2]:
        yield new("linear_kl", *shape)
    s, t = (4, 18) if tiny else (8, 1024)
    yield new("linear_dpo_loss", s * t, *shapes[0][1:], sequences=(s, t), **keeping)
    yield new("grpo", s * t, *shapes[0][1:], sequences=(s, t))
    if not tiny:
        yield new("linear_logprobs", *shapes[0], masked=0.5)
        yield new("linear_logprobs", *small[0], dtype=torch.float32)
