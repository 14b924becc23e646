"""`linear_dpo_loss` over ranks: sharded log-probs, joined to `dpo_loss` as in `rlhf_kernels.dpo.linear`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .._logits import LMHead
from .._packing import packing_of
from ..dpo.linear import LinearDPOLoss, Reference, loss_of_sequences
from ..dpo.reference import LossOptions
from .sequences import ShardedSequences


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    shift: bool = True,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    chosen_idxs: Tensor | None = None,
    rejected_idxs: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> LinearDPOLoss:
    r"""`rlhf_kernels.linear_dpo_loss` over a head, or over sequences, or both, that are split over ranks.

    Args:
        weight, bias, ref_weight, ref_bias, group: as in `linear_logprobs` of this module; the two heads may be split
            differently. With `sequence_group`, also whole heads.
        sequence_group, shift, cu_seqlens, position_ids: as in `sequence_logprobs` of this module. ref_hidden has the
            positions of hidden.
        hidden, labels, the rest: as in `rlhf_kernels.linear_dpo_loss`, replicated over `group`; ref_logps and the
            indices of pairs over both groups.

    Returns:
        LinearDPOLoss, the same bits on every rank of both groups. Call backward on the loss on each of them; gradients
        go out as in `sequence_logprobs` of this module.

    Raises: as `rlhf_kernels.linear_dpo_loss` and `sequence_logprobs` of this module.
    """
    head = LMHead(weight, bias, logit_scale, logit_softcap)
    sequences = ShardedSequences(
        labels, group, sequence_group, shift, False, temperature, -100, backend, cu_seqlens, position_ids
    )
    sequences.check()
    packing = packing_of(hidden, labels, cu_seqlens, position_ids, "[S, T, D]")
    head.check_options(temperature)
    return loss_of_sequences(
        sequences.logprobs, hidden.shape[0] if packing is None else packing.size, hidden, head,
        Reference(ref_logps, ref_hidden, ref_weight, ref_bias), (chosen_idxs, rejected_idxs),
        LossOptions(loss_type, beta, label_smoothing, gamma), backend,
    )  # fmt: skip
