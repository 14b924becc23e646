"""fused(DPOTrainer) and its like against TRL's own classes: the same model, rows and seed give the same first steps.

test_trl_versions.py runs this file, and test_trl_options.py, again with TRL 1.13.
"""

import copy
import importlib

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (the extra `trl`)")
pytest.importorskip("peft", reason="peft is not installed (the extra `trl`)")

import peft
import trl
from trl.trainer import utils

import rlhf_kernels as rk
from rlhf_kernels.integrations import trl as integration
from rlhf_kernels.integrations.trl import fused
from rlhf_kernels.integrations.versions import check_parameters
from tests.integrations.trl_cases import (
    TRAINERS,
    VERSION,
    assert_same,
    calls_of_the_op,
    make_model,
    make_trainer,
    rows,
    steps_of,
    tokenizer,
)
from tests.support.vocabulary_tensors import LargestVocabularyTensor


def options_of(kind, family):
    return {"ref_model": make_model(family, seed=1)} if kind == "DPO" else {}


CASES = [(kind, family) for kind in TRAINERS for family in ("llama", "gemma2")] + [
    (kind, "mixtral") for kind in ("DPO", "SFT")
]


@pytest.mark.parametrize("kind, family", CASES)
def test_first_steps_are_trls(kind, family, tmp_path, scored):
    """Loss, gradient norm and all that is logged; a soft cap on a tied head; experts with a loss of their own."""
    theirs = make_trainer(TRAINERS[kind], kind, tmp_path, make_model(family), **options_of(kind, family))
    expected = steps_of(theirs)
    assert not scored, "TRL's own class is as it was"
    ours = make_trainer(fused(TRAINERS[kind]), kind, tmp_path, make_model(family), **options_of(kind, family))
    assert_same(steps_of(ours), expected)
    assert len(scored) >= 2
    assert isinstance(ours, TRAINERS[kind])
    assert ("aux_loss" in expected[0]) == (family == "mixtral")


@pytest.mark.skipif(VERSION < (1, 15), reason="KTOTrainer of TRL 1.13 has another seam")
def test_kto(tmp_path, scored):
    """Comes with the seam of TRL 1.15 and later."""

    def steps(cls):
        data = rows("DPO").map(lambda row, i: {"completion": row["chosen"], "label": i % 3 > 0}, with_indices=True)
        args = trl.KTOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to=[],
            use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False, max_length=64,
        )  # fmt: skip
        model, ref = make_model("llama"), make_model("llama", seed=1)
        data = data.remove_columns(["chosen", "rejected"])
        return steps_of(cls(model=model, ref_model=ref, args=args, train_dataset=data, processing_class=tokenizer()))

    expected = steps(trl.KTOTrainer)
    assert not scored
    assert_same(steps(fused(trl.KTOTrainer)), expected)
    assert scored


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_logits_of_all_tokens(kind, tmp_path, small_budget):
    """A step makes no tensor [tokens, V] but tiles within the budget; the watcher sees TRL's."""
    vocabulary = 16411

    def most_rows(cls):
        model = make_model("llama", vocab_size=vocabulary, hidden_size=16, num_attention_heads=2)
        reference = {"ref_model": make_model("llama", vocab_size=vocabulary, hidden_size=16, num_attention_heads=2)}
        changes = reference if kind == "DPO" else {}
        data = rows(kind, 16)
        trainer = make_trainer(cls, kind, tmp_path, model, data, per_device_train_batch_size=16, max_steps=1, **changes)
        with LargestVocabularyTensor(vocabulary) as mode:
            trainer.train()
        return mode.elements // vocabulary

    tile = small_budget // (4 * vocabulary)
    assert most_rows(TRAINERS[kind]) > 1.5 * tile
    assert most_rows(fused(TRAINERS[kind])) <= tile


