"""The sandbox: what passes, what does not however it tries, and what is left of it afterwards."""

import os
import resource
import tempfile
import time
from pathlib import Path

import pytest

from rlhf_trainer.rewards import sandbox
from rlhf_trainer.rewards.sandbox import Limits, confinement, protections, run_tests

QUICK = Limits(seconds=4)
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture
def shared_folder():
    """A folder open to all: pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_each_test_passes_or_fails_alone():
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert missing", "x = add(1, 1)\nassert x == 2", "1 +"]
    assert run_tests(ADD, tests) == [True, False, False, True, False]
    assert run_tests(ADD, []) == []


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError", "def add(a, b)", "import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)",
        "exit()", "while True: pass", "a\0b", "\ud800",
        "import time; time.sleep(60)", "def f(): f()\nf()", "x = bytearray(10 * 2**30)", "print('x' * 2**30)",
        "x = []\nwhile True: x.append('x' * 2**20)", "import ctypes; ctypes.string_at(0)",
        "open('f', 'wb').write(bytes(20 * 2**20))",
    ],
)  # fmt: skip
def test_code_that_does_not_come_to_its_end_passes_nothing(code):
    start = time.monotonic()
    assert run_tests(code + "\n" + ADD, ["assert True", "pass"], Limits(seconds=3, memory_mib=512)) == [False, False]
    assert time.monotonic() - start < 20


def test_a_test_that_ends_the_process_takes_the_later_ones_with_it():
    code = "import os, sys, time\ndef leave(): os._exit(0)\ndef hang(): time.sleep(60)\n"
    for call in ("leave()", "hang()"):
        assert run_tests(code, ["pass", call, "pass"], QUICK) == [True, False, False]
    for call in ("sys.exit(0)", "raise KeyboardInterrupt", "bytearray(10 * 2**30)", "import no_such_module"):
        assert run_tests(code, ["pass", call, "pass"], QUICK) == [True, False, True]


CHEATS = {
    "prints what could be looked for": "print('passed', 'ready', 'OK', flush=True)",
    "speaks to whoever listens": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'ready' + bytes(20) * 4)
    except OSError: pass
""",
    "replaces built-in functions": """
import builtins, os, marshal, sys
builtins.exec = builtins.compile = lambda *args, **kwargs: None
builtins.AssertionError = builtins.BaseException = type('E', (), {})
os.write = os.read = lambda *args: b''
marshal.loads = lambda data: (['pass'], bytes(16))
sys.exit = os._exit = lambda code: None
""",
    "replaces what is imported": "import sys\nsys.modules.clear()\n",
    "exits in a thread": """
import os, threading, time
threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0)), daemon=True).start()
time.sleep(0.5)
""",
    "registers an exit handler": "import atexit, os\natexit.register(lambda: os.write(3, b'ready'))",
    "swallows what is raised": "import sys\nsys.excepthook = lambda *args: None\n",
    "closes its files": "import os\nos.closerange(3, 64)\n",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_tricks_do_not_make_a_wrong_function_pass(cheat):
    assert run_tests(CHEATS[cheat] + "\ndef add(a, b): return 0\n", ["assert add(1, 2) == 3"] * 2, QUICK) == [False] * 2


def test_threads_and_output_do_no_harm_to_what_is_right():
    code = """
import sys, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
for _ in range(20):
    sys.stdout.write('x' * 10**6); sys.stderr.write('y' * 10**6)
""" + ADD  # fmt: skip
    start = time.monotonic()
    assert run_tests(code, ["assert add(1, 2) == 3"]) == [True]
    assert time.monotonic() - start < 9  # nobody waits for the thread


def test_large_tests_and_many_of_them():
    tests = [f"assert add({i}, {'0' * 2000 and i}) == {2 * i}  # {'x' * 2000}" for i in range(300)]
    assert run_tests(ADD, tests) == [True] * 300


def test_limits_hold_for_the_process():
    code = "import resource, os\ndef of(name): return resource.getrlimit(getattr(resource, 'RLIMIT_' + name))\n"
    alone = confinement().prefix or confinement().as_nobody
    nproc = "== (16, 16)" if alone else "> (16, 16)"  # where the user's other processes count, too
    tests = [
        "assert of('AS') == (512 * 2**20,) * 2", "assert of('CPU') == (7, 7)", "assert of('FSIZE') == (2**20,) * 2",
        "assert of('NOFILE') == (32, 32)", "assert of('NPROC') " + nproc, "assert of('CORE') == (0, 0)",
        "assert os.getpgid(0) != " + str(os.getpgid(0)),
    ]  # fmt: skip
    limits = Limits(cpu_seconds=7, memory_mib=512, file_mib=1, open_files=32, processes=16)
    assert run_tests(code, tests, limits) == [True] * len(tests)
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] != 7  # the trainer's own are what they were


