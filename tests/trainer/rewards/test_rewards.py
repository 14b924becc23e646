"""Rewards of completions: the functions of a configuration, their arguments, and errors about bad ones."""

import copy
import math
import sys

import pytest
import torch
import transformers

from rlhf_trainer.data.encoding import Codec, encode_rendering
from rlhf_trainer.data.examples import Prompt, load_prompts
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.scoring import load_reward_model, score_sequences
from rlhf_trainer.online.metrics import reward_metrics
from rlhf_trainer.rewards.config import RewardsConfig
from rlhf_trainer.rewards.loading import load_rewards
from rlhf_trainer.rewards.rewards import Scores
from tests.trainer.known_models import save_word_reward_model

CPU = torch.device("cpu")
FUNCTIONS = """
import math
import sys
import numpy
import torch

calls = []

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def everything(prompts, completions, **columns):
    calls.append((prompts, completions, columns))
    return [0.0] * len(prompts)

def matches(completions, target):
    return [float(text == wanted) for text, wanted in zip(completions, target)]

def with_default(completions, bonus=None):
    return [0.0 if bonus is None else each for each in bonus] if bonus else [0.25] * len(completions)

def tensor(prompts, completions): return torch.arange(len(prompts))
def array(prompts, completions): return numpy.arange(len(prompts), dtype=numpy.float32)
def scalars(prompts, completions): return [torch.tensor(0.5) for _ in prompts]
def bools(prompts, completions): return [True for _ in prompts]

def raises(prompts, completions):
    if "bad" in prompts:
        raise KeyError("no such key")
    return [0.0] * len(prompts)

def leaves(prompts, completions):
    if "bad" in prompts:
        sys.exit("enough")
    return [0.0] * len(prompts)

def digits(prompts, completions): return [0.0, 10**400, 0.0]

def raises_on_many(prompts, completions):
    if len(prompts) > 1:
        raise RuntimeError("too many")
    return [0.0]

def one_bad(value):
    return lambda prompts, completions: [value if prompt == "bad" else 1.0 for prompt in prompts]

nan, inf, none, text, nested, huge = map(one_bad, [math.nan, -math.inf, None, "1", [1.0], 1e39])
def short(prompts, completions): return [1.0]
def nothing(prompts, completions): pass
def scalar(prompts, completions): return 1.0
def matrix(prompts, completions): return torch.zeros(len(prompts), 2)
def coroutine(prompts, completions): return iter([1.0] * len(prompts))
constant = 3
def by_position(prompts, completions, /): return []
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module in the working directory, where a user's would be."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_rewards", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    sys.modules.pop("my_rewards", None)


def load(*reward_funcs, reward_model=None, weights=(), **options):
    config = RewardsConfig(
        output_dir="out", reward_model_name_or_path=reward_model, reward_funcs=list(reward_funcs),
        reward_weights=list(weights),
    )  # fmt: skip
    return load_rewards(config, CPU, **options)


def prompt(text, row=1, **columns):
    return Prompt(row, text, [5], None, columns)


THREE = [prompt("a", 1), prompt("bad", 2), prompt("c", 7)]
TEXTS = ["x", "xx", "xxx"]


# --- sums


def test_parts_and_their_weighted_sum(functions):
    rewards = load("my_rewards:length", "regex:xx", "my_rewards:bools", weights=[0.5, 2.0, -1.0])
    assert rewards.names == ("length", "regex", "bools") and rewards.weights == [0.5, 2.0, -1.0]
    total, parts = rewards(THREE, TEXTS)
    assert parts.tolist() == [[1, 0, 1], [2, 1, 1], [3, 1, 1]]
    assert total.tolist() == [0.5 - 1, 1 + 2 - 1, 1.5 + 2 - 1]
    assert total.dtype == parts.dtype == torch.float32


def test_weights_are_one_each_by_default_and_repeated_names_are_numbered(functions):
    rewards = load("regex:a", "my_rewards:length", "regex:x", "regex:xx")
    assert rewards.names == ("regex", "length", "regex-2", "regex-3")
    assert rewards(THREE, TEXTS).total.tolist() == [2, 4, 5]


def test_a_function_may_abstain(functions):
    rewards = load("my_rewards:none", "regex:xx", weights=[2.0, 1.0])
    total, parts = rewards(THREE, TEXTS)
    assert total.tolist() == [2.0, 1.0, 3.0] and parts[:, 1].tolist() == [0, 1, 1]
    assert parts[:, 0].isnan().tolist() == [False, True, False]
    metrics = reward_metrics(Scores(total, parts), rewards.names)
    assert metrics["rewards/none/mean"] == 1.0 and metrics["rewards/none/std"] == 0.0 and metrics["reward"] == 2.0
    assert "rewards/none/mean" not in reward_metrics(Scores(total[1:2], parts[1:2]), rewards.names)


def test_thoughts_that_the_prompt_opens_are_open(functions):
    """Of templates whose generation prompt ends with <think>, completions have </think> only."""
    thinking = Prompt(1, "2+2?", [5], None, {"answer": "4"}, "<think>\n")
    texts = ["two and two</think><answer>4</answer>", "perhaps the answer is 4, but let me", "<think>4</think>4"]
    rewards = load("format:think_answer", "exact_answer", "my_rewards:everything")
    assert rewards([thinking] * 3, texts).parts[:, :2].tolist() == [[1, 1], [0, 0], [0, 1]]
    ((_, completions, _),) = sys.modules["my_rewards"].calls
    assert completions == ["<think>\n" + texts[0], "<think>\n" + texts[1], texts[2]]
    assert rewards([thinking._replace(text="")] * 2, texts[:2]).parts[:, :2].tolist() == [[0, 1], [0, 1]]


def test_no_prompts_give_no_rewards(functions):
    total, parts = load("my_rewards:length", "regex:a")([], [])
    assert total.shape == (0,) and parts.shape == (0, 2)


def test_a_text_is_needed_for_each_prompt(functions):
    with pytest.raises(ValueError, match="expected a text for each prompt, got 2 for 3"):
        load("regex:a")(THREE, TEXTS[:2])


# --- functions of the user's: TRL's signature


def test_a_function_is_called_once_with_all_prompts_completions_and_columns(functions):
    user = [{"role": "user", "content": "b"}]
    prompts = [prompt("a", target="x", level=1), prompt(user, target="y")]
    load("my_rewards:everything")(prompts, ["one", "two"])
    (call,) = sys.modules["my_rewards"].calls
    conversation = [{"role": "assistant", "content": "two"}]
    assert call == (["a", user], ["one", conversation], {"target": ["x", "y"], "level": [1, None]})


def test_a_function_gets_the_columns_that_its_parameters_ask_for(functions):
    prompts = [prompt("a", target="x", other=1), prompt("b", target="y", other=2)]
    assert load("my_rewards:matches")(prompts, ["x", "x"]).total.tolist() == [1, 0]
    assert load("my_rewards:with_default")(prompts, ["x", "x"]).total.tolist() == [0.25, 0.25]
    some = [prompt("a", bonus=0.5), prompt("b", bonus=2.0)]
    assert load("my_rewards:with_default")(some, ["x", "x"]).total.tolist() == [0.5, 2.0]


def test_a_column_that_no_row_of_a_batch_has_is_a_list_of_none_but_one_that_no_row_has_stops(functions):
    rewards = load("my_rewards:matches")
    rewards.check([prompt("a", target="x"), prompt("b", other=1)])
    assert rewards([prompt("b", other=1)], ["x"]).total.tolist() == [0]
    with pytest.raises(
        UsageError, match=r"p\.jsonl: .*'my_rewards:matches' asks for a column 'target'.*they have: other"
    ):
        rewards.check([prompt("b", other=1)], "p.jsonl")


@pytest.mark.parametrize(
    ("name", "values"), [("tensor", [0, 1, 2]), ("array", [0, 1, 2]), ("scalars", [0.5] * 3), ("bools", [1] * 3)]
)
def test_what_else_counts_as_numbers(functions, name, values):
    assert load(f"my_rewards:{name}")(THREE, TEXTS).total.tolist() == values


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"'my_rewards:raises' raised KeyError: 'no such key' \(for row 2, prompt 'bad'; .*my_rewards.py:\d+, in",
        ),
        (
            "raises_on_many",
            r"raised RuntimeError: too many \(for all prompts together; .*my_rewards.py:\d+, in raises_on_many\)",
        ),
        ("leaves", r"'my_rewards:leaves' raised SystemExit: enough \(for row 2, prompt 'bad'"),
        ("digits", r"gave int 1000.*, expected a finite number \(for row 2"),
        ("nan", r"'my_rewards:nan' gave float nan, expected a finite number \(for row 2, prompt 'bad'\)"),
        ("inf", r"gave float -inf, expected a finite number \(for row 2"),
        ("huge", r"gave float 1e\+39, expected a finite number \(for row 2"),  # fp32 holds no such number
        ("none", r"no reward function has a value for a completion of row 2, prompt 'bad': each gave None \(none\)"),
        ("text", r"gave text, expected a finite number \(for row 2"),
        ("nested", r"gave a list, expected a finite number \(for row 2"),
        ("short", r"'my_rewards:short' gave 1 values for 3 completions \(of prompts from row 1.* to row 7, prompt 'c'"),
        ("nothing", r"'my_rewards:nothing' gave nothing, expected a list of 3 numbers.*row 1, prompt 'a'"),
        ("scalar", r"gave float 1.0, expected a list of 3 numbers"),
        ("matrix", r"gave a list, expected a finite number \(for row 1"),
        ("coroutine", r"gave list_iterator .*, expected a list of 3 numbers"),
    ],
)
def test_a_bad_function_and_the_prompt_are_named(functions, name, message):
    with pytest.raises(UsageError, match=message):
        load(f"my_rewards:{name}")(THREE, TEXTS)


def test_a_long_prompt_is_shortened_and_a_chat_shows_its_last_message(functions):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "bad " * 99}]
    with pytest.raises(UsageError, match=r"row 3, prompt '(bad ){14}b\.\.\.'"):
        load("my_rewards:scalar")([prompt(chat, 3)], ["x"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "exact_anwser",
            r"'exact_anwser' is unknown; known are exact_answer, .*regex:PATTERN, .*module:function",
        ),
        ("my_rewards.py:f", "a module is named without .py: my_rewards:f"),
        ("no_module_here:f", r"cannot import 'no_module_here', from .*ModuleNotFoundError"),
        ("leaving_rewards:f", r"cannot import 'leaving_rewards', .*SystemExit: 3"),
        ("broken_rewards:f", r"cannot import 'broken_rewards', .*No module named 'nothing_of_this_name'"),
        ("my_rewards:f", r"'my_rewards' \(.*my_rewards.py\) has no 'f'"),
        ("my_rewards:constant", "expected a function, got int 3"),
        ("my_rewards:by_position", "must take 'prompts' by name"),
        ("regex:(", "'regex:\\(': not a pattern: missing"),
        ("regex:" + "(" * 5000, "not a pattern: maximum recursion"),
        ("regex:", "expected regex:PATTERN"),
        ("format:poem", "'format:poem' is unknown; known are .*, format:think_answer, "),
        ("exact_answer:3", "'exact_answer:3' is unknown; known are exact_answer, "),
        ("unit_tests:some", "'unit_tests:some' is unknown; known are .*, unit_tests, unit_tests:all, "),
        ("classifier:folder", "expected classifier:NAME:LABEL"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_any_model_is_loaded(functions, monkeypatch, spec, message):
    monkeypatch.setattr("rlhf_trainer.rewards.loading.ModelReward", pytest.fail)
    with pytest.raises(UsageError, match=f"reward_funcs: .*{message}"):
        load("model:somewhere", spec)


# --- verifiable rewards and their columns


def test_columns_of_rows_reach_the_rewards(tokenizer, write_jsonl):
    rows = [
        {"prompt": "two and two", "ground_truth": "4", "expression": "2+2"},
        {"messages": [{"role": "user", "content": "q"}], "ground_truth": "5", "expression": "9/3", "dataset": "x"},
    ]
    prompts = load_prompts(write_jsonl(rows), Codec(tokenizer), split="train", max_prompt_length=64).examples
    assert [p.columns for p in prompts] == [
        {"ground_truth": "4", "expression": "2+2"}, {"ground_truth": "5", "expression": "9/3", "dataset": "x"}
    ]  # fmt: skip
    rewards = load("exact_answer", "arithmetic", weights=[1, 10])
    rewards.check(prompts)
    assert rewards(prompts, ["The answer is 4.", "<answer>3</answer>"]).total.tolist() == [11, 10]


def test_answers_of_rows_are_columns_under_their_own_names(tokenizer, write_jsonl):
    rows = [{"prompt": "q", "answer": "4", "completion": " four"}, {"prompt": "q", "chosen": " a", "rejected": " b"}]
    first, second = load_prompts(write_jsonl(rows), Codec(tokenizer), split="train", max_prompt_length=64).examples
    assert first.columns == {"answer": "4", "completion": " four"} and first.answer == " four"
    assert second.columns == {"chosen": " a", "rejected": " b"} and second.answer == " a"


def test_a_prompt_without_columns_shares_nothing_that_could_be_written_to():
    with pytest.raises(TypeError):
        Prompt(1, "a", [5], None).columns["x"] = 1


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        ("exact_answer", {"target": "4"},
         r"needs a column 'ground_truth' or 'answer' or 'solution', the right answer; the row has: target"),
        ("exact_answer", {}, "the row has: the prompt only"),
        ("exact_answer", {"answer": None}, "needs a column"),
        ("exact_answer", {"answer": " "}, "cannot use column 'answer': the expected answer is empty"),
        ("exact_answer", {"answer": {}}, "cannot use column 'answer': expected text or a number"),
        ("json_schema", {"schema": "{"}, "cannot use column 'schema': Expecting property name"),
        ("json_schema", {"schema": {"type": "text"}}, "cannot use column 'schema': not a JSON schema: 'text'"),
        ("arithmetic", {"expression": "__import__('os')"}, "cannot use column 'expression': not arithmetic"),
        ("unit_tests", {"tests": []}, "cannot use column 'tests': expected a list of tests"),
        ("unit_tests", {"tests": ["assert f(1) = 2"]}, "cannot use column 'tests': not Python: 'assert"),
    ],
)  # fmt: skip
def test_a_row_that_a_reward_cannot_use_is_named_before_training(reward, columns, message):
    good = {"answer": "4", "schema": {}, "expression": "1", "tests": "pass"}
    with pytest.raises(UsageError, match=rf"p\.jsonl, row 9, prompt 'q': the reward '{reward}' .*{message}"):
        load(reward).check([prompt("q", 8, **good), prompt("q", 9, **columns)], "p.jsonl")


def test_unit_tests_of_several_completions_run_at_once_and_keep_their_places(capfd):
    prompts = [prompt("double", i, tests=[f"assert f({i}) == {2 * i}", f"assert f({i}) > {i}"]) for i in range(1, 7)]
    texts = [f"```python\ndef f(x): return x + {i}\n```" for i in (0, 1, 2, 3, 4, -9)]
    rewards = load("unit_tests", "unit_tests:all")
    assert "unit_tests: completions run with" in capfd.readouterr().out.lower()
    rewards.check(prompts)
    parts = rewards(prompts, texts).parts
    assert parts[:, 0].tolist() == [0.0, 0.5, 0.5, 0.5, 0.5, 0.0]
    one = [prompt("double", 1, tests="assert f(1) == 2")] * 2
    assert rewards(one, ["def f(x): return 2 * x", "def f(x): return x"]).parts.tolist() == [[1, 1], [0, 0]]


# --- models


@pytest.fixture(scope="module")
def word_reward_model(tokenizer, tmp_path_factory):
    return save_word_reward_model(tmp_path_factory.mktemp("reward_model"), copy.deepcopy(tokenizer), " cat")


def test_a_reward_model_reads_prompt_and_completion_as_its_tokenizer_writes_them(
    word_reward_model, tokenizer, functions
):
    rewards = load(
        "my_rewards:length", f"model:{word_reward_model}", reward_model=word_reward_model, weights=[3, 0, 0.5]
    )
    assert rewards.names == ("reward_model", "length", "reward_model-2")
    chat = [{"role": "user", "content": "the"}]
    prompts, texts = [prompt("the"), prompt("the cat"), prompt(chat)], [" cat", " dogs cat", "a cat"]
    rewards.check(prompts, "p", max_completion_length=4)
    sequences = [
        encode_rendering(
            Codec(tokenizer), p.prompt, t if p.prompt != chat else [{"role": "assistant", "content": t}], "completion"
        )
        for p, t in zip(prompts, texts, strict=True)
    ]
    expected = score_sequences(load_reward_model(word_reward_model, key="k"), sequences, 4, 1, CPU)
    total, parts = rewards(prompts, texts)
    assert expected[1] > expected[0] > 0
    torch.testing.assert_close(parts[:, 0], expected)
    assert torch.equal(parts[:, 0], parts[:, 2])
    torch.testing.assert_close(total, 3.5 * expected)  # the reward_model comes first, with the first weight


def test_an_empty_completion_is_rewarded_as_the_prompt_with_its_end(word_reward_model, tokenizer):
    reward = load(reward_model=word_reward_model)([prompt("the cat cat")], [" \n"]).total
    ids = [*tokenizer("the cat cat").input_ids, tokenizer.eos_token_id]
    torch.testing.assert_close(reward, score_sequences(load_reward_model(word_reward_model, key="k"), [ids], 1, 1, CPU))
    assert reward > 0


def test_what_is_too_long_for_a_reward_model_is_named(word_reward_model):
    rewards = load(reward_model=word_reward_model)
    with pytest.raises(
        UsageError, match=r"p.jsonl, row 1: 99 tokens, but the model has 96 positions; the reward model"
    ):
        rewards.check([prompt("the cat")], "p.jsonl", max_completion_length=96)
    with pytest.raises(UsageError, match=r"row 1: prompt and completion are 102 tokens .* which has 96 positions"):
        rewards([prompt("the")], [" cat" * 100])


def test_a_folder_that_is_not_there():
    with pytest.raises(UsageError, match="reward_model_name_or_path: no such folder"):
        load(reward_model="./none")
    with pytest.raises(UsageError, match="reward_funcs: no such folder"):
        load("model:./none")


TINY = {
    "vocab_size": 397, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "pad_token_id": 1, "initializer_range": 0.5, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def save_classifier(tokenizer, tmp_path_factory):
    def save(config, **changes):
        folder = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(0)
        labels = {0: "negative", 1: "neutral", 2: "positive"}
        config = getattr(transformers, config)(**TINY | {"id2label": labels} | changes)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig"])
def test_a_classifier_rewards_by_log_odds_of_a_label(save_classifier, tokenizer, config):
    folder = save_classifier(config)
    texts = [" ran", " sat on a mat", "", " ran far over the hills"]
    prompts = [prompt("the cat"), prompt("dogs"), prompt("fish"), prompt("the cat")]
    rewards = load(f"classifier:{folder}:positive", batch_size=3)(prompts, texts).total
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for p, text, reward in zip(prompts, texts, rewards.tolist(), strict=True):
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([tokenizer(p.prompt + text).input_ids])).logits.softmax(-1)[0]
        assert reward == pytest.approx(math.log(chances[2] / (1 - chances[2])), abs=1e-4)
    assert rewards.std() > 0.05


def test_a_classifier_that_cannot_be_used(save_classifier):
    folder = save_classifier("RobertaConfig")
    with pytest.raises(UsageError, match="has no label 'good'; it has negative, neutral, positive"):
        load(f"classifier:{folder}:good")
    # RoBERTa counts positions from behind the padding token's, so of 32 it uses 30.
    rewards = load(f"classifier:{folder}:positive")
    assert rewards([prompt("the")], [" cat" * 29]).total.isfinite().all()
    with pytest.raises(UsageError, match=r"row 1: .* 31 tokens to the model .* which has 30 positions"):
        rewards([prompt("the")], [" cat" * 30])
    with pytest.raises(UsageError, match=r"row 1: .* 31 tokens"):
        rewards.check([prompt("the")], "p", max_completion_length=30)
    one = save_classifier("BertConfig", id2label={0: "LABEL_0"})
    with pytest.raises(UsageError, match="has one output, so it is a reward model: name it as model:"):
        load(f"classifier:{one}:LABEL_0")
