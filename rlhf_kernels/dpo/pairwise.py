"""The pairwise losses of the DPO family, from per-response log-probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_same_device, check_vectors, common_dtype
from .._dispatch import ready_for_native, resolve_backend
from . import ops, reference


class DPOLoss(NamedTuple):
    """`losses` [P], and `rewards` [S] = beta * (log pi - log pi_ref), detached."""

    losses: Tensor
    rewards: Tensor


def dpo_loss(
    policy_logps: Tensor,
    ref_logps: Tensor | None,
    chosen_idxs: Tensor,
    rejected_idxs: Tensor,
    beta: float = 0.1,
    *,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    token_counts: Tensor | None = None,
    gamma: float = 0.5,
    backend: str = "auto",
) -> DPOLoss:
    r"""Direct preference optimisation over pairs of responses, each response computed once.

    With the log-ratios w = (log pi - log pi_ref)(chosen) and l = (log pi - log pi_ref)(rejected), h = w - l and
    eps = label_smoothing:

        sigmoid   -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)
        hinge     max(0, 1 - beta h)
        ipo       (h - 1 / (2 beta))^2, h of sums
        ipo_mean  the same, each log-ratio divided by its number of tokens
        robust    (-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)) / (1 - 2 eps)
        simpo     sigmoid's, of h - gamma; h of token means, no reference
        apo_zero  1 - sigma(beta w) + sigma(beta l): chosen up, rejected down
        apo_down  sigma(beta w) + 1 - sigma(beta h): both down, rejected further
        sppo      (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2, the winning probabilities taken as 1 and 0
        nca       -log sigma(beta w) - 1/2 log sigma(-beta w) - 1/2 log sigma(-beta l)
        exo       q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps), q = sigma(beta h)
        aot       sigmoid's, of u - v: u = log pi(chosen) - log pi(rejected), and v the reference's such margin that
                  has the rank of u in the batch
        discopop  -sigma(-beta h / tau) log sigma(beta h) + sigma(beta h / tau) exp(-beta h), tau = 0.05

    The gradient of "sigmoid" is -beta sigma(-mu) (grad log pi(chosen) - grad log pi(rejected)), mu = beta h.

    Args:
        policy_logps: [S] log-probabilities of the responses in nats, e.g. from `sequence_logprobs`.
        ref_logps: [S] of the reference; None for reference-free types (simpo), and only for those.
        chosen_idxs, rejected_idxs: [P] int64 into [0, S). One response may serve in many pairs: four ranked responses
            make six pairs.
        beta: >= 0; > 0 for ipo, ipo_mean and sppo, whose targets are 1 / (2 beta). At 0 the other losses are constants
            with zero gradient, log 2 for sigmoid.
        loss_type: see above.
        label_smoothing: eps in [0, 0.5), for sigmoid, robust, simpo, aot and exo. exo takes log(eps) and needs it
            positive; its paper has 1e-3.
        token_counts: [S] number of response tokens, for ipo_mean and simpo.
        gamma: SimPO's target margin in units of beta (its gamma/beta ratio).
        backend: "auto", "reference", "native" or "triton".

    Returns:
        DPOLoss(losses [P], rewards [S] detached), fp32 (fp64 for fp64 inputs), nats. A pair's loss depends on that pair
        alone but for aot, which sorts the margins: there every pair of the call counts (its mean is the paper's loss,
        and that of two half batches is another), losses[p] belongs to the policy's margin of pair p, ties go by
        position, and one NaN shifts the ranks of all.

    Raises:
        ValueError: shapes, unknown type, a missing or superfluous reference, constants out of range or undefined for
            the type.
        TypeError: unsupported dtype. IndexError: an index outside [0, S); on a GPU, where looking would wait for the
            device, its pair's loss is NaN instead (native, triton).

    Source: sigmoid: Rafailov et al. (2023), arXiv:2305.18290, eq. 7, and with eps Mitchell's cDPO; hinge: SLiC-HF,
    arXiv:2305.10425, and RSO, arXiv:2309.06657; ipo: Azar et al. (2023), arXiv:2310.12036, eq. 17; robust: Chowdhury et
    al. (2024), arXiv:2403.00409, eq. 12; simpo: Meng et al. (2024), arXiv:2405.14734, eq. 6; apo_zero, apo_down:
    D'Oosterlinck et al. (2024), arXiv:2408.06266, eq. 7 and 8; sppo: Wu et al. (2024), arXiv:2405.00675, eq. 4.7; nca:
    Chen et al. (2024), arXiv:2402.05369, for pairs; exo: Ji et al. (2024), arXiv:2402.00856, eq. 16; aot: Melnyk et al.
    (2024), arXiv:2406.05882, for paired data; discopop: Lu et al. (2024), arXiv:2406.08414, eq. 5.
    """
    check_loss_options(loss_type, beta, label_smoothing, gamma)
    check_pairs(chosen_idxs, rejected_idxs)
    kind = reference.LOSS_TYPES[loss_type]
    plain = kind.kernel is not None and ref_logps is not None and token_counts is None and policy_logps.dim() == 1
    pairs = (policy_logps, ref_logps, chosen_idxs, rejected_idxs)
    if plain and chosen_idxs.is_cpu and rejected_idxs.is_cpu and ready_for_native(backend, policy_logps, ref_logps):
        return DPOLoss(*ops.dpo_loss(*pairs, float(beta), kind.kernel, float(label_smoothing)))
    size = check_vectors(policy_logps=policy_logps, ref_logps=ref_logps)
    if kind.reference_free != (ref_logps is None):
        need = "takes no reference: pass ref_logps=None" if kind.reference_free else "needs ref_logps [S]"
        raise ValueError(f"loss_type={loss_type!r} {need}")
    if kind.per_token and token_counts is None:
        raise ValueError(f"loss_type={loss_type!r} is length-normalised and needs token_counts [S]")
    if token_counts is not None and token_counts.shape != policy_logps.shape:
        raise ValueError(f"token_counts must be [{size}], got {tuple(token_counts.shape)}")
    check_same_device(
        policy_logps=policy_logps, chosen_idxs=chosen_idxs, rejected_idxs=rejected_idxs, token_counts=token_counts
    )

    dtype = policy_logps.dtype if ref_logps is None else common_dtype(policy_logps.dtype, ref_logps.dtype)
    chosen_backend = resolve_backend(backend, policy_logps.device, dtype)
    if chosen_backend != "native" or kind.kernel is None:  # the compiled op checks the indices itself
        check_range(chosen_idxs, rejected_idxs, size)
    if kind.kernel is not None and chosen_backend == "triton":
        from . import triton_ops  # takes triton

        return DPOLoss(*triton_ops.dpo_loss(*pairs, float(beta), kind.kernel, float(label_smoothing)))
    if kind.kernel is not None and chosen_backend == "native":
        return DPOLoss(*ops.dpo_loss(*pairs, float(beta), kind.kernel, float(label_smoothing)))
    dtype = torch.promote_types(dtype, torch.float32)
    ref = None if ref_logps is None else ref_logps.to(dtype)
    options = reference.LossOptions(loss_type, beta, label_smoothing, gamma)
    return DPOLoss(*reference.dpo_loss(policy_logps.to(dtype), ref, chosen_idxs, rejected_idxs, token_counts, options))


def check_loss_options(loss_type: str, beta: float, label_smoothing: float, gamma: float) -> None:
    check_choice("loss_type", loss_type, reference.LOSS_TYPES)
    kind = reference.LOSS_TYPES[loss_type]
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and >= 0, got {beta}")
    if kind.positive_beta and beta == 0:
        raise ValueError(f"loss_type={loss_type!r} is undefined at beta=0: its target is 1 / (2 beta)")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and not kind.smoothing:
        able = ", ".join(name for name, k in reference.LOSS_TYPES.items() if k.smoothing)
        raise ValueError(f"label_smoothing is defined for {able}; loss_type={loss_type!r} takes 0")
    if kind.needs_smoothing and not label_smoothing:
        raise ValueError(f"loss_type={loss_type!r} needs label_smoothing > 0, as it takes the logarithm; 1e-3 is usual")
    if not -math.inf < gamma < math.inf:
        raise ValueError(f"gamma must be finite, got {gamma}")


def check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    for name, idxs in (("chosen_idxs", chosen), ("rejected_idxs", rejected)):
        if idxs.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {idxs.dtype}")
        if idxs.dim() != 1 or idxs.shape != chosen.shape:
            raise ValueError(f"{name} must be [{chosen.numel()}] like chosen_idxs, got {tuple(idxs.shape)}")


def check_range(chosen: Tensor, rejected: Tensor, size: int) -> None:
    """Checks indices on the CPU; on a GPU, and under torch.compile, the kernel that reads there does."""
    for name, idxs in (("chosen_idxs", chosen), ("rejected_idxs", rejected)):
        if idxs.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = (idxs < 0) | (idxs >= size)
            if bool(wrong.any()):
                raise IndexError(f"{name} must lie in [0, {size}), got {idxs[wrong][0].tolist()}")
