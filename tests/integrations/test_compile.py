"""torch.compile of whole training steps without a graph break, autocast, checkpointing, torch.export of the forward."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import LogitOptions, logit_options_of, patch_causal_lm, run_in_head
from tests.integrations.tiny_models import assert_same_grads, grads_of, make_batch, make_model, own

# Traced by Dynamo, forward and backward by AOTAutograd, run eagerly: all but the making of kernels, which takes long.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"]  # whatever the test compiled
    torch._dynamo.reset()


def small(family="llama", **changes):
    return make_model(family, num_hidden_layers=1, **changes)


def compiled(function, backend=BACKEND, **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def step_of(run, model):
    """(loss, gradients) of a training step."""
    model.zero_grad()
    loss = run()
    loss.backward()
    return loss.detach(), grads_of(model)


def assert_same_step(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert_same_grads(ours[1], theirs[1], tolerance)


def with_entropy(out):
    return out.loss - 0.1 * out.entropy.mean()


def was_compiled():
    """Something was traced, and our op is not run beside the graph."""
    return counters["stats"]["unique_graphs"] > 0


def test_a_compiled_model():
    """torch.compile(model), as Trainer does it, equals the plain model's own logits, soft cap and all."""
    model = small("gemma2")
    expected = own(copy.deepcopy(model), make_batch())
    run = compiled(patch_causal_lm(model))
    assert_same_step(step_of(lambda: run(**make_batch()).loss, model), (expected.loss, expected.grads), 1e-4)
    assert was_compiled()
    assert run(input_ids=make_batch()["input_ids"]).logits.shape[-1] > 0  # and it still makes logits


@pytest.mark.slow  # C++ is generated and compiled; tests/kernels/test_compile.py does it of an op in every run
def test_a_compiled_step_with_entropy_by_inductor():
    """The real backend, once."""
    model = patch_causal_lm(small(), outputs=("entropy",))
    twin = copy.deepcopy(model)
    step = compiled(lambda inputs: with_entropy(model(**inputs)), backend="inductor")
    ours = step_of(lambda: step(make_batch()), model)
    assert_same_step(ours, step_of(lambda: with_entropy(twin(**make_batch())), twin))
    assert was_compiled()


def test_a_compiled_dpo_step_from_log_probs():
    model = patch_causal_lm(small())
    reference = torch.tensor([-9.0, -8.0])

    def step(inputs):
        logps = model(**inputs).logprobs.sum(-1)
        return rk.dpo_loss(logps, reference, torch.tensor([0]), torch.tensor([1])).losses.mean()

    run = compiled(step)
    assert_same_step(step_of(lambda: run(make_batch()), model), step_of(lambda: step(make_batch()), model))
    assert was_compiled()


def test_a_compiled_dpo_step_in_the_heads_place():
    model = small()
    options = logit_options_of(model)
    reference = torch.tensor([-9.0, -8.0])

    def step(inputs, labels):
        def use(hidden, head):
            return rk.linear_dpo_loss(hidden, head.weight, labels, reference, **head.options()).loss

        return run_in_head(model, use, options, inputs)[0]

    inputs = make_batch()
    labels = inputs.pop("labels")
    run = compiled(step)
    assert_same_step(step_of(lambda: run(inputs, labels), model), step_of(lambda: step(inputs, labels), model))
    assert was_compiled()


def test_batches_of_other_shapes_compile_once_more_at_most():
    model = patch_causal_lm(small())
    run = compiled(model, dynamic=True)
    for length in (9, 5, 7):
        inputs = {name: tensor[:, :length] for name, tensor in make_batch().items()}
        torch.testing.assert_close(run(**inputs).loss, model(**inputs).loss)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_a_model_that_was_never_run_before():
    """The head's first call is the traced one, as its options are passed."""
    model = patch_causal_lm(small("cohere"), logit_options=LogitOptions(logit_scale=0.25))
    expected = own(small("cohere"), make_batch())
    run = compiled(model)
    assert_same_step(step_of(lambda: run(**make_batch()).loss, model), (expected.loss, expected.grads), 1e-4)


def test_lora_that_came_to_the_head_after_patching():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()

    expected = own(adapted(small()), make_batch())
    model = adapted(patch_causal_lm(small()))
    run = compiled(model)
    assert_same_step(step_of(lambda: run(**make_batch()).loss, model), (expected.loss, expected.grads), 1e-4)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where):
    """Under it the head's operands are bf16 in the graph, too; the weights' gradients stay fp32."""
    model = patch_causal_lm(small())
    inputs = make_batch()
    expected = step_of(lambda: model(**inputs).loss, model)

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).loss

    run = compiled(inside if where == "inside" else model)

    def outside():
        with torch.autocast("cpu", torch.bfloat16):
            return run(**inputs).loss

    ours = step_of(run if where == "inside" else outside, model)
    assert_same_step(ours, step_of(inside, model))
    assert all(grad.dtype == torch.float32 for grad in ours[1].values())
    assert 0 < (ours[0] - expected[0]).abs() < 0.1  # bf16 it was
    assert was_compiled()


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, compile_it):
    model = small().train()
    expected = own(copy.deepcopy(model), make_batch())
    patch_causal_lm(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    if not compile_it:
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    run = compiled(model) if compile_it else model
    assert_same_step(step_of(lambda: run(**make_batch()).loss, model), (expected.loss, expected.grads), 1e-4)
    assert compile_it or len(calls) == 2  # the layer was recomputed


def test_trainer_compiles_it(tmp_path):
    """TrainingArguments(torch_compile=True), as users ask for it."""
    rows = [{name: tensor[row].tolist() for name, tensor in make_batch().items()} for row in (0, 1)]
    losses = []
    for compile_it in (False, True):
        model = patch_causal_lm(small())
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", torch_compile=compile_it,
            torch_compile_backend=BACKEND if compile_it else None,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([logged["loss"] for logged in trainer.state.log_history if "grad_norm" in logged])
        assert was_compiled() == compile_it
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[1]) == 2


class Exported(torch.nn.Module):
    """The module that is exported: tensors in, tensors out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return out.loss, out.logprobs


@pytest.mark.parametrize(
    ("strict", "dynamic"),
    [(False, False), (False, True), (True, True)],
    ids=["fixed shapes", "any batch and length", "strictly"],
)
def test_export(strict, dynamic, tmp_path):
    """The exported program, saved and loaded, has our op in it, and log-probs and loss of the model."""
    module = Exported(patch_causal_lm(small()))
    arguments = tuple(make_batch().values())
    shapes = None
    if dynamic:
        sizes = {0: torch.export.Dim("rows", max=16), 1: torch.export.Dim("length", min=2, max=64)}
        shapes = (sizes, sizes, sizes)
    program = torch.export.export(module, arguments, strict=strict, dynamic_shapes=shapes)
    assert any(node.target is torch.ops.rlhf_kernels.linear_logprobs.default for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    candidates = [arguments] + [tuple(torch.cat([tensor] * 3)[:, :7] for tensor in arguments)] * dynamic
    for inputs in candidates:
        for results, expected in zip(run(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(results, expected)
