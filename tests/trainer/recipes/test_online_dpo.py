"""`rlhf online-dpo`: which pairs a round makes, rewards that rise from round to round, and runs that are killed."""

import copy
import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rlhf_trainer.cli import main
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.data.rows import read_rows
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models import scoring
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.offline.dpo import train_dpo
from rlhf_trainer.preferences.pairs import pair_up
from rlhf_trainer.recipes import online_dpo
from rlhf_trainer.recipes.config import OnlineDPOConfig
from rlhf_trainer.recipes.online_dpo import train_online_dpo
from rlhf_trainer.rollouts import sample as sampling
from rlhf_trainer.training import loop as training
from rlhf_trainer.training.journal import write_jsonl as write_rows
from rlhf_trainer.training.output_folder import partial_folder
from tests.trainer.known_models import dice, save_word_reward_model
from tests.trainer.preferences.test_pairs import NOTHING
from tests.trainer.training.test_resume import at_call, kill, killed

# --- whole runs: the model draws each token from given probabilities, the reward model rewards the share of " cat"

WORDS = {" cat": 0.2, " dogs": 0.5}
END = 1


@pytest.fixture(scope="module")
def save_dice(tokenizer, tmp_path_factory):
    def save(words, end):
        folder = tmp_path_factory.mktemp("dice")
        chances = {tokenizer(word).input_ids[0]: chance for word, chance in words.items()}
        dice(chances | ({END: end} if end else {})).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def writer(save_dice):
    return save_dice(WORDS, 0.3)


@pytest.fixture(scope="module")
def word_reward_model(tokenizer, tmp_path_factory):
    return save_word_reward_model(tmp_path_factory.mktemp("reward_model"), copy.deepcopy(tokenizer), " cat")


@pytest.fixture(scope="module")
def options(writer, word_reward_model, tmp_path_factory):
    """Two rounds on 4 prompts, each of 24 completions in 6 batches and of 4 steps."""
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_rows(prompts, [{"prompt": prompt} for prompt in ("the", "on a", "see me the", "green hills")])
    return {
        "model_name_or_path": writer, "reward_model_name_or_path": word_reward_model, "dataset_name": str(prompts),
        "rounds": 2, "num_completions": 6, "per_device_generation_batch_size": 4, "max_new_tokens": 12,
        "max_prompt_length": 16, "max_length": 40, "optim": "adamw_torch_fused", "learning_rate": 0.03,
        "warmup_steps": 0, "batch_size": 2, "micro_batch_size": 2, "num_train_epochs": 2, "save_steps": 1,
    }  # fmt: skip


def run_in(folder, options):
    """Log-probs of references are kept beside the output."""
    places = {"output_dir": str(folder), "ref_cache_dir": str(folder.parent / "cache")}
    return train_online_dpo(OnlineDPOConfig(**options | places))


@pytest.fixture
def run(options, tmp_path):
    return lambda output="out", **changes: run_in(tmp_path / output, options | changes)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    return run_in(tmp_path_factory.mktemp("uninterrupted") / "whole", options)


def rows_of(path):
    return [row for _, row in read_rows(str(path), split="train")]


