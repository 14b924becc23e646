"""A case is one op at one shape: its inputs, the truth of a few rows in fp64, the products that nobody can do without,
and the peers that are to do it. Each op is a class in a file of its own."""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.harness.peers import OURS, Peer, compiled

Run = Callable[[], object]
# What the rows of a table share: op, sizes and options of a case.
CASE_KEY = (
    "op", "dtype", "n", "d", "v", "s", "t", "pairs_per_response", "masked", "frozen", "softcap", "model", "sweep",
    "threads",
)  # fmt: skip
ROWS = 64  # rows that are judged: by fp64, and alone against within the batch


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)


@dataclass(kw_only=True)
class Case(abc.ABC):
    """Inputs are large: they, the truth and the peers are there only after `make`."""

    op: ClassVar[str]
    forward_products: ClassVar[int] = 0  # of hidden states and a head
    total_products: ClassVar[int] = 0  # forward's, each of the policy's again, dH, dW

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    backends: tuple[str, ...] = OURS
    rivals: bool | tuple[str, ...] = True  # or the names of those wanted
    budgets_mib: dict[str, int] = field(default_factory=dict)  # by name, measured besides the default

    @abc.abstractmethod
    def ours(self, backend: str) -> Callable[..., Tensor]:
        """This project's way."""

    @abc.abstractmethod
    def eager(self, *inputs: Tensor, **head: float) -> Tensor:
        """Plain torch. In fp64 it is the truth."""

    def others(self) -> list[Peer]:
        """Other packages' ways."""
        return []

    @abc.abstractmethod
    def make_inputs(self) -> None: ...

    @abc.abstractmethod
    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        """A peer's arguments, the leaves first; with `rows`, of the first ones alone."""

    def make(self) -> None:
        """Besides, the truth: values of the first ROWS rows and, where there is one a row, their sum's gradient in the
        first input."""
        self.make_inputs()
        self.peers = self.choose_peers()
        inputs = [x.detach().double() if x.is_floating_point() else x for x in self.inputs(ROWS)]
        leaf = inputs[0].requires_grad_()
        truth = self.true_value(*inputs, **self.head)
        self.true_gradient = torch.autograd.grad(truth.sum(), leaf)[0] if truth.dim() else None
        self.truth = truth.detach()

    def true_value(self, *inputs: Tensor, **head: float) -> Tensor:
        return self.eager(*inputs, **head)

    def compiled_eager(self) -> Callable[..., Tensor]:
        return compiled(self.eager)

    def choose_peers(self) -> list[Peer]:
        tuned = {"triton": "first_s holds its compilation and tuning"}
        peers = [Peer(name, self.ours(name), note=tuned.get(name, "")) for name in self.backends]
        for name, mib in self.budgets_mib.items():
            label, note = f"native, {name} budget", f"{mib} MiB of scratch"
            peers.append(Peer(label, self.ours("native"), note=note, budget_mib=mib))
        rivals = []
        if self.rivals:
            rivals = [Peer("eager", self.eager), *self.others()]
            rivals.insert(1, Peer("torch.compile", self.compiled_eager(), note="of eager", slow_start=True))
        return peers + [peer for peer in rivals if self.rivals is True or peer.name in self.rivals]

    def label(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": self.op, "dtype": dtype, "threads": torch.get_num_threads()}

    def needs(self) -> set[str]:
        """The words of peers.LACKS that hold for it."""
        return {self.device.type}

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.inputs()[:1]

    @property
    def products(self) -> tuple[int, int]:
        """Of forward and in total."""
        return self.forward_products, self.total_products

    @property
    def head(self) -> dict:
        """Options of the head, for every peer."""
        return {}

    @property
    def counted_share(self) -> float:
        """The part of the rows that is not masked."""
        return 1.0

    def share(self, rows: int) -> float:
        """The part of the work that `rows` alone are."""
        return 1.0

    def bare_gemms(self) -> tuple[Run, Run] | None:
        """The products alone: forward, total."""
        return None

    def drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def call(self, peer: Peer, rows: int | None = None) -> Tensor:
        with torch.no_grad():
            return peer.run(*(tensor.detach() for tensor in self.inputs(rows)), **self.head)  # some ask requires_grad

    def step(self, peer: Peer, rows: int | None = None) -> None:
        peer.run(*self.inputs(rows), **self.head).sum().backward()

    def runs(self, peer: Peer) -> tuple[Run | None, Run]:
        """Forward (None where it is the total), forward and backward."""
        return None if peer.sums else partial(self.call, peer), partial(self.step, peer)


@dataclass
class HeadCase(Case):
    """An op of hidden states [n, d] and a head [v, d]."""

    n: int
    d: int
    v: int
    masked: float = 0.0
    frozen: bool = False  # the head needs no gradient
    softcap: float | None = None
    model: str = ""  # whose head it is
    sweep: str = ""  # what varies, where this is one of several that differ in one thing
    tile: int = 8192  # vocabulary rows of a streamed bare GEMM

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the targets."""
        return (self.n,)

    def label(self) -> dict:
        size = {"n": self.n, "d": self.d, "v": self.v, "masked": self.masked, "softcap": self.softcap}
        return super().label() | size | {"frozen": self.frozen, "model": self.model, "sweep": self.sweep}

    def needs(self) -> set[str]:
        needs = super().needs() | {"32-bit" if self.dtype == torch.float32 else "16-bit"}
        return needs | ({"masked"} if self.masked else set()) | ({"softcap"} if self.softcap else set())

    def make_inputs(self) -> None:
        new = partial(normal, dtype=self.dtype, device=self.device)
        self.hidden = new(*self.shape, self.d, seed=1).requires_grad_()
        self.weight = new(self.v, self.d, seed=2, scale=self.d**-0.5).requires_grad_(not self.frozen)
        generator = torch.Generator(self.device).manual_seed(3)
        self.targets = torch.randint(self.v, self.shape, generator=generator, device=self.device)
        if self.masked:
            drawn = torch.rand(self.shape, generator=generator, device=self.device)
            self.targets[drawn < self.masked] = -100

    def make_reference(self) -> None:
        """Another model near the policy."""
        noise = normal(*self.hidden.shape, seed=4, dtype=torch.float32, device=self.device)
        self.ref_hidden = (self.hidden.detach().float() + 0.1 * noise).to(self.dtype)
        self.ref_weight = self.weight.detach().clone()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden,) if self.frozen else (self.hidden, self.weight)

    @property
    def products(self) -> tuple[int, int]:
        """A frozen head's logits are not computed again, and there is no dW."""
        return self.forward_products, self.total_products - 2 * self.frozen

    @property
    def head(self) -> dict:
        return {} if self.softcap is None else {"softcap": self.softcap}

    @property
    def counted_share(self) -> float:
        return float((self.targets != -100).double().mean())

    def share(self, rows: int) -> float:
        return min(1.0, rows / self.n)

    def small(self) -> dict:
        """Another shape, at which a peer's libraries load and its threads start."""
        return {"n": 16, "d": 64, "v": 4096}

    def bare_gemms(self) -> tuple[Run, Run]:
        """Streamed over the vocabulary, of all rows."""
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
            forward(self.products[1] - len(self.leaves))
            grad_weight = torch.empty_like(self.weight[: 0 if self.frozen else self.v])
            for k, part in enumerate(self.weight.split(self.tile)):
                dz = dlogits[:, : len(part)]
                if not self.frozen:
                    torch.mm(dz.T, hidden, out=grad_weight[k * self.tile :][: len(part)])
                torch.mm(dz, part, out=grad_hidden)

        return forward, total
