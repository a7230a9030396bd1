"""What an expander sees of a growing tree, and what it may ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rollout.tree import Tree


class Judge(Protocol):
    """Scores steps while their tree grows, so that an expander can choose between them."""

    async def score(self, tree: Tree, rows: list[int]) -> list[float | None]:
        """A score of each of `rows`, higher is better; None where there is none. The tree must not be changed.

        The same steps get the same scores whatever else the tree holds, or a re-grown tree would be another one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Expansion:
    """One new step behind `parent`, in the `branch`-th of the prompt's trees."""

    parent: int
    branch: int = 0
    token: int = 0
    """Above 0: behind the parent's first so many tokens alone. The parent is cut in two there, so nothing may be
    growing."""
    max_tokens: int = 0
    """Above 0: the step ends after so many tokens, as a part of its turn when the turn has not ended by then."""
    drafted: bool = False
    """The step is a candidate: the environment reads it and does not act, unless `Act` chooses it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Have the judge score these rows; `View.scores` holds them once nothing is growing."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Act:
    """This candidate is chosen: the environment acts on it, and its siblings stay what they are, not chosen."""

    row: int


@dataclass(frozen=True, slots=True)
class Prune:
    """This step is neither continued nor trained."""

    row: int


Move = Expansion | Ask | Act | Prune


@dataclass(frozen=True, slots=True)
class View:
    """What an expander decides from."""

    tree: Tree
    """Its rows are in canonical order whenever `num_growing` is 0."""
    open_rows: list[int]
    """Rows that may be continued and that nobody has continued or pruned yet."""
    num_growing: int
    """Steps and questions to the judge on their way."""
    drafts: list[int] = field(default_factory=list)
    """Candidates between which nobody has chosen yet."""
    scores: Mapping[int, float | None] = field(default_factory=dict)
    """Row -> what the judge said; None where it had no score."""


class Expander(Protocol):
    """Decides what grows next and, at the end, which trajectories are kept."""

    def expand(self, view: View) -> list[Move]:
        """What to do now; asked again each time something has finished. The tree is done when nothing is on its way."""
        ...

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Leaves of the finished tree that are recorded and not trained."""
        ...


def continued(tree: Tree, rows: Iterable[int]) -> list[Expansion]:
    """One step more behind each row."""
    return [Expansion(row, tree.nodes[row].branch) for row in rows]


def by_score(view: View, rows: Iterable[int]) -> list[int]:
    """Rows from the best score to the worst; those without one come last, equal ones in their order."""

    def rank(row: int) -> tuple[bool, float]:
        score = view.scores.get(row)
        return (True, 0.0) if score is None else (False, -score)

    return sorted(rows, key=rank)
