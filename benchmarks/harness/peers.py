"""Every way to compute an op, behind one signature: `Peer.run(*inputs, **head)` gives a value a row, or their sum.

Forward is a call without autograd, forward and backward is the call and `.backward()`. `takes` says what a peer can do;
what it cannot is a row of the table with the reason. This project's ops are peers too, by backend.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from benchmarks.harness import overlays

OURS = ("native", "triton")  # backends: named, never "auto", so that none stands in for another
# What a job may ask for, and what is said of a peer that lacks it.
LACKS = {
    "cpu": "runs on GPUs alone",
    "cuda": "runs on CPUs alone",
    "softcap": "takes no soft cap",
    "masked": "knows no ignored targets",
    "16-bit": "takes fp32 alone",
    "32-bit": "takes 16-bit inputs alone",
}
EVERYTHING = frozenset(LACKS)
GPU_ALONE = EVERYTHING - {"cpu"}


class CannotRun(Exception):
    """Why a peer cannot do a case."""


@dataclass(frozen=True)
class Peer:
    name: str
    run: Callable[..., Tensor]
    takes: frozenset[str] = EVERYTHING
    note: str = ""
    sums: bool = False  # gives no value a row but a sum or mean, and the gradients with it, in its forward
    slow_start: bool = False  # compiles for a while: it starts only in the first half of the time
    budget_mib: int | None = None  # of scratch, where it isn't the default
    judged: bool = True  # False: a yardstick that does something else, so it has no error

    def why_not(self, needs: set[str]) -> str:
        """Empty where it can."""
        return "; ".join(LACKS[need] for need in LACKS if need in needs - self.takes)


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def older_trl() -> str:
    """The version of the TRL in build/peers, which is measured beside the installed one."""
    try:
        return overlays.folder_of("trl").name.removeprefix("trl-")
    except ModuleNotFoundError:
        return ""


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# --- log-probs: (hidden [N, D], weight [V, D], targets [N]) -> [N] ---


def unmasked_logprobs(backend: str, seed: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same with nothing ignored."""
    generator = torch.Generator(targets.device).manual_seed(seed)
    others = torch.randint(len(weight), targets.shape, generator=generator, device=targets.device)
    return rk.linear_logprobs(hidden, weight, torch.where(targets == -100, others, targets), backend=backend).logprobs


