"""Run by test_distributed.py in two processes: FusedLM under FSDP2 with its LM head sharded as a unit of its own."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_kernels as rk
from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.models.fused_lm import FusedLM
from tests.support.leaving import leave


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    whole, sharded = FusedLM(copy.deepcopy(model)), FusedLM(model)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model.lm_head, sharded):
        fully_shard(module, mesh=mesh)
    batch = pad_sequences([([5, 6, 7], [8, 9, 10]), ([1], [2, 3])], pad_id=0)

    def use(hidden, head):
        assert not isinstance(head.weight, DTensor)
        return rk.linear_dpo_loss(hidden, head.weight, batch.labels, torch.zeros(2), **head.options())

    for lm in (whole, sharded):
        lm(batch, use).loss.backward()
    assert isinstance(model.lm_head.weight, DTensor)
    for (name, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        assert b.grad.norm() > 0, name
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-5)
    if dist.get_rank() == 0:
        print("all gradients equal")
    leave()


main()
