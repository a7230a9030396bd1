"""A jail for Python that a model wrote: what a program gets, what ends it, and what it cannot do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

import psutil
import pytest

from rollout import jail
from rollout.jail import Ended, Isolation, JailError, Limits, Outcome, isolation_problem, run_python

pytestmark = pytest.mark.slow  # each starts a process or several
ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = Path("/usr/bin/python3.11")
PROGRAM_WORDS = ["-s", "-S", "-P", "-B", "main.py"]


def programs() -> list[int]:
    """Processes of jailed programs of these tests, and of those that whoever ran them left behind."""
    return [each.pid for each in psutil.process_iter() if is_program(each)]


def is_program(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        if process.cmdline()[-len(PROGRAM_WORDS) :] == PROGRAM_WORDS:
            parents = process.parents()
            return os.getpid() in {each.pid for each in parents} or not any("pytest" in p.cmdline() for p in parents)
    return False


@pytest.fixture(params=[Isolation.required, Isolation.off])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    if request.param is Isolation.required and isolation_problem():
        pytest.skip(f"no namespaces here: {isolation_problem()}")
    if request.param is Isolation.off and os.geteuid() == 0:
        # As root the program runs as another user, who cannot read a Python that lies in root's home.
        if not SYSTEM_PYTHON.exists():
            pytest.skip("no Python that every user may read")
        monkeypatch.setattr(jail, "_python", lambda: str(SYSTEM_PYTHON.resolve()))
    return request.param


@pytest.fixture
def isolated() -> None:
    if isolation_problem():
        pytest.skip(f"no namespaces here: {isolation_problem()}")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {each.name for each in Path(gettempdir()).glob("grove-jail-*")}
    yield
    assert programs() == []
    assert {each.name for each in Path(gettempdir()).glob("grove-jail-*")} - before == set()


def run(code: str, isolation: Isolation = Isolation.required, stdin: str = "", **limits: float) -> Outcome:
    return run_python(textwrap.dedent(code), stdin=stdin, isolation=isolation, limits=Limits(**limits))  # pyright: ignore


def test_a_program_reads_and_writes(isolation: Isolation):
    code = "import os, sys; print(input()[::-1]); print('!', file=sys.stderr); os.write(4, os.read(3, 99)); sys.exit(3)"
    outcome = run_python(code, stdin="abc\n", channel=b"psst", isolation=isolation)
    assert (outcome.ended, outcome.exit_code, outcome.ok) == (Ended.exited, 3, False)
    assert (outcome.stdout, outcome.stderr, outcome.reply) == ("cba\n", "!\n", b"psst")
    assert outcome.network_cut is (isolation is Isolation.required)
    assert 0 < outcome.cpu_s <= outcome.wall_s + 0.1 and outcome.peak_mib > 1


def test_a_program_that_fails_says_why(isolation: Isolation):
    outcome = run("def f(:", isolation)
    assert outcome.exit_code == 1 and "SyntaxError" in outcome.stderr
    assert run("", isolation).ok
    assert run("import os; os.abort()", isolation).signal == signal.SIGABRT
    assert run("import os; os.abort()", isolation).ended is Ended.signalled


def test_text_that_is_no_text_is_shown_as_far_as_it_can_be(isolation: Isolation):
    assert run(r"import os; os.write(1, b'a\xff')", isolation).stdout == "a\N{REPLACEMENT CHARACTER}"
    assert run("print('ä€')", isolation).stdout == "ä€\n"
    assert run("x = '\ud800'", isolation).ok  # a lone surrogate cannot be written to a file
    assert run("print(len(input()))", isolation, stdin="ä€").stdout == "2\n"


def test_it_has_the_standard_library_and_an_empty_folder_and_nothing_of_ours(
    isolation: Isolation, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET_KEY", "hush")
    code = """
        import json, math, os, sys
        print(sorted(os.environ), os.listdir("."), json.loads("1"), any("site-packages" in each for each in sys.path))
        def is_open(fd):
            try: os.fstat(fd)
            except OSError: return False
            return True
        print([fd for fd in range(400) if is_open(fd)])
    """
    names = "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED', 'PYTHONIOENCODING']"
    assert run(code, isolation).stdout == f"{names} ['main.py'] 1 False\n[0, 1, 2, 3, 4]\n"


def test_the_same_program_says_the_same_again(isolation: Isolation):
    code = "print(list({'a', 'b', 'c', 'd', 'e'}))"
    assert run(code, isolation).stdout == run(code, isolation).stdout


@pytest.mark.parametrize(
    ("code", "ended", "limits"),
    [
        ("import time; time.sleep(60)", Ended.wall_time, {"wall_s": 0.3}),
        ("while True: pass", Ended.wall_time, {"wall_s": 0.3}),
        ("while True: pass", Ended.cpu_time, {"cpu_s": 1, "wall_s": 20}),
        (
            "import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True: pass",
            Ended.cpu_time,
            {"cpu_s": 1, "wall_s": 20},
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", Ended.wall_time, {"wall_s": 0.3}),
        ("while True: print('flood' * 1000)", Ended.output, {"output_bytes": 100_000, "wall_s": 20}),
        ("import os\nwhile True: os.write(2, b'x' * 9999)", Ended.output, {"output_bytes": 100_000, "wall_s": 20}),
        ("import os\nwhile True: os.write(4, b'x' * 9999)", Ended.output, {"output_bytes": 100_000, "wall_s": 20}),
        ("print('x' * 101, end='')", Ended.output, {"output_bytes": 100}),
    ],
)
def test_what_takes_too_much_is_ended(code: str, ended: Ended, limits: dict[str, float], isolation: Isolation):
    started = time.monotonic()
    outcome = run(code, isolation, **limits)
    assert outcome.ended is ended and not outcome.ok
    assert outcome.exit_code is None
    assert time.monotonic() - started < 8
    assert len(outcome.stdout) <= limits.get("output_bytes", 0)


def test_as_much_output_as_is_kept_is_fine(isolation: Isolation):
    outcome = run("print('x' * 100, end='')", isolation, output_bytes=100)
    assert outcome.ok and outcome.stdout == "x" * 100


def test_memory_of_a_process_and_of_all_together(isolation: Isolation):
    alone = run("x = bytearray(1 << 30)", isolation, memory_mib=128)
    assert alone.exit_code == 1 and "MemoryError" in alone.stderr
    together = """
        import os, time
        for _ in range(7):
            if os.fork() == 0:
                x = bytearray(50 << 20)
                time.sleep(60)
        time.sleep(60)
    """
    assert run(together, isolation, memory_mib=128, wall_s=20).ended is Ended.memory


def test_a_fork_bomb_stays_small_and_is_buried(isolation: Isolation):
    code = """
        import os
        while True:
            try: os.fork()
            except OSError: pass
    """
    started = time.monotonic()
    assert run(code, isolation, wall_s=1).ended is Ended.wall_time
    assert time.monotonic() - started < 8


def test_no_more_processes_than_allowed(isolation: Isolation):
    code = """
        import os, time
        made = 0
        try:
            while made < 100:
                if os.fork() == 0: time.sleep(60)
                made += 1
        except OSError: print(made)
    """
    made = int(run(code, isolation, max_processes=8).stdout)
    assert made == 7 or (isolation is Isolation.off and os.geteuid() and made <= 8)


def test_what_detaches_itself_ends_with_the_program(isolation: Isolation):
    code = """
        import os, signal, time
        for number in range(1, 30):
            if number not in (signal.SIGKILL, signal.SIGSTOP): signal.signal(number, signal.SIG_IGN)
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(60)
                os._exit(0)
        print("gone")
    """
    started = time.monotonic()
    outcome = run(code, isolation)
    assert outcome.ok and outcome.stdout == "gone\n"
    assert time.monotonic() - started < 8  # nobody waits for what still holds the streams


def test_the_disk_is_not_filled(isolation: Isolation):
    code = """
        written = 0
        try:
            with open("big", "wb", buffering=0) as big:
                while written < 1 << 30: written += big.write(bytes(1 << 20))
        except OSError as error: print(error.errno, written >> 20)
    """
    number, mib = map(int, run(code, isolation, disk_mib=4).stdout.split())
    assert number in (27, 28) and mib <= 4  # file too large, no space left


def test_many_files_and_deep_folders_are_swept_away(isolation: Isolation):
    code = """
        import os
        for _ in range(1500):
            os.mkdir("d"); os.chdir("d")
    """
    assert run(code, isolation).ok


@pytest.mark.usefixtures("isolated")
def test_all_files_together_have_a_limit():
    code = """
        total = 0
        try:
            for place in range(100):
                for folder in ("/box", "/tmp", "/dev/shm"):
                    with open(f"{folder}/{place}", "wb") as file: total += file.write(bytes(1 << 20))
        except OSError as error: print(error.errno, total >> 20)
    """
    number, mib = map(int, run(code, disk_mib=4).stdout.split())
    assert number == 28 and mib <= 4


@pytest.mark.usefixtures("isolated")
def test_nothing_of_ours_can_be_read(tmp_path: Path):
    (tmp_path / "key").write_text("hush")
    code = f"""
        import glob, os
        print(glob.glob("/proc/*"), os.path.exists({str(tmp_path)!r}), os.path.exists({str(ROOT)!r}))
        for path in ("/proc/1/environ", "/proc/self/environ", "/etc/passwd", "/etc/shadow", {str(tmp_path / "key")!r}):
            try: print(open(path).read())
            except OSError as error: print(error.errno, end=" ")
    """
    assert run(code).stdout == "[] False False\n2 2 2 2 2 "


@pytest.mark.usefixtures("isolated")
def test_nothing_outside_can_be_written():
    code = """
        import os, sys
        for path in (sys.base_prefix, os.path.dirname(os.__file__), "/usr", "/usr/bin", "/etc", "/dev"):
            try:
                open(path + "/written", "w")
                print(path)
            except OSError: pass
    """
    assert run(code).stdout.replace("/etc\n", "").replace("/dev\n", "") == ""  # these two are its own, in memory


@pytest.mark.usefixtures("isolated")
def test_nobody_outside_can_be_signalled():
    code = """
        import os, signal
        print(os.getppid())
        for pid in (os.getppid(), 1, -1):
            try: os.kill(pid, signal.SIGKILL)
            except OSError as error: print(error.errno)
        print("still here")
    """
    outcome = run(code)
    assert outcome.ok and outcome.stdout.startswith("1\n") and outcome.stdout.endswith("still here\n")


@pytest.mark.usefixtures("isolated")
def test_nobody_can_be_called():
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
            import socket
            for place in (("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53)):
                try: socket.create_connection(place, timeout=2)
                except OSError as error: print(error.errno)
            try: socket.getaddrinfo("example.com", 80)
            except OSError: print("no names")
        """
        assert run(code).stdout == "101\n101\nno names\n"  # network is unreachable


