"""`rlhf judge`: a model behind an OpenAI-compatible server compares the two responses of each pair.

Each pair is judged in both orders, and a verdict that changes with the order is a tie (Zheng et al., 2023, "Judging
LLM-as-a-Judge"). Every answer is in answers.jsonl as soon as it comes, under a checksum of its request: a run that goes
on, and a pair that occurs twice, pay for no request again.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.chat import plain_messages
from ..data.columns import comparisons, expect, need, need_any
from ..data.formats import VERDICTS, plain_row
from ..data.rows import read_checked
from ..errors import RowError, TrainingError, UsageError
from ..rollouts.http_json import EXCERPT, RequestError, Server
from ..training.files import checksum
from ..training.journal import whole_lines, write_jsonl
from ..training.output_folder import begin, commit_output, open_output
from ..training.processes import single_process
from .config import JudgeConfig
from .verdicts import Template, load_template, parse_verdict

JUDGED_FILE, ANSWERS_FILE = "judged.jsonl", "answers.jsonl"
KEY_VARIABLE = "RLHF_JUDGE_KEY"
REQUEST_RETRIES = 5  # of one that fails, not of one without a verdict
OF_ONE_PAIR = (200, 400, 408, 413, 422, 500)  # failures that may be one request's; any other stops the run,
HOPELESS = 20  # and so do as many of them in a row
WARMTH = 0.7  # of an answer that is asked for again: at 0 it would be the same
TOKENS = ("prompt_tokens", "completion_tokens")
Pair = tuple[dict[str, Any], tuple[str, str]]  # the input's columns, and what the judge is asked


def judge(config: JudgeConfig) -> Path:
    """Writes judged.jsonl, answers.jsonl and report.json into output_dir, which it returns."""
    single_process("rlhf judge")
    if not begin(config):
        return Path(config.output_dir)
    template = load_template(config.judge_template)
    expected = "rows with prompt, chosen and rejected"
    rows = read_checked(config.dataset_name, lambda _, row: pairs_of(row, config, template), "pairs", expected)
    pairs = [pair for of_row in rows for pair in of_row]
    work = open_output(config)
    asked = AskedJudge(config, template, work / ANSWERS_FILE)
    verdicts = asked.about(list(dict.fromkeys(question for _, both in pairs for question in both)))
    answers = [(verdicts[first], verdicts[second]) for _, (first, second) in pairs]
    settled = [template.settle(*two) for two in answers]
    report = report_of(answers, settled, template) | {
        "requests": len(asked.known), "failed_requests": len(asked.failures), **asked.tokens,
    }  # fmt: skip
    judged = zip(pairs, settled, strict=True)
    write_jsonl(work / JUDGED_FILE, [columns | {"verdict": v, "flipped": f} for (columns, _), (v, f) in judged])
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    folder = commit_output(config)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report["verdicts"].items())
    print(
        f"{len(pairs)} pairs: {counts}; {report['flipped']} changed with the order; {asked.tokens.total()} tokens\n"
        f"saved to {folder / JUDGED_FILE}, which rlhf dpo and rlhf reward take as --dataset_name"
    )
    if asked.failures:
        print(f"{len(asked.failures)} requests failed, and their pairs are unparsed; the first: {asked.failures[0]}")
    return folder


def pairs_of(row: dict[str, Any], config: JudgeConfig, template: Template) -> list[Pair]:
    """The pairs of a row: one, or those among its responses. An earlier judge's verdict is left out."""
    row = {column: value for column, value in row.items() if column not in ("verdict", "flipped")}
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # of dates and images; of halves of characters
        raise RowError("row", f"cannot be written as JSON: {error}") from error
    plain = plain_row(row, config.dataset_format)
    question, reference = text_of(need(plain, "prompt"), "prompt"), ""
    if "reference" in template.places:
        field = need_any(plain, ("reference", "ground_truth"))
        reference = text_of(plain[field], field)
    others = {key: value for key, value in row.items() if key not in ("responses", "pairs", "scores")}
    return [
        (
            others | {"chosen": chosen, "rejected": rejected} if "responses" in plain else row,
            template.questions(question, reference, text_of(chosen, better), text_of(rejected, worse)),
        )
        for (better, chosen), (worse, rejected), _ in comparisons(plain)
    ]


