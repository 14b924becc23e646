"""`rlhf serve-vllm`: a vLLM server that a run of `rlhf grpo` or `rlhf ppo` can lead, with the flags that this takes."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from types import FrameType

from ..errors import TrainingError, UsageError
from .config import ServeVLLMConfig
from .http_json import RequestError, Server

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_vllm(config: ServeVLLMConfig) -> None:
    """Serves until a signal comes, which is passed on; TrainingError where the server ends by itself."""
    program = shutil.which(config.vllm)
    if program is None:
        raise UsageError(
            f"vllm: there is no program {config.vllm!r}. Install vLLM (pip install vllm), best in an environment of "
            "its own, as it wants a torch of its own, and pass --vllm ENVIRONMENT/bin/vllm"
        )
    url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
    words, variables = command(program, config), os.environ | environment(config)
    signals: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        process.send_signal(number)

    process = subprocess.Popen(words, env=variables, start_new_session=True)
    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        if is_up(process, url, config):
            print(f"serves {config.model_name_or_path}: rlhf grpo --use_vllm --vllm_server_base_url {url}", flush=True)
        status = process.wait()
    finally:
        end(process)
        for number, handler in before.items():
            signal.signal(number, handler)
    if status and not signals:
        raise TrainingError(f"vllm serve ended with status {status}; its own messages are above")


def command(program: str, config: ServeVLLMConfig) -> list[str]:
    """Log-probs are those of the distribution that is drawn from; the model's own generation_config does not count."""
    words = [
        program, "serve", config.model_name_or_path, "--host", config.host, "--port", str(config.port), "--dtype",
        config.dtype, "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
    ]  # fmt: skip
    if config.max_lora_rank:
        words += ["--enable-lora", "--max-lora-rank", str(config.max_lora_rank), "--max-loras", "2"]  # new and old
    return words + shlex.split(config.vllm_args)


def environment(config: ServeVLLMConfig) -> dict[str, str]:
    """What lets weights be replaced, by anybody who reaches the server: hence only where that is this machine."""
    adapters = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if config.max_lora_rank else {}
    if config.host in LOOPBACK:
        return adapters | {"VLLM_SERVER_DEV_MODE": "1"}
    print(f"note: {config.host} is not loopback, so whole weights are not taken (weight_sync folder), adapters are")
    return adapters


def is_up(process: subprocess.Popen, url: str, config: ServeVLLMConfig) -> bool:
    """Waits for the server; False if it ends before."""
    server, deadline = Server(url, 10.0, 0), time.monotonic() + config.vllm_server_timeout
    while process.poll() is None:
        try:
            server.request("/health", None)
            return True
        except RequestError as problem:
            if time.monotonic() > deadline:
                raise TrainingError(f"vllm serve is not up in {config.vllm_server_timeout:g} s: {problem}") from problem
        time.sleep(0.5)
    return False


def end(process: subprocess.Popen) -> None:
    """Ends the server and the processes that it started, which are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
