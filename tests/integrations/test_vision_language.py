"""The text part of vision-language models: patched like any causal LM, images and all."""

import copy

import pytest
import torch
import transformers

from rlhf_kernels.integrations.transformers import logit_options_of, patch_causal_lm
from tests.integrations.tiny_models import COMMON, assert_same, make_batch, make_causal_lm, own, patched

IMAGE = 66  # the id that stands for a patch of an image
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def qwen2_vl():
    text = COMMON | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 14}
    return transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=65, vision_start_token_id=64,
        vision_end_token_id=63,
    )  # fmt: skip


def gemma3():
    text = COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
    return transformers.Gemma3Config(
        text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, mm_tokens_per_image=1, boi_token_index=64,
        eoi_token_index=65,
    )  # fmt: skip


def llava():
    text = COMMON | {"model_type": "llama"}
    vision = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 16}
    return transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def with_image(config):
    """A batch whose first row shows an image, as that model's processor would make it."""
    batch = make_batch()
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    if config.model_type == "qwen2_vl":  # 4 patches of 2 frames, merged into one token
        batch["input_ids"][0, 0], places = 64, [1]
        batch["pixel_values"] = torch.randn(4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
        batch["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    elif config.model_type == "gemma3":
        places, batch["pixel_values"] = [1], pixels
    else:
        places, batch["pixel_values"] = [1, 2, 3, 4], pixels
    batch["input_ids"][0, places] = IMAGE
    batch["labels"][0, : max(places) + 1] = -100
    kinds = (batch["input_ids"] == IMAGE).long()
    if config.model_type == "qwen2_vl":
        batch["mm_token_type_ids"] = kinds
    if config.model_type == "gemma3":
        batch["token_type_ids"] = kinds
    return batch


@pytest.mark.parametrize("sees", ["text", "an image"])
@pytest.mark.parametrize("config", [qwen2_vl, gemma3, llava], ids=lambda config: config.__name__)
def test_a_vision_language_model_is_computed_as_from_its_own_logits(config, sees):
    config = config()
    model = make_causal_lm(config, auto=transformers.AutoModelForImageTextToText)
    for name, parameter in model.named_parameters():
        if "mm_input_projection" in name:  # Gemma's starts at 0, in which case no image would show
            torch.nn.init.normal_(parameter, std=0.3)
    plain = copy.deepcopy(model)
    batch = with_image(config) if sees == "an image" else make_batch()
    assert logit_options_of(plain) == (1.0, None)  # Gemma 3 with vision does not do what its config says of a cap
    expected = own(plain, batch)
    assert_same(patched(patch_causal_lm(model), batch), expected)
    assert any("vis" in name and grad.any() for name, grad in expected.grads.items()) == (sees == "an image")
