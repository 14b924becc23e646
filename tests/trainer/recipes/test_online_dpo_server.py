"""`rlhf online-dpo` with a server, which gets each round's model before it draws that round's completions."""

import pytest

from rlhf_trainer.recipes.config import OnlineDPOConfig
from rlhf_trainer.recipes.online_dpo import train_online_dpo
from tests.trainer.known_models import dice
from tests.trainer.rollouts.scripted_server import VLLM, Led, choices

END = 1


@pytest.mark.usefixtures("loopback_without_proxy")
@pytest.mark.parametrize("adapts", [False, True])
def test_each_round_draws_from_the_model_of_the_last(adapts, tokenizer, write_jsonl, tmp_path):
    cat, dogs = (tokenizer(word).input_ids[0] for word in (" cat", " dogs"))
    dice({cat: 0.2, dogs: 0.5, END: 0.3}).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    server = Led(*VLLM)

    def answer(path, body):
        status, content = server.reply(path, body)
        if path == "/v1/completions" and status == 200:
            return choices(
                {"token_ids": [cat if i % 2 else dogs, END], "finish_reason": "stop"} for i in range(body["n"])
            )
        return status, content

    server.answer = answer
    options = {"use_peft": True, "lora_target_modules": ["all-linear"]} if adapts else {}
    with server.running() as url:
        train_online_dpo(
            OnlineDPOConfig(
                model_name_or_path=str(tmp_path / "model"), dataset_name=write_jsonl([{"prompt": "the"}]), rounds=2,
                reward_funcs=["regex: cat"], output_dir=str(tmp_path / "out"), ref_cache_dir=str(tmp_path / "cache"),
                num_completions=4, max_new_tokens=4, max_prompt_length=16, max_length=40, warmup_steps=0, batch_size=2,
                use_vllm=True, vllm_server_base_url=url, **options,
            )
        )  # fmt: skip
    sent = [body.get("lora_path") or body.get("kwargs", {}).get("weights_path") for _, body in server.calls]
    first, second = [path for path in sent if path]
    assert first == str(tmp_path / "model") and second.endswith("out.partial/round-1/model")
    assert ("v1/load_lora_adapter" in [path for path, _ in server.calls]) == adapts
    drawn = [body["model"] for path, body in server.requests if path == "/v1/completions"]
    assert drawn[0] == "base" and (drawn[1].startswith("policy-") if adapts else drawn[1] == "base")
