"""The one definition of a logit: what an LM head does between hidden states and the softmax."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """`(x * scale)`, soft-capped to `cap * tanh(x / cap)` where `softcap > 0`, divided by `temperature`."""

    scale: float
    softcap: float  # 0 means no soft cap
    temperature: float

    def apply(self, x: Tensor) -> Tensor:
        x = x * self.scale
        if self.softcap:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x / self.temperature


class LMHead(NamedTuple):
    """Logits are `hidden @ weight.T + bias`, times logit_scale, soft-capped `cap * tanh(x / cap)`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    logit_softcap: float | None

    def options(self) -> dict[str, Any]:
        """The arguments of rlhf_kernels' functions beside `hidden` and `weight`."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}

    def check_options(self, temperature: float) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
        if not -math.inf < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be finite, got {self.logit_scale}")
        if self.logit_softcap is not None and not 0 < self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap must be None or a finite number > 0, got {self.logit_softcap}")

    def detach(self) -> LMHead:
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


class Side(NamedTuple):
    """One model's hidden states [N, D], the head that they go through, and how its logits are computed."""

    hidden: Tensor
    head: LMHead
    temperature: float
    gemm: torch.dtype  # to which the GEMM's operands are rounded

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead, temperature: float) -> Side:
        """hidden [..., D]"""
        return cls(hidden.reshape(-1, hidden.shape[-1]), head, temperature, gemm_dtype(hidden, head.weight))

    @classmethod
    def made_of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, gemm: torch.dtype
    ) -> Side:
        return cls(hidden, LMHead(weight, bias, transform.scale, transform.softcap), transform.temperature, gemm)

    @property
    def transform(self) -> LogitTransform:
        head = self.head
        return LogitTransform(float(head.logit_scale), float(head.logit_softcap or 0.0), float(self.temperature))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.head.weight, self.head.bias

    def with_tensors(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Side:
        return self._replace(hidden=hidden, head=self.head._replace(weight=weight, bias=bias))

    def detach(self) -> Side:
        return self._replace(hidden=self.hidden.detach(), head=self.head.detach())


class Needs(NamedTuple):
    """The gradients of a side that are needed."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """The gradients of a side; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype the head's GEMM reads: autocast's where it is on, otherwise the promoted type of its inputs.

    Logits themselves are fp32 (fp64 for fp64 inputs) whatever this is.
    """
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return promoted


def logit_dtype(gemm: torch.dtype) -> torch.dtype:
    return torch.float64 if gemm == torch.float64 else torch.float32


class _ExactProduct(torch.autograd.Function):
    """x [N, D], weight [V, D] -> x @ weight.T [N, V] in their own dtype, whatever autocast says now or in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return x @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return grad @ weight, grad.T @ x


def raw_logits(hidden: Tensor, weight: Tensor, gemm: torch.dtype) -> Tensor:
    """hidden [N, D], weight [V, D] (already upcast) -> [N, V], operands rounded to `gemm`, sums not."""
    return _ExactProduct.apply(rounded_upcast(hidden, gemm), weight)


def rounded_upcast(x: Tensor, gemm: torch.dtype) -> Tensor:
    """`x` as the GEMM reads it, held in the logits' dtype so that products are exact and sums are not rounded."""
    return x.to(gemm).to(logit_dtype(gemm))
