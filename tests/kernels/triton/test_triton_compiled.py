"""Every Triton kernel compiled ahead of time for four GPUs, which takes none: matrix instructions, and no spills.

The ops' own launches are followed, with a driver that only names the GPU, so what is compiled is what would run.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from rlhf_kernels import testing as T
from rlhf_kernels._logits import LogitTransform, Needs, Side
from rlhf_kernels._rows import VisitedRows

triton = pytest.importorskip("triton")

# Name -> (backend, architecture, threads of a warp), and what multiplies matrices there.
GPUS = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100, H200
    "sm_100": ("cuda", 100, 32),  # B200
    "gfx942": ("hip", "gfx942", 64),  # MI300
}
MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b|\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\btcgen05\.mma",
    "gfx942": r"\bv_mfma_",
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # a program's
PLAIN = LogitTransform(1.0, 0.0, 1.0)
GEMMA = LogitTransform(1.0, 30.0, 0.7)
N, D, V = 256, 128, 1000


class NamedGpu:
    """The part of a driver that triton's compiler uses."""

    def __init__(self, name):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*GPUS[name])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def gpu(request, monkeypatch):
    """(name, compiled): the launches made while this is alive are compiled for the GPU, and end in the list."""
    from rlhf_kernels._triton import launch
    from rlhf_kernels.kl import triton_kernels as kl
    from rlhf_kernels.logprob import triton_kernels as logprob

    name, compiled = request.param, []

    class CompileOnly:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, **options):
            jit = self.kernel
            if hasattr(jit, "configs"):  # the configuration that needs most: all stages; GROUP is just a number
                jit, config = jit.fn, max(launch.configs(hip=name == "gfx942"), key=lambda c: c.num_stages)
                options |= config.all_kwargs()
            jit.device_caches.clear()  # what was compiled for another GPU
            compiled.append((jit.fn.__name__, jit.warmup(*args, grid=(1,), **options)))

    monkeypatch.setattr(triton.runtime.driver, "_active", NamedGpu(name))
    monkeypatch.setattr(torch.library, "wrap_triton", CompileOnly)
    has_tma = name in ("sm_90", "sm_100")
    monkeypatch.setattr(launch, "has_tma", lambda device: has_tma)
    for module in (logprob, kl):
        monkeypatch.setattr(module, "uses_tma", lambda tensor: has_tma)
    return name, compiled


def spilled_bytes(name, kernel):
    """The bytes of memory that registers went to. (AMD's scalar registers may spill to lanes of vector registers;
    that is not counted, and cheap.)"""
    if name == "gfx942":
        text = kernel.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        (scratch,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return int(registers) * 4 + int(scratch)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin = next(path for file, path in kernel.metadata_group.items() if file.endswith(".cubin"))
    usage = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])


def check(name, compiled, *, multiplying, exact=False):
    """`multiplying`: kernels that multiply matrices. `exact`: in fp32, for which only AMD has an instruction; there
    ptxas may store two numbers once before the loop (3.8 on sm_80), to stay at the 80 registers that let three programs
    share a multiprocessor."""
    assert set(multiplying) <= {kernel for kernel, _ in compiled}
    for kernel, binary in compiled:
        assert spilled_bytes(name, binary) <= (8 if exact else 0), f"{kernel} on {name} spills"
        assert binary.metadata.shared <= SHARED_KIB[name] << 10, f"{kernel} does not fit {name}"
        code = binary.asm["amdgcn" if name == "gfx942" else "ptx"]
        if kernel in multiplying and not (exact and name != "gfx942"):
            assert re.search(MATRIX_INSTRUCTION[name], code), f"{kernel} on {name} has no matrix instruction"


# Of the 60 products of GPUs, cases and directions `make test` takes those below, at a second or two each: on every GPU
# the most registers in either dtype and one plain case, all cases on H200, and both directions of its usual one.
# `make triton-check` takes all of them.
SHORT = {
    "sm_80": ("bf16 everything", "fp32 everything", "fp32"),  # whose two stored numbers `check` allows
    "sm_90": ("bf16", "bf16 everything", "fp16", "fp32", "fp32 everything"),
    "sm_100": ("bf16 everything", "fp32 everything", "fp16"),
    "gfx942": ("bf16 everything", "fp32 everything", "bf16"),
}


def combinations(*directions):
    """(GPU, case), or with directions (GPU, case, direction), those that are not in SHORT marked slow."""
    for number, name in enumerate(GPUS):
        for case in CASES:
            for direction in directions or (None,):
                usual = (number + list(CASES).index(case)) % 2 == 0  # each case in either direction on some GPU
                short = case in SHORT[name] and (direction in (None, usual) or (name, case) == ("sm_90", "bf16"))
                values = (name, case) if direction is None else (name, case, direction)
                yield pytest.param(*values, marks=() if short else pytest.mark.slow)


