"""verl's fused kernel for log-probs and entropy, computed by rlhf_kernels.

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton
    actor_rollout_ref.model.external_lib=rlhf_kernels.integrations.verl_patched

verl imports `external_lib` in each of its workers; `verl_patched` is a module that calls `patch()`.
"""

from __future__ import annotations

import importlib
import sys

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import parallel
from .._checks import check_choice
from ..logprob import linear_logprobs
from .versions import check_parameters, check_version

__all__ = ["linear_cross_entropy", "patch"]

VERSIONS = ("0.9.1",)
KERNEL = "verl.utils.kernel.linear_cross_entropy"
# These take the function's name when they are imported, the models of FSDP when they are called.
IMPORTED_BY_NAME = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")


def patch() -> None:
    """verl's `impl_backend: triton` uses `linear_cross_entropy` of this module instead of verl's kernel, in this
    process, with FSDP and with Megatron, before or after verl was imported. Its other backends, torch and liger, stay.

    Raises ImportError: another version of verl, or a function that does not take what it took in that version.
    """
    check_version("verl", VERSIONS)
    kernel = importlib.import_module(KERNEL)
    check_parameters(
        kernel.LinearCrossEntropy.forward, "ctx, hidden, weight, labels, temperature, reduction, dist_process_group"
    )
    for name in (KERNEL, *IMPORTED_BY_NAME):
        if name in sys.modules:
            vars(sys.modules[name])["linear_cross_entropy"] = linear_cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The results of verl's function of this name: log-probs (not their negatives, whatever the name says) and
    entropies.

    Unlike verl's kernel it takes any hidden size, any dtype and device of rlhf_kernels, logits of any size (verl's
    running maximum starts at 0, so that a row whose logits are all below -88 underflows), and -100 as a label that does
    not count.

    Args:
        hidden: [..., D]. weight: [V, D], the head. labels: [...] integers, as many as hidden has rows; its leading
            dimensions may be others (Megatron's are [T, B] beside [B, T]).
        temperature: logits are `hidden @ weight.T / temperature`.
        reduction: of the log-probs: "none", "sum" or "mean", in which labels of -100 count as zeros.
        dist_process_group: weight holds this rank's rows of the head, in the order of the ranks of the group; all else
            is the same on each of them. Gradients of hidden are, as verl's are, to be summed over the group by the
            caller, as Megatron's sequence parallelism does. (Each rank's is the sum over the number of ranks.)

    Returns: (log-probs [N], or a scalar if reduced; entropies [N]), N = B * T, fp32, in nats, differentiable both.

    Raises ValueError: shapes that do not fit, another reduction, a weight that is a DTensor; and as
    `rlhf_kernels.linear_logprobs` or, with a group, `rlhf_kernels.parallel.linear_logprobs`.
    """
    reduction = reduction.lower()
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    if isinstance(weight, DTensor):
        raise ValueError(
            "weight is a DTensor, a head that FSDP2 shards on its own: verl reads it outside the head's call, where "
            "it is not gathered. Leave the head to the outermost fully_shard, or use FSDP1"
        )
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    if dist_process_group is None:
        results = linear_logprobs(hidden, weight, labels, temperature=temperature, outputs=("entropy",))
    else:
        results = parallel.linear_logprobs(
            _with_shared_gradient(hidden, dist.get_world_size(dist_process_group)), weight, labels,
            group=dist_process_group, temperature=temperature, outputs=("entropy",),
        )  # fmt: skip
    assert results.entropy is not None
    logprobs = results.logprobs
    if reduction != "none":
        logprobs = logprobs.sum() if reduction == "sum" else logprobs.mean()
    return logprobs, results.entropy


def _with_shared_gradient(hidden: Tensor, ranks: int) -> Tensor:
    """Itself, with its gradient divided by the number of ranks: `parallel` gives each of them the whole sum."""
    hidden = hidden.view_as(hidden)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient / ranks)
    return hidden
