"""grove launch"""

from __future__ import annotations

import argparse
import dataclasses
from datetime import datetime
from pathlib import Path

from conf.errors import ConfigError, LaunchError, WaitTimeout
from rl.commands.shared import Commands, add_command, add_settings, print_log, warn

LAUNCH = """\
Starts a training run somewhere and comes back: on this machine, on a Ray cluster, under Slurm or on Kubernetes.
WHERE is a file of the group `launch`, Grove's own or yours. The settings are those of `grove train`.

The same command continues the run: from its newest checkpoint when it has stopped, and by following its output while it
runs. A folder that holds a run with other settings is refused.
"""

LAUNCH_EXAMPLES = """\
examples:
  grove launch local experiment=hop_search
  grove launch ray experiment=hop_search launch.ray.address=http://127.0.0.1:8265 --follow
  grove launch slurm experiment=gsm8k launch.slurm.nodes=4 launch.slurm.gpus_per_node=8 --dry-run
  grove launch kuberay experiment=gsm8k launch.kuberay.image=me/grove launch.kuberay.volume_claim=runs --dry-run
  grove launch my_cluster --config-dir my_conf experiment=mine            my_conf/launch/my_cluster.yaml
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "start a run elsewhere, or in the background"
    parser = add_command(commands, "launch", _launch, summary=summary, about=LAUNCH, examples=LAUNCH_EXAMPLES)
    parser.add_argument("launch", metavar="WHERE", help="local, ray, slurm, kuberay, or a file of your own conf/launch")
    add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be started, and start nothing")
    parser.add_argument("--follow", action="store_true", help="show what it prints, until it ends")


def _launch(arguments: argparse.Namespace) -> int:
    from conf.checks import require_runnable
    from conf.compose import compose
    from rl.jobs.control import require_continues, start, state_of
    from rl.jobs.place import place_of
    from rl.jobs.plan import joins_a_cluster, plan_launch
    from rl.jobs.record import read_launch

    if "=" in arguments.launch:
        raise ConfigError(f"say where before the settings: grove launch local {arguments.launch} ...")
    overrides = [f"launch={arguments.launch}", *arguments.overrides]
    cfg = compose(overrides, arguments.config_dir)
    folder = Path(cfg.run.dir)
    require_continues(folder, cfg)
    address = "auto" if joins_a_cluster(cfg) else cfg.cluster.address
    goes_on = cfg.run.resume or (folder / "metrics.jsonl").exists()
    run, cluster = dataclasses.replace(cfg.run, resume=goes_on), dataclasses.replace(cfg.cluster, address=address)
    require_runnable(dataclasses.replace(cfg, run=run, cluster=cluster), warn=warn)
    plan = plan_launch(cfg, overrides, arguments.config_dir, arguments.launch, Path.cwd(), datetime.now())
    if arguments.dry_run:
        print(place_of(cfg.launch.kind.value).shown(plan))
        return 0
    before = read_launch(folder)
    if before is not None:
        try:
            state = state_of(folder, before)
        except (LaunchError, WaitTimeout) as error:
            raise LaunchError(
                f"{folder} was launched before and may still run, for it cannot be asked: {error} Two jobs in one "
                f"folder would spoil it. When you know that it is gone, remove {folder}/launch.json and launch again."
            ) from error
        if state.is_live:
            print(
                f"{folder} is {state.value} already, as {before.kind} job {before.job}; following it (Ctrl-C leaves it)"
            )
            return print_log(before)
    job = start(plan)
    print(f"{'continues' if goes_on else 'started'} {folder} as {job.kind} job {job.job}")
    print(f"  grove logs {folder} --follow\n  grove jobs\n  grove stop {folder}", flush=True)
    return print_log(job) if arguments.follow else 0
