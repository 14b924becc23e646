"""`rlhf judge` with a server that answers as a test scripts it: what is asked, kept, paid once, and handed on."""

import errno
import json
import os
import signal
import threading

import pytest

from rlhf_trainer.cli import main
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.errors import TrainingError, UsageError
from rlhf_trainer.preferences import judge as judging
from rlhf_trainer.preferences.config import JudgeConfig
from rlhf_trainer.preferences.judge import ANSWERS_FILE, JUDGED_FILE, KEY_VARIABLE, judge
from rlhf_trainer.rollouts import http_json
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder
from tests.trainer.messages import assistant, user
from tests.trainer.rollouts.scripted_server import Scripted

ROWS = [
    {"prompt": "2 + 2 =", "chosen": " good 4", "rejected": " 5", "id": 7},
    {"prompt": "2 + 3 =", "chosen": " 4", "rejected": " good 5"},
    {"prompt": user("the cat?"), "chosen": assistant("same one"), "rejected": assistant("same two")},
    {"prompt": "to see", "chosen": " first a", "rejected": " first b"},
    {"prompt": "to me", "chosen": " mute a", "rejected": " mute b"},
]
VERDICTS = [("chosen", False), ("rejected", False), ("tie", False), ("tie", True), ("unparsed", False)]


def reply(content, prompt_tokens=100, completion_tokens=10, **fields):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"} | fields
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}
    return 200, {"choices": [choice], "usage": usage}


def answers_of(body):
    """What the judge reads as A and as B."""
    text = body["messages"][0]["content"]
    a = text.partition("[The Start of Assistant A's Answer]")[2].partition("[The End")[0].strip()
    return a, text.partition("[The Start of Assistant B's Answer]")[2].partition("[The End")[0].strip()


def opinion(path, body):
    """Prefers what is good, finds the same equal, or the first one better, or says nothing."""
    assert path == "/v1/chat/completions"
    a, _ = answers_of(body)
    if a.startswith("mute"):
        return reply("I cannot decide.")
    if a.startswith(("same", "first")):
        return reply("[[C]]" if a.startswith("same") else "[[A]]")
    return reply(f"Not [[C]]. [[{'A' if 'good' in a else 'B'}]]")


@pytest.fixture
def server(monkeypatch, loopback_without_proxy):
    monkeypatch.setattr(http_json.time, "sleep", lambda seconds: None)
    scripted = Scripted()
    scripted.answer = opinion
    return scripted


@pytest.fixture
def run(write_jsonl, tmp_path):
    def run(url, rows=ROWS, output="out", **options):
        data = write_jsonl(rows, "pairs.jsonl")
        small = {"judge_model": "tiny", "judge_retries": 1, "output_dir": str(tmp_path / output), "dataset_name": data}
        return judge(JudgeConfig(**small | {"judge_base_url": f"{url}/v1"} | options))

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_a_pair_with_a_verdict_of_both_orders(server, write_jsonl, tmp_path, capsys):
    data = write_jsonl(ROWS, "pairs.jsonl")
    out = tmp_path / "out"
    with server.running() as url:
        flags = ["--dataset_name", data, "--judge_base_url", f"{url}/v1", "--judge_model", "tiny"]
        assert main(["judge", *flags, "--output_dir", str(out), "--judge_retries", "1"]) == 0
    expected = [
        row | {"verdict": verdict, "flipped": flipped} for row, (verdict, flipped) in zip(ROWS, VERDICTS, strict=True)
    ]
    assert lines_of(out / JUDGED_FILE) == expected
    assert sorted(path.name for path in out.iterdir()) == [ANSWERS_FILE, JUDGED_FILE, "report.json", CONFIG_FILE]
    bodies = [body for _, body in server.requests]
    assert {body["model"] for body in bodies} == {"tiny"}
    first = [body for body in bodies if body["temperature"] == 0]
    again = [body for body in bodies if body["temperature"] == 0.7]
    assert len(first) == 10 and sorted(map(answers_of, again)) == [("mute a", "mute b"), ("mute b", "mute a")]
    assert {answers_of(body) for body in first} >= {("good 4", "5"), ("5", "good 4"), ("same one", "same two")}
    assert json.loads((out / "report.json").read_text()) == {
        "pairs": 5, "verdicts": {"chosen": 1, "rejected": 1, "tie": 2, "unparsed": 1}, "flipped": 1,
        "flip_rate": 0.25, "win_rate": 0.5, "answers": {"A": 4, "B": 2, "C": 2, "unparsed": 2},
        "position_bias": pytest.approx(1 / 3), "requests": 12, "failed_requests": 0, "prompt_tokens": 1200,
        "completion_tokens": 120,
    }  # fmt: skip
    assert "5 pairs: 1 chosen, 1 rejected, 2 tie, 1 unparsed; 1 changed with the order; 1320" in capsys.readouterr().out


