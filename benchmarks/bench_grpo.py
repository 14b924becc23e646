"""A GRPO loss from hidden states: linear_logprobs and the clipped ratio, against packages that fuse both."""

from benchmarks.heads import HEADS, cpu_job


def test_gpt2(measure):
    model, n, d, v, _ = HEADS[0]
    measure(cpu_job("grpo", n, d, v, sequences=(8, n // 8), model=model), peaks=True)


def test_qwen(measure):
    model, n, d, v, _ = HEADS[1]
    measure(cpu_job("grpo", n, d, v, sequences=(8, n // 8), model=model))
