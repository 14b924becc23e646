"""Every Triton kernel compiled ahead of time for four GPUs, which takes none: matrix instructions, no spills, and on
Hopper how many instructions, registers and waits.

The ops' own launches are followed, with a driver that only names the GPU, so what is compiled is what would run.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

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
PLAIN, TEMPERED = LogitTransform(1.0, 0.0, 1.0), LogitTransform(1.0, 0.0, 0.7)
GEMMA = LogitTransform(1.0, 30.0, 0.7)
N, D, V = 256, 128, 1000


class Case(NamedTuple):
    dtype: torch.dtype
    bias: bool = False
    transform: LogitTransform = PLAIN
    outputs: str = ""  # besides log-probs: "entropy", or "all"
    tma: bool = True  # where the GPU has it: not traced
    head: torch.dtype | None = None  # another dtype than the GEMM's


CASES = {
    "bf16": Case(torch.bfloat16),
    "bf16 pointers": Case(torch.bfloat16, tma=False),
    "bf16 bias": Case(torch.bfloat16, True, TEMPERED, tma=False),
    "bf16 entropy": Case(torch.bfloat16, False, TEMPERED, "entropy"),
    "bf16 entropy pointers": Case(torch.bfloat16, False, TEMPERED, "entropy", tma=False),
    "bf16 all": Case(torch.bfloat16, True, TEMPERED, "all"),
    "bf16 everything": Case(torch.bfloat16, True, GEMMA, "all"),
    "bf16 autocast": Case(torch.bfloat16, head=torch.float32),
    "fp16": Case(torch.float16),
    "fp32": Case(torch.float32),
    "fp32 everything": Case(torch.float32, True, GEMMA, "all"),
}


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
    """(name, compiled, tma): the launches made while this is alive are compiled for the GPU, and end in the list, for
    the choice of the tuner that needs most: all stages. tma(False) is for what is traced."""
    from rlhf_kernels._triton import launch
    from rlhf_kernels.kl import triton_kernels as kl
    from rlhf_kernels.logprob import triton_kernels as logprob

    name, compiled = request.param, []
    choice = max(launch.configs(hip=name == "gfx942"), key=lambda c: c.num_stages)

    class CompileOnly:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, **options):
            self.kernel.device_caches.clear()  # what was compiled for another GPU
            compiled.append((self.kernel.fn.__name__, self.kernel.warmup(*args, grid=(1,), **options)))

    def tma(allowed):
        for module in (logprob, kl):
            monkeypatch.setattr(module, "uses_tma", launch.uses_tma if allowed else lambda *tensors: False)

    monkeypatch.setattr(triton.runtime.driver, "_active", NamedGpu(name))
    monkeypatch.setattr(torch.library, "wrap_triton", CompileOnly)
    monkeypatch.setattr(launch, "generation", lambda device: GPUS[name][1] // 10 if name.startswith("sm_") else 0)
    monkeypatch.setattr(launch, "_untuned_choice", lambda *arguments: choice)
    tma(True)
    return name, compiled, tma


def spilled_bytes(name, kernel):
    """The bytes of memory that registers went to. (AMD's scalar registers may spill to lanes of vector registers;
    that is not counted, and cheap.)"""
    if name == "gfx942":
        text = kernel.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        (scratch,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return int(registers) * 4 + int(scratch)
    usage = cuobjdump(kernel, "--dump-resource-usage")
    return int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])


def cuobjdump(kernel, option):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin = next(path for file, path in kernel.metadata_group.items() if file.endswith(".cubin"))
    return subprocess.run([tools / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout


def check(name, compiled, *, multiplying, exact=False, stored=0):
    """`multiplying`: kernels that multiply matrices. `exact`: in fp32, for which only AMD has an instruction; there
    ptxas may store two numbers once before the loop (3.8 on sm_80), to stay at the 80 registers that let three programs
    share a multiprocessor. `stored`: bytes of such numbers that a test allows in any dtype."""
    assert set(multiplying) <= {kernel for kernel, _ in compiled}
    for kernel, binary in compiled:
        assert spilled_bytes(name, binary) <= max(stored, 8 if exact else 0), f"{kernel} on {name} spills"
        assert binary.metadata.shared <= SHARED_KIB[name] << 10, f"{kernel} does not fit {name}"
        assert not getattr(binary.metadata, "global_scratch_size", 0), f"{kernel} asks the user's Triton allocator"
        code = binary.asm["amdgcn" if name == "gfx942" else "ptx"]
        if kernel in multiplying and not (exact and name != "gfx942"):
            assert re.search(MATRIX_INSTRUCTION[name], code), f"{kernel} on {name} has no matrix instruction"


# Of the products of GPUs, cases and directions `make test` takes those below, at a second or two each: on every GPU the
# most registers in either dtype and one plain case, all cases on H200, and both directions of its usual one.
# `make triton-check` takes all of them.
SHORT = {
    "sm_80": ("bf16 everything", "fp32 everything", "fp32"),  # whose two stored numbers `check` allows
    "sm_90": tuple(CASES),
    "sm_100": ("bf16 everything", "fp32 everything", "fp16"),
    "gfx942": ("bf16 everything", "fp32 everything", "bf16"),
}


def combinations(*directions):
    """(GPU, case), or with directions (GPU, case, direction), those that are not in SHORT marked slow."""
    for number, name in enumerate(GPUS):
        for case in CASES:
            if not CASES[case].tma and name in ("sm_80", "gfx942"):  # there all are
                continue
            for direction in directions or (None,):
                usual = (number + list(CASES).index(case)) % 2 == 0  # each case in either direction on some GPU
                short = case in SHORT[name] and (direction in (None, usual) or (name, case) == ("sm_90", "bf16"))
                values = (name, case) if direction is None else (name, case, direction)
                yield pytest.param(*values, marks=() if short else pytest.mark.slow)


def head_of(case):
    hidden, weight, targets, bias = T.make_head(N, D, V, dtype=case.dtype, bias=case.bias)
    return hidden, weight if case.head is None else weight.to(case.head), targets, bias


def launch_logprobs(case):
    from rlhf_kernels.logprob import triton_kernels as kernels
    from rlhf_kernels.logprob.autograd import Statistics, Upstream

    hidden, weight, targets, bias = head_of(case)
    side = Side.made_of(hidden, weight, bias, case.transform, case.dtype)
    _, max_logit, log_sum, entropy, *_ = kernels.forward(side, targets, None, bool(case.outputs), case.outputs == "all")
    grad = torch.ones(N)
    upstream = Upstream(grad, grad, grad) if case.outputs else Upstream(grad, None, None)
    statistics = Statistics(max_logit, log_sum, entropy, torch.empty(0))
    needs = Needs(True, True, bias is not None)
    kernels.backward(upstream, side, targets, VisitedRows(None, False), statistics, needs)


def launch_kl(case, policy_weighs):
    from rlhf_kernels.kl import triton_kernels as kernels
    from rlhf_kernels.kl.autograd import Statistics

    hidden, weight, _, bias = head_of(case)
    reference = T.make_head(N, 2 * D, V, dtype=case.dtype, bias=case.bias)
    policy = Side.made_of(hidden, weight, bias, case.transform, case.dtype)
    ref = Side.made_of(reference.hidden, reference.weight, reference.bias, case.transform, case.dtype)
    mask, every = torch.ones(N, dtype=torch.bool), VisitedRows(None, False)
    kl, stats = kernels.forward(policy, ref, mask, None, policy_weighs)
    statistics, needs = Statistics(kl, stats, torch.empty(0)), Needs(True, True, bias is not None)
    kernels.backward(torch.ones(N), statistics, policy, ref, mask, every, policy_weighs, needs)


@pytest.mark.parametrize(("gpu", "case"), list(combinations()), indirect=["gpu"])
def test_linear_logprobs(gpu, case):
    name, compiled, tma = gpu
    tma(CASES[case].tma)
    launch_logprobs(CASES[case])
    check(name, compiled, multiplying=("fold", "differentiate"), exact=CASES[case].dtype == torch.float32)
    assert {kernel for kernel, _ in compiled} == {"fold", "merge", "differentiate"}


@pytest.mark.parametrize(("gpu", "case"), list(combinations()), indirect=["gpu"])
def test_frozen_head(gpu, case):
    """Beside its tile of logits fold holds where their weights go: where a thread has all 255 registers for that, up to
    9 numbers are stored once a tile, outside the loop of its product."""
    from rlhf_kernels.logprob import triton_frozen

    name, compiled, tma = gpu
    tma(CASES[case].tma)
    hidden, weight, targets, bias = head_of(CASES[case])
    side = Side.made_of(hidden, weight, bias, CASES[case].transform, CASES[case].dtype)
    outputs = CASES[case].outputs
    triton_frozen.forward(side, targets, None, bool(outputs), outputs == "all")
    check(name, compiled, multiplying=("fold",), exact=CASES[case].dtype == torch.float32, stored=36)
    assert {kernel for kernel, _ in compiled} == {"fold", "restate", "merge", "combine"}


@pytest.mark.parametrize(("gpu", "case", "policy_weighs"), list(combinations(True, False)), indirect=["gpu"])
def test_linear_kl(gpu, case, policy_weighs):
    name, compiled, tma = gpu
    tma(CASES[case].tma)
    launch_kl(CASES[case], policy_weighs)
    check(name, compiled, multiplying=("fold_kl", "differentiate_kl"), exact=CASES[case].dtype == torch.float32)
    assert {kernel for kernel, _ in compiled} == {"fold_kl", "merge_kl_splits", "differentiate_kl"}


# Kernel -> logits of a thread, instructions for each (all that the kernel has, at four stages), programs that share a
# multiprocessor, products.
HOPPER = {"fold": (128, 18, 1, 1), "differentiate": (128, 22, 1, 1), "fold_kl": (32, 104, 1, 2),
          "differentiate_kl": (32, 48, 2, 2)}  # fmt: skip


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
def test_what_hopper_executes(gpu):
    """Of a product's matrix instructions none waits for the one before: ptxas puts waits between them where a branch
    writes their registers, and says so in a warning alone."""
    _name, compiled, _tma = gpu
    launch_logprobs(CASES["bf16"])
    launch_kl(CASES["bf16"], True)
    for kernel, binary in compiled:
        if kernel not in HOPPER:
            continue
        logits, most, programs, products = HOPPER[kernel]
        code = cuobjdump(binary, "--dump-sass")
        instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE))
        assert instructions <= most * logits, f"{kernel} has {instructions} instructions"
        assert len(re.findall(r"HGMMA\S+ .*gsb0", code)) == products, f"matrix instructions of {kernel} are serialized"
        registers = int(re.search(r"REG:(\d+)", cuobjdump(binary, "--dump-resource-usage"))[1])
        threads = 32 * binary.metadata.num_warps
        fit = min(65536 // (-(-registers // 8) * 8 * threads), (228 << 10) // (binary.metadata.shared + 1024))
        assert fit >= programs, f"{kernel}: {registers} registers, {binary.metadata.shared} bytes shared"


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
def test_small_vectors(gpu):
    from rlhf_kernels.bradley_terry import triton_kernels as rewards
    from rlhf_kernels.dpo import triton_kernels as pairs
    from rlhf_kernels.dpo.reference import LOSS_TYPES
    from rlhf_kernels.kl import triton_kernels as kl
    from rlhf_kernels.kl.reference import ESTIMATORS

    name, compiled, _tma = gpu
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
