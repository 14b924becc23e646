"""Turns of an environment between those of real models: their tokens, and a model that learns to ask."""

import pytest
from transformers import AutoTokenizer

from rlhf_trainer.data.chat import set_chat_template
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import Prompt
from rlhf_trainer.online.environment import Environment
from rlhf_trainer.rollouts.generation import Completion, Sampling
from tests.real.calculator import SHOWN, train
from tests.real.real_models import SMOLLM2

pytestmark = pytest.mark.real
QUESTION = {"role": "user", "content": "What is 23 times 17?"}
TURNS = ("<calc>23*17</calc>", "It is 391,\n\nof course 🙂")


def test_turns_are_the_tokens_of_the_conversation(model):
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    if tokenizer.chat_template is None:
        set_chat_template(tokenizer, "chatml")
    codec, messages = Codec(tokenizer), [*SHOWN, QUESTION]
    text = codec.template.text("prompt", messages, {}, add_generation_prompt=True)
    front = [] if tokenizer.bos_token is None or text.startswith(tokenizer.bos_token) else codec.front
    prompt = Prompt(
        1, messages, front + tokenizer(text, add_special_tokens=False).input_ids, None, {"answer": 391}, text
    )
    left = iter(TURNS)
    end = next(iter(codec.ends - {tokenizer.eos_token_id}), tokenizer.eos_token_id)

    def draw(prompts, seed, sampling):
        ids = [*tokenizer(next(left), add_special_tokens=False).input_ids, end]
        return [Completion(ids, True, [-0.5] * len(ids))]

    environment = Environment("tests.real.calculator:Calculator", codec)
    (done,) = environment.play([prompt], 0, Sampling(99), draw, lambda own: own, is_main=True)
    said = [{"role": "assistant", "content": turn} for turn in TURNS]
    messages += [said[0], {"role": "user", "content": "391"}, said[1]]
    whole = tokenizer(codec.template.text("whole", messages, {}), add_special_tokens=False).input_ids
    ids = (prompt.ids + done.ids)[len(front) :]
    assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]).strip() == ""
    learned = [id for id, own in zip(done.ids, done.learned, strict=True) if own]
    assert learned == [id for turn in TURNS for id in [*tokenizer(turn, add_special_tokens=False).input_ids, end]]
    assert done.reward == 1.0


def test_a_model_that_cannot_multiply_learns_to_ask(tmp_path):
    rows = train(SMOLLM2.path, tmp_path / "out", 4)
    rewards = [row["reward"] for row in rows]
    assert rewards[0] < 0.3 and rewards[-1] > 0.6
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
