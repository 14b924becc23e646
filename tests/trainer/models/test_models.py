"""The LM head: read exactly or refused, run inside the model's own forward, and never as `[tokens, vocab]` logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rlhf_kernels as rk
from rlhf_trainer.data.batches import IGNORED, pad_sequences
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.checks import check_fit
from rlhf_trainer.models.fused_lm import FusedLM, lm_head_of
from rlhf_trainer.models.loading import checkpoint_gradients, end_ids_of, load_causal_lm, load_tokenizer, meta_model
from tests.support.vocabulary_tensors import LargestVocabularyTensor


@pytest.fixture
def batch():
    """Two sequences of unequal length."""
    return pad_sequences([([5, 6, 7], [8, 9, 10, 11]), ([12, 13], [14, 15])], pad_id=1)


def sequence_logprobs_of_full_logits(model, batch):
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    targets = batch.labels[:, 1:]
    per_token = F.log_softmax(logits[:, :-1], -1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return (per_token * (targets != IGNORED)).sum(-1)


def fused_sequence_logprobs(fused, batch):
    return fused(
        batch, lambda hidden, head: rk.sequence_logprobs(hidden, head.weight, batch.labels, **head.options()).logprobs
    )


HEADS = {
    "llama": (1.0, None), "qwen3": (1.0, None), "gemma2": (1.0, 3.0), "gpt2": (1.0, None), "cohere": (0.25, None),
    "phi": (1.0, None), "granite": (0.25, None), "hyperclovax": (0.25, None), "minicpm3": (1.0, None),
}  # fmt: skip


@pytest.mark.parametrize("family", HEADS)
def test_head_is_read(family, make_model, batch):
    """Scale, cap and bias of each family; log-probs and every gradient equal those of the model's own full logits."""
    model = make_model(family)
    head = lm_head_of(model)
    assert (head.logit_scale, head.logit_softcap) == (pytest.approx(HEADS[family][0]), HEADS[family][1])
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == (family == "phi")

    expected = sequence_logprobs_of_full_logits(model, batch)
    expected.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = fused_sequence_logprobs(FusedLM(model), batch)
    ours.sum().backward()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if name in grads:
            error = (parameter.grad - grads[name]).norm() / grads[name].norm().clamp(min=1e-3)
            assert error < 1e-3, name


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_ignoring_scale_cap_or_bias_would_show(family, make_model, batch):
    """The models above are not so tame that a plain head gives the same numbers."""
    model = make_model(family)
    plain = FusedLM(model)(
        batch, lambda hidden, head: rk.sequence_logprobs(hidden, head.weight, batch.labels).logprobs
    )  # fmt: skip
    assert (plain - sequence_logprobs_of_full_logits(model, batch)).abs().max() > 0.1


