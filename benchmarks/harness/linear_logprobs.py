"""linear_logprobs: (hidden [N, D], weight [V, D], targets [N]) -> log-probs [N]."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.harness import overlays
from benchmarks.harness.case import HeadCase
from benchmarks.harness.peers import EVERYTHING, GPU_ALONE, TRL, CannotRun, Peer

Logprobs = Callable[..., Tensor]


def our_logprobs(backend: str, *inputs: Tensor, softcap: float | None = None) -> Tensor:
    return rk.linear_logprobs(*inputs, logit_softcap=softcap, backend=backend).logprobs


def unmasked_logprobs(backend: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return our_logprobs(backend, hidden, weight, targets.clamp(min=0))


def eager_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """In fp32, or fp64 where the inputs are."""
    product = hidden @ weight.T
    logits = product.to(torch.promote_types(product.dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    logprobs = eager_logits(hidden, weight, softcap).log_softmax(-1)
    picked = logprobs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(targets == -100, 0.0, picked)


def of_counted(rows_of: Logprobs, hidden: Tensor, weight: Tensor, targets: Tensor, **head) -> Tensor:
    """For those that know no ignore_index: without the ignored rows."""
    if not bool((targets == -100).any()):
        return rows_of(hidden, weight, targets, **head)
    counted = (targets != -100).nonzero()[:, 0]
    logprobs = rows_of(hidden[counted], weight, targets[counted], **head)
    return logprobs.new_zeros(len(targets)).index_copy(0, counted, logprobs)


def trl_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = (1.0, 32768, softcap, 1.0, ())  # temperature, TRL's own chunk size, soft cap, scale, no optional outputs
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[0]


def torch_chunked(reduction: str, *inputs: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise CannotRun("not in this torch")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(*inputs, reduction=reduction, options=options)


def liger_logprobs(reduction: str, hidden: Tensor, weight: Tensor, targets: Tensor, **head) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction=reduction, **head)(weight, hidden, targets)


def liger_scaled(*inputs: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs)


def cce_logprobs(impl: str, *inputs: Tensor, **head) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(*inputs, reduction="none", impl=impl, **head)


def verl_logprobs(*inputs: Tensor) -> Tensor:
    module = overlays.without_init("verl", "utils.kernel.linear_cross_entropy")
    return module.linear_cross_entropy(*inputs, 1.0, "none")[0]


def quack_logprobs(*inputs: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(*inputs, reduction="sum")


class LinearLogprobs(HeadCase):
    op = "linear_logprobs"
    forward_products, total_products = 1, 4

    def inputs(self, rows: int | None = None) -> tuple[Tensor, ...]:
        return self.hidden[:rows], self.weight, self.targets[:rows]

    def ours(self, backend: str) -> Logprobs:
        return partial(our_logprobs, backend)

    def eager(self, *inputs: Tensor, **head) -> Tensor:
        return eager_logprobs(*inputs, **head)

    def others(self) -> list[Peer]:
        no_cap, no_cap_gpu = EVERYTHING - {"softcap"}, GPU_ALONE - {"softcap"}
        at_once = "its forward computes the gradients, for a loss that is the plain sum: three GEMMs, no value a token"
        taken_out = "masked rows are taken out before it"
        cce, cce_note = "torch_compile", "impl='torch_compile'"
        if cuda := self.device.type == "cuda":
            cce, cce_note = "cce", "default filter: small gradients are left out"
        unmasked = Peer("native, unmasked", partial(unmasked_logprobs, "native"), note="nothing ignored", judged=False)
        return [
            *([unmasked] if self.sweep == "masked" else []),
            Peer("CCE", partial(cce_logprobs, cce), note=cce_note, slow_start=not cuda),
            Peer(TRL, partial(of_counted, trl_logprobs), note=taken_out),
            Peer("torch chunked", partial(torch_chunked, "none"), no_cap, "linear_cross_entropy, default options"),
            Peer("torch chunked, sum", partial(torch_chunked, "sum"), no_cap, at_once, sums=True),
            Peer("Liger", partial(liger_logprobs, "none"), GPU_ALONE, "reduction='none': computes logits again"),
            Peer("Liger, scaled", liger_scaled, no_cap_gpu - {"32-bit"}, "by nvidia-cutlass-dsl on Hopper"),
            Peer("Liger, sum", partial(liger_logprobs, "sum"), GPU_ALONE, at_once, sums=True),
            Peer("verl", partial(of_counted, verl_logprobs), no_cap_gpu, taken_out),
            Peer("quack, sum", quack_logprobs, no_cap_gpu - {"32-bit"}, at_once, sums=True),
        ]
