"""Tiny random models of many families, and what their own logits say."""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

VOCABULARY = 67
IGNORED = -100

# Weights are drawn wide, caps low, scales far from 1, so that a forgotten one would show.
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "attn_implementation": "eager",
}  # fmt: skip
EXPERTS = COMMON | {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
FAMILIES = {
    "llama": ("Llama", COMMON),
    "llama, tied": ("Llama", COMMON | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gemma3, capped": ("Gemma3Text", COMMON | {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY,
                      "initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                      "bos_token_id": 0, "eos_token_id": 1}),
    "cohere": ("Cohere", COMMON | {"logit_scale": 0.25, "tie_word_embeddings": False}),
    "cohere2": ("Cohere2", COMMON | {"logit_scale": 4.0, "sliding_window": 4}),
    "phi, bias": ("Phi", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    "granite, divides": ("Granite", COMMON | {"logits_scaling": 4.0}),
    "hyperclova x, multiplies": ("HyperCLOVAX", COMMON | {"logits_scaling": 0.25}),
    "minicpm3, before the head": ("MiniCPM3", COMMON | {"dim_model_base": 4}),
    "falcon h1, multiplier": ("FalconH1", COMMON | {
        "lm_head_multiplier": 0.25, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4,
        "mamba_n_groups": 1, "mamba_chunk_size": 8, "head_dim": 8}),
    "olmo2": ("Olmo2", COMMON),
}  # fmt: skip


class Computed(NamedTuple):
    loss: Tensor
    logprobs: Tensor  # [B, T]
    grads: dict[str, Tensor]


def make_model(family, seed=0, **changes):
    name, options = FAMILIES[family]
    return make_causal_lm(getattr(transformers, f"{name}Config")(**(options | changes)), seed)


def make_causal_lm(config, seed=0, auto=transformers.AutoModelForCausalLM):
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, in which case a dropped bias would not show
                parameter.normal_(std=0.3)
    return model.eval()


def make_batch(padding="right"):
    """Two sequences, the second one padded by 3; the first 3 real labels of each are masked."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    mask = torch.ones_like(ids)
    if padding == "right":
        labels[:, :3], labels[1, 6:], mask[1, 6:] = IGNORED, IGNORED, 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels[0, :3], labels[1, :6], mask[1, :3] = IGNORED, IGNORED, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def logprobs_of_logits(logits, labels):
    """[B, T]: position t holds log p(label t + 1); 0 where that is masked."""
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    results = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return results * (targets != IGNORED)


def own(model, inputs):
    """The unpatched model's results for inputs with labels."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return Computed(out.loss.detach(), logprobs_of_logits(out.logits, inputs["labels"]).detach(), grads_of(model))


def patched(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return Computed(out.loss.detach(), out.logprobs.detach(), grads_of(model))


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=tolerance, atol=tolerance)
    assert_same_grads(ours.grads, theirs.grads, tolerance)


def assert_same_grads(ours, theirs, tolerance=1e-4):
    """Each by its relative Frobenius error, and those that are nearly 0 by the norm of all."""
    assert ours.keys() == theirs.keys() and theirs
    norm = sum(grad.norm() ** 2 for grad in theirs.values()) ** 0.5
    assert norm > 1e-3
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= tolerance * (grad.norm() + 1e-3 * norm), name


def twins(model):
    """The model and its copy."""
    return model, copy.deepcopy(model)