def test_unknown_transform_of_the_logits_is_refused(make_model):
    model = make_model("llama")
    forward = model.forward

    def forward_with_a_twist(**kwargs):
        out = forward(**kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward_with_a_twist
    with pytest.raises(UsageError, match="cannot be read: its forward turns logits"):
        FusedLM(model)
    model.config.logit_scale = 1.5  # now it says so
    assert lm_head_of(model).logit_scale == 1.5


def test_logits_cut_to_an_unpadded_vocabulary_are_refused(make_model):
    model = make_model("llama")
    forward = model.forward

    def forward_with_a_cut(**kwargs):
        out = forward(**kwargs)
        out.logits = out.logits[..., :-7]
        return out

    model.forward = forward_with_a_cut
    with pytest.raises(UsageError, match="cannot be read"):
        lm_head_of(model)


def test_an_adapter_that_is_more_than_a_low_rank_term_is_refused_on_the_head(make_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UsageError, match=r"adapter 'default' on the LM head is a Dora.*merge_and_unload"):
        FusedLM(model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["on the trunk", "on the head", "a trained copy of the head"],
)
def test_adapters_count(options, make_model, batch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, **options))
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.add_(0.1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()
    ours = fused_sequence_logprobs(FusedLM(model), batch)
    torch.testing.assert_close(ours, sequence_logprobs_of_full_logits(model, batch), rtol=1e-4, atol=1e-4)


def test_a_parametrised_a_patched_or_a_missing_head_is_refused(make_model):
    model = make_model("llama")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(UsageError, match=r"expected torch\.nn\.Linear"):
        lm_head_of(model)
    model = make_model("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * forward(hidden)
    with pytest.raises(UsageError, match="forward was replaced"):
        lm_head_of(model)
    model = make_model("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UsageError, match="no output embeddings"):
        lm_head_of(model)
    model.get_output_embeddings = lambda: nn.Linear(32, 397, bias=False)  # not the one forward calls
    with pytest.raises(UsageError, match="0 times, expected once"):
        lm_head_of(model)


def test_hooks_fire_and_the_weight_is_used_inside_the_heads_call(make_model, batch):
    """FSDP and ZeRO need it: hooks of model, layers and head, and the head's weight present only during its call."""
    model = make_model("llama")
    fused = FusedLM(model)
    expected = fused_sequence_logprobs(fused, batch).detach()
    calls = []
    layer, head = model.model.layers[0], model.lm_head
    for name, module in (("model", model), ("layer", layer), ("head", head)):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"{name} starts"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"{name} ends"))
    layer.register_full_backward_hook(lambda *_: calls.append("layer backward"))
    head.register_forward_hook(
        lambda _module, _args, out: out.register_hook(lambda _: calls.append("head backward")) and None
    )
    weight = head.weight
    shard = nn.Parameter(torch.full_like(weight, float("nan")))  # what is there outside the head's call
    head.register_forward_pre_hook(lambda *_: setattr(head, "weight", weight))
    head.register_forward_hook(lambda *_: setattr(head, "weight", shard))
    head.weight = shard

    logprobs = fused_sequence_logprobs(fused, batch)
    torch.testing.assert_close(logprobs, expected)
    assert calls == ["model starts", "layer starts", "layer ends", "head starts", "head ends", "model ends"]
    logprobs.sum().backward()
    assert calls[6:] == ["head backward", "layer backward"]
    assert weight.grad is not None and shard.grad is None


def test_a_hook_that_replaces_the_heads_output_is_respected(make_model, batch):
    """ZeRO-3 wraps outputs so that their backward gathers weights: the result must be the wrapped one."""
    model = make_model("llama")
    fused = FusedLM(model)
    plain = fused_sequence_logprobs(fused, batch)
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 2)
    torch.testing.assert_close(fused_sequence_logprobs(fused, batch), 2 * plain)


def test_the_model_is_itself_again_afterwards(make_model, batch):
    model = make_model("llama")
    fused = FusedLM(model)
    before = model(input_ids=batch.input_ids).logits
    hooks = len(model.lm_head._forward_hooks)
    fused_sequence_logprobs(fused, batch)
    with pytest.raises(ZeroDivisionError):
        fused(batch, lambda hidden, head: 1 / 0)
    torch.testing.assert_close(model(input_ids=batch.input_ids).logits, before)
    assert len(model.lm_head._forward_hooks) == hooks


@pytest.fixture
def small_budget():
    rk.set_workspace_budget(8)
    yield 8 << 20
    rk.set_workspace_budget(None)


def test_no_logits_of_all_tokens(make_model, small_budget):
    """Forward and backward of a DPO step make no tensor of [tokens, V]: at most a tile within the budget."""
    vocabulary = 32771
    model = make_model("llama", vocab_size=vocabulary)
    batch = pad_sequences([([5] * 10, [7] * 60)] * 4, pad_id=1)
    tokens = batch.labels[:, 1:].ne(IGNORED).sum().item()
    assert tokens * vocabulary * 4 > 3 * small_budget  # the logits of the response tokens alone would not fit

    def watched(run):
        with LargestVocabularyTensor(vocabulary) as mode:
            run().backward()
        return mode.elements

    def full():
        return sequence_logprobs_of_full_logits(model, batch).sum()

    def fused():
        ref = torch.zeros(4)
        return FusedLM(model)(
            batch, lambda hidden, head: rk.linear_dpo_loss(hidden, head.weight, batch.labels, ref, **head.options())
        ).loss

    assert watched(full) >= tokens * vocabulary  # the watcher sees logits where there are some
    assert watched(fused) * 4 <= small_budget


def test_heads_own_matmul_never_runs(make_model, batch, monkeypatch):
    model = make_model("llama")
    fused = FusedLM(model)
    weights = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *rest: (weights.append(w), linear(x, w, *rest))[1])
    fused(batch, lambda hidden, head: hidden)
    assert weights and all(w is not model.lm_head.weight for w in weights)