@pytest.mark.usefixtures("isolated")
def test_no_power_can_be_gained():
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print(os.getuid(), os.geteuid())
        for deed in (lambda: os.setuid(0), lambda: os.chroot("/tmp"), lambda: os.setgroups([0]), lambda: os.nice(-5)):
            try: deed(); print("done")
            except OSError: pass
        for flags in (0x10000000, 0x20000, 0x40000000):  # a user, mount or network namespace
            if libc.unshare(flags) == 0: print("unshared")
        if libc.mount(b"proc", b"/tmp", b"proc", 0, None) == 0: print("mounted")
        if libc.ptrace(16, 1, 0, 0) == 0: print("attached")
    """
    assert run(code).stdout == "1000 1000\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user to run it as")
def test_without_isolation_roots_programs_run_as_a_user_who_cannot_harm_us(monkeypatch: pytest.MonkeyPatch):
    if not SYSTEM_PYTHON.exists():
        pytest.skip("no Python that every user may read")
    monkeypatch.setattr(jail, "_python", lambda: str(SYSTEM_PYTHON.resolve()))
    code = f"""
        import os, signal
        for pid in ({os.getpid()}, os.getppid(), 1):
            try: os.kill(pid, signal.SIGKILL); print("killed", pid)
            except PermissionError: pass
            try: print(open(f"/proc/{{pid}}/environ").read())
            except PermissionError: pass
        print(os.getuid() >= 61184)
    """
    assert run(code, Isolation.off).stdout == "True\n"


def test_a_program_ends_with_whoever_runs_it(isolation: Isolation):
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from rollout import jail
        jail._python = lambda: {jail._python()!r}
        print("started", flush=True)
        jail.run_python("import time; time.sleep(60)", isolation=jail.Isolation({isolation.value!r}))
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None and runner.stdout.readline() == b"started\n"
        deadline = time.monotonic() + 10
        while not programs() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert programs()
        runner.kill()
    while programs() and time.monotonic() < deadline:
        time.sleep(0.02)
    for folder in Path(gettempdir()).glob("grove-jail-*"):
        folder.joinpath("main.py").unlink(missing_ok=True)
        folder.rmdir()  # whoever would have removed it was killed
    assert programs() == []


def test_a_jail_that_cannot_be_built_is_no_verdict_on_the_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jail, "_python", lambda: "/nowhere/python")
    with pytest.raises(JailError, match=r"nothing is known of it: .*No such file.*/nowhere/python"):
        run("print(1)", Isolation.off)


def test_preferred_isolation_goes_without_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []

    def pretended(_code: str, _stdin: str, _limits: Limits, isolated: bool, _channel: bytes) -> str:
        asked.append(isolated)
        return "no namespaces"

    monkeypatch.setattr(jail, "_run", pretended)
    monkeypatch.setattr(jail, "isolation_problem", lambda: "no namespaces")
    for isolation in (Isolation.preferred, Isolation.required):
        with pytest.raises(JailError, match="no namespaces"):
            run("", isolation)
    assert asked == [False, True]
