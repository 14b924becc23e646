"""Runs code that a model wrote, and tests of it, in a process of its own with limits.

The process has limits of time, CPU time, memory, file size, open files and processes; no environment but a few names
of no interest; a working directory that is deleted; its output goes nowhere; at the end it is killed with its whole
process group. Where the system lets us (Linux with `unshare` and user namespaces), it also has no network, and all its
descendants die with it. Under root it runs as a user that owns nothing, where that user can read Python's files.

What this is not: a container or a virtual machine. The code can read whatever files its user can read, and where
`unshare` is not to be had, use the network, and leave processes behind that have left the process group; `protections`
says so. Many small files can fill a disk within the time. Limits of processes do not hold for root, and where a
sandbox has neither namespaces nor a user of its own, all sandboxes share one.

Nor is it proof against cheating. A test counts as passed only if a secret number comes back, which the process is told
after the code has run: code that exits, prints what it thinks we look for, or replaces built-in functions passes
nothing. But tests run in one process with the code: what was written against this very program can search that
process for the secret, speak in its place, or return objects that say they are equal to everything.
"""

import contextlib
import functools
import marshal
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

READY = b"ready"
NONCE_BYTES, NUMBER_BYTES = 16, 4
UNSHARE = ("unshare", "--user", "--net", "--pid", "--fork", "--kill-child")
CHILD = Path(__file__).with_name("sandbox_child.py")


class Limits(NamedTuple):
    """For one completion and all its tests."""

    seconds: float = 10.0
    cpu_seconds: int = 10  # of each of its processes
    memory_mib: int = 1024  # address space of each of its processes
    file_mib: int = 16
    open_files: int = 64
    processes: int = 32  # threads, too

    def for_child(self, threads_before: int) -> dict[str, int]:
        """`threads_before`: of the same user; the system counts them all."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_mib * 2**20,
            "RLIMIT_FSIZE": self.file_mib * 2**20,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes + threads_before,
            "RLIMIT_CORE": 0,
        }


class Confinement(NamedTuple):
    """The way in which processes are started here."""

    prefix: tuple[str, ...]  # UNSHARE, or nothing where it does not work
    as_nobody: bool  # as a user that owns nothing; needs root


DEFAULT_LIMITS = Limits()


def run_tests(code: str, tests: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> list[bool]:
    """Which tests pass, each a few statements that run after `code` and raise if it is wrong.

    They run one after the other in one process. None passes if the code raises or exits; none after one that exits, or
    at which time or memory run out.
    """
    ours, theirs = socket.socketpair()
    end = time.monotonic() + limits.seconds
    nonce = secrets.token_bytes(NONCE_BYTES)
    width = NONCE_BYTES + NUMBER_BYTES
    passed = [False] * len(tests)
    with ours, own_folder() as folder:
        with theirs:
            process = start(theirs.fileno(), folder)
        try:
            send(ours, (code, limits.for_child(threads_elsewhere(limits))), end)
            if receive(ours, len(READY), end) == READY:
                send(ours, (list(tests), nonce), end)
                for _ in tests:
                    report = receive(ours, width, end)
                    if len(report) < width or report[:NONCE_BYTES] != nonce:
                        break
                    passed[int.from_bytes(report[NONCE_BYTES:], "big")] = True
        except OSError:  # it is gone, or out of time
            pass
        finally:
            stop(process)
    return passed


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield folder
    finally:  # by programs, as a folder may be without permissions, or nested too deeply for Python's functions
        for program in (("chmod", "-R", "u+rwx"), ("rm", "-rf")):
            subprocess.run([*program, folder], stderr=subprocess.DEVNULL)


def start(channel: int, folder: str) -> subprocess.Popen[bytes]:
    how = confinement()
    command = [*how.prefix, sys.executable, "-I", "-B", "-c", CHILD.read_text(encoding="utf-8"), str(channel)]
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    user = new_user() if how.as_nobody else None
    if user is not None:
        os.chown(folder, user, user)
    return subprocess.Popen(
        command, cwd=folder, env=environment, pass_fds=(channel,), start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user(user),
    )  # fmt: skip


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # before `wait`, so that the number cannot be another group's
    process.wait()


def send(channel: socket.socket, value: Any, end: float) -> None:
    data = marshal.dumps(value)
    channel.settimeout(max(end - time.monotonic(), 1e-3))
    channel.sendall(len(data).to_bytes(8, "big") + data)


def receive(channel: socket.socket, size: int, end: float) -> bytes:
    """`size` bytes, or fewer where there are no more."""
    data = b""
    while len(data) < size:
        channel.settimeout(max(end - time.monotonic(), 1e-3))
        part = channel.recv(size - len(data))
        if not part:
            break
        data += part
    return data


# --- what the system lets us do


@functools.cache
def confinement() -> Confinement:
    """The strictest way to start a process that works here, found by trying."""
    prefixes = (UNSHARE, ()) if shutil.which(UNSHARE[0]) else ((),)
    for as_nobody in (True, False) if os.geteuid() == 0 else (False,):
        for prefix in prefixes:
            if starts(prefix, new_user() if as_nobody else None):
                return Confinement(prefix, as_nobody)
    raise RuntimeError(f"{sys.executable} does not start in a process of its own")


def starts(prefix: Sequence[str], user: int | None) -> bool:
    command = [*prefix, sys.executable, "-I", "-B", "-c", "import decimal, marshal, resource"]
    try:
        return subprocess.run(command, cwd="/", capture_output=True, timeout=60, **as_user(user)).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def threads_elsewhere(limits: Limits) -> int:
    """Those that a limit of processes would count beside a sandbox's own: the user's, and those of other sandboxes. In
    a namespace, or as a user of its own, it is alone."""
    if confinement().prefix or confinement().as_nobody:
        return 0
    running = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if process.stat().st_uid == os.getuid():
                running += len(os.listdir(process / "task"))
    return running + limits.processes * (os.cpu_count() or 1)


def new_user() -> int:
    """A user id that nobody has, and no other sandbox: limits of processes count all those of a user."""
    return 2**30 + secrets.randbelow(2**29)


def as_user(user: int | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def protections() -> str:
    """The protections that hold here, in words."""
    how = confinement()
    network = "without network" if how.prefix else "WITH network (unshare does not work here)"
    user = "as a user of its own" if how.as_nobody else f"as user {os.geteuid()}, with that user's files"
    return f"{network}, {user}"
