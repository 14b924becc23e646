"""linear_dpo_loss with a reference, forward and backward, against eager torch and Liger's fused loss."""

import importlib.util

import pytest
import torch

from benchmarks.peers import DPOCase, bf16_vocab, dpo_steps

has_liger = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not has_liger, reason="liger-kernel is not installed: pip install '.[peers]'")


@pytest.fixture(scope="module")
def bf16_case():
    return DPOCase(torch.bfloat16, v=bf16_vocab())


def name(case: DPOCase) -> str:
    dtype = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    return f"DPO {dtype} {case.s}x{case.t} tokens, D {case.d}, V {case.v}, with reference"


def test_dpo(compare, bf16_case):
    compare(name(bf16_case), dpo_steps(bf16_case), {"eager": 0.4}, rounds=3)


@needs_liger
def test_dpo_against_liger(compare, bf16_case):
    compare(name(bf16_case), dpo_steps(bf16_case), {"Liger": 0.6}, rounds=3)


@needs_liger
def test_dpo_three_gemms_against_liger(compare, bf16_case):
    steps = dpo_steps(bf16_case)
    contenders = {"fused": steps["fused, three GEMMs"], "Liger": steps["Liger"], "four GEMMs": steps["fused"]}
    compare(f"{name(bf16_case)}, three GEMMs", contenders, {"Liger": 0.45, "four GEMMs": None}, rounds=3)


@needs_liger
def test_dpo_fp32(compare):
    case = DPOCase(torch.float32)
    compare(name(case), dpo_steps(case), {"eager": None, "Liger": None}, rounds=2)
