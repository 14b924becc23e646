"""dpo_loss, bradley_terry_loss and kl_penalty on [S]-sized tensors: what a training step pays for the loss once
log-probs or rewards are there. The native backend by "auto", which these functions choose by themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.harness.case import Case, normal


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
class PairLoss(Case):
    """One of WAYS on `s` log-probs or rewards in fp32."""

    op: str
    s: int

    def ours(self, backend: str) -> Callable[..., Tensor]:
        return WAYS[self.op][0]

    def eager(self, *inputs: Tensor) -> Tensor:
        return WAYS[self.op][1](*inputs)

    def label(self) -> dict:
        return super().label() | {"s": self.s}

    def make_inputs(self) -> None:
        new = partial(normal, self.s, dtype=torch.float32, device=self.device)
        self.policy = new(seed=1, scale=5.0).requires_grad_()
        reference = self.policy.detach() + new(seed=2, scale=0.3)
        pairs = torch.arange(self.s, device=self.device).chunk(2)
        self.fixed = {"dpo_loss": (reference, *pairs), "kl_penalty": (reference,)}.get(self.op, ())

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        return self.policy, *self.fixed
