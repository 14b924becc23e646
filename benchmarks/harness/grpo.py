"""GRPO: (hidden [B, T, D], weight, targets [B, T], old_logprobs [B, T], advantages [B]) -> the mean loss, clipped as
PPO does, a mean over sequences of means over tokens (DeepSeekMath eq. 3)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.case import normal
from benchmarks.harness.linear_logprobs import our_logprobs
from benchmarks.harness.peers import Peer
from benchmarks.harness.sequences import SequenceCase


def liger_grpo(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
    mask = targets != -100
    return loss(hidden, weight, targets.clamp(min=0), mask, advantages, old_per_token_logps=old)[0]


class GRPO(SequenceCase):
    op = "grpo"
    forward_products, total_products = 1, 4

    def make_inputs(self) -> None:
        """The old log-probs are of a policy some steps ago, so that some ratios are clipped."""
        super().make_inputs()
        with torch.no_grad():
            now = our_logprobs("auto", self.hidden, self.weight, self.targets)
        self.old = now + normal(*self.shape, seed=5, dtype=torch.float32, device=self.device, scale=0.2)
        self.advantages = normal(self.sequences, seed=6, dtype=torch.float32, device=self.device)

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.targets_of(rows), self.old, self.advantages

    def ours(self, backend: str) -> Callable[..., Tensor]:
        return partial(self.loss_by, partial(our_logprobs, backend))

    def loss_by(self, rows_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        hidden, weight, targets, old, advantages = inputs
        logprobs = rows_of(hidden.flatten(0, 1), weight, targets.flatten()).view(targets.shape)
        ratio, mask = (logprobs - old).exp(), targets != -100
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return -((gain * mask).sum(-1) / mask.sum(-1)).mean()

    def others(self) -> list[Peer]:
        return [*super().others(), Peer("Liger", liger_grpo, note="compiled=False")]
