"""How a config names a function: a file, a module, or an installed package's entry point."""

from __future__ import annotations

import os.path
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.plugin import load_object


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package "politeness" with one entry point."""
    (tmp_path / "politeness.py").write_text("class Judge:\n    @staticmethod\n    def polite(step): return 1.0\n")
    info = tmp_path / "politeness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: politeness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[grove.plugins]\npolite = politeness:Judge\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_module_and_an_attribute_are_named_with_a_colon_or_a_dot():
    assert load_object("os.path:join", key="fn") is os.path.join
    assert load_object("os.path.join", key="fn") is os.path.join


@pytest.mark.usefixtures("installed")
def test_a_bare_name_is_an_entry_point_of_an_installed_package():
    assert load_object("polite", key="fn").polite(None) == 1.0


@pytest.mark.usefixtures("installed")
def test_an_unknown_bare_name_is_refused_with_those_that_are_offered():
    with pytest.raises(ConfigError, match=r'fn="rude" names no function.*installed packages offer polite\.'):
        load_object("rude", key="fn")


def test_where_no_package_offers_any_the_message_says_so():
    with pytest.raises(ConfigError, match="no installed package offers any"):
        load_object("polite", key="fn")


@pytest.mark.parametrize("spec", ["", ":", "file.py:", ":name"])
def test_half_a_name_is_refused(spec: str):
    with pytest.raises(ConfigError, match="names no function"):
        load_object(spec, key="fn")
