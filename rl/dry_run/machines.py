"""What the user says of the machines that a run is to go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl.placement import Node

DEFAULT = "default"
"""How a setting that the user left alone is shown."""


@dataclass(frozen=True, slots=True)
class Machines:
    """Equal machines."""

    num: int
    gpus: int
    """Of each."""
    cores: int
    """Of each."""

    def nodes(self) -> list[Node]:
        """Each by its number, the first of which starts the run."""
        from rl.placement import Node

        names = [f"machine {number}" for number in range(1, self.num + 1)]
        return [Node(name, name, self.cores, self.gpus, is_driver=name == names[0]) for name in names]
