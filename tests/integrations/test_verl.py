"""verl 0.9.1's own code around our function, from build/peers. `import verl` asks for ray and tensordict, and verl's
Triton kernel for a GPU; what is loaded here without verl's __init__ needs neither: the forwards that verl puts into
models, the switch between them, its PyTorch path (FusedLinearForPPO), and its import of external modules."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import overlays
from rlhf_kernels.integrations import verl as ours

try:
    FOLDER = overlays.folder_of("verl")
except ModuleNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
V = 67


def verl(module):
    return overlays.without_init("verl", module)


@pytest.fixture
def kernel(monkeypatch):
    """verl's module of the kernel, as it is again afterwards; its version can be asked for."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    module = verl("utils.kernel.linear_cross_entropy")
    monkeypatch.setattr(module, "linear_cross_entropy", module.LinearCrossEntropy.apply)
    return module


def problem(dtype=torch.float32, batch=(2, 7), dim=20):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*batch, dim, dtype=dtype), 3 * torch.randn(V, dim, dtype=dtype) / dim**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, batch)


def gradients_of(function, *leaves, upstream):
    """(log-probs, entropies, gradients), the first two flat, with unlike upstream gradients for each token."""
    logprobs, entropy = (results.flatten() for results in function(*leaves))
    grads = torch.autograd.grad((torch.stack([logprobs, entropy]) * upstream).sum(), leaves[:2])
    return logprobs, entropy, *grads


def test_values_and_gradients_of_verls_torch_path():
    hidden, weight, labels = problem()
    upstream = torch.randn(2, labels.numel())
    theirs = verl("utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=4, impl_backend="torch")
    expected = gradients_of(lambda *leaves: theirs(*leaves, temperature=0.7), hidden, weight, labels, upstream=upstream)
    results = gradients_of(
        lambda *leaves: ours.linear_cross_entropy(*leaves, 0.7, "none"), hidden, weight, labels, upstream=upstream
    )
    assert (expected[0] < 0).all(), "log-probs, not losses"
    for name, a, b in zip(("log-probs", "entropies", "hidden", "weight"), results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_it_takes_what_verls_function_takes(kernel):
    theirs = list(inspect.signature(kernel.LinearCrossEntropy.forward).parameters.values())[1:]  # without ctx
    own = inspect.signature(ours.linear_cross_entropy).parameters.values()
    assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in theirs]


def test_results_are_flat_and_fp32():
    hidden, weight, labels = problem(torch.bfloat16)
    for results in ours.linear_cross_entropy(hidden, weight, labels.int(), 1.0, "none"):
        assert results.shape == (14,) and results.dtype is torch.float32


def test_bf16_logits_are_not_rounded():
    """verl's PyTorch path rounds them to bf16."""
    hidden, weight, labels = problem(torch.bfloat16, dim=64)
    logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    exact = logprobs.gather(-1, labels[..., None])[..., 0].flatten()
    theirs = verl("utils.experimental.torch_functional").FusedLinearForPPO()(hidden, weight, labels)[0].flatten()
    error = (ours.linear_cross_entropy(hidden, weight, labels)[0] - exact).abs().max()
    assert error < 1e-4 < 1e-2 < (theirs - exact).abs().max()


@pytest.mark.parametrize("reduction", ["Sum", "mean"])
def test_reductions_are_of_the_logprobs_alone(reduction):
    hidden, weight, labels = problem()
    logprobs, entropy = ours.linear_cross_entropy(hidden, weight, labels)
    reduced, entropies = ours.linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
    torch.testing.assert_close(reduced, getattr(logprobs, reduction.lower())())
    assert entropies.equal(entropy)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean; got 'batch'"):
        ours.linear_cross_entropy(*problem(), 1.0, "batch")


def test_rows_whose_logits_are_all_very_negative():
    """verl's running maximum starts at 0: exp(-88) and less is 0 in fp32, and so is the sum of such."""
    hidden = torch.full((3, 1), 100.0)
    weight, labels = -1 - torch.arange(5.0)[:, None] / 100, torch.tensor([0, 2, 4])
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    logprobs, entropy = ours.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(logprobs.double(), exact[range(3), labels], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-4, atol=1e-5)


def model_of(name):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    if name == "tied":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def ppo_step(model, **inputs):
    """(loss, gradient norm, log-probs, entropies) of a clipped loss with an entropy bonus, by verl's model forward."""
    torch.manual_seed(1)
    out = model(**inputs, temperature=0.8, return_dict=True)
    logprobs, entropy = out.log_probs.flatten(), out.entropy.flatten()
    ratio, advantages = (
        (logprobs - logprobs.detach() + 0.1 * torch.randn_like(logprobs)).exp(),
        torch.randn(len(logprobs)),
    )
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = -surrogate.mean() - 0.01 * entropy.mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return loss.item(), norm.item(), logprobs.detach(), entropy.detach()


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("labels", ["rolled inside", "shift_labels"])
def test_a_step_through_the_forward_that_verl_puts_into_models(kernel, monkeypatch, name, labels):
    monkeypatch.setattr(type(model_of(name)), "forward", type(model_of(name)).forward)  # verl replaces the class's
    switch = verl("models.transformers.monkey_patch").patch_forward_with_backends
    ids = torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(3))  # packed: verl removes the padding
    inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None]}
    if labels == "shift_labels":
        inputs["shift_labels"] = torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(4))
    results = {}
    ours.patch()
    for backend in ("torch", "triton"):
        model = model_of(name)
        switch(model, use_fused_kernels=True, fused_kernels_backend=backend)
        results[backend] = ppo_step(model, **inputs)
    for a, b in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-5)
    assert results["torch"][1] > 0.1


