"""Run by torchrun: two steps under DeepSpeed's ZeRO-3, by OpenRLHF's Actor and by ours.

torchrun --nproc_per_node=2 -m tests.integrations.openrlhf_zero3 MODEL OPENRLHF_FOLDER
"""

import os
import sys
from datetime import timedelta

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import pytest
import torch
import torch.distributed as dist

from rlhf_kernels.integrations.lm_head import LogitOptions
from rlhf_kernels.integrations.openrlhf import fused
from tests.integrations import openrlhf_here

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    # Parameters as small as these would stay whole.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main(model, folder):
    sys.path.append(folder)  # where the version is looked up
    # A compiled op that serves inference alone; without this DeepSpeed would compile it now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    torch.compiler.set_stance("force_eager")  # OpenRLHF compiles its entropy, which takes a while
    actor = openrlhf_here.load("models.actor").Actor
    # Mends how transformers 5.15, which OpenRLHF asks for, loads partitioned weights, and breaks how later ones do.
    sys.modules["openrlhf.models.actor"]._patch_zero3_weight_mapping = lambda: None
    # Offers 16 bits alone.
    sys.modules["openrlhf.utils.utils"].convert_to_torch_dtype = lambda name: torch.float32

    torch.manual_seed(dist.get_rank())  # each rank has samples of its own
    sequences, mask = torch.randint(67, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    action_mask, advantages = mask[:, -5:].clone(), torch.randn(2, 5)

    def run(kind):
        made = kind(model, attn_implementation="sdpa", ds_config=CONFIG, temperature=0.7)
        assert all(parameter.numel() == 0 for parameter in made.model.parameters()), "not partitioned"
        optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
        made.model = deepspeed.initialize(model=made.model, optimizer=optimizer, config=CONFIG)[
            0
        ]  # as its strategy does
        results = []
        for _ in range(3):
            log_probs, output = made(sequences, action_mask, mask, return_output=True, return_entropy=True)
            entropies = output.entropy[:, -5:] * action_mask
            made.model.backward(-(log_probs * advantages).mean() - 0.1 * entropies.mean())
            made.model.step()
            results.append(torch.stack([log_probs, entropies]).detach())
        made.model.destroy()
        return results

    theirs, ours = run(actor), run(fused(actor, logit_options=LogitOptions()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (theirs[-1] - theirs[0]).abs().max() > 0.05, "nothing was learned, so equality would show little"
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        run(fused(actor))
    print(f"rank {dist.get_rank()}: as OpenRLHF's Actor")


if __name__ == "__main__":
    main(*sys.argv[1:])
