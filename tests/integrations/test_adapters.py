"""Adapters of peft under patch_causal_lm: LoRA anywhere is exact; what is not a low-rank term on the head raises."""

import copy

import pytest
import torch

from rlhf_kernels.integrations.transformers import lm_head_of, logit_options_of, patch_causal_lm, run_in_head
from tests.integrations.tiny_models import (
    assert_same,
    grads_of,
    logprobs_of_logits,
    make_batch,
    make_model,
    own,
    patched,
)

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

HEAD = {"target_modules": ["lm_head"]}
BOTH = {"target_modules": ["lm_head", "q_proj"]}
TRUNK = {"target_modules": ["q_proj", "up_proj"]}
KINDS = {
    "LoRA on the trunk": TRUNK,
    "DoRA on the trunk": TRUNK | {"use_dora": True},
    "LoRA on the head alone": HEAD,
    "LoRA on both": BOTH,
    "rank-stabilised": BOTH | {"use_rslora": True, "lora_alpha": 3},
    "a trained copy of the head": TRUNK | {"modules_to_save": ["lm_head"]},
    "LoRA on embeddings and head": {"target_modules": ["lm_head", "embed_tokens"]},
    "trained tokens": TRUNK | {"trainable_token_indices": [3, 4, 5]},
}


def adapted(model, adapters=("default",), seed=0, **options):
    """The model with adapters that do something: peft starts B at 0, and DoRA's magnitudes at no change."""
    first, *others = adapters
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(r=2, **options), adapter_name=first)
    for name in others:
        adapted_model.add_adapter(name, peft.LoraConfig(r=3, **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted_model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted_model.eval()


@pytest.mark.parametrize("first", ["patched, then adapted", "adapted, then patched", "its base model patched"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_computed_as_from_its_own_logits(kind, first):
    """Values, gradients of the adapter, and none of the frozen weights."""
    options = KINDS[kind]
    plain = adapted(make_model("llama"), **options)
    if first == "patched, then adapted":
        model = adapted(patch_causal_lm(make_model("llama")), **options)
    else:
        model = adapted(make_model("llama"), **options)
        patch_causal_lm(model if first == "adapted, then patched" else model.get_base_model())
    expected = own(plain, make_batch())
    assert_same(patched(model, make_batch()), expected)
    with model.disable_adapter(), torch.no_grad():
        without = model(**make_batch())
    with plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(without.loss, plain(**make_batch()).loss)
    assert (without.loss - expected.loss).abs() > 1e-3
    assert_same(patched(model, make_batch()), expected)  # and it is back


def pair_of(options, adapters=("default",), family="llama", **changes):
    """Patched and not, with the same adapters."""
    model, plain = (adapted(make_model(family, **changes), adapters, **options) for _ in range(2))
    return patch_causal_lm(model), plain


def test_the_base_weights_may_be_trained_as_well():
    model, plain = pair_of(BOTH)
    for either in (model, plain):
        either.requires_grad_(True)
    expected = own(plain, make_batch())
    assert any("lm_head.base_layer.weight" in name for name in expected.grads)
    assert_same(patched(model, make_batch()), expected)


def test_dropout_draws_the_same_masks():
    model, plain = pair_of(BOTH | {"lora_dropout": 0.5})
    results = []
    for either, run in ((model, patched), (plain, own)):
        either.train()
        torch.manual_seed(7)
        results.append(run(either, make_batch()))
    assert_same(*results)
    assert patched(model, make_batch()).loss != results[0].loss  # it does drop


@pytest.mark.parametrize("options", [BOTH, TRUNK | {"modules_to_save": ["lm_head"]}], ids=["LoRA", "copies"])
def test_of_two_adapters_the_active_one_counts(options):
    model, plain = pair_of(options, ("one", "other"))
    losses = []
    for name in ("one", "other"):
        for either in (model, plain):
            either.set_adapter(name)
        expected = own(plain, make_batch())
        losses.append(expected.loss)
        assert_same(patched(model, make_batch()), expected)
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_two_active_adapters_add_up():
    model, plain = pair_of(BOTH, ("one", "other"))
    for either in (model, plain):
        either.base_model.set_adapter(["one", "other"])
    expected = own(plain, make_batch())
    assert sum("lm_head.lora_A" in name for name in expected.grads) == 2
    assert_same(patched(model, make_batch()), expected)


def test_merged_and_unmerged_again():
    model, plain = pair_of(BOTH)
    expected = plain(**make_batch()).loss.detach()
    with plain.disable_adapter():
        without = plain(**make_batch()).loss.detach()
    model.merge_adapter()
    torch.testing.assert_close(model(**make_batch()).loss, expected)
    with model.disable_adapter():  # peft's own forward unmerges then
        torch.testing.assert_close(model(**make_batch()).loss, without)
    torch.testing.assert_close(model(**make_batch()).loss, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**make_batch()).loss, expected)


def test_tied_embeddings_stay_tied_under_lora_on_the_head():
    model, plain = pair_of(BOTH, tie_word_embeddings=True)
    assert_same(patched(model, make_batch()), own(plain, make_batch()))


@pytest.mark.parametrize("family", ["gemma2", "phi, bias"])
def test_lora_on_a_head_with_a_cap_or_a_bias(family):
    model, plain = pair_of({"target_modules": ["lm_head"]}, family=family)
    assert_same(patched(model, make_batch()), own(plain, make_batch()))


def test_a_bf16_model_with_adapters_in_fp32():
    model = adapted(make_model("llama").to(torch.bfloat16), **BOTH)
    assert model.get_output_embeddings().lora_A["default"].weight.dtype == torch.float32
    plain = copy.deepcopy(model)
    results, expected = patched(patch_causal_lm(model), make_batch()), own(plain, make_batch())
    torch.testing.assert_close(results.loss.float(), expected.loss.float(), rtol=2e-2, atol=0)
    assert results.grads.keys() == expected.grads.keys()
    assert all(grad.dtype == torch.float32 for grad in results.grads.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (HEAD | {"use_dora": True}, "adapter 'default' on the LM head is a DoraLinearVariant"),
        (HEAD | {"lora_bias": True}, "adapter 'default' on the LM head has lora_bias=True"),
    ],
    ids=["DoRA", "lora_bias"],
)
@pytest.mark.parametrize("first", ["adapted", "patched"])
def test_what_is_more_than_a_low_rank_term_on_the_head_raises(options, message, first):
    """At patching or, where the adapter comes later, at the call."""
    model = make_model("phi, bias")
    if first == "patched":
        model = adapted(patch_causal_lm(model), **options)
        assert model(input_ids=make_batch()["input_ids"]).logits.shape[-1] > 0  # peft itself has no objection
        with pytest.raises(ValueError, match=message):
            model(**make_batch())
    else:
        with pytest.raises(ValueError, match=message):
            patch_causal_lm(adapted(model, **options))


@pytest.mark.parametrize(
    "config",
    [
        peft.AdaLoraConfig(total_step=10, init_r=4, **HEAD),
        peft.VeraConfig(r=2, **HEAD),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        peft.LoHaConfig(r=2, **HEAD),
        peft.TrainableTokensConfig(target_modules=["embed_tokens", "lm_head"], token_indices=[3]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_tuners_on_the_head_raise(config):
    """AdaLoRA inherits from LoRA's layers and computes something else."""
    model = peft.get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear, got peft\."):
        patch_causal_lm(model)


def test_rows_with_adapters_of_their_own_raise():
    model, plain = pair_of(HEAD, ("one", "other"))
    batch = make_batch()
    assert plain(**batch, adapter_names=["one", "other"]).loss > 0
    with pytest.raises(ValueError, match="the LM head is called with more than hidden states"):
        model(**batch, adapter_names=["one", "other"])


def test_reading_an_adapted_head_as_one_matrix_raises():
    model = adapted(make_model("llama"), **HEAD)
    with pytest.raises(ValueError, match=r"carries a low-rank adapter.*merge_and_unload.*run_in_head"):
        lm_head_of(model)


PROMPT_LEARNING = {
    "prompt tuning": {"kind": "PromptTuningConfig"},
    "p-tuning": {"kind": "PromptEncoderConfig", "encoder_hidden_size": 8},
    "prefix tuning": {"kind": "PrefixTuningConfig"},
}


def prompted(model, kind, **options):
    torch.manual_seed(0)
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("method", PROMPT_LEARNING)
def test_prompt_learning_raises_at_patching(method):
    model = prompted(make_model("llama"), **PROMPT_LEARNING[method])
    with pytest.raises(ValueError, match=r"adapter 'default' is P.*Config: prompt learning puts virtual tokens"):
        patch_causal_lm(model)


@pytest.mark.parametrize("method", PROMPT_LEARNING)
def test_prompt_learning_that_came_after_patching_is_never_computed_wrongly(method):
    """peft lengthens `labels` itself, so that they fit; of targets it does not know: lengths differ, and it raises."""
    plain = prompted(make_model("llama"), **PROMPT_LEARNING[method])
    model = prompted(patch_causal_lm(make_model("llama")), **PROMPT_LEARNING[method])
    expected, ours = own(plain, make_batch()), model(**make_batch())
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, expected.loss)
    grads = grads_of(model)
    assert all(torch.allclose(grads[name], grad, rtol=1e-4, atol=1e-6) for name, grad in expected.grads.items())
    batch = make_batch()
    targets = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    if method == "prefix tuning":  # no tokens, only keys and values: positions are as they were
        torch.testing.assert_close(model(**batch, shift_labels=targets).loss, expected.loss)
    else:
        with pytest.raises(ValueError, match=r"labels \(2, 9\) and hidden states \(2, 13\)"):
            model(**batch, shift_labels=targets)


def test_run_in_head_sees_the_adapted_head_as_one_matrix():
    """Whatever loss is computed there: hidden states and weight have the rank as further columns."""
    model = adapted(make_model("llama"), **HEAD)
    batch = make_batch()
    labels = batch.pop("labels")
    logits, output = run_in_head(
        model, lambda hidden, head: hidden @ head.weight.T, logit_options_of(model), batch, model
    )
    torch.testing.assert_close(logprobs_of_logits(logits, labels), logprobs_of_logits(model(**batch).logits, labels))
    assert output.logits.shape[-1] == 0
