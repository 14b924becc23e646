"""patch_causal_lm on many families: loss, log-probs and every gradient are those of the model's own logits."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import (
    CausalLMLogprobs,
    LogitOptions,
    lm_head_of,
    logit_options_of,
    patch_causal_lm,
    run_in_head,
)
from tests.integrations.tiny_models import (
    FAMILIES,
    IGNORED,
    VOCABULARY,
    assert_same,
    grads_of,
    logprobs_of_logits,
    make_batch,
    make_model,
    own,
    patched,
    twins,
)

OPTIONS = {
    "gemma2": (1.0, 3.0), "gemma3, capped": (1.0, 3.0), "cohere": (0.25, None), "cohere2": (4.0, None),
    "granite, divides": (0.25, None), "hyperclova x, multiplies": (0.25, None), "falcon h1, multiplier": (0.25, None),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_computed_as_from_its_own_logits(family):
    model, plain = twins(make_model(family))
    assert logit_options_of(plain) == OPTIONS.get(family, (1.0, None))
    assert_same(patched(patch_causal_lm(model), make_batch()), own(plain, make_batch()))


@pytest.mark.parametrize("family", OPTIONS)
def test_a_forgotten_scale_or_cap_would_show(family):
    model = make_model(family)
    expected = own(model, make_batch())
    wrong = patched(patch_causal_lm(model, logit_options=LogitOptions()), make_batch())
    assert (wrong.loss - expected.loss).abs() > 0.01 * expected.loss


def test_a_forgotten_bias_would_show():
    model = make_model("phi, bias")
    batch = make_batch()
    labels = batch.pop("labels")

    def without_bias(hidden, head):
        assert head.bias is not None
        return rk.sequence_logprobs(hidden, head.weight, labels).logprobs

    results, _ = run_in_head(model, without_bias, logit_options_of(model), batch)
    expected = logprobs_of_logits(model(**batch).logits, labels).sum(-1)
    assert (results - expected).abs().min() > 0.1


def variants():
    """Ways to call a model, made of a batch with labels."""
    left = make_batch("left")
    right = make_batch()
    without_mask = {name: right[name] for name in ("input_ids", "labels")}
    yield "padded on the left, with positions", left
    yield "no mask", without_mask
    yield "num_items_in_batch", right | {"num_items_in_batch": 37}
    yield "num_items_in_batch as a tensor", right | {"num_items_in_batch": torch.tensor(37)}
    yield "hidden states asked for", right | {"output_hidden_states": True}
    yield "a cache asked for, in vain", right | {"use_cache": True}


@pytest.mark.parametrize("inputs", [pytest.param(inputs, id=name) for name, inputs in variants()])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_ways_a_model_is_called(family, inputs):
    model, plain = twins(make_model(family))
    assert_same(patched(patch_causal_lm(model), inputs), own(plain, inputs))


def test_inputs_given_by_position_and_embeddings_instead_of_ids():
    model, plain = twins(make_model("llama"))
    batch = make_batch()
    expected = own(plain, batch).loss
    patch_causal_lm(model)
    torch.testing.assert_close(
        model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, expected
    )
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeddings, **batch).loss, expected)


def test_shift_labels_are_targets_of_their_own_positions():
    """transformers' own loss takes them so: a rank of a sequence-parallel batch does not have the neighbours."""
    model, plain = twins(make_model("llama"))
    inputs = make_batch()
    labels = inputs.pop("labels")
    targets = torch.randint(VOCABULARY, labels.shape)
    targets[:, :3] = IGNORED
    expected = plain(**inputs, labels=labels, shift_labels=targets)
    out = patch_causal_lm(model)(**inputs, shift_labels=targets)
    torch.testing.assert_close(out.loss, expected.loss)
    assert torch.equal(out.token_mask, targets != IGNORED)
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=targets).loss, expected.loss)
    with pytest.raises(ValueError, match="log-probs need labels or shift_labels"):
        model(**inputs, logprobs=True)


KEPT = {
    "the last 4": 4,
    "indices": torch.tensor([2, 7, 5]),
    "all of them in another order": torch.arange(8, -1, -1),
    "indices of each row": torch.tensor([[2, 3, 4], [5, 7, 3]]),
    "a mask": torch.arange(18).view(2, 9) % 3 == 1,
}


@pytest.mark.parametrize("kept", KEPT)
def test_logits_to_keep_chooses_log_probs_alike(kept):
    model = make_model("llama")
    inputs = make_batch()
    labels = inputs.pop("labels")
    all_of_them = logprobs_of_logits(model(**inputs).logits, labels)
    chosen = KEPT[kept]
    if isinstance(chosen, int):
        expected = all_of_them[:, -chosen:]
    elif chosen.dim() == 1:
        expected = all_of_them[:, chosen]
    else:
        expected = all_of_them[chosen] if chosen.dtype == torch.bool else all_of_them.gather(1, chosen)
    out = patch_causal_lm(model)(**inputs, labels=labels, logits_to_keep=chosen)
    torch.testing.assert_close(out.logprobs, expected)
    assert expected.abs().sum() > 0
    if isinstance(chosen, int):  # labels may come cut already
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        out = model(**inputs, shift_labels=targets[:, -chosen:], logits_to_keep=chosen)
        torch.testing.assert_close(out.logprobs, expected)