def test_what_the_judge_prefers_trains(server, run, tokenizer):
    """Ties and pairs without a verdict are left out by choice."""
    with server.running() as url:
        judged = str(run(url, [ROWS[0] | {"margin": 2.0}, ROWS[1] | {"margin": 2.0}, *ROWS[3:]]) / JUDGED_FILE)
    limits = {"split": "train", "max_prompt_length": 20, "max_length": 40}
    with pytest.raises(
        UsageError, match=r"row 3, field 'verdict': tie: no preference; --skip_invalid_rows leaves such"
    ):
        load_groups(judged, Codec(tokenizer), **limits)
    loaded = load_groups(judged, Codec(tokenizer), skip_invalid_rows=True, **limits)
    pairs = [[tokenizer.decode(group.responses[i][:-1]) for i in group.pairs[0]] for group in loaded.examples]
    assert pairs == [[" good 4", " 5"], [" good 5", " 4"]] and len(loaded.skipped) == 2
    assert [group.margins for group in loaded.examples] == [[2.0], [0.0]]  # of the pair that was turned round: none


def test_transcripts_and_ranked_responses_are_judged_too(server, run, tokenizer):
    hh = {"chosen": "\n\nHuman: hi\n\nAssistant: 5", "rejected": "\n\nHuman: hi\n\nAssistant: good 4"}
    ranked = {"prompt": "the", "responses": ["good a", "b", "c"], "pairs": [[1, 0], [2, 0]], "id": 3}
    with server.running() as url:
        judged = run(url, [hh, ranked]) / JUDGED_FILE
    rows = lines_of(judged)
    assert rows[0] == hh | {"verdict": "rejected", "flipped": False}
    assert rows[1:] == [
        {"prompt": "the", "id": 3, "chosen": text, "rejected": "good a", "verdict": "rejected", "flipped": False}
        for text in "bc"
    ]
    loaded = load_groups(str(judged), Codec(tokenizer), split="train", max_prompt_length=40, max_length=60)
    better = [tokenizer.decode(group.responses[group.pairs[0][0]]) for group in loaded.examples]
    assert better == ["good 4<|im_end|>", "good a<|im_end|>", "good a<|im_end|>"]


def test_a_judge_with_a_position_bias_is_found_out(server, run):
    server.answer = lambda path, body: reply("[[A]]")
    with server.running() as url:
        report = json.loads((run(url, ROWS[:3]) / "report.json").read_text())
    assert (report["flip_rate"], report["position_bias"], report["win_rate"]) == (1.0, 1.0, 0.5)


def test_ratings_and_references(server, run):
    def rate(path, body):
        text = body["messages"][0]["content"]
        return reply("[[9]]" if "good" in text else "[[4]]") if "[Answer]" in text else reply("[[C]]")

    server.answer = rate
    with server.running() as url:
        rated = lines_of(run(url, ROWS[:3], judge_template="single") / JUDGED_FILE)
        with pytest.raises(UsageError, match="row 1, field 'reference': missing, with no 'ground_truth' either"):
            run(url, ROWS[:1], "refused", judge_template="reference")
        run(url, [ROWS[0] | {"ground_truth": "four"}], "reference", judge_template="reference")
    assert [row["verdict"] for row in rated] == ["chosen", "rejected", "tie"]
    assert all("\n\nfour\n\n" in body["messages"][0]["content"] for _, body in server.requests[-2:])


