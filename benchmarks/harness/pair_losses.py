"""The ops on [S]-sized tensors as jobs: what a training step pays for the loss once log-probs or rewards are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.harness.jobs import normal
from benchmarks.harness.peers import Peer


def our_dpo(policy: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    return rk.dpo_loss(policy, reference, chosen, rejected, 0.1).losses


def eager_dpo(policy: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    ratios = policy - reference
    return -F.logsigmoid(0.1 * (ratios[chosen] - ratios[rejected]))


def our_bradley_terry(rewards: Tensor) -> Tensor:
    return rk.bradley_terry_loss(*rewards.chunk(2))


def eager_bradley_terry(rewards: Tensor) -> Tensor:
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected)


def our_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    return rk.kl_penalty(logprobs, reference, "k3")


def eager_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    ratio = reference - logprobs
    return ratio.exp() - 1 - ratio


WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dpo_loss": (our_dpo, eager_dpo),
    "bradley_terry_loss": (our_bradley_terry, eager_bradley_terry),
    "kl_penalty": (our_k3, eager_k3),
}


@dataclass
class PairLossJob:
    """`s` log-probs or rewards in fp32. The native backend by "auto", which these functions choose by themselves."""

    op: str
    s: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int | None = None
    backends: tuple[str, ...] = ("native",)
    rivals: bool = True
    peers: list[Peer] = field(default_factory=list)
    d: int = 0
    v: int = 0
    forward_products: int = 0
    total_products: int = 0
    true_gradient: Tensor | None = None

    def __post_init__(self) -> None:
        self.n = self.counted = self.s

    def label(self) -> dict:
        return {"op": self.op, "dtype": "float32", "s": self.s, "threads": self.threads or torch.get_num_threads()}

    def needs(self) -> set[str]:
        return {self.device.type}

    def choose_peers(self) -> list[Peer]:
        ours, eager = WAYS[self.op]
        assert "native" in rk.available_backends(self.device)  # or "auto" would be another
        own = [Peer("native", ours)]
        if not self.rivals:
            return own
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        return [*own, Peer("eager", eager), Peer("torch.compile", compiled, note="of eager", slow_start=True)]

    def make_inputs(self) -> None:
        new = partial(normal, self.s, dtype=torch.float32, device=self.device)
        policy = new(seed=1, scale=5.0).requires_grad_()
        reference = policy.detach() + new(seed=2, scale=0.3)
        first = torch.arange(self.s // 2, device=self.device)
        self._inputs: tuple[Tensor, ...] = (policy, reference)
        if self.op == "dpo_loss":
            self._inputs += (first, first + self.s // 2)
        elif self.op == "bradley_terry_loss":
            self._inputs = (policy,)

    def make(self) -> None:
        self.make_inputs()
        self.peers = self.choose_peers()
        with torch.no_grad():
            self.truth = WAYS[self.op][1](*(x.double() if x.is_floating_point() else x for x in self._inputs))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self._inputs[:1]

    def call(self, peer: Peer, rows: int | None = None) -> Tensor:
        with torch.no_grad():
            return peer.run(*(tensor.detach() for tensor in self._inputs))

    def step(self, peer: Peer, rows: int | None = None) -> None:
        peer.run(*self._inputs).sum().backward()

    def share(self, rows: int) -> float:
        return 1.0

    def drop_gradients(self) -> None:
        self.leaves[0].grad = None

    def bare_gemms(self) -> None:
        return None

    def arguments(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key in ("op", "s", "threads")}
