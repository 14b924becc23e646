"""`rlhf evaluate`: who wins, by how much, how sure that is, and how far the model has gone from its reference."""

import copy
import json
import math
import shutil

import pytest
import torch

from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.errors import UsageError
from rlhf_trainer.evaluation.config import EvaluateConfig
from rlhf_trainer.evaluation.evaluate import evaluate
from rlhf_trainer.evaluation.intervals import bootstrap_interval, wilson_interval
from rlhf_trainer.evaluation.report import outcome
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.models.kl import kl_of_sequences, kl_per_sequence
from rlhf_trainer.rewards import model_rewards
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder
from tests.trainer.known_models import dice, save_word_reward_model

# --- intervals


@pytest.mark.parametrize(
    ("rate", "count", "low", "high"),
    [
        (0.5, 10, 0.2366, 0.7634),  # by hand: (0.5 + 0.19207) / 1.38415 -+ 1.96 sqrt(0.025 + 0.0096036) / 1.38415
        (0.0, 10, 0.0, 0.2775),  # 3.84146 / 13.84146: not an empty interval, though all trials agree
        (1.0, 10, 0.7225, 1.0),
        (0.62, 1000, 0.5895, 0.6496),
    ],
)
def test_wilson(rate, count, low, high):
    interval = wilson_interval(rate, count)
    assert interval.value == rate and interval.count == count
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_bootstrap_is_near_the_normal_interval_and_seeded():
    """Of 400 normal values the mean's standard error is s / 20, and 95% lie within 1.96 of it."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 7
    interval = bootstrap_interval(values.tolist(), 4000, seed=1)
    error = 1.96 * values.std().item() / 20
    assert interval.value == pytest.approx(values.mean().item(), abs=1e-5) and interval.count == 400
    assert interval.low == pytest.approx(interval.value - error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.value + error, abs=0.1 * error)
    assert bootstrap_interval(values.tolist(), 4000, seed=1) == interval != bootstrap_interval(values.tolist(), 4000, 2)


def test_bootstrap_of_a_constant_and_of_one_value():
    assert bootstrap_interval([2.0] * 5, 10, seed=0) == (2.0, 2.0, 2.0, 5)
    assert bootstrap_interval([2.5], 10, seed=0) == (2.5, 2.5, 2.5, 1)


def test_outcomes():
    assert [outcome(2.0, 1.0), outcome(1.0, 1.0), outcome(0.5, 1.0), outcome(None, -9.0)] == [1.0, 0.5, 0.0, 0.0]


# --- KL


def test_kl_of_known_distributions_is_a_sum_over_the_responses_tokens():
    policy, reference = {10: 0.5, 11: 0.3, 12: 0.2}, {10: 0.25, 11: 0.25, 12: 0.5}
    nats = sum(p * math.log(p / reference[token]) for token, p in policy.items())
    batch = pad_sequences([([20, 21], [10]), ([20], [11, 12, 10, 10])], pad_id=1)
    kl = kl_per_sequence(FusedLM(dice(policy)), FusedLM(dice(reference)), batch)
    torch.testing.assert_close(kl, torch.tensor([nats, 4 * nats]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "phi", "cohere"])  # a soft cap, a bias, a scale
def test_kl_is_that_of_the_models_own_logits(make_model, family):
    policy, reference = make_model(family, seed=0), make_model(family, seed=1)
    sequences = [([5, 6, 7], [8, 9, 1]), ([4], [11, 12, 13, 14, 15, 1]), ([3, 2], [1])]
    expected = []
    for prompt, response in sequences:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() for model in (policy, reference))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        expected.append((p.exp() * (p - q)).sum().item())
    for batch_size in (1, 2, 3):
        kl = kl_of_sequences(FusedLM(policy), FusedLM(reference), sequences, batch_size, pad_id=1)
        assert kl == pytest.approx(expected, rel=1e-4)
    assert kl_of_sequences(FusedLM(policy), FusedLM(policy), sequences, 2, pad_id=1) == pytest.approx([0] * 3, abs=1e-6)


# --- the stage: the reward model rewards the share of " cat" among all tokens, the end included


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """The reward model; a model that writes nothing but cats, two at most; one that ends at once; their reference."""
    (cat,), (dogs,) = tokenizer(" cat").input_ids, tokenizer(" green").input_ids
    made = {"reward": save_word_reward_model(tmp_path_factory.mktemp("reward"), copy.deepcopy(tokenizer), " cat")}
    for name, model in {
        "cats": dice({cat: 1.0}),
        "silent": dice({tokenizer.eos_token_id: 1.0}),
        "start": dice({cat: 0.5, dogs: 0.25, tokenizer.eos_token_id: 0.25}),
    }.items():
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


ROWS = [
    {"prompt": "the", "completion": " green green"},  # two cats win
    {"prompt": "on", "chosen": " cat cat cat cat", "rejected": " green"},  # four cats are better than two
    {"prompt": "a", "completion": " cat cat"},  # the very same answer
    {"prompt": "over"},
]


@pytest.fixture
def run(folders, write_jsonl, tmp_path):
    def run(model="cats", reference=None, reward_model="reward", rows=ROWS, output="out", **options):
        small = {
            "model_name_or_path": folders[model], "dataset_name": write_jsonl(rows),
            "reward_model_name_or_path": None if reward_model is None else folders[reward_model], "max_new_tokens": 2,
            "ref_model_name_or_path": None if reference is None else folders[reference],
            "per_device_generation_batch_size": 2, "resamples": 200, "output_dir": str(tmp_path / output),
        }  # fmt: skip
        folder = evaluate(EvaluateConfig(**small | options))
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return folder, json.loads((folder / "report.json").read_text()), lines

    return run


def test_what_is_measured(run, capsys):
    folder, report, samples = run(reference="start")
    assert [sample["completion"] for sample in samples] == [" cat cat"] * 4
    assert [sample["answer"] for sample in samples] == [" green green", " cat cat cat cat", " cat cat", None]
    assert [sample["tokens"] for sample in samples] == [2] * 4
    assert [sample["answer_tokens"] for sample in samples] == [3, 5, 3, None]  # with the end
    rewards, theirs = ([sample[name] for sample in samples] for name in ("reward", "answer_reward"))
    assert rewards[0] > theirs[0] and rewards[1] < theirs[1] and rewards[2] == theirs[2] and theirs[3] is None

    assert (report["prompts"], report["unfinished"], report["empty"]) == (4, 4, 0)
    assert (report["wins"], report["ties"], report["losses"]) == (1, 1, 1)
    assert report["win_rate"] == wilson_interval(0.5, 3)._asdict()
    assert report["reward"]["value"] == pytest.approx(sum(rewards) / 4) and report["reward"]["count"] == 4
    assert report["answer_reward"]["value"] == pytest.approx(sum(theirs[:3]) / 3)
    gains = [a - b for a, b in zip(rewards[:3], theirs[:3], strict=True)]
    assert report["reward_gain"] == bootstrap_interval(gains, 200, 42)._asdict()
    assert report["length_tokens"]["value"] == 2.0 and report["answer_length_tokens"]["value"] == pytest.approx(11 / 3)
    # The reference says " cat" with 1/2, the model always: log 2 a token, and two tokens.
    assert report["kl_nats"]["value"] == pytest.approx(2 * math.log(2), rel=1e-5)

    out = capsys.readouterr().out
    assert "on 4 prompts of" in out and "95% interval" in out
    assert "win rate against the answers of the data            50.00%" in out
    assert "1 wins, 1 ties (half a win each), 1 losses. 4 answers were cut at max_new_tokens" in out
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", CONFIG_FILE, "samples.jsonl"]


def test_an_empty_answer_has_no_reward_and_loses(run):
    _, report, samples = run(model="silent")
    assert [sample["reward"] for sample in samples] == [None] * 4 and [s["tokens"] for s in samples] == [1] * 4
    assert (report["empty"], report["losses"], report["unfinished"]) == (4, 3, 0)
    assert report["win_rate"] == wilson_interval(0.0, 3)._asdict()
    assert report["reward"] is None and report["reward_gain"] is None and report["kl_nats"] is None
    assert report["answer_reward"]["count"] == 3


def test_without_answers_there_is_no_win_rate(run, capsys):
    _, report, _ = run(rows=[{"prompt": "the"}, {"prompt": "on"}])
    assert report["win_rate"] is None and report["answer_reward"] is None and report["reward"]["count"] == 2
    assert "win rate" not in capsys.readouterr().out
    _, report, _ = run(model="silent", rows=[{"prompt": "the"}], output="nothing")
    assert report["reward"] is None and report["length_tokens"]["value"] == 1.0


def test_reward_functions_without_a_reward_model_and_beside_one(run, capsys):
    rows = [{"prompt": "the", "completion": " 5", "ground_truth": "5"}, {"prompt": "on", "ground_truth": "6"}]
    options = {"rows": rows, "reward_funcs": ["exact_answer", "regex:cat"], "reward_weights": [1.0, 0.5]}
    _, report, samples = run(reward_model=None, **options)
    assert [sample["reward"] for sample in samples] == [0.5, 0.5]
    assert [sample["answer_reward"] for sample in samples] == [1.0, None]
    assert (report["reward_model"], report["reward_funcs"]) == (None, ["exact_answer", "regex:cat"])
    assert (report["wins"], report["losses"]) == (0, 1)
    assert "scored by exact_answer + regex:cat" in capsys.readouterr().out
    alone = run(rows=rows, output="alone")[2]
    both = run(output="both", **options | {"reward_weights": [2.0, 1.0, 0.5]})[2]
    assert [line["reward"] for line in both] == pytest.approx([2 * line["reward"] + 0.5 for line in alone])
    with pytest.raises(UsageError, match="nothing rewards the completions: pass reward_model_name_or_path or reward_f"):
        run(reward_model=None, rows=rows, output="none")
    with pytest.raises(UsageError, match="row 1, prompt 'the': the reward 'exact_answer' needs a column"):
        run(reward_model=None, rows=[{"prompt": "the"}], reward_funcs=["exact_answer"], output="bare")


def test_chat(run):
    prompt, answer = [{"role": "user", "content": "the"}], [{"role": "assistant", "content": "green"}]
    _, report, samples = run(rows=[{"prompt": prompt, "completion": answer}])
    assert samples[0]["completion"] == [{"role": "assistant", "content": " cat cat"}] and report["wins"] == 1


def test_the_same_run_again_is_the_same(run):
    first = run(model="start", reference="cats", output="a", max_new_tokens=5)
    again = run(model="start", reference="cats", output="b", max_new_tokens=5)
    assert first[1:] == again[1:]
    assert run(model="start", output="c", max_new_tokens=5, seed=1)[2] != run(model="start", output="d")[2]


def test_an_interrupted_run_goes_on(run, monkeypatch):
    options = {"model": "start", "reference": "cats", "max_new_tokens": 5}
    whole = run(output="whole", **options)
    original = model_rewards.score_sequences

    def interrupted(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_rewards, "score_sequences", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    monkeypatch.setattr(model_rewards, "score_sequences", original)
    for name in ("rlhf_trainer.rollouts.generation.generate_batch", "rlhf_trainer.models.kl.kl_per_sequence"):
        monkeypatch.setattr(name, None)  # both are in the file of the interrupted run
    assert run(resume_from_checkpoint=True, **options)[1:] == whole[1:]


# --- bad input


def test_an_unusable_answer_is_named_or_left_out(run, capsys):
    rows = [*ROWS, {"prompt": "mat", "completion": "  "}]
    with pytest.raises(UsageError, match=r"1 answers of the data cannot be used:\n  row 5, field 'answer'.* is empty"):
        run(rows=rows)
    _, report, _ = run(rows=rows, skip_invalid_rows=True)
    assert (report["prompts"], report["win_rate"]["count"]) == (5, 3)
    assert "row 5, field 'answer'" in capsys.readouterr().out


def test_a_reward_model_that_cannot_read_chats_shows_before_anything_is_generated(run, folders, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folders["reward"], plain)
    (plain / "chat_template.jinja").unlink()
    prompt = [{"role": "user", "content": "the"}]
    with pytest.raises(UsageError, match=r"train.jsonl, row 1, for the tokenizer of .*plain: .* no chat template"):
        run(rows=[{"prompt": prompt}], reward_model_name_or_path=str(plain))
    assert not partial_folder(tmp_path / "out").exists()


def test_models_that_do_not_fit(run, folders, model_folder, make_model, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"reward_model_name_or_path: .* lacks weights"):
        run(reward_model="start")
    make_model("llama", vocab_size=500).save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match="ref_model_name_or_path: a vocabulary of 500 tokens, the model has 397"):
        run(ref_model_name_or_path=str(tmp_path / "larger"))
    with pytest.raises(UsageError, match=r"row \d: \d+ tokens, but the model has 96 positions"):
        run(max_new_tokens=96)
    with pytest.raises(UsageError, match="model_name_or_path: no such folder"):
        run(model_name_or_path=str(tmp_path / "none"))
    assert not partial_folder(tmp_path / "out").exists()


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="rlhf evaluate works in one process and was launched in 2"):
        run()