def test_nothing_of_the_trainer_is_handed_down(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    monkeypatch.setenv("PYTHONSTARTUP", "/etc/passwd")
    opened = os.dup2(0, 55, inheritable=True)
    tests = [
        "import os; assert 'SECRET_TOKEN' not in os.environ and set(os.environ) <= KNOWN",
        f"import os\ntry: os.fstat({opened})\nexcept OSError: pass\nelse: assert False",
        "import sys; assert sys.stdin.read() == ''",
        "import os; assert os.listdir('.') == [] and os.path.samefile('.', os.environ['HOME'])",
    ]
    known = "KNOWN = {'PATH', 'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE', 'PWD', 'OMP_NUM_THREADS', "
    known += "'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'}"
    try:
        assert run_tests(known, tests) == [True] * 4
    finally:
        os.close(opened)


def test_the_folder_is_deleted(shared_folder, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(shared_folder))
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nfound = os.getcwd()"
    assert run_tests(code, [f"assert found.startswith({str(shared_folder)!r})"]) == [True]
    assert list(shared_folder.iterdir()) == []


MESSES = ["for _ in range(1500):\n    os.mkdir('a')\n    os.chdir('a')", "os.makedirs('a/b')\nos.chmod('a', 0)"]


@pytest.mark.parametrize("mess", MESSES)
def test_a_folder_that_python_may_not_delete_is_deleted(mess, shared_folder, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(shared_folder))
    assert run_tests(f"import os\n{mess}", ["assert True"]) == [True]
    assert list(shared_folder.iterdir()) == []


@pytest.mark.parametrize("leaves_group", [False, True])
def test_descendants_end_with_the_process(leaves_group, shared_folder):
    """A child that has left the process group outlives it where there is no namespace to end it, as the docs say."""
    beat = shared_folder / "beat"
    code = f"""
import os, time
if os.fork() == 0:
    {"os.setsid()" if leaves_group else "pass"}
    for _ in range(100):
        with open({str(beat)!r}, 'a') as file: file.write('x')
        time.sleep(0.05)
    os._exit(0)
time.sleep(0.5)
"""
    assert run_tests(code, ["pass"]) == [True]
    time.sleep(0.2)
    size = beat.stat().st_size
    assert size > 0
    time.sleep(0.4)
    outlived = beat.stat().st_size > size
    assert outlived == (leaves_group and not confinement().prefix)


def test_many_forks_end_in_time():
    code = "import os, time\nfor _ in range(5): os.fork()\ntime.sleep(60)\n"  # 32 processes
    start = time.monotonic()
    assert run_tests(code, ["pass"], QUICK) == [False]
    assert time.monotonic() - start < 15


def test_the_protections_that_hold_here_are_named():
    """The network is where `protections` says it is: a socket to the trainer's loopback is refused in a namespace."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        code = "import socket\ndef reach(): socket.create_connection(('127.0.0.1', PORT), timeout=2)\n"
        code = code.replace("PORT", str(server.getsockname()[1]))
        (reached,) = run_tests(code, ["reach()"])
    assert reached == (not confinement().prefix)
    assert ("without network" in protections()) == (not reached) and ("WITH network" in protections()) == reached


def test_what_does_not_work_here_is_not_used(monkeypatch):
    """No `unshare`, or one that is refused, as in most containers."""
    for prefix in (("no-such-unshare",), ("false",)):
        monkeypatch.setattr(sandbox, "UNSHARE", prefix)
        confinement.cache_clear()
        assert confinement().prefix == () and run_tests(ADD, ["assert add(1, 2) == 3"]) == [True]
        assert "WITH network" in protections()
        code = "import threading\ndef wait():\n    t = threading.Thread(target=int)\n    t.start(); t.join()\n"
        assert run_tests(code, ["wait()"], Limits(processes=2)) == [True]  # the user's other processes are not counted
    monkeypatch.setattr(sandbox.sys, "executable", "/no/such/python")
    confinement.cache_clear()
    with pytest.raises(RuntimeError, match="does not start in a process of its own"):
        run_tests(ADD, ["pass"])
    confinement.cache_clear()


def test_under_root_a_user_of_its_own_where_it_can_read_python(monkeypatch):
    """A Python of the system's, as one in root's home is not for others to run; who is not root stays who he is."""
    pythons = [path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()]
    if os.geteuid() != 0 or not pythons:
        assert not confinement().as_nobody
        return
    monkeypatch.setattr(sandbox.sys, "executable", pythons[0])
    confinement.cache_clear()
    try:
        assert confinement().as_nobody
        code = "import os\ndef read(): open('/etc/shadow').read()\n"
        owns = "import os; open('f', 'w').close(); assert os.stat('.').st_uid == os.getuid() != 0"
        assert run_tests(code, ["read()", owns, "assert os.getgroups() in ([], [65534])"]) == [False, True, True]
        assert "as a user of its own" in protections()
    finally:
        confinement.cache_clear()
