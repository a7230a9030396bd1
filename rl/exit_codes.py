"""Exit codes of `grove`, by which whoever started it knows whether to start it again."""

from __future__ import annotations

ERROR = 1
"""An error that starting again would not mend. Of a training process: Ray's word that Ray itself is gone, for it then
ends the process without asking Python; such a process tells its own errors by TOLD."""
REFUSED = 2
"""A configuration that cannot run; nothing was started."""
TOLD = 70
"""Of the training process under `rl.supervisor`: an error that it told (EX_SOFTWARE), which becomes ERROR."""
LOST = 75
"""A part was lost that the run cannot replace (EX_TEMPFAIL: trying again may help)."""
INTERRUPTED = 130
"""Ctrl-C or a preemption, as shells have it."""
