"""`rlhf reward`: its losses by hand, what it saves, and what it says of itself. (test_against_trl.py: beside TRL's.)"""

import json
import math
import random

import pytest
import tokenizers
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trainer.data.examples import Group, Prompt
from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline.config import RewardConfig
from rlhf_trainer.offline.pair_batches import collate_groups
from rlhf_trainer.offline.reward_model import (
    PAD,
    RewardTask,
    calibration,
    calibration_error,
    disagreement,
    margins_of,
    pair_losses,
    reward_metrics,
    train_reward,
)
from rlhf_trainer.rewards.config import RejectionConfig
from rlhf_trainer.rewards.loading import load_rewards
from tests.trainer.messages import assistant, user

GROUPS = [Group(1, [1], [[2], [3], [4]], [(0, 1), (2, 1)], [0.0, 0.5]), Group(2, [1], [[2], [3]], [(1, 0)], [0.25])]
REWARDS = torch.tensor([1.0, -1.0, 0.5, 2.0, 2.5])


def config(**options):
    return RewardConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **options)


@pytest.fixture
def reward(tmp_path):
    """Trains with small settings; returns (output folder, the lines of metrics.jsonl)."""
    runs = iter(range(100))

    def run(**options):
        small = {"output_dir": str(tmp_path / f"rm{next(runs)}"), "learning_rate": 1e-3, "max_length": 96}
        small |= {"batch_size": 8, "micro_batch_size": 8, "max_prompt_length": 48}
        folder = train_reward(RewardConfig(**(small | options)))
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


def minus_log_sigma(x):
    return math.log1p(math.exp(-x))


def test_losses_by_hand():
    """Pairs (0, 1), (2, 1), (4, 3) with margins 0, 0.5, 0.25."""
    pairs = collate_groups(GROUPS, 0)
    losses = pair_losses(REWARDS, pairs, config())
    expected = [minus_log_sigma(2 - 0), minus_log_sigma(1.5 - 0.5), minus_log_sigma(0.5 - 0.25)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    centred = pair_losses(REWARDS, pairs, config(center_rewards_coefficient=0.1))
    assert (centred - losses).tolist() == pytest.approx([0.0, 0.1 * 0.25, 0.1 * 4.5**2], abs=1e-5)
    ranking = pair_losses(REWARDS, pairs, config(loss_type="margin_ranking", margin=1.0))
    assert ranking.tolist() == pytest.approx([0, 0, 0.5])


def test_metrics_by_hand():
    metrics = reward_metrics(torch.tensor(0.5), REWARDS, collate_groups(GROUPS, 0))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss": 0.5, "accuracy": 1.0, "margin": (2 + 1.5 + 0.5) / 3, "rewards/chosen": 4 / 3,
            "rewards/rejected": 0.0, "mean_reward": 2 / 3,
        }
    )  # fmt: skip
    task = RewardTask(config(), GROUPS, 0, Accelerator(cpu=True), shuffled=False)
    output = task.compute_loss(lambda batch: REWARDS, [0, 1])
    assert {name: value.item() for name, value in (output.minima | output.maxima).items()} == {
        "min_reward": -1.0, "max_reward": 2.5,
    }  # fmt: skip


def test_calibration_by_hand():
    """Sure by 0.6 on average and right in 1 of 2; sure by 0.9 and right in 2 of 2; a tie is half right."""
    logit = [math.log(p / (1 - p)) for p in (0.62, 0.58, 0.92, 0.88)]
    margins = torch.tensor([logit[0], -logit[1], logit[2], logit[3]])
    assert calibration_error(margins) == pytest.approx(
        0.25 * abs(1 - 0.62) + 0.25 * 0.58 + 0.25 * (1 - 0.92) + 0.25 * (1 - 0.88)
    )
    assert sum(row["pairs"] for row in calibration(margins)) == 4
    assert calibration(torch.zeros(3)) == [{"pairs": 3, "claimed": 0.5, "right": 0.5}]
    assert calibration_error(torch.full((5,), 50.0)) == pytest.approx(0)


def test_a_judge_as_sure_as_it_is_right_is_calibrated():
    """Bradley-Terry pairs drawn from the margins that are claimed; one twice as sure is not."""
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(40000, generator=generator)
    drawn = torch.where(torch.rand(40000, generator=generator) < margins.sigmoid(), margins, -margins)
    assert calibration_error(drawn) < 0.02
    assert calibration_error(2 * drawn) > 0.05


