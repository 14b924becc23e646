"""Run by test_sequence_parallel.py in two processes, `shared_sequences.py NAME=FOLDER ...`: each model's hidden states
of shared sequences, beside those of whole ones. Prints a line a model: the relative error, or why it is refused."""

import sys

import torch
from accelerate import Accelerator

from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.fused_lm import FusedLM, share_positions
from rlhf_trainer.models.loading import load_causal_lm
from rlhf_trainer.models.sequence_parallel import start_sequence_parallel
from rlhf_trainer.training.processes import leave_processes

accelerator = Accelerator()
sequence = start_sequence_parallel(accelerator, 2)
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(2, 397, (length,), generator=generator).tolist() for length in (37, 20, 31)]
batch = pad_sequences([(row[:5], row[5:]) for row in rows], 1)
for word in sys.argv[1:]:
    name, folder = word.split("=")
    fused = FusedLM(load_causal_lm(folder, key="model", dtype=torch.float32))
    with torch.no_grad():
        whole = fused(batch, lambda hidden, head: hidden)
        try:
            share_positions(fused, sequence, name)
        except UsageError as error:
            accelerator.print(f"{name}\trefused\t{error}")
            continue
        part = fused(batch, lambda hidden, head: hidden)
    real = sequence.part(batch.attention_mask).bool()
    wanted = torch.nn.functional.pad(whole, (0, 0, 0, 1)).chunk(2, 1)[sequence.rank][real]
    error = accelerator.reduce((part[real] - wanted).norm() / wanted.norm(), "mean")
    accelerator.print(f"{name}\t{error.item()}")
leave_processes()