def test_labels_of_another_length_are_refused():
    model = patch_causal_lm(make_model("llama"))
    inputs = make_batch()
    labels = inputs.pop("labels")
    with pytest.raises(ValueError, match=r"labels \(2, 12\) and hidden states \(2, 9\)"):
        model(**inputs, labels=nn.functional.pad(labels, (3, 0), value=IGNORED))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"outputs": ("entropy", "is_top1")}], ids=str)
def test_temperature_and_outputs_at_patching_or_at_the_call(options):
    model, other = twins(make_model("gemma2"))
    inputs = make_batch()
    logits = model(**inputs).logits / options.get("temperature", 1.0)
    before = patch_causal_lm(model, **options)(**inputs)
    at_call = patch_causal_lm(other)(**inputs, **options)
    for out in (before, at_call):
        torch.testing.assert_close(out.logprobs, logprobs_of_logits(logits, inputs["labels"]))
        if "outputs" in options:
            expected = torch.distributions.Categorical(logits=logits).entropy() * out.token_mask
            torch.testing.assert_close(out.entropy, expected)
            assert out.is_top1.shape == out.logprobs.shape and out.mean_logit is None
        else:
            assert out.entropy is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe"])
def test_router_logits_add_the_models_own_balancing_loss(family):
    model, plain = twins(make_model(family))
    batch = make_batch()
    expected, out = plain(**batch), patch_causal_lm(model)(**batch)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    assert out.loss - model(**batch, output_router_logits=False).loss > 0.1


def test_nothing_counts():
    model = patch_causal_lm(make_model("llama"))
    batch = make_batch()
    out = model(**batch | {"labels": torch.full_like(batch["labels"], IGNORED)})
    out.loss.backward()
    assert out.loss == 0 and all(not grad.any() for grad in grads_of(model).values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_bf16_models_train(family):
    """Nearer to fp32 than the model's own bf16 logits are."""
    batch = make_batch()
    model = make_model(family).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    expected = own(exact, batch)
    theirs, ours = own(copy.deepcopy(model), batch), patched(patch_causal_lm(model), batch)
    assert (ours.loss - expected.loss).abs() <= (theirs.loss - expected.loss).abs() + 0.02
    assert all(grad.dtype == torch.bfloat16 for grad in ours.grads.values())
    for name, grad in expected.grads.items():
        error = (ours.grads[name].float() - grad).norm()
        assert error <= 1.2 * (theirs.grads[name].float() - grad).norm() + 0.01 * grad.norm() + 1e-3, name


def test_everything_else_is_the_models_own():
    """Logits without labels, logits with labels on request, generation with its cache."""
    model, plain = twins(make_model("llama"))
    patch_causal_lm(model)
    batch = make_batch("left")
    with_logits = model(**batch, logprobs=False)
    torch.testing.assert_close(with_logits.logits, plain(**batch).logits, rtol=0, atol=0)
    assert with_logits.loss == plain(**batch).loss
    del batch["labels"]
    assert model(**batch).logits.shape == (2, 9, VOCABULARY)
    model(**make_batch())  # the head is as it was after a fused call, too
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for how in ({"do_sample": False}, {"num_beams": 2}):
        assert torch.equal(
            model.generate(**inputs, **how, max_new_tokens=8), plain.generate(**inputs, **how, max_new_tokens=8)
        )


def test_saving_and_loading_are_unharmed(tmp_path):
    model, plain = twins(make_model("gemma2"))
    patch_causal_lm(model)
    model(**make_batch())
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == ["Gemma2ForCausalLM"]
    assert loaded.state_dict().keys() == plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded(**make_batch()).logits, plain(**make_batch()).logits)


def test_a_deep_copy_is_patched_and_a_model_of_its_own():
    """A reference model is often made that way."""
    model = patch_causal_lm(make_model("llama"))
    twin = copy.deepcopy(model)
    expected = patched(model, make_batch())
    assert_same(patched(twin, make_batch()), expected, tolerance=0)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert patched(twin, make_batch()).loss != expected.loss
    assert_same(patched(model, make_batch()), expected, tolerance=0)


def test_a_pickled_copy_is_the_plain_model_and_can_be_patched():
    model = patch_causal_lm(make_model("llama"))
    expected = patched(model, make_batch())
    copied = pickle.loads(pickle.dumps(model))
    assert not isinstance(copied(**make_batch()), CausalLMLogprobs)
    assert_same(patched(patch_causal_lm(copied), make_batch()), expected, tolerance=0)


def test_what_is_refused_at_patching():

    model = patch_causal_lm(make_model("llama"))
    with pytest.raises(ValueError, match=r"forward of LlamaForCausalLM was replaced already .*: patch it once"):
        patch_causal_lm(model)
    tiny = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**tiny, num_attention_heads=2))
    with pytest.raises(ValueError, match="loss of BertForMaskedLM is not that of a causal language model"):
        patch_causal_lm(masked)
    small = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 16, "num_layers": 1, "d_kv": 8, "num_heads": 2}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not that of a causal language model"):
        patch_causal_lm(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)))
    model = make_model("llama")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match="loss of LlamaForCausalLM is not that of a causal language model"):
        patch_causal_lm(model)


