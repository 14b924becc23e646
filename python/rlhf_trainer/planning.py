"""`--dry_run`: what a training run will take, from shapes alone. Data and tokenizer are read, no weights are."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import rlhf_kernels as rk

from .commands import COMMANDS, load
from .config.base import TrainConfig
from .data.examples import Group, TokenSequence
from .errors import UsageError
from .inspection import read
from .models.loading import loading_of, meta_model, turn_dropout_off
from .models.lora import leave_inputs, train_adapter
from .offline.config import RewardConfig
from .training.batch_plan import plan_batches, step_plan
from .training.fsdp import blocks_of

STATE_BYTES = {  # of an optimizer, a trained weight
    "adamw_torch_fused": 8, "adamw_torch": 8, "adamw_torch_8bit": 2, "adamw_bnb_8bit": 2, "rmsprop": 4, "muon": 4,
    "adafactor": 0,  # a row and a column of each matrix
}  # fmt: skip


SCRATCH = 64 << 20  # of the losses, beside logits that are kept


class Shape(NamedTuple):
    """The largest micro-batch, and the run's extent."""

    rows: int
    width: int  # what a process has of it
    micro_batches: int  # of a step, at most, over all processes
    tokens_a_step: int  # at most, over all processes
    steps: int


class Plan(NamedTuple):
    """Bytes: what is cut over the processes (weights, gradients, optimizer; one process holds whole models), and what
    each of them holds."""

    weights: int
    gradients: int
    head: int  # of the gradients, the head's, which comes first
    tied: int  # another one of its size, which comes last and is added to it, where it is the embeddings
    optimizer: int
    activations: int
    with_checkpoints: int  # activations, with gradient_checkpointing
    scratch: int  # of the losses, at most
    logits: int  # and their gradients, which are not made
    accumulates: bool  # gradients of one micro-batch wait for those of the next
    processes: int = 1
    whole: int = 0  # of weights that are cut, what a process has whole while it computes with it

    def total(self, checkpoints: bool) -> int:
        """The most at a time: where backward begins, with all activations, or where it ends, with all gradients."""
        kept = self.with_checkpoints if checkpoints else self.activations
        gradients = self.part(self.gradients)
        begin = kept + self.scratch + self.head + gradients * self.accumulates
        return self.part(self.weights + self.optimizer) + self.whole + max(begin, gradients + self.tied)

    def part(self, size: int) -> int:
        """What one process holds of what is cut."""
        return -(-size // self.processes)


def dry_run(name: str, config: TrainConfig) -> None:
    """Prints the plan of a command."""
    command = COMMANDS[name]
    if command.reader is None:
        raise UsageError(f"--dry_run: rlhf {name} runs other commands; pass it to those")
    loaded, _ = read(config, load(command.reader))
    print(loaded.report(config.dataset_name))
    print(text_of(name, config, *plan_of(config, loaded.examples)))


def plan_of(config: TrainConfig, examples: Sequence[Any]) -> tuple[PreTrainedModel, Shape, Plan]:
    shape, model = shape_of(config, examples), model_of(config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    activations, layers = activations_of(model, shape, config.bf16)
    text = model.config.get_text_config()
    tokens = shape.rows * shape.width
    between_layers = text.num_hidden_layers * tokens * text.hidden_size * (2 if model.dtype != torch.float32 else 4)
    head = None if isinstance(config, RewardConfig) else model.get_output_embeddings().weight
    logits = 0 if head is None else 2 * 4 * tokens * len(head)
    of_head = 0 if head is None or not head.requires_grad else head.nbytes
    budget = (config.workspace_mib or rk.build_info()["workspace_budget_mib"][device_type()]) << 20
    kept = min(logits, budget) // 2 if of_head else 0  # logits, for backward; a frozen head needs none
    plan = Plan(
        weights=sum(weight.nbytes for weight in model.parameters()) - saved_by_four_bits(model, config),
        gradients=sum(weight.nbytes for weight in trained),
        head=of_head,
        tied=of_head if head is model.get_input_embeddings().weight else 0,
        optimizer=STATE_BYTES[config.optim] * sum(weight.numel() for weight in trained),
        activations=activations,
        with_checkpoints=between_layers + activations - layers + layers // text.num_hidden_layers,
        scratch=min(budget, logits, kept + SCRATCH),
        logits=logits,
        accumulates=shape.micro_batches * together(config) > config.dry_run_processes,
        processes=config.dry_run_processes,
        whole=0 if config.dry_run_processes == 1 else whole_of(model, 2 if config.bf16 else None),
    )
    return model, shape, plan


def saved_by_four_bits(model: PreTrainedModel, config: TrainConfig) -> int:
    """Bytes by which load_in_4bit makes weights smaller: of frozen linear layers but the head, whose blocks of 64 then
    have a scale each, in fp32 or, nested, in eight bits with one in fp32 for 256 of them."""
    if not config.load_in_4bit:
        return 0
    scale = 1 + 4 / 256 if config.use_bnb_nested_quant else 4
    head = model.get_output_embeddings()
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
    weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
    return sum(weight.nbytes - int(weight.numel() * (0.5 + scale / 64)) for weight in weights)


def whole_of(model: PreTrainedModel, itemsize: int | None) -> int:
    """Bytes of weights that are whole at a time, as `place` cuts them: those outside the blocks from forward to
    backward, the block that computes, and the next one on its way."""

    def size(weights: Iterable[torch.Tensor]) -> int:
        return sum(weight.numel() * (itemsize or weight.itemsize) for weight in weights)

    blocks = [size(block.parameters()) for block in blocks_of(model, None)]
    return size(model.parameters()) - sum(blocks) + 2 * max(blocks)


def together(config: TrainConfig) -> int:
    """The number of processes that share a sequence."""
    return getattr(config, "sp_size", 1)


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape_of(config: TrainConfig, examples: Sequence[Any]) -> Shape:
    """Batches are planned as the run plans them; completions to come are as long as they may be."""
    is_group = isinstance(examples[0], Group)
    completion = getattr(config, "max_completion_length", 0)
    lengths = [example.length + completion for example in examples]
    sizes = [len(example.pairs) for example in examples] if is_group else None
    plan = plan_batches(lengths, config.batch_size, config.micro_batch_size, config.seed, sizes)
    steps = len(step_plan(len(plan), config.num_train_epochs, config.max_steps, config.seed))

    def rows_of(micro: list[int]) -> int:
        return sum(len(examples[i].responses) for i in micro) if is_group else len(micro)

    shapes = [[(rows_of(micro), max(lengths[i] for i in micro)) for micro in batch] for batch in plan]
    if isinstance(examples[0], TokenSequence) and getattr(config, "packing", False):
        shapes = [[(config.micro_batch_size, config.max_length)] * -(-config.batch_size // config.micro_batch_size)]
        steps = math.ceil(sum(lengths) / (config.batch_size * config.max_length)) * config.num_train_epochs
    rows, width = max((shape for batch in shapes for shape in batch), key=math.prod)
    width = -(-width // together(config))
    return Shape(rows, width, max(map(len, shapes)), max(sum(map(math.prod, batch)) for batch in shapes), steps)


def model_of(config: TrainConfig) -> PreTrainedModel:
    """The model as it will train, of fake tensors on the device of the run."""
    is_reward, dtype = isinstance(config, RewardConfig), loading_of(config, trains=True)["dtype"]
    auto, task = (AutoModelForSequenceClassification, "SEQ_CLS") if is_reward else (AutoModelForCausalLM, "CAUSAL_LM")
    model = meta_model(
        config.model_name_or_path, key="model_name_or_path", auto=auto, trust_remote_code=config.trust_remote_code,
        dtype=None if dtype == "auto" else getattr(torch, dtype), attn_implementation=config.attn_implementation,
    )  # fmt: skip
    if config.use_peft:
        train_adapter(model, config, task)
    if config.bf16:
        leave_inputs(model)
    turn_dropout_off(model)
    for part in model.modules():
        part.training = getattr(part, "drops_in_updates", False)
    return model


def activations_of(model: PreTrainedModel, shape: Shape, bf16: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for its backward pass, and how many of these its layers keep."""
    with FakeTensorMode():
        make_fake(model)
        ids = torch.ones(shape.rows, shape.width, dtype=torch.long, device=device_type())
        whole = bytes_kept(model, ids, ids, bf16)
        blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
        count, others = len(blocks), list(blocks)[1:]
        del blocks[1:]
        one = bytes_kept(model, ids, ids, bf16)
        blocks.extend(others)
    return whole, (whole - one) * count // max(count - 1, 1)


def make_fake(model: nn.Module) -> None:
    """Tensors of the meta device become fake ones of the run's: autocast then treats them as it will the real ones."""
    fakes: dict[int, torch.Tensor] = {}  # a tied weight stays one
    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device_type())
                    is_weight = tensors is part._parameters
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                tensors[name] = None if tensor is None else fakes[id(tensor)]


def bytes_kept(model: PreTrainedModel, ids: torch.Tensor, attention_mask: torch.Tensor, bf16: bool) -> int:
    """Bytes that the model below its head keeps for a backward pass, of a batch with padding."""
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that no other one gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast(device_type(), torch.bfloat16, enabled=bf16):
        model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def text_of(name: str, config: TrainConfig, model: PreTrainedModel, shape: Shape, plan: Plan) -> str:
    """The plan for a person, in MiB."""
    count = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    checkpoints = config.gradient_checkpointing
    other = f"{'without' if checkpoints else 'with'} --gradient_checkpointing"
    kept, instead = plan.activations, plan.with_checkpoints
    kept, instead = (instead, kept) if checkpoints else (kept, instead)
    lines = [
        ("weights", plan.part(plan.weights), f"{model.dtype}".removeprefix("torch.")),
        *([("whole at a time", plan.whole, "of weights, while they compute")] if plan.processes > 1 else []),
        ("gradients", plan.part(plan.gradients), "of what trains"),
        ("optimizer", plan.part(plan.optimizer), config.optim),
        ("activations", kept, f"{other}: {mib(instead)}"),
        ("losses' scratch", plan.scratch, f"at most; logits and their gradients, {mib(plan.logits)}, are not made"),
        (
            "at most at once",
            plan.total(checkpoints),
            f"{other}: {mib(plan.total(not checkpoints))}",
        ),
    ]
    return "\n".join([
        f"rlhf {name}: {type(model).__name__}, {count:,} parameters, of which {trained:,} train",
        f"{shape.steps:,} steps of at most {shape.tokens_a_step:,} tokens; the largest micro-batch has "
        f"{shape.rows} x {shape.width} tokens",
        *([f"of {plan.processes} processes, among which weights are cut, each holds"] if plan.processes > 1 else []),
        *(f"  {label:<18}{mib(size):>14}  {note}" for label, size, note in lines),
        "Other models (a reference of its own, rewards, values), the cache of generation and what a device takes "
        "come on top.",
    ])  # fmt: skip


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
