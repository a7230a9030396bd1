"""The process that stands guard over one jailed program: a script that `rollout.jail` runs and that needs no package.

    jailer (this, outside) -> warden (process 1 inside) -> the program and whatever it starts

The warden builds the room and waits for the program; where it dies, the kernel ends all that is inside. The jailer has
the clock and the scales, and ends the warden. Without namespaces the warden is a plain process that inherits the
program's orphans, and the jailer hunts down what is left.
"""

from __future__ import annotations

# pathlib would take as long to load as all the rest, and this starts before every program.
# ruff: noqa: PTH101, PTH103, PTH110, PTH112, PTH114, PTH115, PTH116, PTH120, PTH123, PTH208, PTH211
import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import stat
import sys
import time
from contextlib import suppress

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
LAST_CAPABILITY = 63

USER_INSIDE = 1000
FIRST_USER_OUTSIDE, NUM_USERS_OUTSIDE = 61184, 4096
"""Where root starts a program it runs as a user of its own, so that its processes can be counted and kept apart."""
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    *(f"/dev/{name}" for name in ("null", "zero", "random", "urandom")),
)
PROGRAM = "main.py"
POLL_S = 0.02
MAX_KILL_ROUNDS = 200
NUM_FILES = 4096
HIGH_FD = 100
"""Above the descriptors that a program gets."""


def main() -> None:
    """Guard one program: the request comes on the first descriptor named, the report goes to the second."""
    request_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(request_fd, "rb") as source:
        request = json.load(source)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    try:
        report = _guarded(request)
    except Exception as error:
        report = {"broken": f"{type(error).__name__}: {error}"}
    os.write(report_fd, json.dumps(report).encode())


def _guarded(request: dict) -> dict:
    if request["isolated"]:
        _enter_namespaces(request)
    told_fd, tell_fd = os.pipe()
    go_fd, let_go_fd = os.pipe()
    warden = os.fork()
    if warden == 0:
        os.close(told_fd)
        os.close(let_go_fd)
        _as_child(tell_fd, lambda: _warden(request, go_fd, tell_fd))
    for fd in (tell_fd, go_fd, 0, 1, 2, *request["channel"]):
        os.close(fd)  # so that who reads what the program says sees its end
    os.write(let_go_fd, b"!")
    started = time.monotonic()
    reason = _watched(warden, started + request["wall_s"], request["memory_bytes"])
    wall_s = time.monotonic() - started
    if reason:
        _kill(warden)
    _end_all()
    with os.fdopen(told_fd, "rb") as source:
        told = source.read()
    report = json.loads(told) if told else {}
    if not report and not reason:
        report = {"broken": "the warden ended without a word"}
    return {**report, "reason": reason, "wall_s": wall_s}


def _as_child(tell_fd: int, work) -> None:
    """Do the work of a forked child and end it; what goes wrong is told."""
    try:
        work()
    except BaseException as error:
        os.write(tell_fd, json.dumps({"broken": f"{type(error).__name__}: {error}"}).encode())
    os._exit(0)


def _watched(warden: int, deadline: float, memory_bytes: int) -> str:
    """Wait for the warden to end; the reason why it must be ended, "" where it did by itself."""
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return "wall_time"
        sent = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, min(left_s, POLL_S))
        if sent is not None and sent.si_signo == signal.SIGTERM:
            return "told"
        if sent is not None and _reap(warden):
            return ""
        if _resident_bytes(_descendants(warden)) > memory_bytes:
            return "memory"


def _reap(wanted: int) -> bool:
    """Bury every child that ended; True when the wanted one is among them."""
    found = False
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return found
        found |= pid == wanted


def _end_all() -> None:
    """Kill every descendant and wait until none is left: stopped first, so that none can start another meanwhile."""
    for _ in range(MAX_KILL_ROUNDS):
        descendants = _descendants(os.getpid())
        for deed in (signal.SIGSTOP, signal.SIGKILL):
            for pid in descendants:
                _kill(pid, deed)
        if _reap(-1) or not descendants:
            return
        time.sleep(0.005)
    raise RuntimeError("processes of the program could not be ended")


def _kill(pid: int, how: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, how)


def _descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as listed:
                    todo += map(int, listed.read().split())
        except (OSError, ValueError):
            pass
        if parent != pid:
            found.append(parent)
    return found


def _resident_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as told:
                total += int(told.read().split()[1])
        except (OSError, ValueError, IndexError):
            pass  # it ended meanwhile
    return total * resource.getpagesize()


def _enter_namespaces(request: dict) -> None:
    """A user, network, process and message space of its own; the maps are written by a helper that stays outside."""
    wait_fd, start_fd = os.pipe()
    jailer = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(start_fd)
        code = 1
        try:
            if os.read(wait_fd, 1):
                _write_maps(jailer, request)
                code = 0
        finally:
            os._exit(code)
    os.close(wait_fd)
    try:
        _call("unshare", NEWUSER | NEWNET | NEWIPC | NEWUTS | NEWPID)
        os.write(start_fd, b"!")
    finally:
        os.close(start_fd)
        _, ended = os.waitpid(helper, 0)
    if ended:
        raise PermissionError("the users of a namespace could not be mapped")


