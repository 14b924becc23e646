"""Adapters of peft: what trains, what is saved, what loads it, and the reference below it."""

import json
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.cli import main
from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.config import MergeConfig
from rlhf_trainer.models.fused_lm import load_fused, load_policy
from rlhf_trainer.models.kl import states_of
from rlhf_trainer.models.loading import load_causal_lm, load_codec_for, loading_of, meta_model
from rlhf_trainer.models.lora import Reference, adapter_of
from rlhf_trainer.models.merge import merge
from rlhf_trainer.models.scoring import load_reward_model, score_sequences
from rlhf_trainer.offline import sft
from rlhf_trainer.offline.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.offline.reward_model import train_reward
from rlhf_trainer.offline.sft import train_sft

IDS = torch.tensor([[5, 9, 200, 31, 7]])


def flags(model, **options):
    common = {"model_name_or_path": str(model), "dataset_name": "d", "output_dir": "o", "use_peft": True}
    return DPOConfig(**common | options)


def policy_of(config):
    return load_policy(config, *load_codec_for(config))


@pytest.fixture
def fit(write_jsonl, rows, tmp_path):
    """fit(model, **options) -> the folder that a short SFT run left."""
    made = iter(range(100))

    def run(model, cls=SFTConfig, function=train_sft, **options):
        small = {
            "model_name_or_path": str(model), "dataset_name": write_jsonl(rows(8)), "batch_size": 4,
            "micro_batch_size": 2, "learning_rate": 1e-2, "max_length": 96, "num_train_epochs": 2, "use_peft": True,
            "output_dir": str(tmp_path / f"run{next(made)}"), "lr_scheduler_type": "constant",
        }  # fmt: skip
        return function(cls(**small | options))

    return run


@pytest.fixture
def bf16_folder(make_model, tokenizer, tmp_path):
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    return tmp_path / "bf16"


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@torch.no_grad()
def logits_below(reference):
    """Those of the hidden states and the head that a reference gives."""
    hidden, head = states_of(reference, pad_sequences([(IDS[0].tolist(), [])], 1))
    return torch.nn.functional.linear(hidden, head.weight, head.bias).float()


