"""dpo_loss through the compiled op. Kernel and autograd are in csrc/preference."""

from __future__ import annotations

import torch

from .. import _extension, _ops
from .autograd import differentiable_twice, fake, fake_backward

if _extension.native_available():
    _ops.register_shapes("dpo_loss", "dpo_loss_backward", fake, fake_backward)
    dpo_loss = differentiable_twice(torch.ops.rlhf_kernels.dpo_loss.default)
