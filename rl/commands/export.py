"""grove export"""

from __future__ import annotations

import argparse
from pathlib import Path

from rl.commands.shared import Commands, add_command, count, print_summary, run_folder

EXPORT_EXAMPLES = """\
examples:
  grove export runs/hop_search-seed0 searcher                  the newest checkpoint
  grove export runs/hop_search-seed0 searcher --best           the one with the highest held-out success
  grove export runs/hop_search-seed0 searcher --step 40 --license apache-2.0
  grove export runs/qwen-seed0 searcher-lora --adapter         the adapters alone, of a run with model.lora.rank
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "write a run's model as a folder for the Hugging Face hub"
    parser = add_command(commands, "export", _export, summary=summary, examples=EXPORT_EXAMPLES)
    parser.add_argument("path", metavar="RUN", help="the run's folder")
    parser.add_argument("out", metavar="OUT", help="folder to make; its name is the model's in the card")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=count, metavar="N", help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the highest held-out success")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, not merged")
    parser.add_argument("--license", default="", metavar="NAME", help="for the card, as the hub names it")
    parser.add_argument(
        "--base-model", default="", metavar="NAME", help="name on the hub of the model that was trained"
    )


def _export(arguments: argparse.Namespace) -> int:
    folder = run_folder(arguments.path, "export")
    from rl.hub import export_model

    out = Path(arguments.out)
    found = export_model(
        folder,
        out,
        step=arguments.step,
        best=arguments.best,
        adapter=arguments.adapter,
        license=arguments.license,
        base_model=arguments.base_model,
    )
    print_summary(found)
    print(f"to publish it: hf upload YOUR_NAME/{out.resolve().name} {out}")
    return 0
