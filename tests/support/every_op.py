"""`python -m tests.support.every_op BACKEND [--tiny]`: every op once, forward and backward, at small shapes.

Sizes that fill no tile, several tiles, masks, bias and every output: made for compute-sanitizer, and to look at a new
device first. By Triton in bf16 alone, as each dtype is compiled, and untuned, as each choice is. --tiny: on the CPU.
"""

import sys
from functools import partial

import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.support import untuned

N, D = 70, 72
OUTPUTS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")


def run(backend, device, dtype, v):
    by, randn = {"backend": backend}, partial(T.randn, dtype=dtype, device=device)
    hidden, weight = randn(N, D, seed=1).requires_grad_(), (randn(v, D, seed=2) * D**-0.5).requires_grad_()
    bias, ref_hidden, ref_weight = randn(v, seed=3).requires_grad_(), randn(N, D, seed=4), weight.detach()
    targets = torch.arange(N, device=device) * 127 % v
    targets[::3] = -100
    result = rk.linear_logprobs(hidden, weight, targets, bias, logit_softcap=30.0, outputs=OUTPUTS, **by)
    kl = rk.linear_kl(hidden, weight, ref_hidden, ref_weight, targets != -100, bias=bias, **by)
    penalty = rk.kl_penalty(result.logprobs, result.logprobs.detach() - 0.1, "k3", **by)
    pairs, reference = (2, N // 2, D), {"ref_hidden": ref_hidden.view(2, N // 2, D), "ref_weight": ref_weight}
    dpo = rk.linear_dpo_loss(hidden.view(pairs), weight, targets.view(2, -1), **reference, **by).loss
    rewards = rk.bradley_terry_loss(result.logprobs[: N // 2], result.logprobs[N // 2 :], **by)
    (result.logprobs.sum() + result.entropy.sum() + kl.sum() + penalty.sum() + dpo + rewards.sum()).backward()
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in (hidden, weight, bias))


def main(backend, tiny=""):
    device, v = ("cpu", 300) if tiny else ("cuda", 9001)
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    if backend == "triton":
        untuned.pytest_configure()
        del dtypes[1:]
    rk.set_workspace_budget(8)
    for dtype in dtypes:
        run(backend, torch.device(device), dtype, v)
        print(f"every op ran by {backend} in {dtype}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