def our_logprobs(backend: str, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    return rk.linear_logprobs(hidden, weight, targets, logit_softcap=softcap, backend=backend).logprobs


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    logprobs = capped((hidden @ weight.T).float(), softcap).log_softmax(-1)
    picked = logprobs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(targets == -100, 0.0, picked)


def torch_chunked(reduction: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise CannotRun("not in this torch")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def of_counted(rows_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, **head) -> Tensor:
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


def older_trl_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    function = overlays.beside("trl", "trainer.utils")._ChunkedLogProbFunction
    return function.apply(hidden, weight, None, targets, 1.0, 8192, softcap)[0]  # temperature, its own chunk size


def liger_logprobs(
    reduction: str, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction=reduction, softcap=softcap)(weight, hidden, targets)


def cce_logprobs(impl: str, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", impl=impl)


def verl_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    module = overlays.without_init("verl", "utils.kernel.linear_cross_entropy")
    return module.linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]


def quack_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def rl_kernel_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from rl_engine.backends.cuda.logprob.linear_logp import FusedLinearLogpSM90Op  # from its repository alone

    return FusedLinearLogpSM90Op()(hidden, weight, targets)


AT_ONCE = "its forward computes the gradients, for a loss that is the plain sum: three GEMMs, no value a token"


def logprob_peers(device: torch.device) -> list[Peer]:
    torch._dynamo.reset()  # or one function at every shape would soon be past the limit and run uncompiled
    no_cap, cuda = EVERYTHING - {"softcap"}, device.type == "cuda"
    taken_out = "masked rows are taken out before it"
    peers = [
        Peer("eager", eager_logprobs),
        Peer("torch.compile", torch.compile(eager_logprobs, dynamic=False), note="of eager", slow_start=True),
        Peer("torch chunked", partial(torch_chunked, "none"), no_cap, "linear_cross_entropy, default options"),
        Peer("torch chunked, sum", partial(torch_chunked, "sum"), no_cap, AT_ONCE, sums=True),
        Peer(f"TRL {installed('trl')}", partial(of_counted, trl_logprobs), note=taken_out),
        Peer(f"TRL {older_trl()}", partial(of_counted, older_trl_logprobs), note=taken_out),
        Peer("Liger", partial(liger_logprobs, "none"), GPU_ALONE, "reduction='none': computes logits again"),
        Peer("Liger, sum", partial(liger_logprobs, "sum"), GPU_ALONE, AT_ONCE, sums=True),
        Peer(
            "CCE",
            partial(cce_logprobs, "cce" if cuda else "torch_compile"),
            note="default filter: small gradients are left out" if cuda else "impl='torch_compile'",
            slow_start=not cuda,
        ),
        Peer("verl", partial(of_counted, verl_logprobs), GPU_ALONE - {"softcap"}, taken_out),
        Peer("quack, sum", quack_logprobs, GPU_ALONE - {"softcap", "32-bit"}, AT_ONCE, sums=True),
        Peer("RL-Kernel", partial(of_counted, rl_kernel_logprobs), GPU_ALONE - {"softcap", "32-bit"}, taken_out),
    ]
    return peers


# --- KL: (hidden, weight, ref_hidden, ref_weight) -> [N] ---


def our_kl(
    backend: str, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None = None
) -> Tensor:
    return rk.linear_kl(hidden, weight, ref_hidden, ref_weight, logit_softcap=softcap, backend=backend)


def eager_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None = None
) -> Tensor:
    heads = ((hidden, weight), (ref_hidden, ref_weight))
    log_p, log_q = (capped((h @ w.T).float(), softcap).log_softmax(-1) for h, w in heads)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def eager_kl_in_chunks(rows: int, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, *rest: Tensor, **head) -> Tensor:
    parts = zip(hidden.split(rows), ref_hidden.split(rows), strict=True)
    of_part = partial(checkpoint, eager_kl, use_reentrant=False, **head)
    return torch.cat([of_part(h, weight, r, *rest) for h, r in parts])


def trl_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None = None
) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    reverse, options = 1.0, (1.0, 1.0, softcap, 1.0, softcap)  # temperature, each head's scale and soft cap
    return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, reverse, *options)[0]


def liger_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    reverse = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    nothing = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # labels of a loss with weight 0
    return reverse(hidden, weight, ref_hidden, ref_weight, nothing) * len(hidden)


def kl_peers(device: torch.device) -> list[Peer]:
    torch._dynamo.reset()
    mean = "beta=1; its forward computes the gradients of the mean, no value a token"
    return [
        Peer("eager", eager_kl),
        Peer("torch.compile", torch.compile(eager_kl, dynamic=False), note="of eager", slow_start=True),
        Peer("eager in chunks", partial(eager_kl_in_chunks, 1024), note="of 1024 rows, each checkpointed"),
        Peer(f"TRL {installed('trl')}", trl_kl, note="beta=1; computes the student's entropy too"),
        Peer("Liger, sum", liger_kl, EVERYTHING - {"softcap"}, mean, sums=True),
    ]


# --- DPO: (hidden [S, T, D], weight, labels [S, T], ref_hidden, ref_weight, chosen [P], rejected [P]) -> mean loss ---


def our_dpo(
    backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *pairs: Tensor
) -> Tensor:
    chosen, rejected = pairs
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    pairs_of = {"chosen_idxs": chosen, "rejected_idxs": rejected}
    return rk.linear_dpo_loss(hidden, weight, labels, **reference, **pairs_of, backend=backend).loss