def text_of(value: Any, field: str) -> str:
    """Text as it is; of one message its content; of several, who says what."""
    if isinstance(value, str):
        return value
    messages = plain_messages(expect(field, value, list, "text or a list of messages"), field)
    texts = [message["content"] or json.dumps(message.get("tool_calls", "")) for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


class AskedJudge:
    """A judge and its answers so far, which are in the file `path`, a line each, from the moment that they come."""

    def __init__(self, config: JudgeConfig, template: Template, path: Path) -> None:
        base, self.config, self.template = config.judge_base_url.rstrip("/"), config, template
        self.server = Server(base, config.judge_timeout, REQUEST_RETRIES, key_variable=KEY_VARIABLE)
        self.url_path = "/v1/chat/completions" if base.endswith("/v1") else "/chat/completions"
        path.touch()
        lines = whole_lines(path)
        os.truncate(path, sum(map(len, lines)))  # a line that was cut off goes
        self.path, self.lock = path, threading.Lock()
        self.known = {answer["key"]: answer for answer in map(json.loads, lines)}
        self.tokens = Counter({name: sum(answer[name] for answer in self.known.values()) for name in TOKENS})
        self.failures: list[str] = []
        self.failures_in_a_row = 0
        self.problem: Exception | None = None  # why the run stops: no further request is sent

    def about(self, questions: Sequence[str]) -> dict[str, str | None]:
        """The verdict on each question, None where there is none; TrainingError where the run has to stop."""
        pool = ThreadPoolExecutor(self.config.judge_concurrency)
        try:
            verdicts = list(tqdm(pool.map(self.verdict, questions), "rlhf judge", len(questions), disable=None))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if self.problem is not None:
            raise self.problem
        if not self.known:
            raise UsageError(f"judge_base_url: no request has an answer; the first: {self.failures[0]}")
        return dict(zip(questions, verdicts, strict=True))

    def verdict(self, question: str) -> str | None:
        """The first verdict in the answers to a question."""
        config = self.config
        for retry in range(config.judge_retries + 1):
            warmth = max(config.judge_temperature, WARMTH) if retry else config.judge_temperature
            answer = self.answer(
                {
                    "model": config.judge_model, "messages": [{"role": "user", "content": question}],
                    "max_tokens": config.judge_max_tokens, "temperature": warmth, "seed": config.seed + retry,
                }
            )  # fmt: skip
            if answer is None:
                return None
            verdict = parse_verdict(answer["content"], self.template.allowed)
            if verdict is not None and answer["finish_reason"] != "length":  # else its last verdict is yet to come
                return verdict
        return None

    def answer(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request, as it is kept, or by the server; None where it has failed, or the run stops."""
        key, limit = checksum(json.dumps(body).encode()), self.config.judge_max_tokens_total
        with self.lock:
            if key in self.known:
                return self.known[key]
            if limit is not None and self.tokens.total() >= limit:
                self.stop(f"judge_max_tokens_total: {self.tokens.total()} tokens are spent, of {limit}; raise it")
            if self.problem is not None:
                return None
        try:
            answer = {"key": key} | self.server.request(self.url_path, body, self.read)
        except RequestError as problem:
            with self.lock:
                self.failures.append(str(problem))
                self.failures_in_a_row += 1
                if problem.status not in OF_ONE_PAIR or self.failures_in_a_row >= HOPELESS:
                    self.stop(f"judge_base_url: no answer of {self.config.judge_base_url}: {problem}")
            return None
        with self.lock:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(answer) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a full disk
                os.truncate(self.path, size)  # half a line would hide those behind it
                self.stop(f"{self.path} cannot be written: {error}")
                return None
            self.known[key], self.failures_in_a_row = answer, 0
            self.tokens.update({name: answer[name] for name in TOKENS})
        return answer

    def stop(self, reason: str) -> None:
        kept = f"{len(self.known)} answers are kept: --resume_from_checkpoint goes on from them"
        self.problem = self.problem or TrainingError(f"{reason}. {kept}")

    def read(self, answer: Any) -> dict[str, Any]:
        """What is kept of a server's answer, which may be anything."""
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            content, reason = choice["message"]["content"], choice.get("finish_reason")
            tokens = {name: usage.get(name) for name in TOKENS}
        except (LookupError, TypeError, AttributeError):
            content = 0
        if not isinstance(content, str | None):  # None: a refusal, or all tokens went into thoughts
            raise RequestError(f"expected a choice with a message, got {str(answer)[:EXCERPT]!r}", status=200)
        if not all(type(count) is int and count >= 0 for count in tokens.values()):
            if self.config.judge_max_tokens_total is not None:
                raise RequestError("judge_max_tokens_total: the server counts no tokens (usage)", retryable=False)
            tokens = dict.fromkeys(TOKENS, 0)
        return {"content": content or "", "finish_reason": reason, **tokens}


def report_of(
    answers: Sequence[tuple[str | None, str | None]], settled: Sequence[tuple[str, bool]], template: Template
) -> dict[str, Any]:
    """Counts of verdicts. win_rate: of `chosen` over `rejected`, a tie as half a win. position_bias: of the answers
    that prefer one side, the share of A less that of B, which is 0 for a judge who does not look at the order."""
    verdicts, letters = Counter(verdict for verdict, _ in settled), Counter(letter for two in answers for letter in two)
    parsed, flipped = len(settled) - verdicts["unparsed"], sum(flipped for _, flipped in settled)
    sided = letters["A"] + letters["B"]
    return {
        "pairs": len(settled), "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS},
        "flipped": flipped, "flip_rate": flipped / parsed if parsed else None,
        "win_rate": (verdicts["chosen"] + verdicts["tie"] / 2) / parsed if parsed else None,
        "answers": {letter: letters[letter] for letter in template.allowed} | {"unparsed": letters[None]},
        "position_bias": (letters["A"] - letters["B"]) / sided if sided else None,
    }  # fmt: skip
