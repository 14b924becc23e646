"""linear_logprobs against the bare GEMMs, eager torch and TRL."""

import importlib.util

import pytest
import torch

import rlhf_kernels as rk
from benchmarks.peers import Case, bf16_vocab, forwards, totals

has_trl = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module")
def bf16_case():
    return Case(torch.bfloat16, v=bf16_vocab())


def name(case: Case, what: str) -> str:
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
    return f"log-probs {dtype} {case.n}x{case.d}x{case.v}, {what}"


def error_of(case: Case) -> float:
    """Largest |log-prob - fp64's| over the first 64 rows."""
    hidden, targets = case.hidden.detach()[:64], case.targets[:64]
    found = rk.linear_logprobs(hidden, case.weight.detach(), targets).logprobs
    truth = (hidden.double() @ case.weight.detach().double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return float(f"{(found - truth).abs().max():.1e}")


def test_forward_bf16(compare, bf16_case):
    targets = {"bare GEMM": 1.35, "eager": 0.4}
    compare(name(bf16_case, "forward"), forwards(bf16_case), targets, rounds=7, error=error_of(bf16_case))


def test_total_bf16(compare, bf16_case):
    targets = {"bare GEMMs": 1.35, "eager": 0.5}
    compare(name(bf16_case, "total"), totals(bf16_case), targets, rounds=7, error=error_of(bf16_case))


@pytest.mark.skipif(not has_trl, reason="TRL is not installed: pip install '.[peers]'")
def test_total_bf16_against_trl(compare, bf16_case):
    compare(name(bf16_case, "total"), totals(bf16_case), {"TRL": 0.1}, rounds=2, error=error_of(bf16_case))


def test_forward_fp32(compare):
    case = Case(torch.float32)
    targets = {"bare GEMM": None, "eager": None}
    compare(name(case, "forward"), forwards(case), targets, rounds=3, error=error_of(case))


def test_total_fp32(compare):
    case = Case(torch.float32)
    targets = {"bare GEMMs": None, "eager": 1.3}
    compare(name(case, "total"), totals(case), targets, rounds=3, error=error_of(case))


@pytest.mark.skipif(not has_trl, reason="TRL is not installed: pip install '.[peers]'")
def test_total_fp32_against_trl(compare):
    case = Case(torch.float32)
    compare(name(case, "total"), totals(case), {"TRL": None}, rounds=2, error=error_of(case))


def test_total_fp16(compare):
    case = Case(torch.float16, v=min(50257, bf16_vocab()))
    targets = {"eager": None}
    compare(name(case, "total"), totals(case), targets, rounds=3, error=error_of(case))


@pytest.mark.parametrize("masked", [0.25, 0.5, 0.75])
def test_masked(compare, masked):
    """Cost follows the tokens that count; a fresh dW is written whatever their number."""
    whole, part = Case(torch.bfloat16), Case(torch.bfloat16, masked=masked)
    contenders = {"fused": totals(part)["fused"], "unmasked": totals(whole)["fused"]}
    what = f"log-probs bf16, {masked:.0%} of tokens masked, total"
    compare(what, contenders, {"unmasked": round(1 - masked + 0.2, 2)}, rounds=5)
