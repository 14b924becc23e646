"""What is timed against what: the fused ops, the GEMMs no one can do without, eager torch, other packages.

Each contender is a function of no arguments on inputs made once. Forward contenders return log-probs; total contenders
leave gradients behind, in fresh memory as a training step does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.testing import randn

VOCAB = 151936  # Qwen's
GEMM_TILE = 2048  # vocabulary rows of a streamed bare GEMM: large enough for full speed, small enough to stay in cache


@dataclass
class Case:
    """hidden [N, D], weight [V, D], targets [N]; `masked`: fraction of targets that are ignored."""

    dtype: torch.dtype
    n: int = 1024
    d: int = 1024
    v: int = VOCAB
    masked: float = 0.0

    def __post_init__(self) -> None:
        self.hidden = randn(self.n, self.d, seed=1).to(self.dtype).requires_grad_()
        self.weight = (randn(self.v, self.d, seed=2) * self.d**-0.5).to(self.dtype).requires_grad_()
        self.targets = torch.randint(self.v, (self.n,), generator=torch.Generator().manual_seed(3))
        self.targets[: int(self.masked * self.n)] = -100

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def backward(self, logprobs: Tensor) -> None:
        logprobs.sum().backward()


def bf16_vocab() -> int:
    """`VOCAB`, or a 64th of it where torch multiplies bf16 many times slower than fp32 (x86 without AVX-512, which has
    no bf16 instructions): the whole would keep eager torch busy for an hour."""

    def seconds(dtype: torch.dtype) -> float:
        dlogits, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 256, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            dlogits @ weight
            times.append(time.perf_counter() - start)
        return sorted(times)[2]

    return VOCAB if seconds(torch.bfloat16) < 5 * seconds(torch.float32) else VOCAB // 64


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    rows = targets.clamp(min=0)[:, None]
    return torch.where(targets == -100, 0.0, logits.log_softmax(-1).gather(-1, rows).squeeze(-1))


def forwards(case: Case) -> dict[str, Callable[[], Tensor]]:
    tile = torch.empty(case.n, GEMM_TILE, dtype=case.dtype)

    @torch.no_grad()
    def bare() -> Tensor:
        """One GEMM, streamed over the vocabulary: what any fused forward has to compute at least."""
        for part in case.weight.split(GEMM_TILE):
            torch.mm(case.hidden, part.T, out=tile[:, : len(part)])
        return tile

    return {
        "fused": torch.no_grad()(lambda: rk.linear_logprobs(case.hidden, case.weight, case.targets).logprobs),
        "bare GEMM": bare,
        "eager": torch.no_grad()(lambda: eager_logprobs(case.hidden, case.weight, case.targets)),
    }


def totals(case: Case) -> dict[str, Callable[[], None]]:
    dlogits = randn(case.n, GEMM_TILE, seed=4).to(case.dtype)
    tile, grad_hidden = torch.empty_like(dlogits), torch.empty_like(case.hidden)

    @torch.no_grad()
    def bare() -> None:
        """Four GEMMs streamed over the vocabulary: forward, recompute, dW into fresh memory, dH."""
        grad_weight = torch.empty_like(case.weight)
        for part, grad_part in zip(case.weight.split(GEMM_TILE), grad_weight.split(GEMM_TILE), strict=True):
            dz = dlogits[:, : len(part)]
            for _ in range(2):
                torch.mm(case.hidden, part.T, out=tile[:, : len(part)])
            torch.mm(dz.T, case.hidden, out=grad_part)
            torch.mm(dz, part, out=grad_hidden)

    def fused() -> None:
        case.drop_gradients()
        case.backward(rk.linear_logprobs(case.hidden, case.weight, case.targets).logprobs)

    def eager() -> None:
        case.drop_gradients()
        case.backward(eager_logprobs(case.hidden, case.weight, case.targets))

    def trl() -> None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        case.drop_gradients()
        options = (1.0, 32768, None, 1.0, ())  # temperature, TRL's own chunk size, softcap, scale, no optional outputs
        case.backward(ChunkedLogProbFunction.apply(case.hidden, case.weight, None, case.targets, *options)[0])

    return {"fused": fused, "bare GEMMs": bare, "eager": eager, "TRL": trl}


@dataclass
class DPOCase:
    """Pairs of sequences: hidden [S, T, D], weight [V, D] of policy and reference, labels [S, T]."""

    dtype: torch.dtype = torch.bfloat16
    s: int = 4
    t: int = 256
    d: int = 1024
    v: int = VOCAB

    def __post_init__(self) -> None:
        shape = (self.s, self.t, self.d)
        self.hidden = randn(*shape, seed=1).to(self.dtype).requires_grad_()
        self.weight = (randn(self.v, self.d, seed=2) * self.d**-0.5).to(self.dtype).requires_grad_()
        self.ref_hidden = (self.hidden.detach().float() + 0.1 * randn(*shape, seed=3)).to(self.dtype)
        self.ref_weight = self.weight.detach().clone()
        self.labels = torch.randint(self.v, (self.s, self.t), generator=torch.Generator().manual_seed(4))

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def dpo_steps(case: DPOCase) -> dict[str, Callable[[], None]]:
    def fused() -> None:
        case.drop_gradients()
        reference = {"ref_hidden": case.ref_hidden, "ref_weight": case.ref_weight}
        rk.linear_dpo_loss(case.hidden, case.weight, case.labels, **reference).loss.backward()

    def fused_three_gemms() -> None:
        logits_mib = 4 * case.labels.numel() * case.v >> 20
        rk.set_workspace_budget(2 * logits_mib)
        fused()
        rk.set_workspace_budget(None)

    def eager() -> None:
        def sums(hidden: Tensor, weight: Tensor) -> Tensor:
            logps = eager_logprobs(hidden[:, :-1].flatten(0, 1), weight, case.labels[:, 1:].flatten())
            return logps.view(case.s, -1).sum(-1)

        case.drop_gradients()
        with torch.no_grad():
            ref = sums(case.ref_hidden, case.ref_weight)
        chosen, rejected = (sums(case.hidden, case.weight) - ref).chunk(2)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).mean().backward()

    def liger() -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        case.drop_gradients()
        loss, _ = LigerFusedLinearDPOLoss(beta=0.1, compiled=False)(
            case.weight, case.hidden[:, :-1], case.labels[:, 1:], None, case.ref_hidden[:, :-1], case.ref_weight
        )
        loss.backward()

    return {"fused": fused, "fused, three GEMMs": fused_three_gemms, "eager": eager, "Liger": liger}
