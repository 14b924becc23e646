"""linear_dpo_loss with a reference, forward and backward, against eager torch and Liger's fused loss."""

import importlib.util

import pytest

from benchmarks.peers import DPOCase, dpo_steps

WHAT = "DPO bf16 4x256 tokens, D 1024, V 151936, with reference"
has_liger = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not has_liger, reason="liger-kernel is not installed: pip install '.[peers]'")


def test_dpo(compare):
    compare(WHAT, dpo_steps(DPOCase()), {"eager": 0.4}, rounds=3)


@needs_liger
def test_dpo_against_liger(compare):
    compare(WHAT, dpo_steps(DPOCase()), {"Liger": 0.6}, rounds=3)


@needs_liger
def test_dpo_three_gemms_against_liger(compare):
    steps = dpo_steps(DPOCase())
    contenders = {"fused": steps["fused, three GEMMs"], "Liger": steps["Liger"], "four GEMMs": steps["fused"]}
    compare(f"{WHAT}, three GEMMs", contenders, {"Liger": 0.45, "four GEMMs": None}, rounds=3)
