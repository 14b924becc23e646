"""Training steps of DPO: `rlhf dpo` against TRL's DPOTrainer, and the same fused by rlhf_kernels.

What is timed stands in steps/watch.py. The trainers have the same model (hidden size 512, Llama 3's vocabulary) and one
pair a step, of 255 tokens a sequence. They take turns, step by step, in processes of their own, and every one of them
has computed the reference's log-probs before. bf16 is autocast over fp32 weights for all of them, which is how
`rlhf dpo` trains; where torch multiplies bf16 slowly it is fp32, and the targets, which are of bf16, are not judged.
`rlhf, share_prefix` computes the prompt once for both responses, by an option.
"""

import pytest

from benchmarks.harness.heads import bf16_is_fast
from benchmarks.harness.measuring import LEAST_TURNS
from benchmarks.steps.inputs import Sizes
from benchmarks.steps.track import TARGETS, WARM_UP, Track, check


@pytest.mark.budget(turns=135)
def test_steps(benchmark, keep, tmp_path):
    sizes = Sizes(steps=WARM_UP + LEAST_TURNS)
    track = Track(tmp_path, sizes, "bfloat16" if bf16_is_fast() else "float32")
    rows = benchmark.pedantic(track.run, rounds=1)  # the trainers' own steps are what is compared
    for row in rows:
        over = f"{row['over_rlhf']:.2f} of rlhf's time" if "over_rlhf" in row else row["status"]
        keep(row, f"DPO step {row['dtype']} {row['trainer']:20} {over}", "steps")
    check(rows)
    assert all(row["first_loss_error"] <= TARGETS["first_loss_error"] for row in rows if "losses" in row), rows
