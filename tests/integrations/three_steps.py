"""The common part of test_wrappers.py's scripts: tiny models, three batches, two losses, the truth to compare with."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

import rlhf_kernels as rk
from tests.support.leaving import leave

PAIRS, LENGTH, STEPS, VOCABULARY = 8, 9, 3, 67  # 8 pairs: two micro-batches each on four ranks
# AdamW's eps is far above rounding: with the usual one a gradient of 1e-9, which is noise, moves as far as any other.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, eps=1e-3),
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


class Batch(NamedTuple):
    """Row 2p is the chosen and row 2p + 1 the rejected response of pair p."""

    input_ids: Tensor  # [S, T]
    attention_mask: Tensor  # [S, T]
    labels: Tensor  # [S, T], -100 where masked
    ref_logps: Tensor  # [S]

    def part(self, k: int, parts: int) -> Batch:
        return Batch(*(field.chunk(parts)[k] for field in self))


class Run(NamedTuple):
    """A wrapper's task: `kind` of loss, `optimizer` by name, in `micros` micro-batches a step."""

    kind: str
    optimizer: str
    micros: int = 1


def runs(micros: int = 1) -> list[Run]:
    """Each loss with each optimizer; on four ranks, where all costs twice as much, each in one run."""
    if dist.get_world_size() > 2:
        return [Run("sft", "adamw", micros), Run("dpo", "sgd", micros)]
    return [Run(kind, optimizer, micros) for kind in ("sft", "dpo") for optimizer in OPTIMIZERS]


# Makes a model, whose trainable weights start at random, by a seed.
Make = Callable[[int], Any]


def llama(seed: int = 0) -> LlamaForCausalLM:
    return made(LlamaForCausalLM, LlamaConfig(**SIZES), seed)


def tied(seed: int = 0) -> CohereForCausalLM:
    """Its embeddings are its head, and it scales its logits."""
    return made(CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25, tie_word_embeddings=True), seed)


def trunk_lora(seed: int) -> Any:
    return lora(seed, "q_proj", "v_proj")


def head_lora(seed: int) -> Any:
    return lora(seed, "q_proj", "lm_head")


def lora(seed: int, *targets: str) -> Any:
    model = llama()
    torch.manual_seed(seed)
    # Not the usual start with B = 0, where A would have no gradient.
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)).eval()


def made(model: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return model(config).eval()


def batches() -> list[Batch]:
    """One for each step. Lengths differ, so that ranks hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(2)
    results = []
    for _ in range(STEPS):
        ids = torch.randint(2, VOCABULARY, (2 * PAIRS, LENGTH), generator=generator)
        lengths = torch.randint(4, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
        position = torch.arange(LENGTH)
        labels = ids.masked_fill((position < 2) | (position >= lengths), -100)
        ref_logps = -20.0 + torch.randn(2 * PAIRS, generator=generator)
        results.append(Batch(ids, (position < lengths).long(), labels, ref_logps))
    return results


def token_count(batch: Batch) -> Tensor:
    return (batch.labels[:, 1:] != -100).sum()


def dpo(logps: Tensor, batch: Batch) -> Tensor:
    pairs = torch.arange(0, len(logps), 2)
    return rk.dpo_loss(logps, batch.ref_logps, pairs, pairs + 1).losses.mean()


def loss_of(wrapper: Any, batch: Batch, whole: Batch, run: Run, ranks: int) -> Tensor:
    """The loss of a patched model, called through its wrapper. The mean over ranks of the sum over micro-batches is
    the loss of the whole batch: the model's own for "sft", and for "dpo" one computed behind it."""
    count = token_count(whole)  # a trainer all-reduces it
    out = wrapper(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, num_items_in_batch=count
    )
    assert out.logprobs.dtype == out.loss.dtype == torch.float32
    if run.kind == "sft":
        return out.loss * ranks
    return dpo(out.logprobs.sum(-1), batch) / run.micros


def loss_of_logits(model: Any, batch: Batch, whole: Batch, run: Run, ranks: int) -> Tensor:
    """The same of a model that was not patched, from its logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.labels[:, 1:]
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    logps = logprobs.masked_fill(targets == -100, 0.0).sum(-1)
    if run.kind == "sft":
        return -logps.sum() / token_count(whole) * ranks
    return dpo(logps, batch) / run.micros


class Trained(NamedTuple):
    losses: list[float]
    parameters: dict[str, Tensor]


def truth(make: Make, seed: int, run: Run) -> Trained:
    """The unpatched model in fp64, in this one process, on whole batches."""
    return _alone(make, seed, run._replace(micros=1), torch.float64)


def unfused(make: Make, seed: int, run: Run) -> Trained:
    """The unpatched model as it is, in this one process, on halves of the batches."""
    return _alone(make, seed, run._replace(micros=2), torch.float32)


@functools.cache
def _alone(make: Make, seed: int, run: Run, dtype: torch.dtype) -> Trained:
    model = make(seed).to(dtype)
    optimizer = OPTIMIZERS[run.optimizer](trainable(model))
    losses = []
    for whole in batches():
        optimizer.zero_grad()
        total = 0.0
        for k in range(run.micros):
            loss = loss_of_logits(model, whole.part(k, run.micros), whole, run, 1)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return Trained(losses, snapshot(model))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_name(name: str) -> str:
    """Without what wrappers add: module.model... -> model..."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_checkpoint_wrapped_module"))