@pytest.mark.parametrize("kept", [1, 4, 11])
def test_a_killed_run_pays_for_no_answer_twice(server, run, tmp_path, kept):
    """Whatever the moment: of the file of answers, the whole lines are kept, and a line that was cut off is not."""
    with server.running() as url:
        whole = run(url, output="whole")
        server.answer = lambda path, body: (401, b"no") if len(server.requests) > 12 else opinion(path, body)
        with pytest.raises(TrainingError):
            run(url, output="broken", judge_max_tokens_total=1)  # the folder of a run that has just begun
        partial = partial_folder(tmp_path / "broken")
        lines = (whole / ANSWERS_FILE).read_bytes().splitlines(keepends=True)
        (partial / ANSWERS_FILE).write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        server.answer = opinion
        server.requests.clear()
        folder = run(url, output="broken", resume_from_checkpoint=True)
    assert len(server.requests) == 12 - kept
    for name in (JUDGED_FILE, "report.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert sorted((folder / ANSWERS_FILE).read_text().splitlines()) == sorted(
        (whole / ANSWERS_FILE).read_text().splitlines()
    )


@pytest.mark.parametrize("answers", [1, 2, 5])
def test_kills_while_the_judge_is_asked_lose_no_answer(server, run, answers):
    """Each time by SIGKILL, in a process of its own, that has got so many answers."""
    running, answered = [], []

    def answer(path, body):
        if len(server.requests) > answers and running:
            os.kill(running.pop(), signal.SIGKILL)
            return b""
        answered.append(json.dumps(body))
        return opinion(path, body)

    server.answer = answer
    with server.running() as url:
        for _ in range(20):
            server.requests.clear()
            child = os.fork()
            if child == 0:
                try:
                    run(url, resume_from_checkpoint=True, judge_concurrency=1)
                    os._exit(0)
                finally:
                    os._exit(1)
            running.append(child)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
        rows = lines_of(run(url, resume_from_checkpoint=True) / JUDGED_FILE)
    assert [(row["verdict"], row["flipped"]) for row in rows] == VERDICTS
    assert len(answered) == len(set(answered)) == 12


def test_an_answer_is_on_the_disk_before_the_next_request(server, run, tmp_path):
    counts = []

    def answer(path, body):
        counts.append(len((partial_folder(tmp_path / "out") / ANSWERS_FILE).read_bytes().splitlines()))
        return opinion(path, body)

    server.answer = answer
    with server.running() as url:
        run(url, judge_concurrency=1)
    assert counts == list(range(12))


def test_equal_pairs_are_asked_about_once(server, run):
    with server.running() as url:
        rows = lines_of(run(url, [ROWS[0], ROWS[0] | {"id": 8}, ROWS[0]]) / JUDGED_FILE)
    assert [row["verdict"] for row in rows] == ["chosen"] * 3 and len(server.requests) == 2


def test_a_budget_stops_the_run_and_a_larger_one_goes_on(server, run):
    with server.running() as url:
        with pytest.raises(
            TrainingError, match=r"judge_max_tokens_total: 330 tokens are spent, of 300; raise it. 3 answ"
        ):
            run(url, judge_concurrency=1, judge_max_tokens_total=300)
        assert len(server.requests) == 3
        folder = run(url, judge_max_tokens_total=1320, resume_from_checkpoint=True)
    assert len(server.requests) == 12
    assert [(row["verdict"], row["flipped"]) for row in lines_of(folder / JUDGED_FILE)] == VERDICTS


def test_a_full_disk_stops_the_run_and_loses_nothing(server, run, monkeypatch, tmp_path):
    flush, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with server.running() as url:
        with pytest.raises(TrainingError, match=r"answers.jsonl cannot be written: .*No space left .* 2 answers"):
            run(url, judge_concurrency=1)
        assert len(lines_of(partial_folder(tmp_path / "out") / ANSWERS_FILE)) == 2
        run(url, resume_from_checkpoint=True)
    assert len(server.requests) == 3 + 10


def test_a_budget_wants_a_server_that_counts(server, run):
    server.answer = lambda path, body: (200, {"choices": opinion(path, body)[1]["choices"]})
    with server.running() as url:
        with pytest.raises(TrainingError, match="the server counts no tokens"):
            run(url, output="budget", judge_max_tokens_total=300)
        assert json.loads((run(url) / "report.json").read_text())["prompt_tokens"] == 0


