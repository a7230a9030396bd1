"""What one call of a reward is about: read from its arguments, or as `level` says."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from enum import StrEnum

from conf.errors import ConfigError
from conf.schema import Level


class Subject(StrEnum):
    """What one call of a source is asked about."""

    step = "step"
    """One step."""
    trajectory = "trajectory"
    """One trajectory."""
    step_pair = "step_pair"
    """Two steps that were tried at the same fork."""
    trajectory_pair = "trajectory_pair"
    """Two trajectories of one prompt."""
    steps = "steps"
    """All steps of a tree at once."""
    trajectories = "trajectories"
    """All trajectories of a tree at once."""
    tree = "tree"
    """The tree: one number for all its trajectories, or a mapping from leaf to number."""

    @property
    def level(self) -> Level:
        """What gets the score."""
        return Level.step if self in OF_STEPS else Level.trajectory

    @property
    def is_batch(self) -> bool:
        """Whether one call gives a list of scores."""
        return self in (Subject.steps, Subject.trajectories)

    @property
    def is_pair(self) -> bool:
        """Whether one call compares two."""
        return self in (Subject.step_pair, Subject.trajectory_pair)


TREE_ARGUMENTS = (
    *("step", "siblings", "trajectory", "facts", "other", "other_trajectory", "steps", "trajectories", "rows"),
    *("tree", "prompt", "question", "answer"),
)
"""Arguments that the tree fills."""
SERVICES = ("model", "engine")
"""Arguments that only a reward service can fill."""
ARGUMENTS = (*TREE_ARGUMENTS, *SERVICES)
"""Any other name is a column of the prompt or one of the source's `args`."""
ARGUMENT_OF_TYPE = {"Node": "step", "StepFacts": "facts", "Tree": "tree", "Prompt": "prompt"}
"""A parameter of another name gets these by its annotation."""
OF_STEPS = (Subject.step, Subject.step_pair, Subject.steps)
STEP_ARGUMENTS = ("step", "siblings")
"""Arguments that exist where single steps are scored: asking for one makes a source a step source."""
PAIR_ARGUMENTS = {"other": Subject.step_pair, "other_trajectory": Subject.trajectory_pair}
BATCH_ARGUMENTS = {"steps": Subject.steps, "trajectories": Subject.trajectories}
SINGLE_ARGUMENTS = ("step", "siblings", "trajectory", "facts", "other", "other_trajectory")
"""Arguments that speak of one step or trajectory, which a call about all of them does not have."""
LEVELS = ("step", "trajectory", "pair", "tree")


def argument_names(parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """Parameter -> the argument it asks for: its own name where that is known, else by its annotation, as `s: Node`."""
    return {name: name if name in ARGUMENTS else _by_type(each) or name for name, each in parameters.items()}


def _by_type(parameter: inspect.Parameter) -> str | None:
    annotation = parameter.annotation
    written = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return ARGUMENT_OF_TYPE.get(written.rpartition(".")[2])


def subject_of(key: str, level: str, arguments: Collection[str]) -> Subject:
    """What a source with these arguments is asked about.

    Args:
        key: of the source, for messages.
        level: as configured; "" leaves it to the arguments.
        arguments: names of what it asks for (`argument_names`).
    Raises: ConfigError where the arguments contradict each other or the level.
    """
    if level not in ("", *LEVELS):
        raise ConfigError(f'{key}.level="{level}" is no level. Use {", ".join(LEVELS)}, or leave it empty.')
    asked = _asked(key, arguments)
    if level == "tree":
        _refuse(key, arguments, SINGLE_ARGUMENTS, "scores a whole tree")
        if asked is not None:
            raise ConfigError(f"{key}.level=tree, but its function asks for a {asked.replace('_', ' ')}. Keep one.")
        return Subject.tree
    if level == "pair" and (asked is None or not asked.is_pair):
        raise ConfigError(
            f"{key}.level=pair, but its function compares nothing. Ask for `step` and `other`, two steps tried at the "
            f"same fork, or for `trajectory` and `other_trajectory`."
        )
    if level in Level.__members__ and asked is not None and asked.level is not Level[level]:
        reason = next(name for name in (*PAIR_ARGUMENTS, *BATCH_ARGUMENTS, *STEP_ARGUMENTS) if name in arguments)
        raise ConfigError(
            f'{key}.level={level}, but its function asks for "{reason}", which makes it score a {asked.level.value}. '
            f"Leave the level empty, or ask for `{'trajectory' if level == 'trajectory' else 'step'}` instead."
        )
    if asked is not None:
        return asked
    if "rows" in arguments:
        return Subject.trajectories if level == "trajectory" else Subject.steps
    return Subject.step if level == "step" else Subject.trajectory


def _asked(key: str, arguments: Collection[str]) -> Subject | None:
    """What the arguments alone say; None where they fit both a step and a trajectory."""
    special = {name: subject for name, subject in (PAIR_ARGUMENTS | BATCH_ARGUMENTS).items() if name in arguments}
    if len(special) > 1:
        one, two = list(special)[:2]
        raise ConfigError(f"{key}: its function asks for both `{one}` and `{two}`; one call is about one of them.")
    if special:
        name, subject = next(iter(special.items()))
        if subject.is_batch:
            _refuse(key, arguments, SINGLE_ARGUMENTS, f"asks for all {name} at once")
        elif "rows" in arguments:
            _refuse(key, arguments, ("rows",), f"compares two (`{name}`)")
        return subject
    if "rows" in arguments:
        _refuse(key, arguments, SINGLE_ARGUMENTS, "asks for all rows at once")
        return None
    return Subject.step if any(name in arguments for name in STEP_ARGUMENTS) else None


def _refuse(key: str, arguments: Collection[str], unfit: Collection[str], what: str) -> None:
    found = [name for name in unfit if name in arguments]
    if found:
        raise ConfigError(f"{key}: its function {what}, so there is no single `{found[0]}` to give it. Take it out.")
