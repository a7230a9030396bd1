from __future__ import annotations

import pytest

from conf import check_learner
from conf.check_learner import (
    adapters_have_targets,
    depth_first_is_alone,
    dtypes_are_known,
    layout_fits_the_device,
    offload_has_a_gpu,
    processes_have_devices,
    weights_are_wide_enough,
)
from conf.problem import Problem
from conf.schema import Config, Layout


def config(**learner: object) -> Config:
    cfg = Config()
    for name, value in learner.items():
        setattr(cfg.learner, name, value)
    return cfg


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def of(gpus: int, cores: int = 2) -> None:
        monkeypatch.setattr(check_learner, "num_gpus", lambda: gpus)
        monkeypatch.setattr(check_learner, "num_cores", lambda: cores)

    return of


def only(found: list[Problem]) -> str:
    assert len(found) == 1, found
    return found[0].text


def test_an_unknown_type_is_named_with_the_nearest():
    cfg = config(weights_dtype="float23")
    assert 'learner.weights_dtype="float23" is none of' in only(dtypes_are_known(cfg))
    cfg = Config()
    cfg.model.dtype = "bfloat61"
    assert "bfloat16" in only(dtypes_are_known(cfg))


def test_weights_may_be_wider_than_what_is_computed_in_and_not_narrower():
    cfg = config(weights_dtype="bfloat16")
    assert "Use learner.weights_dtype=float32" in only(weights_are_wide_enough(cfg))
    cfg.model.dtype = "bfloat16"
    assert weights_are_wide_enough(cfg) == []
    cfg.learner.weights_dtype = "float32"
    assert weights_are_wide_enough(cfg) == []


@pytest.mark.parametrize("layout", [Layout.flex, Layout.varlen])
def test_layouts_for_gpus_are_refused_without_one(layout: Layout, machine):
    machine(gpus=0)
    assert "Use learner.layout=auto" in only(layout_fits_the_device(config(layout=layout)))
    machine(gpus=1)
    assert layout_fits_the_device(config(layout=layout)) == []


def test_depth_first_is_refused_where_ranks_would_wait_for_each_other():
    cfg = config(layout=Layout.depth_first)
    assert depth_first_is_alone(cfg) == []
    cfg.learner.num_processes = 2
    assert "wait for each other for ever" in only(depth_first_is_alone(cfg))


def test_depth_first_is_refused_with_a_second_recomputation_and_with_two_types():
    assert "gradient_checkpointing=false" in only(
        depth_first_is_alone(config(layout=Layout.depth_first, gradient_checkpointing=True))
    )
    cfg = config(layout=Layout.depth_first)
    cfg.model.dtype = "bfloat16"
    assert "Set both to the same" in only(depth_first_is_alone(cfg))


def test_every_learner_process_needs_a_gpu_of_its_own_where_there_are_gpus(machine):
    machine(gpus=2)
    assert "Use learner.num_processes=2" in only(processes_have_devices(config(num_processes=4)))
    assert processes_have_devices(config(num_processes=2)) == []


def test_more_threads_than_cores_is_a_warning(machine):
    machine(gpus=0, cores=2)
    (problem,) = processes_have_devices(config(num_processes=2, num_threads=2))
    assert not problem.fatal
    assert "learner.num_threads=1" in problem.text
    assert processes_have_devices(config(num_processes=2, num_threads=1)) == []


def test_offload_is_refused_without_a_gpu(machine):
    machine(gpus=0)
    assert "learner.offload=false" in only(offload_has_a_gpu(config(offload=True)))


def test_adapters_without_a_layer_to_sit_in_are_refused():
    cfg = Config()
    cfg.model.lora.rank, cfg.model.lora.targets = 8, []
    assert "nothing would be trained" in only(adapters_have_targets(cfg))
