"""What every test starts from: the packages importable, no network, one torch thread, no GPU tests without a GPU."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# The repository comes first: tests/rewards and its like are folders without __init__.py and would hide the packages.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import whole_runs  # noqa: E402, F401, makes a folder that all test processes share
from key_reads import is_whole_suite, missing_keys  # noqa: E402

from conf.reads import FOLDER_VARIABLE, note_records  # noqa: E402

READS, MISSING = pytest.StashKey[Path](), pytest.StashKey[list[str]]()

LONGEST = (
    *("test_chaos", "test_train", "test_train_rewards", "test_launch_page", "test_cluster", "test_sweep_processes"),
    *("test_train_custom", "test_methods", "test_dry_run", "test_generate", "test_faults", "test_pool"),
)
"""Modules of minutes, in the order in which they begin."""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several tests look for what is left behind: each test process has a folder for it, which other users may enter.
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"{os.environ['PYTEST_XDIST_WORKER']}-")
    os.environ["TMPDIR"] = tempfile.tempdir
    Path(tempfile.tempdir).chmod(0o711)
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

# Before anything imports the libraries that read them; Ray's workers and spawned processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",
    RAY_prestart_worker_first_driver="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    # Teams that wait by spinning take the core that another process would work on.
    OMP_WAIT_POLICY="PASSIVE",
)

# A script that was started in the background, or by nohup, ignores signals that tests of stopping send.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# The same examples every time, so that a change is what breaks a test; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("few", derandomize=True, max_examples=20)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Tiny tensors gain nothing from threads, and two spinning teams on two cores cost a factor of twenty."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data files beside the checkout, or a skip: a user's checkout has none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data folder beside the checkout")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Let a run of the whole suite note which settings are read; its processes inherit the folder."""
    if FOLDER_VARIABLE not in os.environ and is_whole_suite(config.option):
        os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="grove-key-reads-")
        config.stash[READS] = Path(os.environ[FOLDER_VARIABLE])
    if FOLDER_VARIABLE in os.environ:
        note_records(Path(os.environ[FOLDER_VARIABLE]))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Look whether all tests together read every setting; with GROVE_REQUIRE_KEYS=1 fail where one is missing."""
    folder = session.config.stash.get(READS, None)
    if folder is None:
        return
    missing = missing_keys(folder)
    shutil.rmtree(folder)
    session.config.stash[MISSING] = missing
    if exitstatus == pytest.ExitCode.OK and missing and os.environ.get("GROVE_REQUIRE_KEYS") == "1":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which."""
    missing = config.stash.get(MISSING, [])
    if missing:
        terminalreporter.section("settings that no test reads", red=True)
        terminalreporter.line("Remove each, or write a test of what it does:")
        terminalreporter.line("  " + "\n  ".join(missing))


PROCESSES_OF_THEIR_OWN = ("ray", "vllm", "slow")
"""Markers of tests that start processes."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run: `gpu` without as many CUDA devices, `vllm` where vLLM is not installed.

    With `pytest -n 2 --dist loadgroup --no-loadscope-reorder` the tests that start no process come first, one by one;
    the others follow in modules, longest first, so that neither test process ends long before the other.
    """
    items.sort(key=_turn)
    for item in items:
        if _starts_processes(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    for item in items:
        wanted = _num_gpus(item)
        if wanted and _num_cuda_devices() < wanted:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} CUDA device{'s' * (wanted > 1)}"))
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: make install"))


def _starts_processes(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in PROCESSES_OF_THEIR_OWN)


def _turn(item: pytest.Item) -> int:
    if not _starts_processes(item):
        return 0
    return 1 + (LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def _num_gpus(item: pytest.Item) -> int:
    """How many GPUs a test needs: `gpu` is one, `gpu(2)` two."""
    return max((marker.args[0] if marker.args else 1 for marker in item.iter_markers("gpu")), default=0)


@functools.cache
def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()
