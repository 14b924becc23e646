"""Reward models: loading one, and the reward of token sequences."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..data.batches import pad_sequences
from ..errors import UsageError
from ..training.journal import RunBatch, batches_of_like_length, compute_only
from .loading import load_pretrained
from .lora import TRAINED, base_of


def load_reward_model(name: str, *, key: str, **loading: Any) -> PreTrainedModel:
    """A model with one value a sequence, dropout off; UsageError if it was not trained to be one."""
    if base_of(name, key) is not None:
        loading["num_labels"] = 1  # the base knows nothing of it
    model = load_pretrained(
        AutoModelForSequenceClassification, name, "a reward model", key=key,
        hint=". Is it a language model? `rlhf reward` makes a reward model of one", **loading,
    )  # fmt: skip
    if model.config.num_labels != 1:
        raise UsageError(
            f"{key}: {name!r} gives {model.config.num_labels} values a sequence; a reward model gives 1 (num_labels)"
        )
    try:
        value_head_of(model)
    except UsageError as error:
        raise UsageError(f"{key}: {name!r}: {error}") from error
    return model


@torch.no_grad()
def value_head_of(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns a hidden state into the reward, confirmed by the model's own forward on a short sequence.

    Raises UsageError where the reward is not that of the last token's hidden state: an encoder with a pooler, say.
    """
    name = type(model).__name__
    children = [child for child in model.children() if child is not model.base_model]
    children = [child.modules_to_save[TRAINED] if hasattr(child, "modules_to_save") else child for child in children]
    heads = [child for child in children if isinstance(child, nn.Linear) and child.out_features == 1]
    if len(heads) != 1:
        raise UsageError(f"{name}: expected one linear layer with one output on top, got {len(heads)}")
    if "use_cache" not in inspect.signature(model.base_model.forward).parameters:
        raise UsageError(f"{name}: expected a causal model, which is rewarded at its last token")
    # Its own forward takes the last token that is not the padding token: none of these is.
    pad_id = model.config.get_text_config().pad_token_id
    ids = torch.tensor([[i for i in range(4) if i != pad_id][:3]], device=model.device)
    mask = torch.ones_like(ids)
    precision = torch.finfo(model.dtype)  # of the model's own forward, also where its head is in fp32
    is_low = precision.bits < 32
    with torch.autocast(ids.device.type, model.dtype if is_low else None, enabled=is_low):
        expected = model(input_ids=ids, attention_mask=mask).logits.view(-1).float()
    reward = last_values(model, heads[0], ids, mask)
    if not torch.allclose(reward, expected, rtol=max(1e-4, 4 * precision.eps), atol=max(1e-5, precision.eps)):
        raise UsageError(
            f"{name}: its forward gives {expected.item():.6g} where its head makes {reward.item():.6g} of the last "
            "token's hidden state; only models whose reward is that can be used"
        )
    return heads[0]


def score_sequences(
    model: PreTrainedModel,
    sequences: Sequence[list[int]],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    *,
    bf16: bool = False,
    run: RunBatch = compute_only,
) -> Tensor:
    """The reward of each of N sequences of token ids, [N] fp32 on the CPU, in their order.

    It is the value at the last token, by its position: which token pads, and whether it is also a real one, does not
    matter. Equal sequences are scored once: in different batches they would differ in the last bit. `run` runs each
    batch; that of a `Journal` keeps the results.
    """
    if model.device.type != device.type:  # `to` cuts again what `unsharded` has made whole
        model.to(device)
    head = value_head_of(model)
    distinct = list(dict.fromkeys(map(tuple, sequences)))
    rewards: dict[tuple[int, ...], float] = {}
    for positions in batches_of_like_length([len(ids) for ids in distinct], batch_size):
        members = [distinct[i] for i in positions]

        def score(members: list[tuple[int, ...]] = members) -> list[float]:
            batch = pad_sequences([(list(ids), []) for ids in members], pad_id).to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return last_values(model, head, batch.input_ids, batch.attention_mask).tolist()

        rewards.update(zip(members, run(score), strict=True))
    broken = [reward for reward in rewards.values() if not math.isfinite(reward)]
    if broken:
        raise UsageError(f"the reward model gives {broken[0]} for {len(broken)} of {len(distinct)} sequences")
    return torch.tensor([rewards[tuple(ids)] for ids in sequences])


def batch_count(sequences: Sequence[list[int]], batch_size: int) -> int:
    """The number of batches that `score_sequences` will run."""
    return math.ceil(len(set(map(tuple, sequences))) / batch_size)


def last_values(model: PreTrainedModel, head: nn.Linear, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The value at the last real token of each sequence, [S] fp32; inputs [S, T], padded on the right, where no real
    token of a causal model attends."""
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    last = attention_mask.sum(1) - 1
    return values_of(head, hidden[torch.arange(len(last), device=last.device), last])


def values_of(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's values of hidden states, [..., D] -> [...] fp32, computed in fp32: rounded to bf16, a value has three
    digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        if head.weight.dtype in (torch.bfloat16, torch.float16):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()
