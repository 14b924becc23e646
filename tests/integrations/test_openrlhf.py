"""OpenRLHF 0.11.2's own Actor beside ours: tests/integrations/openrlhf_here.py says what had to stand in for what."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

from benchmarks.harness import overlays

try:
    FOLDER = overlays.folder_of("openrlhf")
except ModuleNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

from rlhf_kernels.integrations import openrlhf as ours
from rlhf_kernels.integrations import scores
from rlhf_kernels.integrations.lm_head import LogitOptions
from tests.integrations import openrlhf_here

logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[2]
V, A = 67, 5  # vocabulary, actions
Actor = openrlhf_here.load("models.actor").Actor
losses = openrlhf_here.load("models.loss")


@pytest.fixture(autouse=True)
def version_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])


@pytest.fixture(autouse=True)
def eager():
    """OpenRLHF compiles its entropy, which takes a while."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    sizes = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    gemma = Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager")
    models = {"llama": LlamaForCausalLM(LlamaConfig(**sizes)), "gemma2": Gemma2ForCausalLM(gemma)}
    mixtral = MixtralConfig(**sizes, num_local_experts=4, router_aux_loss_coef=0.5)
    models["mixtral"] = MixtralForCausalLM(mixtral)
    gpt2 = GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=12, initializer_range=0.3)
    models["gpt2"] = GPT2LMHeadModel(gpt2)
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def actors(folder, **options):
    """OpenRLHF's and ours, in fp32, with the same weights."""
    results = []
    for kind in (Actor, ours.fused(Actor)):
        torch.manual_seed(0)  # of adapters
        results.append(kind(folder, **{"attn_implementation": "sdpa"} | options).float().train())
    return results


def experience(left=True):
    """Prompts padded on the left and answers on the right, as OpenRLHF's PPO has them; or on the right alone."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(V, (3, 12), generator=generator)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :2] = mask[2, :3] = 0 if left else 1
    mask[1, -2:] = 0
    mask[2, -3:] = 0 if not left else 1
    action_mask = mask[:, -A:].clone()
    action_mask[0, 1] = 0  # a token of somebody else's, between those of the policy
    return sequences, mask, action_mask


def norm(actor):
    return torch.nn.utils.get_total_norm([p.grad for p in actor.parameters() if p.grad is not None]).item()


def ppo_step(actor, entropy=True):
    """(loss, gradient norm, log-probs, entropies of actions) by OpenRLHF's own PolicyLoss and aggregate_loss."""
    sequences, mask, action_mask = experience()
    torch.manual_seed(1)
    log_probs, output = actor(sequences, action_mask, attention_mask=mask, return_output=True, return_entropy=entropy)
    old = log_probs.detach() + 0.3 * torch.randn_like(log_probs)
    loss = losses.PolicyLoss()(log_probs, old, torch.randn_like(log_probs), action_mask=action_mask)[0]
    entropies = torch.zeros_like(log_probs)
    if entropy:
        entropies = output.entropy[:, -A:] * action_mask
        loss = loss - 0.05 * losses.aggregate_loss(output.entropy[:, -A:], action_mask)
    loss.backward()
    return loss.item(), norm(actor), log_probs.detach(), entropies.detach()


def assert_same(results, expected, tolerance=1e-5):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_step_of_ppo(folders, packing, temperature):
    theirs, own = actors(folders["llama"], packing_samples=packing, temperature=temperature)
    results, expected = ppo_step(own), ppo_step(theirs)
    assert expected[1] > 0.1
    assert_same(results, expected)


def test_positions_after_padding_on_the_left(folders):
    """Rotary embeddings would not tell: these are learned for each position, and there is none for -1."""
    theirs, own = actors(folders["gpt2"])
    assert_same(ppo_step(own), ppo_step(theirs))


