"""Shell completion: what may follow on a `grove` command line. Standard library only, so that Tab answers at once."""

from __future__ import annotations

import itertools
from pathlib import Path

from conf.keys import ENTRY, all_keys, enum_choices, group_choices, kind_of
from conf.subject import LEVELS

COMMANDS = ("train", "eval", "rollout", "report", "replay", "check-reward", "new", "config", "completion")
OPTIONS = {
    "train": ["--config-dir", "--help"],
    "eval": ["--prompts", "--help"],
    "rollout": ["--prompts", "--held-out", "--export", "--format", "--config-dir", "--help"],
    "report": ["--help"],
    "replay": ["--steps", "--config-dir", "--help"],
    "check-reward": ["--trees", "--level", "--model", "--arg", "--column", "--timeout", "--help"],
    "new": ["--level", "--model", "--help"],
    "config": ["--config-dir", "--keys", "--check", "--help"],
    "completion": ["--help"],
}
SHELLS = ("bash", "zsh")
NOUNS = {"completion": SHELLS, "new": ("reward",)}
"""What follows a command at once."""
EXPORTS = ("steps", "trajectories", "pairs")
"""What `rl.export` can write trees as."""
FORMATS = ("jsonl", "parquet")
VALUES = {"--level": LEVELS, "--export": EXPORTS, "--format": FORMATS}
"""What follows an option."""

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


def candidates(words: list[str]) -> list[str]:
    """What the last word may become.

    Args:
        words: the command line after "grove"; the last one is being typed and may be empty.
    Returns: whole words; one that ends in "=" or "." is to be continued. Empty where a file may follow.
    """
    command, word = words[0] if words else "", words[-1] if words else ""
    if len(words) <= 1:
        return _beginning(word, COMMANDS)
    if word.startswith("-"):
        return _beginning(word, OPTIONS.get(command, []))
    if words[-2] in VALUES and words[-2] in OPTIONS.get(command, []):
        return _beginning(word, VALUES[words[-2]])
    if command in NOUNS and len(words) == 2:
        return _beginning(word, NOUNS[command])
    if command not in ("train", "config", "eval", "replay", "rollout"):
        return []
    if words[-2] in ("--config-dir", "--steps", "--prompts"):
        return []
    if command in ("eval", "replay", "rollout") and len(words) == 2:
        return []  # the run's folder
    # A run has made its choices; a bare model is evaluated on any task.
    has_choices = command != "eval" or (Path(words[1]) / "config.json").is_file()
    groups = group_choices(_config_dir(words)) if has_choices else {}
    return _values(word, groups) if "=" in word else _names(word, groups)


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
