"""Real models on real text: the op on their hidden states beside random ones of the same sizes, and DPO steps, of all
weights and of an adapter (LoRA)."""

import json

import pytest
import torch

from benchmarks.harness.heads import bf16_is_fast, cpu_case
from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.harness.measuring import LEAST_TURNS
from benchmarks.harness.real import MODELS, OwnHidden, folder_of, head_sizes, real_pairs
from benchmarks.steps.track import LORA_TARGETS, REAL_TARGETS, WARM_UP, Track, check

DTYPE = "bfloat16" if bf16_is_fast() else "float32"


@pytest.mark.budget(turns=30)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("op", [OwnHidden, LinearLogprobs])
@pytest.mark.parametrize("model", MODELS)
def test_hidden_states(measure, model, op, frozen):
    d, v = head_sizes(model)
    whose = "its own" if op is OwnHidden else "random"
    options = {"dtype": getattr(torch, DTYPE), "frozen": frozen, "model": f"{model}, {whose} hidden states"}
    measure(cpu_case(op, 512, d, v, rivals=("eager",), budgets_mib={}, **options))


@pytest.mark.budget(turns=120)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_steps(benchmark, keep, tmp_path, model, lora):
    """Pairs of some 150 tokens against 400."""
    pairs = real_pairs()[: WARM_UP + LEAST_TURNS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    trained, targets = ("LoRA", LORA_TARGETS) if lora else ("all weights", REAL_TARGETS)
    track = Track(
        tmp_path, dtype=DTYPE, trainers=("rlhf", "rlhf, padding_free", "TRL", "TRL, fused"), model=folder_of(model),
        lora=lora, case=f"DPO steps of {model}, {trained}", targets=targets,
    )  # fmt: skip
    rows = benchmark.pedantic(track.run, rounds=1)
    for row in rows:
        keep(row, f"{row['case']} {row['trainer']:20} {row.get('over_rlhf', row['status'])} of rlhf's time", "steps")
    check(rows)