def move(model, scale=0.3):
    """Changes what trains, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn_like(weight))


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


HEAD = {"lora_target_modules": ["q_proj", "lm_head"]}
KINDS = {
    "peft's own layers": {}, "all linear layers": {"lora_target_modules": ["all-linear"]}, "the head, too": HEAD,
    "a pattern": {"lora_target_modules": [r".*\.(up|down)_proj"]}, "magnitudes": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True}, "a layer whole": {"lora_modules_to_save": ["lm_head"], "dtype": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_without_its_adapter_a_policy_is_its_reference(options, model_folder):
    """To the bit, whatever the adapter has become; and the adapter is back, and trains, afterwards."""
    config = flags(model_folder("llama"), **options)
    policy = policy_of(config)
    reference = Reference(policy)
    own = load_causal_lm(model_folder("llama"), key="k", **loading_of(config, trains=True) | {"merges": False})
    expected = logits_of(own)
    trains = trained(policy.model)
    assert trains and all("lora_" in name or "modules_to_save" in name for name in trains)
    move(policy.model)
    assert torch.equal(logits_below(reference), expected)
    assert not torch.equal(logits_of(policy.model), expected)
    assert trained(policy.model) == trains


def test_the_base_is_in_bf16_and_the_adapter_in_fp32(model_folder):
    model = policy_of(flags(model_folder("llama"), **HEAD)).model
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert weight.requires_grad == ("lora_" in name), name
    assert policy_of(flags(model_folder("llama"), dtype="float32")).model.dtype == torch.float32


def test_under_autocast_inputs_of_the_adapter_stay_in_bf16(model_folder):
    """peft would cast them to fp32, which autocast takes back for each product: the same bits, and less is kept."""
    policy = policy_of(flags(model_folder("llama"), bf16=True, lora_dropout=0.0))
    layers = [layer for layer in policy.modules() if hasattr(layer, "cast_input_dtype_enabled")]
    batch = pad_sequences([([5, 9], [200, 31, 7])], pad_id=0)
    results, kept = [], []
    for casts in (False, True):
        for layer in layers:
            assert layer.cast_input_dtype_enabled is casts
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=saved: into.append(x) or x, lambda x: x):
            hidden = policy(batch, lambda hidden, head: hidden)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        results.append([hidden, *torch.autograd.grad(hidden.float().square().sum(), trained)])
        kept.append(sum({tensor.data_ptr(): tensor.nbytes for tensor in saved}.values()))
        for layer in layers:
            layer.cast_input_dtype_enabled = True
    assert layers and all(map(torch.equal, *results))
    assert kept[0] < kept[1]


def test_the_reference_of_an_adapter_that_is_trained_on_is_what_it_was(fit, model_folder):
    folder = fit(model_folder("llama"))
    policy = policy_of(flags(folder, dtype="float32"))
    before = logits_of(policy.model)
    reference = Reference(policy)
    trains = trained(policy.model)
    move(policy.model)
    assert torch.equal(logits_below(reference), before)
    assert not torch.equal(logits_of(policy.model), before) and trained(policy.model) == trains
    assert not any("reference" in name for name in trains)


@pytest.mark.parametrize("options", [{}, HEAD, {"use_dora": True}], ids=["plain", "head", "dora"])
def test_peft_and_transformers_load_what_was_trained(options, fit, model_folder, tokenizer):
    folder = fit(model_folder("llama"), dtype="float32", **options)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert "model.safetensors" not in names
    ours = logits_of(load_causal_lm(str(folder), key="k"))
    assert not torch.allclose(ours, logits_of(load_causal_lm(model_folder("llama"), key="k")), atol=1e-2)
    # transformers 5.23 itself drops the magnitudes of DoRA, with a report; peft loads them.
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM)[: 1 if "use_dora" in options else 2]:
        torch.testing.assert_close(logits_of(load.from_pretrained(folder).eval()), ours, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == model_folder("llama")


def test_merged_it_is_the_same_model(fit, model_folder, tmp_path):
    folder = fit(model_folder("llama"), dtype="float32", **HEAD)
    whole = merge(MergeConfig(model_name_or_path=str(folder), output_dir=str(tmp_path / "whole")))
    at_once = fit(model_folder("llama"), dtype="float32", **HEAD, merge_adapter=True)
    ours = logits_of(load_causal_lm(str(folder), key="k"))
    for merged in (whole, at_once):
        assert not (merged / "adapter_config.json").exists()
        torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(merged)), ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"expected the folder of an adapter, with adapter_config.json in it"):
        merge(MergeConfig(model_name_or_path=str(whole), output_dir=str(tmp_path / "again")))


def test_merged_weights_are_in_the_dtype_of_the_base(fit, bf16_folder, tmp_path):
    folder = fit(bf16_folder)
    assert main(["merge", "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "whole")]) == 0
    wide = merge(MergeConfig(model_name_or_path=str(folder), output_dir=str(tmp_path / "wide"), dtype="float32"))
    exact, base = load_file(wide / "model.safetensors"), load_file(bf16_folder / "model.safetensors")
    assert any(not torch.equal(exact[name], base[name].float()) for name in base)
    for merged in (tmp_path / "whole", fit(bf16_folder, merge_adapter=True)):
        for name, weight in load_file(merged / "model.safetensors").items():
            assert weight.dtype == torch.bfloat16
            change = (exact[name] - base[name].float()).abs()  # rounded by itself, before the sum is
            assert ((weight.float() - exact[name]).abs() <= 2**-8 * (exact[name].abs() + 2 * change)).all(), name


def test_training_goes_on_with_an_adapter_or_on_top_of_it(fit, model_folder, capsys):
    first = fit(model_folder("llama"), dtype="float32", lora_r=4)
    further = fit(first, dtype="float32")
    assert f"goes on with the adapter {first}: r 4, alpha 32" in capsys.readouterr().out
    config = json.loads((further / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, model_folder("llama"))
    assert (
        load_file(further / "adapter_model.safetensors").keys() == load_file(first / "adapter_model.safetensors").keys()
    )
    on_top = fit(first, use_peft=False, max_steps=1, learning_rate=0.0)
    assert f"{first} is an adapter: it is merged into the weights of {model_folder('llama')}" in capsys.readouterr().out
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(on_top)), logits_of(load_causal_lm(str(first), key="k")),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_a_reward_models_head_is_trained_whole(fit, model_folder, tmp_path):
    options = {"cls": RewardConfig, "function": train_reward, "max_prompt_length": 48, "dtype": "float32"}
    folder = fit(model_folder("llama"), **options)
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in weights)
    model = load_reward_model(str(folder), key="k")
    sequences = [[5, 9, 200], [31, 7]]
    rewards = score_sequences(model, sequences, 2, 1, torch.device("cpu"))
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in sequences])
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)
    whole = merge(MergeConfig(model_name_or_path=str(folder), output_dir=str(tmp_path / "whole")))
    merged = score_sequences(load_reward_model(str(whole), key="k"), sequences, 2, 1, torch.device("cpu"))
    torch.testing.assert_close(merged, rewards, rtol=1e-5, atol=1e-5)
    fit(folder, **options)  # goes on with it
    message = "is an adapter with task_type SEQ_CLS, expected CAUSAL_LM. `rlhf merge` makes a model of it"
    with pytest.raises(UsageError, match=message):
        fit(folder)


def test_a_reward_model_of_a_full_vocabulary_pads_with_another_token(fit, make_model, tokenizer, tmp_path):
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    folder = fit(tmp_path / "full", RewardConfig, train_reward, max_prompt_length=48)
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<s>"
    assert not any("embed" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_template_with_new_tokens_needs_a_model_that_embeds_them(make_model, tokenizer, tmp_path):
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    config = flags(tmp_path / "full")
    codec, largest = load_codec_for(config)
    codec.tokenizer.add_tokens(["<new>"])
    with pytest.raises(UsageError, match="brings tokens that the model does not embed, and an adapter trains no"):
        load_policy(config, codec, largest)


def test_wrong_layers_are_named(model_folder):
    with pytest.raises(UsageError, match=r"lora_target_modules: .*qq_proj.* all-linear takes all linear layers"):
        policy_of(flags(model_folder("llama"), lora_target_modules=["qq_proj"]))
    with pytest.raises(UsageError, match="lora_modules_to_save: the model, or its adapter, has no sscore to train"):
        policy_of(flags(model_folder("llama"), lora_modules_to_save=["sscore"], dtype="float32"))
    with pytest.raises(UsageError, match="on the LM head is a Dora"):
        policy_of(flags(model_folder("llama"), use_dora=True, **HEAD))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"use_peft": False, "use_dora": True}, "use_dora is for an adapter: pass use_peft"),
        ({"use_peft": False, "merge_adapter": True}, "merge_adapter is for an adapter: pass use_peft"),
        ({"use_peft": False, "load_in_4bit": True}, "load_in_4bit is for an adapter: pass use_peft"),
        ({"load_in_4bit": True, "merge_adapter": True}, "merge_adapter: four-bit weights cannot take an adapter"),
        ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant is for load_in_4bit"),
        ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save: layers trained in fp32 want bf16, or a base"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        flags("m", **options)


def test_an_adapter_of_another_base_is_refused(fit, model_folder, make_model, tokenizer, tmp_path):
    folder = fit(model_folder("llama"))

    def based_on(base):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))

    for name, changes in {
        "wide": {"hidden_size": 64},
        "deep": {"num_hidden_layers": 3},
        "flat": {"num_hidden_layers": 1},
    }.items():
        make_model("llama", **changes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        based_on(tmp_path / name)
        with pytest.raises(UsageError, match=r"models: the adapter .* (does not fit|is of another model than) "):
            load_causal_lm(str(folder), key="models")
    based_on(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"the base of the adapter .* no such folder: .*gone"):
        load_causal_lm(str(folder), key="models")
    with pytest.raises(UsageError, match="gone"):
        meta_model(str(folder), key="models")


def test_an_adapter_of_another_kind_is_refused(model_folder, tmp_path):
    from peft import PromptTuningConfig

    model = get_peft_model(
        load_causal_lm(model_folder("llama"), key="k"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained(tmp_path / "prompts")
    with pytest.raises(UsageError, match=r"expected LoRA with a base_model_name_or_path in .*, got PROMPT_TUNING"):
        load_causal_lm(str(tmp_path / "prompts"), key="k")


def test_an_adapter_by_peft_itself_takes_its_tokenizer_from_the_base(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    move(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    codec, _ = load_codec_for(flags(tmp_path / "theirs"))
    assert codec.tokenizer.eos_token == "<|im_end|>" and codec.ends
    torch.testing.assert_close(logits_of(load_causal_lm(str(tmp_path / "theirs"), key="k")), logits_of(adapted.eval()))
    assert meta_model(str(tmp_path / "theirs"), key="k").config.model_type == "llama"


def test_without_peft_it_says_what_to_install(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"take the package peft: pip install peft"):
        policy_of(flags(model_folder("llama")))


def test_dropout_is_on_in_updates_alone(fit, model_folder, write_jsonl, rows, monkeypatch):
    states, compute = [], sft.SFTTask.compute_loss

    def watched(self, model, indices):
        drop = [part.training for part in model.model.modules() if isinstance(part, torch.nn.Dropout)]
        states.append((torch.is_grad_enabled(), frozenset(drop)))
        return compute(self, model, indices)

    monkeypatch.setattr(sft.SFTTask, "compute_loss", watched)
    fit(model_folder("llama"), lora_dropout=0.4, eval_dataset=write_jsonl(rows(2), "held_out.jsonl"))
    assert {state for state in states if state[0]} == {(True, frozenset({True}))}
    assert {state for state in states if not state[0]} == {(False, frozenset({False}))}


def test_dropout_draws_anew_each_step_and_the_same_in_each_run(fit, model_folder):
    def norms(**options):
        folder = fit(model_folder("llama"), dtype="float32", learning_rate=0.0, num_train_epochs=1, **options)
        return [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    plain = norms(lora_dropout=0.0)
    dropped = norms(lora_dropout=0.4)
    assert dropped == norms(lora_dropout=0.4)
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(plain, dropped, strict=True))


def test_hidden_states_of_the_reference_are_the_bases(model_folder, tokenizer):
    policy = policy_of(flags(model_folder("llama"), dtype="float32", **HEAD))
    base = load_fused(flags(model_folder("llama"), use_peft=False), model_folder("llama"), "k")
    move(policy.model)
    batch = pad_sequences([([5, 6], [7, 8, 1])], 1)
    hidden, head = states_of(Reference(policy), batch)
    expected = states_of(base, batch)
    assert torch.equal(hidden, expected.hidden) and torch.equal(head.weight, expected.head.weight)
    assert states_of(policy, batch).head.weight.shape[1] == head.weight.shape[1] + 16  # its rank, as further columns
    assert adapter_of(base.model) is None
