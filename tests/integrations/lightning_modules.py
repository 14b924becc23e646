"""Modules for Lightning's Trainer, ours and the same written plainly; as a script, trains one of them in the processes
that torchrun started and writes what came of it.

    torchrun --nproc_per_node=2 -m tests.integrations.lightning_modules OUT.json
"""

import json
import os
import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from rlhf_kernels.integrations.lightning import FusedDPOMixin, FusedSFTMixin
from rlhf_kernels.integrations.transformers import patch_causal_lm

logging.disable_progress_bar()
V, PAIRS, BETA, LEARNING_RATE = 67, 4, 0.1, 0.1


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pairs(count, seed=1):
    """Rows of unlike lengths; chosen and rejected are padded to unlike widths."""
    torch.manual_seed(seed)
    results = []
    for i in range(count):
        row = {}
        for side, width in (("chosen", 9), ("rejected", 12)):
            ids, position = torch.randint(V, (width,)), torch.arange(width)
            mask = (position < width - i % 3).long()
            labels = torch.where((mask > 0) & (position >= 3), ids, -100)
            row |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
        results.append(row)
    return results


def side_of(batch, side):
    """A model's arguments, from the `chosen` or `rejected` columns."""
    return {name.removeprefix(f"{side}_"): column for name, column in batch.items() if name.startswith(side)}


def conversations(count):
    return [side_of(row, "chosen") for row in pairs(count)]


def logps_of(model, batch, side):
    """[P] sums, by the model's logits."""
    inputs = side_of(batch, side)
    targets = inputs.pop("labels")[:, 1:]
    logprobs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    picked = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (targets != -100)).sum(-1)


class Recorded:
    """Losses and gradient norms of the steps. SGD, so that equal gradients make equal parameters."""

    def __init__(self, model, ref_model=None):
        super().__init__()
        self.model, self.ref_model, self.norms, self.losses = model, ref_model, [], []

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.trained()]).item())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained(), lr=LEARNING_RATE)

    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def parameters_as_one(self):
        return torch.cat([p.detach().flatten() for p in self.trained()])


class PlainDPO(Recorded, lightning.LightningModule):
    def loss(self, batch):
        chosen, rejected = (logps_of(self.model, batch, side) for side in ("chosen", "rejected"))
        with torch.no_grad():
            ref_chosen, ref_rejected = (logps_of(self.ref_model, batch, side) for side in ("chosen", "rejected"))
        margins = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        return -torch.nn.functional.logsigmoid(margins).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))


class FusedDPO(FusedDPOMixin, Recorded, lightning.LightningModule):
    beta = BETA


class PlainSFT(Recorded, lightning.LightningModule):
    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss  # transformers' own


class FusedSFT(FusedSFTMixin, Recorded, lightning.LightningModule):
    pass


def fused_dpo(kind=FusedDPO):
    return kind(patch_causal_lm(llama()), patch_causal_lm(llama(1)).requires_grad_(False))


def plain_dpo():
    return PlainDPO(llama(), llama(1).requires_grad_(False))


def fit(module, rows, folder, *, batch_size=PAIRS, validation=None, trainer=lightning.Trainer, **options):
    made = trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **{"devices": 1, "log_every_n_steps": 1} | options,
    )  # fmt: skip
    loaders = [DataLoader(data, batch_size) for data in (rows, validation) if data is not None]
    made.fit(module, *loaders)
    return made


def main(out):
    module, mine = fused_dpo(), slice(int(os.environ["RANK"]), None, 2)
    trainer = fit(
        module, pairs(3 * PAIRS)[mine], None, batch_size=PAIRS // 2, validation=pairs(PAIRS, seed=5)[mine],
        strategy="ddp", devices=2, use_distributed_sampler=False,  # Lightning's would shuffle
    )  # fmt: skip
    if trainer.is_global_zero:
        results = {
            "world_size": trainer.world_size,
            "norms": module.norms,
            "losses": module.losses,
            "val/loss": trainer.callback_metrics["val/loss"].item(),
            "parameters": module.parameters_as_one().tolist(),
        }
        with open(out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
