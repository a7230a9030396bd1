from __future__ import annotations

import pytest

from conf.errors import ConfigError
from conf.schema import Config
from rl.launch import GpuShare, gpu_share


def config(workers: int, tensor_parallel: int = 1) -> Config:
    cfg = Config()
    cfg.rollout.num_workers, cfg.rollout.tensor_parallel_size = workers, tensor_parallel
    cfg.rollout.gpu_memory_share = 0.9
    return cfg


def test_without_gpus_nobody_gets_one():
    assert gpu_share(config(2), 0) == GpuShare(per_worker=0, learner=0, memory_share=0.9)


def test_with_enough_gpus_everyone_has_whole_ones():
    # 2 engines of 2 GPUs and a learner: 5
    assert gpu_share(config(2, 2), 5) == GpuShare(per_worker=2, learner=1, memory_share=0.9)


def test_a_single_gpu_is_dealt_out_in_equal_parts():
    # 2 engines and a learner on 1 GPU: a third each, and a third of 0.9 of the memory
    share = gpu_share(config(2), 1)
    assert (share.per_worker, share.learner) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert share.memory_share == pytest.approx(0.3)


def test_two_gpus_hold_two_parts_each():
    # 3 engines and a learner on 2 GPUs
    assert gpu_share(config(3), 2).per_worker == pytest.approx(1 / 2)


def test_an_engine_that_spans_gpus_does_not_share_them():
    with pytest.raises(ConfigError, match="need 5 GPUs, and there are 4"):
        gpu_share(config(2, 2), 4)
