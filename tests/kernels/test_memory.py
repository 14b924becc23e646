"""Memory beyond inputs and gradients stays inside the workspace budget, and far below eager torch's."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
from rlhf_kernels import testing as T

N, V, D = 512, 50_000, 64
LOGITS_MIB = 4 * N * V / 2**20  # 98 MiB for one fp32 copy of the logits
GRADIENT_MIB = 4 * (V * D + N * D) / 2**20  # 12 MiB
SLACK_MIB = 16  # threads' packing buffers of the BLAS, autograd's bookkeeping, the allocator's fragments

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

# High-water marks only rise: each measurement has a process of its own, forked where inputs are there already (making
# them leaves room that scratch would hide in) and no thread was started, so that torch is imported once. It starts
# after one small call that loads libraries and starts threads. VmHWM instead of ru_maxrss, which a child inherits.
PROGRAM = """
import json, os, sys, torch
import rlhf_kernels as rk
from rlhf_kernels import testing as T

N, V, D = {shape}

def peak_mib():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

def step(what, backend, head):
    hidden, weight = T.leaves_of(head[:2])
    ref_hidden = 0.9 * head.hidden
    def run():
        if backend == "eager":
            torch.nn.functional.cross_entropy(hidden @ weight.T, head.targets).backward()
        elif what == "kl":
            rk.linear_kl(hidden, weight, ref_hidden, head.weight, backend=backend).mean().backward()
        elif what == "dpo":
            ref = torch.zeros(4)
            batch = hidden.view(4, -1, D), weight, head.targets.view(4, -1)
            rk.linear_dpo_loss(*batch, ref, backend=backend).loss.backward()
        else:
            out = rk.linear_logprobs(hidden, weight, head.targets, outputs=T.OUTPUTS, backend=backend)
            (out.logprobs.mean() + out.entropy.mean()).backward()
    return run

def extra_mib(what, backend, budget):
    torch.set_num_threads(2)
    rk.set_workspace_budget(budget)
    step(what, backend, SMALL)()
    run = step(what, backend, LARGE)
    before = peak_mib()
    run()
    return peak_mib() - before

torch.set_num_threads(1)
SMALL, LARGE = T.make_head(64, D, 3000), T.make_head(N, D, V)
for case in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(json.dumps(extra_mib(*case)), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, case
"""
BUDGETS = [  # MiB
    ("logprobs", 16),
    ("kl", 16),
    ("dpo", 16),  # recomputes its logits
    ("dpo", 128),  # keeps them: they fit
]


@pytest.fixture(scope="module")
def extra_mib():
    """MiB beyond inputs for each case of BUDGETS, and last for eager torch."""
    program = textwrap.dedent(PROGRAM).replace("{shape}", f"{N}, {V}, {D}")
    cases = [(what, "native", budget) for what, budget in BUDGETS] + [("logprobs", "eager", 64)]
    command = [sys.executable, "-c", program, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = map(json.loads, done.stdout.splitlines())
    return dict(zip([*BUDGETS, "eager"], peaks, strict=True))


@on_linux
@pytest.mark.xdist_group("memory")  # one worker, one launch
@pytest.mark.parametrize(("what", "budget"), BUDGETS)
def test_peak_of_a_process(native, extra_mib, what, budget):
    peak = extra_mib[what, budget]
    assert peak <= budget + GRADIENT_MIB + SLACK_MIB, f"{peak:.0f} MiB"


@on_linux
@pytest.mark.xdist_group("memory")
def test_eager_needs_several_copies_of_the_logits(native, extra_mib):
    """The yardstick of the limits above: if this fails, the measurement is broken."""
    assert extra_mib["eager"] > 2 * LOGITS_MIB


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operator returns, in forward and in backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("what", ["logprobs", "kl", "dpo"])
def test_no_tensor_is_as_large_as_the_logits(backend, device, what, small_budget):
    """Whatever the number of rows: the reference works in chunks of rows, the kernels in tiles."""
    n, v, d = 128, 20_000, 16
    head = T.make_head(n, d, v, device=device)
    hidden, weight = T.leaves_of(head[:2])
    with LargestTensor() as largest:
        if what == "kl":
            loss = rk.linear_kl(hidden, weight, 0.9 * head.hidden, head.weight, backend=backend).sum()
        elif what == "dpo":
            ref, batch = torch.zeros(4, device=device), (hidden.view(4, -1, d), weight, head.targets.view(4, -1))
            loss = rk.linear_dpo_loss(*batch, ref, backend=backend).loss
        else:
            out = rk.linear_logprobs(hidden, weight, head.targets, outputs=T.OUTPUTS, backend=backend)
            loss = out.logprobs.sum() + out.entropy.sum()
        loss.backward()
    assert largest.numel <= max(v * d, (small_budget << 20) // 4), f"{largest.numel / (n * v):.2f} of the logits"