def _write_maps(pid: int, request: dict) -> None:
    user, group = os.geteuid(), os.getegid()
    outside = request["user_outside"]
    if outside is None:
        _write(f"/proc/{pid}/setgroups", "deny")
        users, groups = f"{USER_INSIDE} {user} 1", f"{USER_INSIDE} {group} 1"
    else:
        users = groups = f"0 0 1\n{USER_INSIDE} {outside} 1"
    _write(f"/proc/{pid}/uid_map", users)
    _write(f"/proc/{pid}/gid_map", groups)


def _write(path: str, text: str) -> None:
    with open(path, "w") as target:
        target.write(text)


def _warden(request: dict, go_fd: int, tell_fd: int) -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not os.read(go_fd, 1):
        return  # the jailer is gone already
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    folder = _build_room(request) if request["isolated"] else request["folder"]
    _write(f"{folder}/{PROGRAM}", request["code"])
    if request["user_outside"] is not None:
        user = USER_INSIDE if request["isolated"] else request["user_outside"]
        for path in (folder, f"{folder}/{PROGRAM}"):
            os.chown(path, user, user)
    failed_fd, fail_fd = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            os.close(failed_fd)
            fail_fd = fcntl.fcntl(fail_fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
            _become_program(request, folder, fail_fd)
        except BaseException as error:
            os.write(fail_fd, f"{type(error).__name__}: {error}".encode())
        os._exit(127)
    for fd in (fail_fd, 0, 1, 2, *request["channel"]):
        os.close(fd)
    with os.fdopen(failed_fd, "rb") as source:
        failed = source.read().decode()
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            break
    report = {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}
    os.write(tell_fd, json.dumps({"broken": failed} if failed else report).encode())


def _become_program(request: dict, folder: str, fail_fd: int) -> None:
    os.setsid()
    os.chdir(folder)
    os.nice(request["nice"])
    _keep_descriptors(request["channel"], fail_fd)
    user = request["user_outside"]
    if request["isolated"]:
        for capability in range(LAST_CAPABILITY + 1):
            LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user is not None:
        user = USER_INSIDE if request["isolated"] else user
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user takes it off
    for name, (soft, hard) in request["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    os.execve(request["python"][0], [*request["python"], PROGRAM], {**request["environment"], "HOME": folder})


def _keep_descriptors(channel: list[int], fail_fd: int) -> None:
    """Standard streams, the channel at 3 and 4, and until the program starts the pipe that tells of a failure."""
    reads, writes = (fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH_FD) for fd in channel)
    os.dup2(reads, 3)
    os.dup2(writes, 4)
    os.closerange(5, fail_fd)
    os.closerange(fail_fd + 1, os.sysconf("SC_OPEN_MAX"))


def _build_room(request: dict) -> str:
    """A root folder with nothing but Python, the system's libraries and an empty folder to work in; no /proc."""
    _call("unshare", NEWNS)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    base = request["folder"]
    _mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size={request['disk_bytes']},nr_inodes={NUM_FILES}")
    root = f"{base}/room"
    for name in ("box", "tmp", "dev/shm"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for name in ("tmp", "dev/shm"):
        os.chmod(f"{root}/{name}", 0o1777)
    for folder in (*SYSTEM_FOLDERS, *request["read_folders"]):
        _show(folder, root)
    for file in SYSTEM_FILES:
        if os.path.exists(file):
            _touch(f"{root}{file}")
            _bind(file, f"{root}{file}")
    os.chdir(base)
    machine = os.uname().machine
    if machine in PIVOT_ROOT:
        _checked(LIBC.syscall(PIVOT_ROOT[machine], b".", b"."), "pivot_root")
        _checked(LIBC.umount2(b".", MNT_DETACH), "umount2")
        root = "/room"
    # In a changed root the kernel refuses further user namespaces, and with them their powers.
    os.chroot(root)
    os.chdir("/box")
    return "/box"


def _show(folder: str, root: str) -> None:
    """Make a folder of the machine readable at the same place of the room."""
    target = f"{root}{folder}"
    if os.path.islink(folder):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.lexists(target):
            os.symlink(os.readlink(folder), target)
    elif os.path.isdir(folder) and not os.path.isdir(target):
        os.makedirs(target)
        _bind(folder, target)


def _bind(source: str, target: str) -> None:
    _mount(source, target, None, MS_BIND | MS_REC)
    if stat.S_ISCHR(os.stat(target).st_mode):
        return  # a read-only device could not be written to
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    done = LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes, size)
    if done and ctypes.get_errno() == errno.ENOSYS:
        kept = os.statvfs(target).f_flag & (2 | 4 | 8 | 1024 | 2048)  # a namespace may not take these off
        _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)
    else:
        _checked(done, f"mount_setattr {target}")


def _touch(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = (None if word is None else os.fsencode(word) for word in (source, target, kind))
    done = LIBC.mount(*words, ctypes.c_ulong(flags), None if data is None else data.encode())
    _checked(done, f"mount {target}")


def _prctl(option: int, value: int) -> None:
    _checked(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _call(name: str, flags: int) -> None:
    _checked(getattr(LIBC, name)(flags), name)


def _checked(done: int, what: str) -> None:
    if done:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
