"""grove config"""

from __future__ import annotations

import argparse
import sys

from conf.errors import ConfigError
from rl.commands.shared import Commands, add_command, add_settings, print_lines, warn

CONFIG_EXAMPLES = """\
examples:
  grove config experiment=hop_search > hop_search.yaml
  grove config experiment=hop_search rollout.num_workers=64 --check
  grove config --keys                                    every setting
  grove config --keys timeout num_leaves                 those that contain one of the words
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "config", _config, summary="show settings", examples=CONFIG_EXAMPLES)
    add_settings(parser)
    parser.add_argument("--keys", action="store_true", help="list what can be set; words narrow the list")
    parser.add_argument("--check", action="store_true", help="also run every check that `train` runs")


def _config(arguments: argparse.Namespace) -> int:
    if arguments.keys:
        lines = _key_lines(arguments.overrides, arguments.config_dir)
        if not lines:
            raise ConfigError(f"no setting contains {' or '.join(arguments.overrides)}. All: grove config --keys")
        print_lines(lines)
        return 0
    from conf.checks import require_runnable
    from conf.compose import compose, to_yaml

    cfg = compose(arguments.overrides, arguments.config_dir)
    if arguments.check:
        require_runnable(cfg, warn=warn)
    sys.stdout.write(to_yaml(cfg))
    sys.stdout.flush()
    return 0


def _key_lines(words: list[str], config_dir: str) -> list[str]:
    """Groups with their choices, then every setting whose name contains one of the words (all without words)."""
    from conf.keys import all_keys, group_choices, type_name

    lines = []
    for group, choices in group_choices(config_dir).items():
        if not words or group in words:
            lines.append(f"{group}={'|'.join(choices)}")
    for key in all_keys():
        if words and not any(word in key.name for word in words):
            continue
        lines.append(f"{key.name}: {type_name(key.kind)} = {key.default}")
        lines += [f"    {line}" for line in key.doc.splitlines()]
    return lines
