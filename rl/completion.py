"""Shell completion: what may follow on a `grove` command line. Standard library only, so that Tab answers at once."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from conf.keys import ENTRY, all_keys, enum_choices, group_choices, kind_of

SETTINGS = "overrides"
"""The name by which commands declare that settings follow."""

SHELLS = ("bash", "zsh")
EXPORTS = ("steps", "trajectories", "pairs")
"""What `rl.export` can write trees as."""
FORMATS = ("jsonl", "parquet")

BASH = r"""# Completion of grove for bash. Use it with: source <(grove completion bash)
_grove() {
    local typed=${COMP_LINE:0:COMP_POINT} line
    local -a words
    read -ra words <<< "$typed"
    [[ $typed == *[[:space:]] ]] && words+=("")
    local word=${words[${#words[@]}-1]} cut=""
    # bash breaks words at "=", so a reply must hold only what follows it.
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && cut="${word%%=*}="
    COMPREPLY=()
    while IFS= read -r line; do
        [[ -n $line ]] && COMPREPLY+=("${line#"$cut"}")
    done < <("${words[0]}" __complete "${words[@]:1}" 2> /dev/null)
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    return 0
}
complete -o default -F _grove grove
"""

ZSH = r"""#compdef grove
# Completion of grove for zsh. Use it with: source <(grove completion zsh)
_grove() {
    local -a found unfinished
    found=("${(@f)$(${words[1]} __complete "${(@)words[2,CURRENT]}" 2> /dev/null)}")
    found=(${found:#})
    (( ${#found} )) || { _files; return }
    unfinished=(${(M)found:#*[=.]})
    found=(${found:#*[=.]})
    compadd -S '' -a unfinished
    compadd -a found
}
compdef _grove grove
"""


def script(shell: str) -> str:
    """The completion script of a shell."""
    return {"bash": BASH, "zsh": ZSH}[shell]


def candidates(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """What the last word may become.

    Args:
        words: the command line after "grove"; the last one is being typed and may be empty.
        parser: of all commands, whose declarations are what can follow.
    Returns: whole words; one that ends in "=" or "." is to be continued. Empty where a file may follow.
    """
    commands = _commands(parser)
    command, word = commands.get(words[0]) if words else None, words[-1] if words else ""
    if len(words) <= 1:
        return _beginning(word, list(commands))
    if command is None:
        return []
    options = {option: action for action in command._actions for option in action.option_strings if option != "-h"}
    if word.startswith("-"):
        return _beginning(word, sorted(options, key="--help".__eq__))  # help last
    before = options.get(words[-2])
    if before is not None and before.nargs != 0:
        return _beginning(word, [str(choice) for choice in before.choices or ()])
    place = _place(words[1:], options)
    positional = [action for action in command._actions if not action.option_strings]
    nouns = [action for action in positional if action.dest != SETTINGS]
    if place < len(nouns):
        known = nouns[place].choices or group_choices(_config_dir(words)).get(nouns[place].dest, ())
        return _beginning(word, [str(choice) for choice in known])
    if len(nouns) == len(positional):
        return []
    # A run has made its choices; a bare model is evaluated on any task.
    has_choices = words[0] != "eval" or (Path(words[1]) / "config.json").is_file()
    groups = group_choices(_config_dir(words)) if has_choices else {}
    return _values(word, groups) if "=" in word else _names(word, groups)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def _place(words: list[str], options: dict[str, argparse.Action]) -> int:
    """Which of the command's words without a dash the last one is, from 0."""
    place, is_value = 0, False
    for word in words[:-1]:
        if is_value or word.startswith("-"):
            is_value = not is_value and word in options and options[word].nargs != 0
        else:
            place += 1
    return place


def _config_dir(words: list[str]) -> str:
    for word, after in itertools.pairwise(words):
        if word == "--config-dir":
            return after
        if word.startswith("--config-dir="):
            return word.partition("=")[2]
    return ""


def _values(word: str, groups: dict[str, list[str]]) -> list[str]:
    key = word.partition("=")[0]
    kind = kind_of(key)
    choices = groups.get(key) or enum_choices(kind) or (["true", "false"] if kind is bool else [])
    return _beginning(word, [f"{key}={choice}" for choice in choices])


def _names(word: str, groups: dict[str, list[str]]) -> list[str]:
    names = [f"{group}=" for group in groups]
    for key in all_keys():
        name = _with_typed_entry(key.name, word)
        names.append(f"{name.partition(ENTRY)[0]}" if ENTRY in name else f"{name}=")
    return _beginning(word, list(dict.fromkeys(names)))


def _with_typed_entry(name: str, word: str) -> str:
    """A key with the name that was already typed in the place of `<name>`."""
    before, found, _ = name.partition(ENTRY)
    entry, dot, _ = word.removeprefix(before).partition(".")
    return name.replace(ENTRY, entry, 1) if found and dot and word.startswith(before) else name


def _beginning(word: str, words: list[str] | tuple[str, ...]) -> list[str]:
    return [each for each in words if each.startswith(word)]