def test_packed_samples_do_not_see_each_other(folders):
    """Or equality with OpenRLHF, packed as well, would show that both do."""
    _, packed = actors(folders["llama"], packing_samples=True)
    _, padded = actors(folders["llama"])
    assert_same(ppo_step(packed), ppo_step(padded))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_prompts_cost_nothing_without_entropy(folders, packing, monkeypatch):
    rows = []
    real = scores.linear_logprobs

    def counting(hidden, weight, targets, **options):
        rows.append(int((targets != -100).sum()))
        return real(hidden, weight, targets, **options)

    monkeypatch.setattr(scores, "linear_logprobs", counting)
    theirs, own = actors(folders["llama"], packing_samples=packing)
    assert_same(ppo_step(own, entropy=False), ppo_step(theirs, entropy=False))
    assert rows == [int(experience()[2].sum())]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_step_of_dpo(folders, packing):
    """The calls of OpenRLHF's DPOTrainer, with its own DPOLoss; the reference gets padding on the right."""
    results = []
    for actor in actors(folders["llama"], packing_samples=packing):
        sequences, mask, _ = experience(left=False)
        log_probs, output = actor(sequences, attention_mask=mask, return_output=True, return_logprobs=True)
        assert ("aux_loss" in output) is False
        logps = (log_probs * mask[:, 1:]).sum(-1)
        reference = torch.tensor([-40.0, -30.0])
        loss, *rewards = losses.DPOLoss(beta=0.1)(logps[:1], logps[1:2], reference[:1], reference[1:])
        loss.backward()
        results.append((loss.item(), norm(actor), log_probs.detach() * mask[:, 1:], *rewards))
    assert results[0][1] > 0.01
    assert_same(results[1], results[0])


def test_every_entropy_is_that_of_openrlhf(folders):
    """Those of prompts too, where a mask of actions is given; but not those of padding."""
    sequences, mask, action_mask = experience()
    theirs, own = (
        actor(sequences, action_mask, attention_mask=mask, return_output=True, return_entropy=True)[1].entropy
        for actor in actors(folders["llama"])
    )
    counts = (mask[:, :-1] * mask[:, 1:]).bool()
    assert own.shape == theirs.shape == (3, 11)
    torch.testing.assert_close(own[counts], theirs[counts], rtol=1e-5, atol=1e-5)
    assert not own[~counts].any()


def test_soft_caps_hold(folders):
    theirs, own = actors(folders["gemma2"], attn_implementation="eager")
    assert_same(ppo_step(own), ppo_step(theirs))


def test_a_mixture_of_experts_returns_its_load_balancing_loss(folders):
    """OpenRLHF turns router logits on and adds aux_loss itself."""
    sequences, mask, action_mask = experience()
    results = []
    for actor in actors(folders["mixtral"]):
        log_probs, output = actor(sequences, action_mask, attention_mask=mask, return_output=True)
        assert "aux_loss" in output
        loss = log_probs.sum() + 0.1 * output.aux_loss
        loss.backward()
        results.append((loss.item(), norm(actor), output.aux_loss.item()))
    assert_same(results[1], results[0])


def test_adapters(folders):
    options = {"lora_rank": 2, "target_modules": ["q_proj", "lm_head"]}
    results = []
    for actor in actors(folders["llama"], **options):
        with torch.no_grad():
            for name, parameter in actor.named_parameters():
                if "lora_B" in name:  # starts at zero, where it would show nothing
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 4)
        results.append(ppo_step(actor))
    assert_same(results[1], results[0])


def test_bf16_as_openrlhf_loads_it(folders):
    """Its logits are rounded to bf16 before they become fp32, ours are not."""
    results = []
    for kind in (Actor, ours.fused(Actor)):
        actor = kind(folders["llama"], attn_implementation="sdpa", param_dtype="bf16")
        assert actor.model.dtype is torch.bfloat16
        results.append(ppo_step(actor))
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0.02, atol=0.02)
    assert results[1][2].dtype is torch.float32


def test_calls_for_logits_are_actors_own(folders):
    sequences, mask, _ = experience()
    theirs, own = actors(folders["llama"])
    expected = theirs(sequences, attention_mask=mask, return_output=True, return_entropy=True)
    results = own(sequences, attention_mask=mask, return_output=True, return_entropy=True)
    assert results.logits.shape == (3, 12, V)
    torch.testing.assert_close(results.logits, expected.logits)
    torch.testing.assert_close(results.entropy, expected.entropy)