def bart():
    """A decoder of an encoder-decoder, which does not shift labels."""
    return transformers.BartForCausalLM(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2,
            max_position_embeddings=64, is_decoder=True,
        )
    )  # fmt: skip


def bamba(z_loss):
    return transformers.BambaForCausalLM(
        transformers.BambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
            mamba_d_state=8, mamba_expand=2, mamba_chunk_size=4, z_loss_coefficient=z_loss,
        )
    )  # fmt: skip


def test_a_model_whose_loss_is_another_is_refused():
    """Differences that attributes do not show: labels that are not shifted, a term of its own."""
    for model in (bart(), bamba(0.1)):
        with pytest.raises(ValueError, match=r"of known logits it makes .* cross entropy is"):
            patch_causal_lm(model)
    patch_causal_lm(bamba(0.0))


def test_a_head_in_use_says_so():
    """Another thread uses it, whose calls without labels are the model's own; or a call inside `use` does."""
    model = patch_causal_lm(make_model("llama"))
    ids, results = torch.arange(8)[None], {}

    def another_call(*_):
        if threading.current_thread() is not threading.main_thread():
            return

        def call():
            results["logits"] = model(input_ids=ids).logits.shape
            with pytest.raises(ValueError, match=r"is in use, by another thread: give each thread a copy"):
                model(input_ids=ids, labels=ids + 1)
            results["refused"] = True

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    expected = model(input_ids=ids, labels=ids).logprobs
    handle = model.model.layers[0].register_forward_hook(another_call)
    assert model(input_ids=ids, labels=ids).logprobs.equal(expected)
    handle.remove()
    assert results == {"logits": (1, 8, VOCABULARY), "refused": True}

    def nested(hidden, head):
        return model(input_ids=ids, labels=ids)

    with pytest.raises(ValueError, match=r"is in use, by a call around this one"):
        run_in_head(model, nested, LogitOptions(), {"input_ids": ids})
    assert model(input_ids=ids, labels=ids).logprobs.equal(expected)


def test_a_patched_model_inside_checkpoint():
    """torch's checkpoint lets backward read what was saved once."""
    model, ids = patch_causal_lm(make_model("llama")), torch.arange(8)[None]

    def loss():
        return model(input_ids=ids, labels=ids).loss

    (expected,) = torch.autograd.grad(loss(), model.lm_head.weight)
    torch.utils.checkpoint.checkpoint(loss, use_reentrant=False).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected)


class Louder(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_heads_that_are_more_than_a_matrix_are_refused():
    model = make_model("llama")
    model.lm_head = Louder(16, VOCABULARY)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear, got .*Louder"):
        patch_causal_lm(model)
    model = make_model("llama")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear, got .*Parametrized"):
        patch_causal_lm(model)
    model = make_model("llama")
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(16, VOCABULARY)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear, got torch\.ao.*quantized"):
        patch_causal_lm(model)


def test_a_head_that_changed_after_patching_is_refused_at_the_call():
    model = patch_causal_lm(make_model("llama"))
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * forward(hidden)  # as accelerate's hooks do
    with pytest.raises(ValueError, match="its forward was replaced"):
        model(**make_batch())
    model = patch_causal_lm(make_model("llama"))
    model.lm_head = Louder(16, VOCABULARY)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear"):
        model(**make_batch())


def test_a_model_without_weights_needs_its_options_told():

    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(make_model("cohere").config)
    with pytest.raises(ValueError, match=r"not there yet .*give LogitOptions\(logit_scale, logit_softcap\)"):
        patch_causal_lm(empty)
    model, plain = twins(make_model("cohere"))
    patch_causal_lm(empty, logit_options=logit_options_of(plain))
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    empty.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are in no state dict
    assert_same(patched(empty.eval(), make_batch()), own(plain, make_batch()))


def test_patching_draws_no_random_numbers():
    """Dropout would, in the two tokens that the model is asked about; training would then differ from a plain one's."""
    model = make_model("gpt2", resid_pdrop=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    patch_causal_lm(model)
    assert torch.equal(torch.rand(4), expected)


def test_reading_a_head_says_what_it_is():
    head = lm_head_of(make_model("gemma2"))
    assert head.weight.shape == (VOCABULARY, 16) and head.options() == {
        "bias": None,
        "logit_scale": 1.0,
        "logit_softcap": 3.0,
    }


def test_a_model_made_for_flash_attention_is_patched_on_the_cpu(monkeypatch):
    """The CPU is where models are loaded before they go to a GPU; flash attention is back afterwards."""
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    chosen = []
    set_as_ever = type(model).set_attn_implementation

    def set_what_is_installed(self, name):
        chosen.append(name)
        if name == "eager":
            set_as_ever(self, name)

    monkeypatch.setattr(type(model), "set_attn_implementation", set_what_is_installed)
    patch_causal_lm(model)
    assert chosen == ["eager", "flash_attention_2"]
