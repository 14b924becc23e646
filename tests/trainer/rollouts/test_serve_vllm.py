"""`rlhf serve-vllm` with a program in vLLM's place, which serves nothing but its health."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from rlhf_trainer.cli import main
from rlhf_trainer.rollouts.http_json import RequestError, Server

pytestmark = pytest.mark.usefixtures("loopback_without_proxy")
PROGRAM = """#!{python}
import http.server, json, os, signal, sys
{begin}
names = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
facts = {{"words": sys.argv[1:], "pid": os.getpid(), "environment": {{n: os.environ.get(n) for n in names}}}}
with open({facts!r}, "w") as file:
    json.dump(facts, file)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path):
    """(what the program does first) -> its path; `.facts` is what it was started with."""

    def make(begin=""):
        path = tmp_path / "vllm"
        path.write_text(PROGRAM.format(python=sys.executable, begin=begin, facts=str(tmp_path / "facts.json")))
        path.chmod(0o755)
        return str(path)

    make.facts = tmp_path / "facts.json"
    return make


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(*words):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_trainer", "serve-vllm", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment,
    )  # fmt: skip


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_comes_and_leaves_nothing_behind(vllm, port, number):
    process = started("--model_name_or_path", "m", "--vllm", vllm(), "--port", str(port), "--vllm_args=--enforce-eager")
    try:
        lines = iter(process.stdout.readline, "")
        assert any(f"rlhf grpo --use_vllm --vllm_server_base_url http://127.0.0.1:{port}" in line for line in lines)
        Server(f"http://127.0.0.1:{port}", 5.0, 0).request("/health", None)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    facts = json.loads(vllm.facts.read_text())
    assert is_gone(facts["pid"])
    assert facts["words"][:2] == ["serve", "m"] and facts["words"][-1] == "--enforce-eager"
    text = " ".join(facts["words"])
    assert "--host 127.0.0.1" in text and "--logprobs-mode processed_logprobs" in text and "--enable-lora" in text
    assert facts["environment"] == {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with pytest.raises(RequestError):
        Server(f"http://127.0.0.1:{port}", 5.0, 0).request("/health", None)


def test_weights_are_replaced_from_this_machine_alone(vllm, port):
    process = started(
        "--model_name_or_path", "m", "--vllm", vllm(), "--port", str(port), "--host", "0.0.0.0", "--max_lora_rank", "0"
    )
    try:
        lines = iter(process.stdout.readline, "")
        assert any("0.0.0.0 is not loopback, so whole weights are not taken" in line for line in lines)
        assert any("rlhf grpo --use_vllm" in line for line in lines)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    facts = json.loads(vllm.facts.read_text())
    assert facts["environment"] == {"VLLM_SERVER_DEV_MODE": None, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": None}
    assert "--enable-lora" not in facts["words"]


def test_a_server_that_ends_by_itself_is_reported(vllm, port, capsys):
    words = ["serve-vllm", "--model_name_or_path", "m", "--port", str(port)]
    assert main([*words, "--vllm", vllm("sys.exit(3)")]) == 1
    assert "vllm serve ended with status 3" in capsys.readouterr().err


def test_one_that_never_serves_is_ended(vllm, port, capsys, monkeypatch):
    processes, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1])
    words = ["serve-vllm", "--model_name_or_path", "m", "--port", str(port), "--vllm_server_timeout", "0"]
    assert main([*words, "--vllm", vllm("import time; time.sleep(600)")]) == 1
    assert "vllm serve is not up in 0 s" in capsys.readouterr().err
    (process,) = processes
    assert process.returncode == -signal.SIGTERM


def test_a_missing_program_is_a_message(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["serve-vllm", "--model_name_or_path", "m"]) == 2
    assert (
        "there is no program 'vllm'. Install vLLM (pip install vllm), best in an environment" in capsys.readouterr().err
    )