def test_requests_run_at_the_same_time_up_to_a_limit(server, run):
    barrier = threading.Barrier(5)

    def answer(path, body):
        barrier.wait(60)  # passes where five requests are under way
        return reply("[[C]]")

    server.answer = answer
    with server.running() as url:
        run(url, judge_concurrency=5)
    assert len(server.requests) == 10


BAD = [
    (200, {"error": "busy"}), (200, []), (200, {"choices": [{"message": {"content": 3}}]}), (200, b"<html>"),
    (200, b" " * (10 << 20)), (400, b"too long"), (500, b"crashed"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_what_one_pair_does_not_get_leaves_it_unparsed(server, run, bad, capsys):
    server.answer = lambda path, body: bad if "good" in answers_of(body)[0] else opinion(path, body)
    with server.running() as url:
        rows = lines_of(run(url, ROWS[:3]) / JUDGED_FILE)
    assert [row["verdict"] for row in rows] == ["unparsed", "unparsed", "tie"]
    assert "2 requests failed, and their pairs are unparsed; the first: " in capsys.readouterr().out


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
def test_a_server_that_refuses_everybody_stops_the_run(server, run, status, tmp_path):
    server.answer = lambda path, body: opinion(path, body) if len(server.requests) <= 2 else (status, b"not now")
    with server.running() as url:
        with pytest.raises(
            TrainingError, match=f"HTTP {status}: not now.* 2 answers are kept: --resume_from_checkpoint"
        ):
            run(url, judge_concurrency=1)
        server.answer = opinion
        server.requests.clear()
        folder = run(url, resume_from_checkpoint=True)
    assert len(server.requests) == 10 and len(lines_of(folder / JUDGED_FILE)) == 5


def test_a_server_without_one_good_answer_is_reported(server, run, monkeypatch):
    server.answer = lambda path, body: (400, b"no such field: seed")
    with server.running() as url:
        with pytest.raises(UsageError, match="no request has an answer; the first: HTTP 400: no such field: seed"):
            run(url)
        monkeypatch.setattr(judging, "HOPELESS", 3)
        with pytest.raises(TrainingError, match="0 answers are kept"):
            run(url, output="more", judge_concurrency=1)
    assert len(server.requests) == 10 + 3


def test_an_answer_that_was_cut_off_is_no_verdict(server, run):
    server.answer = lambda path, body: reply("It might be [[A]], but", finish_reason="length")
    with server.running() as url:
        assert [row["verdict"] for row in lines_of(run(url, ROWS[:1]) / JUDGED_FILE)] == ["unparsed"]


def test_the_key_is_sent_and_never_kept(server, run, monkeypatch, capsys):
    """Not even where a server repeats it."""
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret\n")

    def answer(path, body):
        return (400, b"bad key sk-secret") if "good" in answers_of(body)[0] else opinion(path, body)

    server.answer = answer
    with server.running() as url:
        folder = run(url)
    assert set(server.keys) == {"Bearer sk-secret"}
    assert not any(b"sk-secret" in path.read_bytes() for path in folder.iterdir())
    out = capsys.readouterr()
    assert "HTTP 400: bad key (the key)" in out.out and "sk-secret" not in out.out + out.err
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(TrainingError, match="RLHF_JUDGE_KEY must be one line of ASCII"):
        run("http://127.0.0.1:9", output="other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_base_url": "127.0.0.1:8000"}, "judge_base_url must start with http"),
        ({"judge_base_url": "http://me:key@host/v1"}, "without user or key"),
        ({"judge_timeout": 0.0}, "judge_timeout must be a positive number"),
        ({"judge_concurrency": 0}, "judge_concurrency must be at least 1"),
    ],
)
def test_bad_options(run, options, message):
    with pytest.raises(UsageError, match=message):
        run("http://127.0.0.1:9", **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 1, field 'rejected': missing"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "row 1, field 'prompt': expected text or a list of messages"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "row 1, field 'row': cannot be written as JSON"),
        ("{", "row 1, field 'row': not JSON"),
    ],
)
def test_bad_rows_are_named_before_anything_is_asked(run, row, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        run("http://127.0.0.1:9", [row])
    assert not partial_folder(tmp_path / "out").exists()