def test_dropout_is_off_with_and_without_checkpointing(make_model, batch, tmp_path):
    """Two passes agree although the config asks for dropout; OPT drops in the checkpointed block itself."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=397, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.5,
        attention_dropout=0.5, layerdrop=0.5, word_embed_proj_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    model = load_causal_lm(str(tmp_path / "opt"), key="model_name_or_path")
    fused = FusedLM(model)
    first = fused_sequence_logprobs(fused, batch)
    torch.testing.assert_close(fused_sequence_logprobs(fused, batch), first, rtol=0, atol=0)
    checkpoint_gradients(model)
    torch.testing.assert_close(fused_sequence_logprobs(fused, batch), first, rtol=0, atol=0)
    model.train()
    assert not torch.equal(fused_sequence_logprobs(fused, batch), first)  # this model does drop if it may


def test_autocast_reaches_the_head_and_weights_stay_fp32(make_model, batch):
    model = make_model("llama")
    hidden = {flag: FusedLM(model, bf16=flag)(batch, lambda hidden, head: hidden).detach() for flag in (False, True)}
    assert not torch.equal(hidden[False], hidden[True].float())
    autocast = []
    FusedLM(model, bf16=True)(batch, lambda hidden, head: autocast.append(torch.is_autocast_enabled("cpu")))
    FusedLM(model)(batch, lambda hidden, head: autocast.append(torch.is_autocast_enabled("cpu")))
    assert autocast == [True, False]
    assert model.lm_head.weight.dtype == torch.float32


def test_missing_weights_are_refused(make_model, tmp_path):
    """A checkpoint without its head would get a random one, with a mere warning."""
    model = make_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(UsageError, match=r"model_name_or_path: .*lacks weights.*lm_head.weight"):
        load_causal_lm(str(tmp_path / "headless"), key="model_name_or_path")


NO_FACTS = {
    "list": "[]", "nothing": "null", "number": "3", "cut": "{", "deep": "[" * 100_000, "digits": "9" * 5000,
    "text": '{"model_type": "llama", "hidden_size": "x"}', "negative": '{"model_type": "llama", "hidden_size": -4}',
    "large": '{"model_type": "llama", "hidden_size": ' + "1" * 400 + "}", "kind": '{"model_type": []}',
    "no heads": '{"model_type": "llama", "num_attention_heads": 0}',
}  # fmt: skip


@pytest.mark.parametrize("facts", NO_FACTS.values(), ids=list(NO_FACTS))
def test_a_folder_whose_config_is_none(facts, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(facts)
    for load in (load_causal_lm, meta_model):
        with pytest.raises(UsageError, match=r"ref_model: cannot load '.*' as a causal language model"):
            load(str(tmp_path), key="ref_model")
    assert end_ids_of(str(tmp_path), False) == set()


@pytest.mark.parametrize("facts", ["[]", "null", "{", "[" * 100_000, "9" * 5000, '{"peft_type": "LORA"}', "{}"])
def test_a_folder_whose_adapter_config_is_none(facts, tmp_path):
    (tmp_path / "adapter_config.json").write_text(facts)
    for load in (load_causal_lm, load_tokenizer, meta_model):
        with pytest.raises(UsageError, match=r"ref_model: expected .*adapter_config.json"):
            load(str(tmp_path), key="ref_model")


def test_a_name_too_long_for_a_folder_or_a_hub_id():
    for load in (load_causal_lm, load_tokenizer, meta_model):
        with pytest.raises(UsageError, match="ref_model: no such folder: xxx"):
            load("x" * 5000, key="ref_model")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UsageError, match="model_name_or_path: no such folder: /nowhere/model"):
        load_causal_lm("/nowhere/model", key="model_name_or_path")
    with pytest.raises(UsageError, match=f"tokenizer_name_or_path: cannot load a tokenizer from '{tmp_path}'"):
        load_tokenizer(str(tmp_path), key="tokenizer_name_or_path")
    with pytest.raises(UsageError, match=f"model_name_or_path: cannot load '{tmp_path}'"):
        load_causal_lm(str(tmp_path), key="model_name_or_path")


def test_a_tokenizer_with_more_tokens_than_the_model(make_model, tokenizer):
    data = ([3], [3], "data.jsonl")
    check_fit(make_model("llama"), tokenizer, *data)
    small = make_model("llama", vocab_size=200)
    with pytest.raises(UsageError, match=r"its ids go up to 3\d\d, the model embeds 200 tokens \(ids up to 199\)"):
        check_fit(small, tokenizer, *data)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<extra{i}>" for i in range(200)])
    with pytest.raises(UsageError, match="the tokenizer does not belong to the model"):
        check_fit(make_model("llama"), larger, *data)


def test_a_row_longer_than_the_models_positions(make_model, tokenizer):
    with pytest.raises(
        UsageError, match=r"data.jsonl, row 4: 97 tokens, but the model has 96 positions; set max_length"
    ):
        check_fit(make_model("gpt2"), tokenizer, [1, 4], [2, 97], "data.jsonl")
    check_fit(make_model("gpt2"), tokenizer, [1, 4], [2, 96], "data.jsonl")
