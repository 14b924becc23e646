"""linear_logprobs against the bare GEMMs, eager torch and TRL."""

import importlib.util

import pytest
import torch

import rlhf_kernels as rk
from benchmarks.peers import Case, forwards, totals

has_trl = importlib.util.find_spec("trl") is not None


def error_of(case: Case) -> float:
    """Largest |log-prob - fp64's| over the first 64 rows."""
    hidden, targets = case.hidden.detach()[:64], case.targets[:64]
    found = rk.linear_logprobs(hidden, case.weight.detach(), targets).logprobs
    truth = (hidden.double() @ case.weight.detach().double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return float(f"{(found - truth).abs().max():.1e}")


def test_forward_bf16(compare):
    case = Case(torch.bfloat16)
    targets = {"bare GEMM": 1.35, "eager": 0.4}
    compare("log-probs bf16 1024x1024x151936, forward", forwards(case), targets, rounds=7, error=error_of(case))


def test_total_bf16(compare):
    case = Case(torch.bfloat16)
    targets = {"bare GEMMs": 1.35, "eager": 0.5}
    compare("log-probs bf16 1024x1024x151936, total", totals(case), targets, rounds=7, error=error_of(case))


@pytest.mark.skipif(not has_trl, reason="TRL is not installed: pip install '.[peers]'")
def test_total_bf16_against_trl(compare):
    case = Case(torch.bfloat16)
    compare("log-probs bf16 1024x1024x151936, total", totals(case), {"TRL": 0.1}, rounds=2, error=error_of(case))


def test_total_fp32(compare):
    case = Case(torch.float32)
    targets = {"bare GEMMs": None, "eager": 1.3}
    compare("log-probs fp32 1024x1024x151936, total", totals(case), targets, rounds=3, error=error_of(case))


def test_total_fp16(compare):
    case = Case(torch.float16, v=50257)
    targets = {"eager": None}
    compare("log-probs fp16 1024x1024x50257, total", totals(case), targets, rounds=3, error=error_of(case))


@pytest.mark.parametrize("masked", [0.25, 0.5, 0.75])
def test_masked(compare, masked):
    """Cost follows the tokens that count; a fresh dW is written whatever their number."""
    whole, part = Case(torch.bfloat16), Case(torch.bfloat16, masked=masked)
    contenders = {"fused": totals(part)["fused"], "unmasked": totals(whole)["fused"]}
    what = f"log-probs bf16, {masked:.0%} of tokens masked, total"
    compare(what, contenders, {"unmasked": round(1 - masked + 0.2, 2)}, rounds=5)
