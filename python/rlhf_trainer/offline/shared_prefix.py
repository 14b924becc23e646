"""One pass over a prompt for all its responses: they stand behind it in one row, and attention keeps them apart.

A row is [prompt, response 1, response 2, ...]. A response sees the prompt and itself; its positions go on from the
prompt's. The prompt is then computed once, not once a response, and hidden states are what they would be otherwise, to
rounding. That takes a model that obeys a mask of its own, [rows, 1, T, T], in every layer: `can_share` tests it.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import IGNORED, Batch
from ..data.examples import Group
from .pair_batches import PairBatch, collate_groups, pairs_of

LARGEST_DIFFERENCE, IN_BF16 = 1e-3, 0.5  # of log-probs in the probe; a wrong mask makes it several nats


def collate_shared(groups: list[Group], pad_id: int, attention: str) -> PairBatch:
    """A row for each group. `attention`: the model's implementation, "sdpa" or "eager", which decides on the masks."""
    width = max(len(group.prompt) + sum(map(len, group.responses)) for group in groups)
    ids = torch.full((len(groups), width), pad_id)
    positions = torch.zeros(len(groups), width, dtype=torch.int64)
    owner = torch.full((len(groups), width), -1)  # 0: the prompt, k: response k, -1: padding
    longest = max(len(response) for group in groups for response in group.responses)
    count = sum(len(group.responses) for group in groups)
    gather = torch.zeros(count, 1 + longest, dtype=torch.int64)
    labels = torch.full((count, 1 + longest), IGNORED)
    s = 0
    for row, group in enumerate(groups):
        start = len(group.prompt)
        ids[row, :start], owner[row, :start] = torch.tensor(group.prompt), 0
        positions[row, :start] = torch.arange(start)
        for k, response in enumerate(group.responses, start=1):
            end = start + len(response)
            ids[row, start:end], owner[row, start:end] = torch.tensor(response), k
            positions[row, start:end] = torch.arange(len(response)) + len(group.prompt)
            # The prompt's last token predicts a response's first one.
            gather[s, 0] = row * width + len(group.prompt) - 1
            gather[s, 1 : 1 + len(response)] = row * width + torch.arange(start, end)
            labels[s, 1 : 1 + len(response)] = torch.tensor(response)
            start, s = end, s + 1
    batch = Batch(ids, attention_among(owner, attention), torch.full_like(ids, IGNORED), positions, (owner >= 0).long())
    return PairBatch(batch, labels, *pairs_of(groups), gather)


def attention_among(owner: Tensor, attention: str) -> Tensor:
    """The attention mask [R, 1, T, T] of tokens, a row each, on others: True where one attends to the other, else
    False; 0 and the lowest number for eager attention, which adds masks. owner [R, T]: the sequence of each token."""
    length = owner.shape[1]
    own = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = (own & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def attention_of(model: PreTrainedModel) -> str:
    return model.config._attn_implementation


@torch.no_grad()
def can_share(model: PreTrainedModel) -> bool:
    """Whether two responses behind one prompt give the log-probs of each behind a prompt of its own."""
    if attention_of(model) not in ("sdpa", "eager"):
        return False
    highest = model.get_input_embeddings().weight.shape[0]
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 16
    length = min(2 * window, 64)  # past the window, where a mask of one's own would lose it
    ids = [(7 * i + 3) % highest for i in range(length + 10)]
    group = Group(0, ids[:length], [ids[length : length + 4], ids[length + 4 :]], [(0, 1)], [0.0])
    device = model.get_input_embeddings().weight.device
    # The balancing loss of a mixture of experts would take the mask for one of padding.
    routers_off = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    logps = []
    for made in (collate_groups([group], 0), collate_shared([group], 0, attention_of(model))):
        pairs = made.to(device)
        logits = model(
            input_ids=pairs.batch.input_ids, attention_mask=pairs.batch.attention_mask,
            position_ids=pairs.batch.position_ids, use_cache=False, **routers_off,
        ).logits  # fmt: skip
        log_p = pairs.hidden_of(logits).float().log_softmax(-1)[:, :-1]
        targets = pairs.labels[:, 1:]
        picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        logps.append(torch.where(targets == IGNORED, 0.0, picked).sum(-1))
    return bool((logps[0] - logps[1]).abs().max() < (LARGEST_DIFFERENCE if model.dtype == torch.float32 else IN_BF16))
