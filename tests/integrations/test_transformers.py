"""transformers' own Trainer around a patched model: its losses, gradients and evaluation are those of the plain one."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import CausalLMLogprobs, nll_loss, patch_causal_lm, with_shift_labels
from tests.integrations.tiny_models import IGNORED, VOCABULARY, logprobs_of_logits, make_model, twins
from tests.support.vocabulary_tensors import LargestVocabularyTensor


def make_rows(vocabulary=VOCABULARY, lengths=(5, 9, 7, 12, 6, 8, 11, 10)):
    """Prompts of 3 tokens and answers of unequal length, with a column that no model knows."""
    torch.manual_seed(2)
    rows = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,))
        labels = torch.cat([torch.full((3,), IGNORED), ids[3:]])
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "origin": "nowhere"})
    return rows


def collate(rows):
    assert "origin" not in rows[0]  # remove_unused_columns is on by default, and looks at the forward's signature
    width = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 1, "labels": IGNORED}
    batch = {
        name: torch.tensor([row[name] + [padding] * (width - len(row[name])) for row in rows])
        for name, padding in padded.items()
    }
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return batch | {"attention_mask": mask}


def trained(model, tmp_path, collate=collate, compute_loss_func=None, rows=None, **options):
    """(its trainer, loss of each step, gradient norm of the first)."""
    arguments = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "seed": 0,
    }  # fmt: skip
    trainer = Trainer(
        model=model, args=TrainingArguments(**(arguments | options)), train_dataset=rows or make_rows(),
        eval_dataset=make_rows(lengths=(6, 9, 7)), data_collator=collate, compute_loss_func=compute_loss_func,
    )  # fmt: skip
    trainer.train()
    steps = [logged for logged in trainer.state.log_history if "grad_norm" in logged]
    assert len(steps) == trainer.args.max_steps
    return trainer, [step["loss"] for step in steps], steps[0]["grad_norm"]


def assert_same_training(ours, plain, tolerance=1e-4):
    assert plain[0].args.gradient_accumulation_steps == ours[0].args.gradient_accumulation_steps
    assert ours[1] == pytest.approx(plain[1], rel=tolerance)
    assert ours[2] == pytest.approx(plain[2], rel=tolerance)
    assert plain[1][0] != pytest.approx(plain[1][-1], rel=0.01)  # the model does learn
    for (name, parameter), other in zip(ours[0].model.named_parameters(), plain[0].model.parameters(), strict=True):
        assert (parameter - other).norm() <= 10 * tolerance * other.norm() + 1e-6, name


@pytest.fixture
def never_logits(monkeypatch):
    """Patched models must have been asked for log-probs only."""

    def watch(model):
        forward = model.forward

        def watched(*args, **kwargs):
            out = forward(*args, **kwargs)
            assert isinstance(out, CausalLMLogprobs)
            return out

        watched.__signature__ = inspect.signature(forward)
        model.forward = watched
        return model

    return watch


SETTINGS = {
    "accumulated": {},
    "not accumulated": {"gradient_accumulation_steps": 1},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_patched_model_trains_as_the_plain_one(family, setting, tmp_path, never_logits):
    model, plain = twins(make_model(family))
    ours = trained(never_logits(patch_causal_lm(model)), tmp_path, **SETTINGS[setting])
    assert_same_training(ours, trained(plain, tmp_path, **SETTINGS[setting]))


def test_mixtures_of_experts_balance_alike(tmp_path):
    model, plain = twins(make_model("mixtral"))
    assert_same_training(trained(patch_causal_lm(model), tmp_path), trained(plain, tmp_path))


def test_models_whose_forward_takes_no_loss_kwargs_are_scaled_alike(tmp_path):
    """Trainer then divides by the accumulation steps itself; a patched forward must not look as if it took them."""
    model, plain = twins(make_model("llama"))
    for either in (model, plain):
        either.accepts_loss_kwargs = False
    assert_same_training(trained(patch_causal_lm(model), tmp_path), trained(plain, tmp_path))


def test_padding_free_batches(tmp_path):
    """One row of sequences, told apart by position_ids, with labels that do not cross."""
    model, plain = twins(make_model("llama"))
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in make_rows()]
    expected = trained(plain, tmp_path, DataCollatorWithFlattening(), rows=rows)
    patch_causal_lm(model)
    twin = copy.deepcopy(model)
    assert_same_training(trained(model, tmp_path, DataCollatorWithFlattening(), rows=rows), expected)
    with_targets = with_shift_labels(DataCollatorWithFlattening())
    assert_same_training(trained(twin, tmp_path, with_targets, rows=rows, compute_loss_func=nll_loss), expected)


def test_shift_labels_that_a_collator_or_a_data_set_brings_are_kept():
    """Shards of a sequence know their last target, which their labels do not tell."""
    batch = {"labels": torch.tensor([[5, 6, 7]]), "shift_labels": torch.tensor([[6, 7, 8]])}
    assert with_shift_labels(lambda rows: dict(batch))([])["shift_labels"].tolist() == [[6, 7, 8]]
    del batch["shift_labels"]
    assert with_shift_labels(lambda rows: dict(batch))([])["shift_labels"].tolist() == [[6, 7, IGNORED]]
    model = make_model("llama")
    names = list(inspect.signature(model.forward).parameters)
    patched = list(inspect.signature(patch_causal_lm(model).forward).parameters)
    assert patched == [*names[:-1], "shift_labels", names[-1]]  # columns of a data set that Trainer leaves there


def test_loss_function_in_place_of_the_models(tmp_path, never_logits):
    model, plain = twins(make_model("gemma2"))
    ours = trained(
        never_logits(patch_causal_lm(model)), tmp_path, with_shift_labels(collate), compute_loss_func=nll_loss
    )
    theirs = trained(plain, tmp_path)
    assert_same_training(ours, theirs)
    assert ours[0].evaluate()["eval_loss"] == pytest.approx(theirs[0].evaluate()["eval_loss"], rel=1e-4)


def test_loss_function_with_entropy(tmp_path):
    """Gradients flow through outputs.entropy as well."""

    def from_logits(outputs, labels, num_items_in_batch=None):
        logprobs = outputs.logits.float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1) * (F.pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED)
        return (-logprobs_of_logits(outputs.logits, labels) - 0.5 * entropy).sum() / num_items_in_batch

    def fused(outputs, labels, num_items_in_batch=None):
        return nll_loss(outputs, labels, num_items_in_batch) - 0.5 * outputs.entropy.sum() / num_items_in_batch

    model, plain = twins(make_model("llama"))
    expected = trained(copy.deepcopy(plain), tmp_path, compute_loss_func=from_logits)
    patch_causal_lm(model, outputs=("entropy",))
    ours = trained(model, tmp_path, with_shift_labels(collate), compute_loss_func=fused)
    assert_same_training(ours, expected)
    assert ours[2] != pytest.approx(trained(plain, tmp_path)[2], rel=0.01)  # the bonus does something


def test_loss_function_without_a_patched_model_or_shift_labels_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="the model returned no log-probs: patch it"):
        trained(make_model("llama"), tmp_path, with_shift_labels(collate), compute_loss_func=nll_loss)
    with pytest.raises(ValueError, match="wrap the collator in with_shift_labels"):
        trained(patch_causal_lm(make_model("llama")), tmp_path, compute_loss_func=nll_loss)


def test_bf16_autocast_trains_nearly_alike(tmp_path):
    """The two are as near as bf16 logits are: ours are not rounded to it."""
    model, plain = twins(make_model("llama"))
    ours, theirs = trained(patch_causal_lm(model), tmp_path, bf16=True), trained(plain, tmp_path, bf16=True)
    assert ours[1] == pytest.approx(theirs[1], rel=2e-2)
    assert ours[2] == pytest.approx(theirs[2], rel=2e-2)
    assert ours[0].accelerator.mixed_precision == "bf16"


def test_the_patch_outlives_accelerates_unwrapping(tmp_path):
    """Which puts back the innermost `__wrapped__` of a forward."""
    model = patch_causal_lm(make_model("llama"))
    trainer, *_ = trained(model, tmp_path, bf16=True)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    batch = collate([{k: row[k] for k in ("input_ids", "labels")} for row in make_rows()[:2]])
    assert isinstance(unwrapped(**batch), CausalLMLogprobs)


def test_evaluation(tmp_path):
    """Its loss is the plain model's; what compute_metrics sees are log-probs and the mask of those that count."""
    records = {}

    def compute_metrics(results):
        logprobs, mask = results.predictions
        records.update(logprobs=torch.tensor(logprobs), mask=torch.tensor(mask))
        return {"nats": -logprobs[mask == 1].mean()}

    model, plain = twins(make_model("llama"))
    ours, theirs = trained(patch_causal_lm(model), tmp_path)[0], trained(plain, tmp_path)[0]
    ours.compute_metrics = compute_metrics
    results = ours.evaluate()
    assert results["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)
    assert results["eval_nats"] == pytest.approx(results["eval_loss"], rel=1e-4)
    assert records["logprobs"].shape == (3, 9) and records["mask"].eq(1).sum() == (6 + 9 + 7) - 3 * 3


def test_label_smoothing_takes_the_models_own_logits(tmp_path):
    """It needs all of them: Trainer keeps labels to itself then, so that the call is none for log-probs."""
    model, plain = twins(make_model("llama"))
    smooth = {"label_smoothing_factor": 0.2}
    ours = trained(patch_causal_lm(model), tmp_path, **smooth)
    assert_same_training(ours, trained(plain, tmp_path, **smooth))


def test_saved_by_trainer(tmp_path):
    model = patch_causal_lm(make_model("llama"))
    trainer, *_ = trained(model, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(make_model("llama")).from_pretrained(tmp_path / "saved")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


@pytest.fixture
def small_budget():
    rk.set_workspace_budget(8)
    yield 8 << 20
    rk.set_workspace_budget(None)


def test_no_logits_of_all_tokens(tmp_path, small_budget):
    """A whole step of Trainer makes no [tokens, V] tensor; the plain model's does."""
    vocabulary, lengths = 32771, (64, 64)
    tokens = sum(lengths)
    assert tokens * vocabulary * 4 > 1.9 * small_budget
    largest = []
    for patch in (lambda model: model, patch_causal_lm):
        model = patch(make_model("llama", vocab_size=vocabulary))
        with LargestVocabularyTensor(vocabulary) as mode:
            trained(model, tmp_path, rows=make_rows(vocabulary, lengths), max_steps=1, gradient_accumulation_steps=1)
        largest.append(mode.elements)
    assert largest[0] >= tokens * vocabulary
    assert largest[1] * 4 <= small_budget