def test_disagreement_by_hand():
    report = disagreement(torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, 3.0]]))
    assert report["models"] == 2
    assert report["disagreement"] == pytest.approx(1 / 3)
    assert report["margin_std"] == pytest.approx((math.sqrt(0.5) + math.sqrt(4.5) + 0) / 3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_trained_model_loads_as_a_sequence_classifier(family, model_folder, rows, write_jsonl, reward):
    """transformers, on its own, gives the rewards that training saw: padded or not, on the right or, where positions
    are relative, on the left. The tokenizer's padding was its end of sequence; now it is a token of its own."""
    data = rows(8)
    folder, records = reward(
        model_name_or_path=model_folder(family), dataset_name=write_jsonl(data), max_steps=1, learning_rate=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert tokenizer.pad_token == PAD != tokenizer.eos_token and model.config.pad_token_id == tokenizer.pad_token_id

    def rewards(column, side):
        tokenizer.padding_side = side
        texts = [row["prompt"] + row[column] + tokenizer.eos_token for row in data]
        with torch.no_grad():
            return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]

    sides = ("right", "left") if family == "llama" else ("right",)
    for side in sides:
        chosen, rejected = rewards("chosen", side), rewards("rejected", side)
        assert records[0]["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
        assert records[0]["min_reward"] == pytest.approx(min(chosen.min(), rejected.min()).item(), abs=1e-5)
        assert records[0]["max_reward"] == pytest.approx(max(chosen.max(), rejected.max()).item(), abs=1e-5)
        assert records[0]["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())


def preferences(count, seed):
    """The better answer has more fish."""
    rng = random.Random(seed)

    def answer(fish):
        words = ["fish"] * fish + rng.choices(["cat", "mat", "hills"], k=rng.randint(2, 5))
        rng.shuffle(words)
        return " " + " ".join(words)

    pairs = [sorted(rng.sample(range(5), 2)) for _ in range(count)]
    return [{"prompt": "the cat", "chosen": answer(more), "rejected": answer(fewer)} for fewer, more in pairs]


def test_it_learns_and_reports_on_held_out_pairs(model_folder, write_jsonl, reward, capsys):
    common = {
        "model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(preferences(160, 0), "train.jsonl"),
        "eval_dataset": write_jsonl(preferences(200, 1), "held.jsonl"), "batch_size": 16, "learning_rate": 3e-3,
        "num_train_epochs": 1,
    }  # fmt: skip
    first, records = reward(**common, seed=1)
    assert records[0]["eval/accuracy"] < 0.75 < 0.85 < records[-1]["eval/accuracy"]
    report = json.loads((first / "report.json").read_text())
    assert report["accuracy"] == pytest.approx(records[-1]["eval/accuracy"], abs=1e-6)
    assert report["calibration_error"] == pytest.approx(records[-1]["eval/calibration_error"], abs=1e-5)
    assert "models" not in report

    second, _ = reward(**common, seed=2, compare_with=[str(first)])
    compared = json.loads((second / "report.json").read_text())
    assert compared["models"] == 2 and 0 < compared["disagreement"] < 0.5 and compared["margin_std"] > 0
    assert "2 models disagree on" in capsys.readouterr().out


def test_held_out_pairs_are_scored_once_an_evaluation(model_folder, rows, write_jsonl, reward, monkeypatch):
    """Evaluations are before training and at its end; the report is of the last, with margins in the plan's order."""
    calls = []
    original = RewardTask.loss_and_margins

    def counting(task, model, indices):
        calls.append((task, model))
        return original(task, model, indices)

    monkeypatch.setattr(RewardTask, "loss_and_margins", counting)
    data = write_jsonl(rows(20))
    reward(model_name_or_path=model_folder("llama"), dataset_name=data, eval_dataset=data, max_steps=1)
    held_out, model = calls[-1]
    assert [task is held_out for task, _ in calls] == [True] * 3 + [False] + [True] * 3  # batches of 8, 8, 4
    assert held_out.margins.tolist() == pytest.approx(margins_of(held_out, model).tolist(), abs=1e-6)


def test_margins_reach_the_loss(model_folder, rows, write_jsonl, reward):
    """Step 1, before anything is learned: -log sigma(d - margin) with a margin of 40 is 40 more than with none."""
    data = rows(4)
    common = {"model_name_or_path": model_folder("llama"), "max_steps": 1}
    plain = reward(**common, dataset_name=write_jsonl(data, "a.jsonl"))[1][0]
    margin = reward(**common, dataset_name=write_jsonl([row | {"margin": 40.0} for row in data], "b.jsonl"))[1][0]
    assert margin["loss"] == pytest.approx(40 - plain["margin"], abs=1e-3)
    assert margin["margin"] == pytest.approx(plain["margin"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"loss_type": "margin_ranking", "center_rewards_coefficient": 0.1}, "margin_ranking takes neither"),
        ({"compare_with": ["x"]}, "pass eval_dataset"),
        ({"margin": 2.0}, "margin is for loss_type margin_ranking"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options, message, reward):
    with pytest.raises(UsageError, match=message):
        reward(model_name_or_path="/nowhere/at/all", dataset_name="/nowhere/at/all.jsonl", **options)


def test_ensemble_members_are_checked_before_training(model_folder, rows, write_jsonl, reward, tokenizer, tmp_path):
    """A folder that is not there, a model that reads other tokens, one that is no reward model."""
    import copy

    data = write_jsonl(rows(4))
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": data, "eval_dataset": data, "max_steps": 1}
    folder, _ = reward(**common)
    other = copy.deepcopy(AutoTokenizer.from_pretrained(folder))
    other.add_tokens(["<other>"])
    for name in ("moved", "renamed"):
        AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / name)
    changed = json.loads(tokenizer.backend_tokenizer.to_str())
    words = changed["model"]["vocab"]
    words["the"], words["Ġcat"] = words["Ġcat"], words["the"]
    type(tokenizer)(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(changed))).save_pretrained(
        tmp_path / "renamed"
    )
    cases = {"/no/such/rm": "no such folder", str(tmp_path / "renamed"): "has another tokenizer"}
    cases |= {model_folder("gpt2"): "lacks weights|has another tokenizer"}
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message):
            reward(**common, compare_with=[name])
    reward(**common, compare_with=[str(folder)])


