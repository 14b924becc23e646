"""The command line on real models: what it reports is what transformers alone computes of the same text, before
training and of the saved folder afterwards, and the folder answers and stops under transformers alone."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from tests.real.real_models import (
    CONVERSATIONS,
    END,
    PAIRS,
    PROMPTS,
    assistant,
    labelled,
    load,
    token_logps,
)

pytestmark = pytest.mark.real

SEED = 42  # of every run: the default


def with_room(model, tokenizer):
    """The model as it is before training: with embeddings for the tokens that its chat template brings, drawn near the
    mean of the others by transformers, from the run's seed."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        torch.manual_seed(SEED)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    return model


def fp32_and_fp64(model, rows):
    """The log-probs of transformers' own forward, as people train with it and as exact as can be."""
    return token_logps(model, rows), token_logps(copy.deepcopy(model).double(), rows)


def check_means(model, rows, reported):
    """reported: the mean over all learned tokens of -log p, within twice the mean error of fp32 logits."""
    eager, truth = (torch.cat(logps) for logps in fp32_and_fp64(model, rows))
    assert abs(reported + truth.mean().item()) <= 2 * (eager - truth).abs().mean().item() + 1e-6


def check_sums(model, rows, reported):
    """reported: the mean over the rows of the sum of log p, within twice the error of fp32 logits."""
    eager, truth = fp32_and_fp64(model, rows)
    error = sum((a - b).abs().sum().item() for a, b in zip(eager, truth, strict=True)) / len(rows)
    assert abs(reported - sum(row.sum().item() for row in truth) / len(rows)) <= 2 * error + 1e-6


def test_sft_learns_what_the_assistant_says_and_where_it_ends(model, rlhf, metrics):
    first, *_, last = metrics("sft")
    trained, tokenizer = load(rlhf("sft"))
    rows = [labelled(model, tokenizer, messages) for messages in CONVERSATIONS]
    check_means(trained, rows, last["eval/loss"])
    check_means(with_room(load(model.path)[0], tokenizer), rows, first["eval/loss"])
    assert last["eval/loss"] < first["eval/loss"]


def test_inspect_shows_these_tokens(model, rlhf):
    result = rlhf.call("inspect", "sft", *rlhf.arguments("sft"), "--json")
    assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(rlhf("sft"))
    for line, messages in zip(result.stdout.splitlines(), CONVERSATIONS, strict=True):
        ids, labels = labelled(model, tokenizer, messages)
        row = json.loads(line)
        assert row["input_ids"] == ids
        assert row["labels"] == labels


def test_dpo_sums_the_log_probs_of_both_answers(model, rlhf, metrics):
    first, *_, last = metrics("dpo")
    trained, tokenizer = load(rlhf("dpo"))
    before = with_room(load(model.path)[0], tokenizer)
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for place, name in ((1, "chosen"), (2, "rejected")):
        conversations = [[*pair[0], assistant(pair[place])] for pair in PAIRS]
        rows = [labelled(model, tokenizer, messages, last_turn_only=True) for messages in conversations]
        check_sums(before, rows, first[f"eval/logps/{name}"])
        check_sums(trained, rows, last[f"eval/logps/{name}"])
    assert last["eval/loss"] < first["eval/loss"]


@torch.no_grad()
def test_a_reward_model_is_read_by_transformers_as_it_was_trained(model, rlhf, metrics):
    folder = rlhf("reward")
    rewards = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for place, name in ((1, "chosen"), (2, "rejected")):
        values = []
        for pair in PAIRS:
            messages = [*pair[0], assistant(pair[place])]
            inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            assert tokenizer.decode(inputs.input_ids[0]) == model.rendered(messages)
            values.append(rewards(**inputs).logits.item())
        assert metrics("reward")[-1][f"eval/rewards/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_grpo_learns_from_what_transformers_would_generate(metrics):
    first, *_ = metrics("grpo")
    assert len(metrics("grpo")) == 3
    assert first["sampling/sampling_logp_difference/max"] < 1e-3  # log-probs of generation against those of training
    assert all(0 <= row["reward"] <= 1 for row in metrics("grpo"))


def answers(folder, prompts, max_new_tokens):
    """Greedy answers by transformers alone: (prompt ids, new ids) of each prompt."""
    trained, tokenizer = load(folder)
    for messages in prompts:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = trained.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert all(logits.isfinite().all() for logits in output.logits)
        yield inputs.input_ids[0].tolist(), output.sequences[0, inputs.input_ids.shape[1] :].tolist()


def test_transformers_alone_answers_and_stops(model, rlhf):
    """As `rlhf sample` does, token by token."""
    folder = rlhf("sft")
    tokenizer, ends = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder).eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    assert tokenizer.convert_tokens_to_ids(END) in ends
    sampled = [json.loads(line) for line in (rlhf("sample") / "completions.jsonl").read_text().splitlines()]
    for messages, row, (prompt, ids) in zip(PROMPTS, sampled, answers(folder, PROMPTS, 24), strict=True):
        assert tokenizer.decode(prompt) == model.rendered(messages) + "<|im_start|>assistant\n"
        assert row["finished"] == (ids[-1] in ends)
        assert row["finished"] or not model.knows_end
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip()
        assert row["completion"] == [assistant(text)]


@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_what_preferences_and_rewards_made_answers_too(model, rlhf, command):
    tokenizer = AutoTokenizer.from_pretrained(rlhf(command))
    for _, ids in answers(rlhf(command), PROMPTS, 12):
        assert tokenizer.decode(ids, skip_special_tokens=True).strip()