def test_samples_cut_over_the_ranks_of_a_ring(folders):
    """Targets and masks at the cuts. Of ring attention itself there is nothing: the models' attention is turned off."""
    assert in_two_processes("openrlhf_ring", folders["llama"]).count("as OpenRLHF's Actor") == 2


def test_steps_under_zero_3(folders):
    """Weights partitioned while the model is loaded, as OpenRLHF does it; the logits' options must be given then."""
    overlay = []
    if importlib.util.find_spec("deepspeed") is None:
        overlay = sorted((ROOT / "build/peers").glob("deepspeed-*"))[-1:]
        if not overlay:
            pytest.skip("DeepSpeed is not installed: make hosts")
    assert in_two_processes("openrlhf_zero3", folders["llama"], *overlay).count("as OpenRLHF's Actor") == 2


def in_two_processes(script, model, *overlay):
    """The output of tests/integrations/<script>.py for a model's folder."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = subprocess.run(
        [*command, "-m", f"tests.integrations.{script}", model, str(FOLDER)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, overlay))},
        timeout=240, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_wraps_the_model_is_what_is_called(folders):
    """DeepSpeed's engine takes the place of `model`."""
    _, own = actors(folders["llama"])
    calls = []

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            calls.append(sorted(kwargs))
            return self.module(*args, **kwargs)

    expected = ppo_step(own)
    own.zero_grad()
    own.model = Engine(own.model)
    assert_same(ppo_step(own), expected)
    assert len(calls) == 1


def test_an_actor_is_made_where_its_attention_cannot_run(folders):
    """OpenRLHF loads models on the CPU and runs them on GPUs, with flash attention."""

    def flash(*args, **kwargs):
        raise RuntimeError("takes a GPU")

    transformers.AttentionInterface.register("gpu_only", flash)
    _, own = actors(folders["llama"], attn_implementation="gpu_only")
    assert own.model.config._attn_implementation == "gpu_only"
    with pytest.raises(RuntimeError, match="takes a GPU"):
        ppo_step(own)


def test_other_versions_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(ours, "VERSIONS", ("0.10.0",))
    with pytest.raises(ImportError, match=r"openrlhf 0\.11\.2 is not known here: known are 0\.10\.0\. Install"):
        ours.fused(Actor)


def test_another_forward_is_refused():
    class Other(Actor):
        def forward(self, sequences):
            return sequences

    with pytest.raises(ImportError, match=r"Other\.forward takes \(self, sequences\), expected"):
        ours.fused(Other)


def test_another_class_is_refused():
    with pytest.raises(TypeError, match=r"fused\(\) takes openrlhf.models.actor.Actor or a subclass of it, got"):
        ours.fused(torch.nn.Linear)


def test_weights_that_are_partitioned_need_options(folders, monkeypatch):
    """Parameters marked as ZeRO-3 does."""
    made = LlamaForCausalLM.get_output_embeddings

    def partitioned(self):
        head = made(self)
        head.weight.ds_id = 0
        return head

    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", partitioned)
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        ours.fused(Actor)(folders["llama"], attn_implementation="sdpa")
    own = ours.fused(Actor, logit_options=LogitOptions())(folders["llama"], attn_implementation="sdpa")
    assert ppo_step(own.float())[1] > 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"return_entropy": True}, "return_entropy needs return_output"),
        ({"attention_mask": None}, "expected an attention_mask"),
        ({"pixel_values": torch.zeros(1)}, r"no other inputs, got \['pixel_values'\]"),
    ],
)
def test_calls_that_cannot_be_served(folders, arguments, expected):
    sequences, mask, action_mask = experience()
    with pytest.raises(ValueError, match=expected):
        actors(folders["llama"])[1](sequences, action_mask, **{"attention_mask": mask} | arguments)


def test_vision_language_models_are_refused(folders, monkeypatch):
    class Vlm(Actor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_vlm = True

    with pytest.raises(ValueError, match="vision-language models are not supported"):
        ours.fused(Vlm)(folders["llama"], attn_implementation="sdpa")


def test_a_model_in_the_place_of_a_path_is_refused():
    """OpenRLHF's own Actor takes one, and fails in forward."""
    with pytest.raises(ValueError, match="expected the path of a model, got a Linear"):
        ours.fused(Actor)(torch.nn.Linear(2, 2))