def test_without_the_patch_that_forward_wants_a_gpu(kernel, monkeypatch):
    """So the test above would fail if verl's own kernel had been called."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    model = model_of("llama")
    verl("models.transformers.monkey_patch").patch_forward_with_backends(model, True, "triton")
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):
        model(input_ids=torch.randint(V, (1, 12)), return_dict=True)


def test_verls_external_lib_does_it(kernel):
    sys.modules.pop("rlhf_kernels.integrations.verl_patched", None)
    verl("utils.import_utils").import_external_libs("rlhf_kernels.integrations.verl_patched")
    assert kernel.linear_cross_entropy is ours.linear_cross_entropy


def test_modules_that_took_the_name_before(kernel, monkeypatch):
    """Stand-ins: verl's own import Megatron at once."""
    for name in ours.IMPORTED_BY_NAME:
        source = (FOLDER / f"{name.replace('.', '/')}.py").read_text()
        assert f"from {ours.KERNEL} import linear_cross_entropy" in source
        stand_in = ModuleType(name)
        stand_in.linear_cross_entropy = kernel.linear_cross_entropy
        monkeypatch.setitem(sys.modules, name, stand_in)
    ours.patch()
    assert all(sys.modules[name].linear_cross_entropy is ours.linear_cross_entropy for name in ours.IMPORTED_BY_NAME)


def test_no_other_module_takes_the_name_when_it_is_imported():
    line = f"from {ours.KERNEL} import linear_cross_entropy"
    files = [path for path in (FOLDER / "verl").rglob("*.py") if f"\n{line}" in path.read_text()]
    names = {".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in files}
    assert names == set(ours.IMPORTED_BY_NAME)


def test_other_versions_are_refused_by_name(kernel, monkeypatch):
    monkeypatch.setattr(ours, "VERSIONS", ("0.8.0", "0.9.0"))
    with pytest.raises(ImportError, match=r"verl 0\.9\.1 is not known here: known are 0\.8\.0, 0\.9\.0\. Install"):
        ours.patch()


def test_another_signature_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(kernel.LinearCrossEntropy, "forward", lambda ctx, hidden, weight: None)
    with pytest.raises(ImportError, match=r"takes \(ctx, hidden, weight\), expected \(ctx, hidden, weight, labels,"):
        ours.patch()
    assert kernel.linear_cross_entropy is not ours.linear_cross_entropy


def test_a_head_split_over_ranks():
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = subprocess.run(
        [*command, "-m", "tests.integrations.verl_shards"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as the whole head") == 2
