"""Weights are loaded as they were saved, to train in fp32; a result is saved as the model was, unless the run says."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from rlhf_trainer.models.fused_lm import FusedLM, load_fused, load_policy
from rlhf_trainer.models.loading import load_causal_lm, load_codec_for, loading_of, save_model
from rlhf_trainer.models.lora import adapter_of
from rlhf_trainer.offline.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.offline.reward_model import train_reward
from rlhf_trainer.offline.sft import train_sft
from rlhf_trainer.offline.shared_prefix import can_share
from rlhf_trainer.rollouts.config import SampleConfig
from rlhf_trainer.training import checkpoint

IDS = torch.tensor([[5, 9, 200, 31, 7]])


@pytest.fixture(scope="module")
def saved(make_model, tokenizer, tmp_path_factory):
    """saved(dtype) -> the folder of a model with weights of it."""
    folders = {}

    def folder(dtype):
        if dtype not in folders:
            folders[dtype] = tmp_path_factory.mktemp(dtype)
            make_model("llama").to(getattr(torch, dtype)).save_pretrained(folders[dtype])
            tokenizer.save_pretrained(folders[dtype])
        return str(folders[dtype])

    return folder


def dtypes_in(path):
    return {tensor.dtype for tensor in load_file(path).values()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_models_that_do_not_train_are_loaded_as_they_were_saved(dtype, saved):
    config = SampleConfig(models=["m"], dataset_name="d", output_dir="o")
    assert load_causal_lm(saved(dtype), key="models", **loading_of(config)).dtype == getattr(torch, dtype)
    config.dtype = "float16"
    assert load_causal_lm(saved(dtype), key="models", **loading_of(config)).dtype == torch.float16
    dpo = DPOConfig(model_name_or_path=saved(dtype), dataset_name="d", output_dir="o")
    assert load_fused(dpo, saved(dtype), "ref_model_name_or_path").model.dtype == getattr(torch, dtype)
    assert load_policy(dpo, *load_codec_for(dpo)).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("before", "option", "after"),
    [("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", None, "float32")],
)
@pytest.mark.parametrize("command", ["sft", "reward"])
def test_a_result_is_saved_as_the_model_was(command, before, option, after, saved, rows, write_jsonl, tmp_path):
    """Trained, and kept in checkpoints, in fp32."""
    options = {
        "model_name_or_path": saved(before), "dataset_name": write_jsonl(rows(4)), "output_dir": str(tmp_path / "out"),
        "batch_size": 4, "micro_batch_size": 2, "max_length": 96, "dtype": option,
    }  # fmt: skip
    if command == "sft":
        folder = train_sft(SFTConfig(**options))
    else:
        folder = train_reward(RewardConfig(**options, max_prompt_length=48))
    assert dtypes_in(folder / "model.safetensors") == {getattr(torch, after)}
    (newest,) = checkpoint.saved_checkpoints(folder)
    tensors = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
    assert {facts.properties.dtype for name, facts in tensors.items() if name.startswith("model.")} == {torch.float32}


def test_a_model_trains_in_the_dtype_that_it_is_told(saved, rows, write_jsonl, tmp_path):
    with pytest.warns(UserWarning, match=r"bfloat16: updates of learning_rate 1e-06 are lost in rounding"):
        folder = train_sft(
            SFTConfig(
                model_name_or_path=saved("float32"), dataset_name=write_jsonl(rows(4)), dtype="bfloat16",
                output_dir=str(tmp_path / "out"), batch_size=4, micro_batch_size=2, max_length=96, learning_rate=1e-6,
            )
        )  # fmt: skip
    assert dtypes_in(folder / "model.safetensors") == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_heads_of_bf16_models_are_read(family, make_model):
    exact, low = FusedLM(make_model(family)), FusedLM(make_model(family).to(torch.bfloat16))
    assert (low.logit_scale, low.logit_softcap) == (exact.logit_scale, exact.logit_softcap)


def test_bf16_models_share_prefixes_where_fp32_models_do(make_model):
    assert can_share(make_model("llama").to(torch.bfloat16))
    assert not can_share(make_model("gemma2").to(torch.bfloat16))


@torch.no_grad()
def test_what_a_server_gets_of_a_policy_is_whole_and_the_policy_stays(saved, tokenizer, tmp_path):
    config = DPOConfig(
        model_name_or_path=saved("float32"), dataset_name="d", output_dir="o", use_peft=True, dtype="float32",
        lora_target_modules=["q_proj", "lm_head"],
    )  # fmt: skip
    policy = load_policy(config, *load_codec_for(config))
    torch.manual_seed(0)
    for weight in policy.model.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn_like(weight))
    before = policy.model(IDS).logits
    save_model(policy.model, tokenizer, tmp_path / "sent")
    assert torch.equal(policy.model(IDS).logits, before) and adapter_of(policy.model) is not None
    sent = load_causal_lm(str(tmp_path / "sent"), key="k")
    assert adapter_of(sent) is None
    torch.testing.assert_close(sent(IDS).logits, before, rtol=1e-5, atol=1e-5)