CASES = {  # dtype, bias, transform, compacted, all outputs
    "bf16": (torch.bfloat16, False, PLAIN, False, False),
    "bf16 everything": (torch.bfloat16, True, GEMMA, True, True),
    "fp16": (torch.float16, False, PLAIN, False, False),
    "fp32": (torch.float32, False, PLAIN, False, False),
    "fp32 everything": (torch.float32, True, GEMMA, True, True),
}


@pytest.mark.parametrize(("gpu", "case"), list(combinations()), indirect=["gpu"])
def test_linear_logprobs(gpu, case):
    from rlhf_kernels.logprob import triton_kernels as kernels
    from rlhf_kernels.logprob.autograd import Statistics, Upstream

    name, compiled = gpu
    dtype, bias, transform, compacted, everything = CASES[case]
    hidden, weight, targets, bias = T.make_head(N, D, V, dtype=dtype, bias=bias)
    index = torch.arange(0, N, 2) if compacted else None
    side = Side.made_of(hidden, weight, bias, transform, dtype)
    _, max_logit, log_sum, entropy, *_ = kernels.forward(side, targets, index, everything, everything)
    grad = torch.ones(N)
    upstream = Upstream(grad, grad, grad) if everything else Upstream(grad, None, None)
    statistics = Statistics(max_logit, log_sum, entropy, torch.empty(0))
    needs = Needs(True, True, bias is not None)
    kernels.backward(upstream, side, targets, VisitedRows(index, False), statistics, needs)
    check(name, compiled, multiplying=("fold", "differentiate"), exact=dtype == torch.float32)
    assert {kernel for kernel, _ in compiled} == {"fold", "merge", "differentiate"}


@pytest.mark.parametrize(("gpu", "case", "policy_weighs"), list(combinations(True, False)), indirect=["gpu"])
def test_linear_kl(gpu, case, policy_weighs):
    from rlhf_kernels.kl import triton_kernels as kernels
    from rlhf_kernels.kl.autograd import Statistics

    name, compiled = gpu
    dtype, bias, transform, compacted, _ = CASES[case]
    inputs = T.make_kl_inputs(N, D, V, ref_d=2 * D, dtype=dtype, bias=bias)
    policy = Side.made_of(inputs.hidden, inputs.weight, inputs.bias, transform, dtype)
    ref = Side.made_of(inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias, transform, dtype)
    mask, index = torch.ones(N, dtype=torch.bool), torch.arange(0, N, 2) if compacted else None
    kl, stats = kernels.forward(policy, ref, mask, index, policy_weighs)
    statistics, needs = Statistics(kl, stats, torch.empty(0)), Needs(True, True, inputs.bias is not None)
    kernels.backward(torch.ones(N), statistics, policy, ref, mask, VisitedRows(index, False), policy_weighs, needs)
    check(name, compiled, multiplying=("fold_kl", "differentiate_kl"), exact=dtype == torch.float32)
    assert {kernel for kernel, _ in compiled} == {"fold_kl", "merge_kl_splits", "differentiate_kl"}


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
def test_small_vectors(gpu):
    from rlhf_kernels.bradley_terry import triton_kernels as rewards
    from rlhf_kernels.dpo import triton_kernels as pairs
    from rlhf_kernels.dpo.reference import LOSS_TYPES
    from rlhf_kernels.kl import triton_kernels as kl
    from rlhf_kernels.kl.reference import ESTIMATORS

    name, compiled = gpu
    values, index = torch.randn(64), torch.arange(32)
    for loss in [kind.kernel for kind in LOSS_TYPES.values() if kind.kernel is not None]:
        pairs.forward(values, values, index, index + 32, 0.1, loss, 0.1)
        pairs.backward(values[:32], values, None, index, index + 32, 0.1, loss, 0.1)
    for margin, centring in ((values, 0.01), (None, 0.0)):
        rewards.forward(values, values, margin, 0.1, centring)
        rewards.backward(values, values, values, margin, 0.1, centring)
    for estimator in range(len(ESTIMATORS)):
        kl.estimate_kl(values, values, estimator)
        kl.estimate_kl_backward(values, values, values, estimator)
    check(name, compiled, multiplying=())
    kernels = "pair_forward pair_backward reward_forward reward_backward estimate differentiate_estimate"
    assert {kernel for kernel, _ in compiled} == set(kernels.split())