def chance_of(folder, word):
    """The probability of a word's token, which is the same everywhere."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the").input_ids])
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, -1]
    return logits.softmax(-1)[tokenizer(word).input_ids[0]].item()


def test_reward_functions_without_a_reward_model(run, options):
    folder = run(rounds=1, reward_model_name_or_path=None, reward_funcs=["regex: cat"], num_completions=8)
    (report,) = json.loads((folder / "report.json").read_text())["rounds"]
    scored = rows_of(folder / "round-1" / "scored" / "scored.jsonl")
    rewards = [(row["reward"], float(" cat" in row["completion"])) for row in scored if row["left_out"] is None]
    assert all(reward == expected for reward, expected in rewards) and len({reward for reward, _ in rewards}) == 2
    assert report["pairs"] > 0
    with pytest.raises(UsageError, match="row 1, prompt 'the': the reward 'exact_answer' needs a column"):
        run("bare", reward_model_name_or_path=None, reward_funcs=["exact_answer"])


def test_rewards_rise_from_round_to_round(run, writer, capsys):
    folder = run(rounds=3, num_completions=16, per_device_generation_batch_size=64, max_new_tokens=20)
    reports = json.loads((folder / "report.json").read_text())["rounds"]
    first, second, third = (report["mean_reward"] for report in reports)
    assert second > first + 0.2 and third > first + 0.3

    # The folder is the last round's model; its files are there once.
    chances = [chance_of(model, " cat") for model in (writer, folder / "round-1" / "model", folder)]
    assert chances[0] == pytest.approx(0.2) and chances[1] > 0.3 and chances[2] > 0.5
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folder / name).samefile(folder / "round-3" / "model" / name)
    assert sorted(path.name for path in folder.glob("*.jsonl")) == []
    for number in (1, 2, 3):
        assert sorted(path.name for path in (folder / f"round-{number}").iterdir()) == [
            "completions", "model", "pairs.jsonl", "scored",
        ]  # fmt: skip

    out = capsys.readouterr().out
    for number, report in enumerate(reports, start=1):
        place = folder / f"round-{number}"
        scored = rows_of(place / "scored" / "scored.jsonl")
        rewards = [row["reward"] for row in scored if row["reward"] is not None]
        pairs, left_out = rows_of(place / "pairs.jsonl"), report["left_out"]
        assert report == {
            "round": number, "mean_reward": pytest.approx(sum(rewards) / len(rewards)), "completions": len(rewards),
            "left_out": left_out, "prompts": 4, "pairs": len(pairs), "prompts_without_pair": NOTHING,
        }  # fmt: skip
        assert sum(left_out.values()) == len(scored) - len(rewards) == 64 - len(rewards)
        assert (
            f"round {number}: mean reward {report['mean_reward']:+.4f} of {len(rewards)} completions (left out: "
            f"{left_out['unfinished']} unfinished, {left_out['empty']} empty, 0 too long); 4 pairs of 4 prompts "
            "(without a pair: 0 equal rewards, 0 fewer than two usable completions)"
        ) in out


def test_each_round_goes_on_with_the_model_of_the_last_and_draws_anew(run):
    folder = run(learning_rate=0.0)
    written = [rows_of(folder / f"round-{number}" / "completions" / "completions.jsonl") for number in (1, 2)]
    assert {row["model"] for row in written[1]} == {str(partial_folder(folder) / "round-1" / "model")}
    assert [row["prompt"] for row in written[0]] == [row["prompt"] for row in written[1]]
    assert [row["completion"] for row in written[0]] != [row["completion"] for row in written[1]]
    assert same_weights(folder, folder / "round-1" / "model")


def test_rounds_go_on_with_one_adapter(run, writer):
    """On the first model; the folder that the last round leaves is an adapter, too."""
    folder = run(use_peft=True, lora_target_modules=["lm_head"], lora_r=2, lora_dropout=0.0, dtype="float32")
    adapters = [load_file(folder / f"round-{number}" / "model" / "adapter_model.safetensors") for number in (1, 2)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0] if "lora_B" in name)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == writer
    first, last = (
        json.loads((folder / f"round-{n}" / "model" / "metrics.jsonl").read_text().splitlines()[0]) for n in (1, 2)
    )
    assert first["loss"] == last["loss"] == pytest.approx(0.6931472)  # the reference is what the round starts from
    assert chance_of(folder, " cat") > chance_of(writer, " cat")


def test_a_round_is_what_its_stages_are(whole, tmp_path):
    """`rlhf dpo` with the configuration that lies in round-2/model makes that model."""
    text = (whole / "round-2" / "model" / "rlhf_config.yaml").read_text().replace("whole.partial", "whole")
    options = yaml.safe_load(text) | {"output_dir": str(tmp_path / "alone"), "resume_from_checkpoint": False}
    assert (
        options["model_name_or_path"] == str(whole / "round-1" / "model") and options["ref_model_name_or_path"] is None
    )
    assert same_weights(train_dpo(DPOConfig(**options)), whole)


def test_the_reference_is_the_round_before_or_the_first_model(run, whole, writer, save_dice):
    first = run("first", reference="first")
    other = save_dice(WORDS, 0.1)
    named = run("named", reference="first", ref_model_name_or_path=other)
    assert same_weights(whole / "round-1" / "model", first / "round-1" / "model")  # one and the same in round 1
    assert not same_weights(whole, first)
    for folder, reference in ((first, writer), (named, other)):
        for number in (1, 2):
            config = (folder / f"round-{number}" / "model" / "rlhf_config.yaml").read_text()
            assert yaml.safe_load(config)["ref_model_name_or_path"] == reference


def test_all_pairs_of_chats(run, write_jsonl, tokenizer):
    chats = [[{"role": "user", "content": text}] for text in ("the", "on a")]
    data = write_jsonl([{"messages": [*chat, {"role": "assistant", "content": "no"}]} for chat in chats])
    lengths = {"max_prompt_length": 32, "max_length": 64}
    folder = run(dataset_name=data, pairing="all", rounds=1, num_completions=12, **lengths)
    pairs = folder / "round-1" / "pairs.jsonl"
    rows = rows_of(pairs)
    assert [row["prompt"] for row in rows] == chats
    assert all(len(row["pairs"]) > len(row["responses"]) > 3 for row in rows)
    (report,) = json.loads((folder / "report.json").read_text())["rounds"]
    loaded = load_groups(str(pairs), Codec(tokenizer), split="train", **lengths)
    assert report["pairs"] == sum(len(row["pairs"]) for row in rows) and loaded.cut == 0
    assert [len(group.pairs) for group in loaded.examples] == [len(row["pairs"]) for row in rows]
    assert [len(group.responses) for group in loaded.examples] == [len(row["responses"]) for row in rows]


def test_a_file_system_without_hard_links_gets_a_copy(run, monkeypatch):
    monkeypatch.setattr(online_dpo.Path, "hardlink_to", lambda self, target: os.link(target, "/no/such/folder/file"))
    folder = run(rounds=1)
    assert not (folder / "model.safetensors").samefile(folder / "round-1" / "model" / "model.safetensors")
    assert same_weights(folder, folder / "round-1" / "model")


def test_from_the_command_line(options, tmp_path, capsys):
    config = {**options, "output_dir": str(tmp_path / "out"), "ref_cache_dir": str(tmp_path), "rounds": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["online-dpo", "--config", str(tmp_path / "run.yaml"), "--pairing", "all"]) == 0
    assert yaml.safe_load((tmp_path / "out" / "rlhf_config.yaml").read_text())["pairing"] == "all"
    assert main(["online-dpo", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err


# --- killed and resumed


def same_weights(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a, b):
    a_files, b_files = (sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (a, b))
    assert a_files == b_files
    for file in ("report.json", "round-1/pairs.jsonl", "round-2/pairs.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert all(same_weights(a / model, b / model) for model in ("round-1/model", "round-2/model", ""))


def half_a_file(original):
    def dying(path, rows):
        original(path, rows)
        path.write_text(path.read_text()[:40])
        kill()

    return dying


# In the order of a run. The reward model's head is tried three times before the first batch is scored: when the run
# begins, when the model is loaded again, and when scoring begins.
KILLS = {
    "sampling": (sampling, "generate_batch", at_call(3)),
    "scoring": (scoring, "last_values", at_call(3 + 2)),
    "half the pairs": (online_dpo, "write_jsonl", half_a_file),
    "training": (training, "learning_rate_at", at_call(3)),
    "a model not moved": (training, "commit_output", at_call(1)),
    "a round done": (online_dpo, "train_dpo", at_call(1, after=True)),
    "sampling again": (sampling, "generate_batch", at_call(6 + 3)),
    "training again": (training, "learning_rate_at", at_call(4 + 3)),
    "half the links": (online_dpo, "link_file", at_call(3)),
    "a run not moved": (online_dpo, "commit_output", at_call(1)),
}


@pytest.mark.parametrize("point", KILLS.values(), ids=KILLS)
def test_a_killed_run_goes_on(point, run, whole, tmp_path):
    killed(lambda: run("broken"), point)
    assert not (tmp_path / "broken").exists()
    assert_same(run("broken", resume_from_checkpoint=True), whole)
    assert not partial_folder(tmp_path / "broken").exists()


def test_a_run_may_be_killed_again_and_again(run, whole):
    for point in (
        (sampling, "generate_batch", at_call(4)),
        (sampling, "generate_batch", at_call(2)),
        (training, "learning_rate_at", at_call(3)),
        (training, "learning_rate_at", at_call(2)),
        (online_dpo, "rejection", at_call(2)),
        (online_dpo, "link_file", at_call(2)),
    ):
        killed(lambda: run("broken", resume_from_checkpoint=True), point)
    assert_same(run("broken", resume_from_checkpoint=True), whole)


def test_what_is_done_is_not_done_again(run, monkeypatch, capsys):
    killed(lambda: run("broken"), (sampling, "generate_batch", at_call(6 + 3)))
    calls = []

    def counted(name, original):
        return lambda *args, **options: (calls.append(name), original(*args, **options))[1]

    for module, name in ((sampling, "generate_batch"), (training, "learning_rate_at")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    folder = run("broken", resume_from_checkpoint=True)
    assert calls == ["generate_batch"] * 4 + ["learning_rate_at"] * 4
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run("broken", resume_from_checkpoint=True) == folder
    assert "already finished" in capsys.readouterr().out.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_resume_takes_the_run_it_was(run):
    killed(lambda: run(), (training, "learning_rate_at", at_call(3)))
    with pytest.raises(UsageError, match=r"is of another run, .*num_completions: 6 then, 5 now"):
        run(num_completions=5, resume_from_checkpoint=True)
    run(resume_from_checkpoint=True, save_steps=3)


# --- what cannot be


@pytest.mark.parametrize(
    ("words", "end", "message"),
    [
        ({" dogs": 0.5}, 0.5, r"round 1: no prompt gives a pair, .* \(prompts: 4 equal rewards, 0 fewer than two"),
        ({" cat": 0.5, " dogs": 0.5}, 0, r"\(completions: 24 unfinished, 0 empty, 0 too long\)\. Raise num_"),
        ({}, 1.0, r"\(completions: 0 unfinished, 24 empty, 0 too long\)\. Raise num_completions or temperature"),
    ],
)  # fmt: skip
def test_a_round_without_pairs_stops_and_says_why(words, end, message, run, save_dice):
    with pytest.raises(UsageError, match=message) as stopped:
        run(model_name_or_path=save_dice(words, end))
    assert "the rounds before" not in str(stopped.value)


def test_a_later_round_without_pairs_names_the_model_so_far(run, monkeypatch, tmp_path):
    first = iter([pair_up])
    none = ([], {"equal rewards": 3, "fewer than two usable completions": 1})
    monkeypatch.setattr(online_dpo, "pair_up", lambda *args: next(first, lambda *_: none)(*args))
    model = partial_folder(tmp_path / "out") / "round-1" / "model"
    with pytest.raises(UsageError, match=rf"round 2: .*3 equal rewards, 1 fewer than .* made is in {model}: a new run"):
        run()
    assert chance_of(model, " cat") > 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"num_completions": 1}, "num_completions must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"max_length": 16}, "max_length must leave room for a response"),
        ({"tokenizer_name_or_path": "t"}, "tokenizer_name_or_path: a model writes with its own tokenizer"),
        ({"ref_model_name_or_path": "m"}, "ref_model_name_or_path: with reference: previous"),
        ({"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing"),
        ({"model_name_or_path": "/no/such"}, "model_name_or_path: no such folder: /no/such"),
        ({"reference": "first", "ref_model_name_or_path": "/no/such"}, "ref_model_name_or_path: no such folder"),
        ({"reward_model_name_or_path": "/no/such"}, "reward_model_name_or_path: no such folder: /no/such"),
        ({"max_new_tokens": 95}, r"prompts.jsonl, row \d: .* but the model has 96 positions"),
        ({"dataset_name": "/no/such.jsonl"}, "/no/such.jsonl: no such file"),
        ({"eval_dataset": "/no/such.jsonl"}, "/no/such.jsonl: no such file"),
        ({"report_to": ["nobody"]}, "report_to: unknown tracker 'nobody'"),
    ],
)
def test_bad_input_is_refused_at_once(wrong, message, run, tmp_path):
    with pytest.raises(UsageError, match=message):
        run(**wrong)
    assert not partial_folder(tmp_path / "out").exists()


def test_models_that_cannot_serve_are_refused_at_once(run, writer, model_folder, make_model, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"reward_model_name_or_path: .* lacks weights, which would start at random"):
        run(reward_model_name_or_path=writer)
    with pytest.raises(UsageError, match="share_prefix: the attention of model_name_or_path"):
        run(model_name_or_path=model_folder("gemma2"), share_prefix=True)
    make_model("llama", vocab_size=400).save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    with pytest.raises(UsageError, match="ref_model_name_or_path: a vocabulary of 400 tokens, the model has 397"):
        run(reference="first", ref_model_name_or_path=str(tmp_path / "large"))
    assert not partial_folder(tmp_path / "out").exists()


def test_a_reward_model_too_short_is_refused_at_once_unless_max_length_spares_it(run, save_dice, tmp_path):
    writer = save_dice(WORDS, 0.3)
    config = LlamaConfig.from_pretrained(writer)
    config.max_position_embeddings = 200
    config.save_pretrained(writer)
    long = {"model_name_or_path": writer, "max_new_tokens": 150, "rounds": 1}
    with pytest.raises(UsageError, match=r"prompts.jsonl, row 3: 1\d\d tokens, .* set max_length to at most 96"):
        run(**long, max_length=180)
    assert not partial_folder(tmp_path / "out").exists()
    run(**long, max_length=96)


def test_odd_line_breaks_in_completions_are_text(run, monkeypatch):
    original = sampling.completion_text
    monkeypatch.setattr(sampling, "completion_text", lambda *args: original(*args) + "\u2028\x85")
    folder = run(rounds=1)
    pairs = rows_of(folder / "round-1" / "pairs.jsonl")
    assert all(text.endswith("\u2028\x85") for row in pairs for text in row["responses"])


def test_held_out_pairs_are_evaluated_in_every_round(run, rows, write_jsonl):
    folder = run(eval_dataset=write_jsonl(rows(3), "held_out.jsonl"))
    for number in (1, 2):
        metrics = rows_of(folder / f"round-{number}" / "model" / "metrics.jsonl")
        assert [record["step"] for record in metrics if "eval/loss" in record] == [0, 4]


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="rlhf online-dpo works in one process and was launched in 2"):
        run()
