"""A peer is one way to compute an op: `Peer.run(*inputs, **head)` returns a value a row, or their sum.

Forward is a call without autograd, forward and backward is the call and `.backward()`. `takes` says what a peer can do;
what it cannot is a row of the table with the reason. This project's backends are peers too. Each op's peers stand in
the op's own file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_trainer.studies.machine import versions

ROOT = Path(__file__).resolve().parent.parent.parent
TRL = f"TRL {versions('trl')['trl']}"
OURS = ("native", "triton")  # backends: named, never "auto", so that none stands in for another
# What a case may need, and the reason for which a peer without it is left out.
LACKS = {
    "cpu": "runs on GPUs alone",
    "softcap": "takes no soft cap",
    "masked": "knows no ignored targets",
    "16-bit": "takes fp32 alone",
    "32-bit": "takes 16-bit inputs alone",
}
EVERYTHING = frozenset(LACKS)
GPU_ALONE = EVERYTHING - {"cpu"}


class CannotRun(Exception):
    """Why a peer cannot do a case."""


@dataclass(frozen=True)
class Peer:
    name: str
    run: Callable[..., Tensor]
    takes: frozenset[str] = EVERYTHING
    note: str = ""
    sums: bool = False  # returns no value a row but a sum or mean, and computes the gradients with it, in its forward
    slow_start: bool = False  # compiles for a while
    budget_mib: int | None = None  # of scratch, where it isn't the default
    judged: bool = True  # False: a yardstick that does something else, so it has no error

    def why_not(self, needs: set[str]) -> str:
        """The reasons for which it cannot do a case; empty where it can."""
        return "; ".join(LACKS[need] for need in LACKS if need in needs - self.takes)

    @contextmanager
    def budget(self) -> Iterator[None]:
        """The peer's workspace budget, while it runs."""
        if self.budget_mib is None:
            yield
            return
        rk.set_workspace_budget(self.budget_mib)
        try:
            yield
        finally:
            rk.set_workspace_budget(None)


def is_ours(name: str) -> bool:
    """Whether a contender is one of this project's backends, by default or otherwise ("native, larger budget")."""
    return name.partition(",")[0] in OURS


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` of one shape. Without the reset a function at every shape would be past the limit soon."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