def difference(results: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest ||found - expected|| / ||expected - start|| of a parameter, over all ranks. Relative to how far
    training moved it, not to its size, of which three steps are a small part."""
    assert results.keys() == expected.keys() == start.keys(), sorted(results.keys() ^ expected.keys())
    worst = 0.0
    for name, value in results.items():
        moved = (expected[name] - start[name]).norm()
        if moved == 0:
            assert value.equal(start[name]), f"{name} is frozen"
        else:
            worst = max(worst, ((value - expected[name]).norm() / moved).item())
    largest = torch.tensor(worst)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def loss_difference(results: list[float], expected: list[float]) -> float:
    """The largest relative one of a step. `found` are this rank's, whose mean over ranks is the batch's."""
    mean = torch.tensor(results)
    dist.all_reduce(mean)
    return max(abs(a / dist.get_world_size() / b - 1) for a, b in zip(mean.tolist(), expected, strict=True))


def compare_runs(make: Make, micros: int, train: Callable[[Any, Run], Trained]) -> dict[str, float]:
    """The largest distances, over losses and optimizers; each is the mean over what the weights may start at.

    AdamW makes of one rounding another three steps on, ours or the unpatched model's alike: of LoRA's few weights one
    start says little, so there are several."""
    seeds = range(4) if make in (trunk_lora, head_lora) else range(1)

    def compare(run: Run, seed: int) -> dict[str, float]:
        model = make(seed)
        start = snapshot(model)
        return compared(train(model, run), make, seed, run, start)

    results = [mean_of([compare(run, seed) for seed in seeds]) for run in runs(micros)]
    return {key: max(one[key] for one in results) for key in results[0]}


def mean_of(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in results) / len(results) for key in results[0]}


def compared(trained: Trained, make: Make, seed: int, run: Run, start: dict[str, Tensor]) -> dict[str, float]:
    """The distances from the truth of parameters and losses, and those of the unpatched model in one process."""
    expected, alone = truth(make, seed, run), unfused(make, seed, run)
    return {
        "difference": difference(trained.parameters, expected.parameters, start),
        "loss_difference": loss_difference(trained.losses, expected.losses),
        "unfused": difference(alone.parameters, expected.parameters, start),
        "unfused_loss": loss_difference(alone.losses, expected.losses),
    }


def message_of(error: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that `call` raises."""
    try:
        call()
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__} was raised")


def micro_batches(whole: Batch, micros: int) -> Iterator[Batch]:
    mine = whole.part(dist.get_rank(), dist.get_world_size())
    return (mine.part(k, micros) for k in range(micros))


def report(groups: dict[str, dict[str, Callable[[], dict[str, Any]]]]) -> None:
    """Runs the cases of each group and writes what each found, a line of JSON, to the file that the command names."""
    torch.set_num_threads(1)
    for group, cases in groups.items():
        for name, case in cases.items():
            try:
                results = case()
            except Exception as error:
                error.add_note(f"This was the case {name!r}.")
                raise
            if dist.get_rank() == 0:
                with open(sys.argv[1], "a") as file:
                    print(json.dumps({"group": group, "case": name, **results}), file=file)
    leave()