def test_masked_tokens_cost_nothing(tmp_path, scored):
    """Tokens of prompts do not reach the op as targets: it skips their rows."""
    ours = fused(trl.DPOTrainer)
    trainer = make_trainer(ours, "DPO", tmp_path, make_model("llama"), ref_model=make_model("llama"), max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert scored == [int(batch["completion_mask"].sum())] * 2
    assert scored[0] < 0.8 * int(batch["attention_mask"].sum())


def test_trls_classes_stay_unfused(tmp_path, scored):
    """Made before, after and beside a fused one, a subclass of the user's as well."""

    class Mine(trl.SFTTrainer):
        pass

    before = make_trainer(trl.SFTTrainer, "SFT", tmp_path, make_model("llama"))
    ours = make_trainer(fused(Mine), "SFT", tmp_path, make_model("llama"))
    after = make_trainer(trl.SFTTrainer, "SFT", tmp_path, make_model("llama"))
    expected = steps_of(before)
    assert_same(steps_of(after), expected)
    assert not scored
    assert_same(steps_of(ours), expected)
    assert scored
    assert isinstance(ours, Mine) and fused(Mine) is fused(Mine) and fused(Mine) is not Mine


def test_the_seam_is_put_back_after_an_error(tmp_path):
    module = importlib.import_module("trl.trainer.sft_trainer")
    own = dict(vars(module))
    with pytest.raises(ValueError):
        make_trainer(fused(trl.SFTTrainer), "SFT", tmp_path, make_model("llama"), loss_type="no such")
    trainer = make_trainer(fused(trl.SFTTrainer), "SFT", tmp_path, make_model("llama"))
    trainer.train()
    assert {name for name in own if getattr(module, name) is not own[name]} == set()


def test_a_model_trained_twice_and_its_copy(tmp_path, scored):
    """Fused SFT, then fused DPO of the same object against a copy of it, which runs its own weights."""
    model = make_model("llama")
    steps_of(make_trainer(fused(trl.SFTTrainer), "SFT", tmp_path, model, loss_type="nll"))
    reference = copy.deepcopy(model)
    plain, theirs = make_model("llama"), make_model("llama")
    plain.load_state_dict(model.state_dict())
    theirs.load_state_dict(model.state_dict())
    expected = steps_of(make_trainer(trl.DPOTrainer, "DPO", tmp_path, plain, ref_model=theirs))
    ours = make_trainer(fused(trl.DPOTrainer), "DPO", tmp_path, model, ref_model=reference)
    assert_same(steps_of(ours), expected)
    assert not torch.equal(model.lm_head.weight, reference.lm_head.weight)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(reference(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_under_bf16_it_is_nearer_to_the_truth(tmp_path):
    """Against the logits in fp64 of the same bf16 hidden states and head, TRL's are rounded once more."""
    made = {"trl": trl.DPOTrainer, "fused": fused(trl.DPOTrainer)}
    logged = {}
    for name, cls in made.items():
        model = make_model("llama", initializer_range=1.0)
        trainer = make_trainer(cls, "DPO", tmp_path, model, ref_model=make_model("llama"), bf16=True, max_steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        logged[name] = steps_of(trainer)[0]

    model = make_model("llama", initializer_range=1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, :-1]
    logits = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T
    logprobs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    truth = (logprobs * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    names = ("logps/chosen", "logps/rejected")
    errors = {
        who: [abs(steps[name] - of.mean().item()) for name, of in zip(names, truth, strict=True)]
        for who, steps in logged.items()
    }
    assert max(errors["fused"]) < 1e-4 * abs(truth[0].mean().item())
    assert max(errors["fused"]) < 0.1 * max(errors["trl"])


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
def test_lora_on_the_head_is_exact(tied, tmp_path, scored):
    """Against the model's own logits: TRL 1.15 and later leave the low-rank term out of log-probs and gradient."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama", tie_word_embeddings=tied), config)
    own = copy.deepcopy(model)
    trainer = make_trainer(fused(trl.SFTTrainer), "SFT", tmp_path, model, max_steps=1, loss_type="nll")
    batch = next(iter(trainer.get_train_dataloader()))
    (step,) = steps_of(trainer)

    own.train()
    loss = own(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    grads = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    assert any("lm_head" in name for name in grads)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_prompt_learning_is_refused(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for kind in ("SFT", "DPO"):
        with pytest.raises(ValueError, match=r"PromptTuningConfig: prompt learning .* LoRA, DoRA"):
            make_trainer(fused(TRAINERS[kind]), kind, tmp_path, make_model("llama"), peft_config=config)


def test_losses_of_full_logits_are_refused(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum()

    for options in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: this loss is computed from the logits of all"):
            make_trainer(fused(trl.SFTTrainer), "SFT", tmp_path, make_model("llama"), **options)


def test_a_head_that_cannot_be_read_is_refused(tmp_path):
    model = make_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match="the LM head of LlamaForCausalLM cannot be read"):
        make_trainer(fused(trl.SFTTrainer), "SFT", tmp_path, model)


def test_other_classes_are_refused():
    with pytest.raises(
        TypeError, match=r"fused\(\) takes DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer.* got .*Reward"
    ):
        fused(trl.RewardTrainer)


@pytest.mark.parametrize("version", ["1.12.0", "1.14.2", "1.17.0", "2.0.0.dev0"])
def test_other_versions_are_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"TRL {version} is not known here: known are 1\.13, 1\.15, 1\.16\. Install"):
        fused.__wrapped__(trl.DPOTrainer)


def test_a_seam_that_changed_is_refused(monkeypatch):
    """Another signature of what TRL calls, and another function in its place."""
    name = "add_fused_lm_head" if VERSION >= (1, 15) else "selective_log_softmax"
    module = importlib.import_module(f"rlhf_kernels.integrations.{integration.VERSIONS['.'.join(map(str, VERSION))]}")

    def changed(model, new_argument):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(utils, name, changed)
        with pytest.raises(ImportError, match=r"changed takes \(model, new_argument\), expected"):
            importlib.reload(module)
    importlib.reload(module)
    monkeypatch.setattr(importlib.import_module("trl.trainer.dpo_trainer"), name, changed)
    with pytest.raises(ImportError, match=f"dpo_trainer.{name} is not that of trl.trainer.utils"):
        fused.__wrapped__(trl.DPOTrainer)


def test_signatures_are_compared_as_far_as_they_are_known():
    def function(a, b, c):
        pass

    check_parameters(function, "a, b, c")
    check_parameters(function, "a, b, ...")
    for other in ("a, b", "a, c, ...", "a, b, c, d"):
        with pytest.raises(ImportError, match=r"takes \(a, b, c\), expected"):
            check_parameters(function, other)


@pytest.fixture
def small_budget():
    rk.set_workspace_budget(8)
    yield 8 << 20
    rk.set_workspace_budget(None)


@pytest.fixture
def scored(monkeypatch):
    return calls_of_the_op(monkeypatch)
