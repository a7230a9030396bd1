"""Rules about the learner: how trees go through the model, in which types, and over how many processes."""

from __future__ import annotations

from collections.abc import Callable

from conf.check_machine import DTYPE_BYTES, num_cores, num_gpus
from conf.keys import did_you_mean
from conf.problem import Problem
from conf.schema import Config, Layout


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        dtypes_are_known,
        weights_are_wide_enough,
        layout_fits_the_device,
        depth_first_is_alone,
        processes_have_devices,
        offload_has_a_gpu,
        adapters_have_targets,
    ]


def dtypes_are_known(cfg: Config) -> list[Problem]:
    """Weights come in three types."""
    types = {"model.dtype": cfg.model.dtype, "learner.weights_dtype": cfg.learner.weights_dtype}
    return [
        Problem(f'{key}="{dtype}" is none of {", ".join(DTYPE_BYTES)}.{did_you_mean(dtype, DTYPE_BYTES)}')
        for key, dtype in types.items()
        if dtype not in DTYPE_BYTES
    ]


def weights_are_wide_enough(cfg: Config) -> list[Problem]:
    """The optimiser's weights are float32, or what the model computes in."""
    if cfg.learner.weights_dtype in ("float32", cfg.model.dtype) or cfg.learner.weights_dtype not in DTYPE_BYTES:
        return []
    return [
        Problem(
            f"learner.weights_dtype={cfg.learner.weights_dtype} differs from model.dtype={cfg.model.dtype} and is no "
            f"float32: weights would be rounded twice. Use learner.weights_dtype=float32 or {cfg.model.dtype}."
        )
    ]


def layout_fits_the_device(cfg: Config) -> list[Problem]:
    """Two layouts have kernels for GPUs alone; a running cluster knows itself."""
    layout = cfg.learner.layout
    if layout not in (Layout.flex, Layout.varlen) or num_gpus() or cfg.cluster.address:
        return []
    return [
        Problem(
            f"learner.layout={layout.value} needs an NVIDIA GPU, and there is none: its attention has no backward on a "
            "CPU. Use learner.layout=auto, which takes segments here."
        )
    ]


def depth_first_is_alone(cfg: Config) -> list[Problem]:
    """Ranks with different trees would make different numbers of model calls, and wait for each other for ever."""
    learner = cfg.learner
    if learner.layout is not Layout.depth_first:
        return []
    found = []
    if learner.num_processes > 1:
        found.append(
            Problem(
                f"learner.layout=depth_first with learner.num_processes={learner.num_processes}: it calls the model "
                "once for each segment of a tree, so ranks with different trees would wait for each other for ever. "
                "Use learner.num_processes=1, or learner.layout=auto with learner.gradient_checkpointing=true."
            )
        )
    if learner.weights_dtype != cfg.model.dtype:
        found.append(
            Problem(
                f"learner.layout=depth_first computes in the type of the weights, and learner.weights_dtype="
                f"{learner.weights_dtype} is not model.dtype={cfg.model.dtype}. Set both to the same."
            )
        )
    if learner.gradient_checkpointing:
        found.append(
            Problem(
                "learner.layout=depth_first computes activations again by itself, so "
                "learner.gradient_checkpointing=true would only do it twice. Use learner.gradient_checkpointing=false."
            )
        )
    return found


def processes_have_devices(cfg: Config) -> list[Problem]:
    """A learner process has a GPU of its own where there are GPUs; on a CPU its threads need cores."""
    learner, gpus, cores = cfg.learner, num_gpus(), num_cores()
    if cfg.cluster.address or learner.num_processes == 1:
        return []
    if 0 < gpus < learner.num_processes:
        return [
            Problem(
                f"learner.num_processes={learner.num_processes}, but there are {gpus} GPUs and each process needs one "
                f"of its own. Use learner.num_processes={gpus} or fewer."
            )
        ]
    threads = learner.num_processes * learner.num_threads
    if gpus or threads <= cores:
        return []
    return [
        Problem(
            f"learner.num_processes={learner.num_processes} of learner.num_threads={learner.num_threads} want "
            f"{threads} cores and there are {cores}: they will slow each other down. Use learner.num_threads="
            f"{max(1, cores // learner.num_processes)}.",
            fatal=False,
        )
    ]


def offload_has_a_gpu(cfg: Config) -> list[Problem]:
    """There is nothing to offload from on a CPU."""
    if not cfg.learner.offload or num_gpus() or cfg.cluster.address:
        return []
    return [
        Problem(
            "learner.offload=true moves weights and moments from a GPU to the host's memory, and there is no GPU. Use "
            "learner.offload=false."
        )
    ]


def adapters_have_targets(cfg: Config) -> list[Problem]:
    """Adapters sit somewhere."""
    if not cfg.model.lora.rank or cfg.model.lora.targets:
        return []
    return [
        Problem(
            f"model.lora.rank={cfg.model.lora.rank} but model.lora.targets is empty: no layer would get an adapter and "
            "nothing would be trained. Use model.lora.targets=[all-linear], or name layers such as q_proj."
        )
    ]
