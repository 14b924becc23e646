"""Several conversations in one row, so that little of a batch is padding; none sees another.

A packed batch carries positions that start again from 0 at each conversation. transformers reads from them which
tokens belong together and masks attention between the others, in full and in sliding-window layers alike, but only if
it is given no attention mask: so a packed batch has none. Padding needs none either: it stands behind the
conversations, with positions of its own, like one more of them.

Whether a model plays by these rules is for `leaks` to find out.
"""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import IGNORED, Batch, labels_of
from ..data.examples import TokenSequence
from ..errors import UsageError
from ..models.fused_lm import FusedLM

LARGEST_LEAK = 0.03  # of a visible neighbour's effect; rounding makes 1e-5 of it in fp32, 1e-2 in bf16


def plan_packing(lengths: list[int], max_length: int) -> list[list[int]]:
    """lengths [N] -> rows of at most max_length tokens that partition range(N): first fit, the longest first."""
    too_long = [i for i, length in enumerate(lengths) if length > max_length]
    if too_long:
        raise ValueError(f"lengths[{too_long[0]}] is {lengths[too_long[0]]}, over max_length={max_length}")
    # The room of row i is leaf i of a tree, of which each node holds the largest room below it: the first row with
    # enough room then takes log N steps to find.
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [max_length] * (2 * leaves)
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def collate_packed(rows: list[list[TokenSequence]], pad_id: int) -> Batch:
    """R rows of conversations -> Batch of [R, T], padded at the end, with positions that restart and no mask."""
    width = max(sum(sequence.length for sequence in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full_like(input_ids, IGNORED)
    position_ids = torch.zeros_like(input_ids)
    for r, row in enumerate(rows):
        start = 0
        for sequence in row:
            end = start + sequence.length
            input_ids[r, start:end] = torch.tensor(sequence.ids)
            labels[r, start:end] = torch.tensor(labels_of(sequence))
            position_ids[r, start:end] = torch.arange(sequence.length)
            start = end
        position_ids[r, start:] = torch.arange(width - start)
    real = torch.tensor([[int(t < sum(s.length for s in row)) for t in range(width)] for row in rows])
    return Batch(input_ids, None, labels, position_ids, real)


def check_packing(fused: FusedLM, option: str) -> None:
    """UsageError where sequences in one row would not be kept apart, computed as they will be."""
    model = fused.model
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fused.bf16):
        leak = leaks(model)
    if leak:
        raise UsageError(
            f"{option}: in {type(model).__name__} with attention {model.config._attn_implementation!r} sequences that "
            f"share a row see each other. Leave {option} off, or try attn_implementation: sdpa"
        )


@torch.no_grad()
def leaks(model: PreTrainedModel) -> bool:
    """Whether a conversation changes when others share its row, as far as two small rows can tell.

    It does in models that take no positions or carry a state from token to token, and under flash attention, which
    keeps packed rows apart only one at a time. The precision is the one it is called under.
    """
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        return True
    embeddings = model.get_input_embeddings().weight
    parts = [
        TokenSequence(0, [(7 * i + 3 * n) % embeddings.shape[0] for i in range(length)], [True] * length)
        for n, length in enumerate((5, 9, 6))
    ]
    batch = collate_packed([[parts[0], parts[1]], [parts[1], parts[2]]], pad_id=0).to(embeddings.device)
    width = batch.input_ids.shape[1]

    def logits_of(ids: Tensor, position_ids: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits.float()

    in_sight = torch.arange(width, device=embeddings.device).expand(2, -1)
    packed, joined = (logits_of(batch.input_ids, positions) for positions in (batch.position_ids, in_sight))
    leaked, visible = [], []  # the largest effect of neighbours in a packed row, and of ones in plain sight
    for row, start, part in ((0, 0, parts[0]), (0, 5, parts[1]), (1, 0, parts[1]), (1, 9, parts[2])):
        place = (row, slice(start, start + part.length))
        alone = logits_of(batch.input_ids[place][None], batch.position_ids[place][None])[0]
        leaked.append((packed[place] - alone).abs().max())
        visible.append((joined[place] - alone).abs().max())
    return not bool(torch.stack(leaked).max() <= LARGEST_LEAK * torch.stack(visible).max())  # NaN is not trusted
