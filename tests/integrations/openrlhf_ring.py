"""Run by torchrun: packed samples cut over the ranks of a ring, by OpenRLHF's Actor and by ours.

torchrun --nproc_per_node=2 -m tests.integrations.openrlhf_ring MODEL OPENRLHF_FOLDER
"""

import sys

import torch
import torch.distributed as dist

from rlhf_kernels.integrations.openrlhf import fused
from tests.integrations import openrlhf_here
from tests.support.leaving import leave


def main(model, folder):
    sys.path.append(folder)  # where the version is looked up
    dist.init_process_group("gloo")
    torch.compiler.set_stance("force_eager")  # OpenRLHF compiles its entropy, which takes a while
    actor = openrlhf_here.load("models.actor").Actor
    ring = sys.modules["openrlhf.models.ring_attn_utils"]
    ring.update_ring_attn_params = lambda boundaries: None  # tells ring_flash_attn, which is not here

    torch.manual_seed(0)
    lengths, width, actions = (9, 12, 4), 12, 5  # 25 tokens: the second rank's part is padded by one
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    sequences, action_mask = torch.randint(67, mask.shape), mask[:, -actions:].clone()
    upstream = torch.randn(2, len(lengths), actions)

    def run(kind, group, entropy):
        made = kind(model, attn_implementation="sdpa", packing_samples=True, temperature=0.7).float()
        for layer in made.model.model.layers:  # each token by itself, so that no ring of attention is missed
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        log_probs, output = made(
            sequences, action_mask, mask, return_output=True, return_entropy=entropy, ring_attn_group=group
        )
        entropies = output.entropy[:, -actions:] * action_mask if entropy else torch.zeros_like(log_probs)
        (torch.stack([log_probs, entropies]) * upstream).sum().backward()
        head = made.model.lm_head.weight.grad
        if group is not None:
            dist.all_reduce(head)
        return log_probs.detach(), entropies.detach(), head

    for entropy in (False, True):
        whole = run(fused(actor), None, entropy)
        theirs, ours = (run(kind, dist.group.WORLD, entropy) for kind in (actor, fused(actor)))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert theirs[2].norm() > 0.1
        for a, b in zip(ours[:2], whole[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    print(f"rank {dist.get_rank()}: as OpenRLHF's Actor")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
