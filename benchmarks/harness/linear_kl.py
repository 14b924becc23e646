"""linear_kl: (hidden [N, D], weight [V, D], ref_hidden [N, D], ref_weight [V, D]) -> KL(policy || reference) [N]."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.harness.case import HeadCase
from benchmarks.harness.linear_logprobs import eager_logits
from benchmarks.harness.peers import EVERYTHING, TRL, Peer


def our_kl(backend: str, *inputs: Tensor, softcap: float | None = None) -> Tensor:
    return rk.linear_kl(*inputs, logit_softcap=softcap, backend=backend)


def trl_kl(hidden: Tensor, weight: Tensor, *reference: Tensor, softcap: float | None = None) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    reverse, options = 1.0, (1.0, 1.0, softcap, 1.0, softcap)  # temperature, each head's scale and soft cap
    return ChunkedDivergenceFunction.apply(hidden, weight, None, *reference, None, reverse, *options)[0]


def liger_kl(hidden: Tensor, *others: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    reverse = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    nothing = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # labels of a loss with weight 0
    return reverse(hidden, *others, nothing) * len(hidden)


class LinearKL(HeadCase):
    op = "linear_kl"
    forward_products, total_products = 2, 6

    def make_inputs(self) -> None:
        super().make_inputs()
        self.make_reference()

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        return self.hidden[:rows], self.weight, self.ref_hidden[:rows], self.ref_weight

    def ours(self, backend: str) -> Callable[..., Tensor]:
        return partial(our_kl, backend)

    def eager(self, *inputs: Tensor, softcap: float | None = None) -> Tensor:
        log_p, log_q = (eager_logits(*inputs[k : k + 2], softcap).log_softmax(-1) for k in (0, 2))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def others(self) -> list[Peer]:
        mean = "beta=1; its forward computes the gradients of the mean, no value a token"
        return [
            Peer("Liger, sum", liger_kl, EVERYTHING - {"softcap"}, mean, sums=True),
            Peer(TRL, trl_kl, note="beta=1; computes the student's entropy too"),
        ]