def test_a_tokenizer_of_another_model_is_refused(model_folder, tokenizer, rows, write_jsonl, reward, tmp_path):
    """Room is made for a padding token, not for hundreds."""
    import copy

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<extra{i}>" for i in range(200)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match="the tokenizer does not belong to the model"):
        reward(
            model_name_or_path=model_folder("llama"), dataset_name=write_jsonl(rows(4)),
            tokenizer_name_or_path=str(tmp_path / "larger"),
        )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_is_no_language_model(family, model_folder, rows, write_jsonl, reward, train):
    """With tied embeddings no weight is missing, so that nothing else would show."""
    data = write_jsonl(rows(4))
    folder, _ = reward(model_name_or_path=model_folder(family), dataset_name=data, max_steps=1)
    with pytest.raises(UsageError, match=r"is a reward model|lacks weights"):
        train(model_name_or_path=str(folder), dataset_name=data)


def test_a_response_that_ends_with_padding_is_refused(tokenizer, make_model, write_jsonl, reward, tmp_path):
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": PAD})
    padded.eos_token = None
    make_model("llama").save_pretrained(tmp_path / "start")
    padded.save_pretrained(tmp_path / "start")
    with pytest.raises(UsageError, match=r"row 1: a response ends with the padding token"):
        reward(
            model_name_or_path=str(tmp_path / "start"),
            dataset_name=write_jsonl([{"prompt": "the cat", "chosen": f" sat{PAD}", "rejected": " ran"}]),
        )


# --- read where it was trained: transformers' plain chat template, both ways


@pytest.fixture
def chat_pairs(rows):
    def pair(row):
        chosen, rejected = (assistant(row[side].strip()) for side in ("chosen", "rejected"))
        return {"prompt": user(row["prompt"]), "chosen": chosen, "rejected": rejected}

    return [pair(row) for row in rows(12)]


def as_transformers_reads(folder, conversations):
    """The values of AutoModelForSequenceClassification on what apply_chat_template makes, padded, as pipelines do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        conversations, return_tensors="pt", return_dict=True, padding=True, tokenizer_kwargs={"padding_side": "right"}
    )
    with torch.no_grad():
        return model(**inputs).logits.squeeze(-1)


def test_transformers_reads_a_trained_model_as_it_was_trained(reward, chat_pairs, model_folder, write_jsonl):
    """Its held-out accuracy and margins are those that transformers finds, line break behind the turn and all."""
    held_out = write_jsonl(chat_pairs[8:], "held_out.jsonl")
    data = {"dataset_name": write_jsonl(chat_pairs[:8]), "eval_dataset": held_out}
    folder, (*_, last) = reward(model_name_or_path=model_folder("llama"), **data)
    chosen, rejected = (
        as_transformers_reads(folder, [pair["prompt"] + pair[side] for pair in chat_pairs[8:]])
        for side in ("chosen", "rejected")
    )
    assert last["eval/margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert last["eval/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())


def test_a_model_of_the_hub_is_read_as_transformers_reads_it(reward, chat_pairs, model_folder, write_jsonl):
    folder, _ = reward(model_name_or_path=model_folder("llama"), dataset_name=write_jsonl(chat_pairs))
    score = load_rewards(
        RejectionConfig(output_dir="x", completions=["x"], reward_model_name_or_path=str(folder)), torch.device("cpu")
    )
    prompts = [Prompt(i, pair["prompt"], [], None) for i, pair in enumerate(chat_pairs, start=1)]
    scores = score(prompts, [pair["chosen"][0]["content"] for pair in chat_pairs]).total
    expected = as_transformers_reads(folder, [pair["prompt"] + pair["chosen"] for pair in chat_pairs])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
