"""linear_dpo_loss: (hidden [S, T, D], weight, labels [S, T], ref_hidden, ref_weight) -> the mean loss of pairs, the
first half of the sequences chosen, the second rejected."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.harness.peers import Peer
from benchmarks.harness.sequences import SequenceCase


def our_dpo(backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, *reference: Tensor) -> Tensor:
    options = dict(zip(("ref_hidden", "ref_weight"), reference, strict=True))
    return rk.linear_dpo_loss(hidden, weight, labels, **options, backend=backend).loss


def liger_dpo(compile_it: bool, *inputs: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight, labels, ref_hidden, ref_weight = inputs
    loss = LigerFusedLinearDPOLoss(beta=0.1, compiled=compile_it)
    return loss(weight, hidden[:, :-1], labels[:, 1:], None, ref_hidden[:, :-1], ref_weight)[0]


class LinearDPO(SequenceCase):
    op = "linear_dpo_loss"
    forward_products, total_products = 2, 5
    shift = 1

    def label(self) -> dict:
        return super().label() | {"pairs_per_response": 1}

    def make_inputs(self) -> None:
        super().make_inputs()
        self.make_reference()

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.targets_of(rows), self.ref_hidden, self.ref_weight

    def ours(self, backend: str) -> Callable[..., Tensor]:
        return partial(our_dpo, backend)

    def loss_by(self, rows_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        hidden, weight, labels, ref_hidden, ref_weight = inputs

        def sums(hidden: Tensor, weight: Tensor) -> Tensor:
            logps = rows_of(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())
            return logps.view(len(labels), -1).sum(-1)

        with torch.no_grad():
            reference = sums(ref_hidden, ref_weight)
        chosen, rejected = (sums(hidden, weight) - reference).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    def others(self) -> list[Peer]:
        at_once = "its forward computes the gradients"
        default = f"its default; {at_once}"
        return [
            Peer("Liger, compiled", partial(liger_dpo, True), note=default, sums=True, slow_start=True),
            Peer("Liger", partial(liger_dpo, False), note=f"compiled=False; {at_once}", sums=True),
            *super().others(),
        ]