def mean_dpo_loss(logps: Tensor, ref_logps: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    ratios = logps - ref_logps
    return -F.logsigmoid(0.1 * (ratios[chosen] - ratios[rejected])).mean()


def dpo_of(
    rows_of: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *pairs: Tensor,
) -> Tensor:
    """By log-probs of tokens, as trainers compute it; each response once, however many pairs it is in."""

    def sums(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = rows_of(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())
        return logps.view(len(labels), -1).sum(-1)

    with torch.no_grad():
        ref = sums(ref_hidden, ref_weight)
    return mean_dpo_loss(sums(hidden, weight), ref, *pairs)


def liger_dpo(
    compiled: bool,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *pairs: Tensor,
) -> Tensor:
    """It takes each pair's two responses, so one that is in many pairs is there as often."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rows = torch.cat(pairs)
    if len(rows) > len(labels):
        hidden, labels, ref_hidden = hidden[rows], labels[rows], ref_hidden[rows]
    loss, _ = LigerFusedLinearDPOLoss(beta=0.1, compiled=compiled)(
        weight, hidden[:, :-1], labels[:, 1:], None, ref_hidden[:, :-1], ref_weight
    )
    return loss


def dpo_peers(device: torch.device) -> list[Peer]:
    torch._dynamo.reset()
    compiled = torch.compile(eager_logprobs, dynamic=False)
    at_once = "its forward computes the gradients"
    return [
        Peer("eager", partial(dpo_of, eager_logprobs)),
        Peer("torch.compile", partial(dpo_of, compiled), note="of eager log-probs", slow_start=True),
        Peer("Liger", partial(liger_dpo, False), note=f"compiled=False; {at_once}", sums=True),
        Peer("Liger, compiled", partial(liger_dpo, True), note=f"its default; {at_once}", sums=True, slow_start=True),
        Peer(f"TRL {installed('trl')}", partial(dpo_of, partial(of_counted, trl_logprobs)), note="its log-probs"),
        Peer(f"TRL {older_trl()}", partial(dpo_of, partial(of_counted, older_trl_logprobs)), note="its log-probs"),
    ]


# --- GRPO: (hidden [B, T, D], weight, targets [B, T], old_logprobs [B, T], advantages [B]) -> the mean loss ---


def grpo_of(
    rows_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    """By log-probs of tokens; clipped as PPO does, a mean over sequences of means over tokens (DeepSeekMath eq. 3)."""
    logprobs = rows_of(hidden.flatten(0, 1), weight, targets.flatten()).view(targets.shape)
    return grpo_loss(logprobs, old, advantages, targets != -100)


def grpo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -((gain * mask).sum(-1) / mask.sum(-1)).mean()


def liger_grpo(
    compiled: bool, hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    of = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="grpo")
    mask = targets != -100
    return of(hidden, weight, targets.clamp(min=0), mask, advantages, old_per_token_logps=old)[0]


def grpo_peers(device: torch.device) -> list[Peer]:
    torch._dynamo.reset()
    compiled = torch.compile(eager_logprobs, dynamic=False)
    return [
        Peer("eager", partial(grpo_of, eager_logprobs)),
        Peer("torch.compile", partial(grpo_of, compiled), note="of eager log-probs", slow_start=True),
        Peer("Liger", partial(liger_grpo, False), note="compiled=False"),
        Peer(f"TRL {installed('trl')}", partial(grpo_of, partial(of_counted, trl_logprobs)), note="its log-probs"),
        Peer(f"TRL {older_trl()}", partial(grpo_of, partial(of_counted, older_trl_logprobs)), note="its log-probs"),
    ]


# --- by op ---

OUR_OPS: dict[str, Callable[..., Tensor]] = {
    "linear_logprobs": our_logprobs,
    "linear_kl": our_kl,
    "linear_dpo_loss": our_dpo,
    "grpo": lambda backend, *inputs: grpo_of(partial(our_logprobs, backend), *inputs),
}
RIVALS: dict[str, Callable[[torch.device], list[Peer]]] = {
    "linear_logprobs": logprob_peers,
    "linear_kl": kl_peers,
    "linear_dpo_loss": dpo_peers,
    "grpo": grpo_peers,
}


def unmasked(backend: str) -> Peer:
    return Peer(f"{backend}, unmasked", partial(unmasked_logprobs, backend, 7), note="nothing ignored", judged=False)


def ours(op: str, backend: str) -> Peer:
    note = "first_s holds its compilation and tuning" if backend == "triton" else ""
    return Peer(backend, partial(OUR_OPS[op], backend), note=note)


def native_with(op: str, budget: str, mib: int) -> Peer:
    """With another budget than the default: `budget` names it."""
    return Peer(
        f"native, {budget} budget", partial(OUR_OPS[op], "native"), note=f"{mib} MiB of scratch", budget_mib=mib
    )
