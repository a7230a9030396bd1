import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conf.errors import CheckpointError
from rl import checkpoint
from rl.checkpoint import Checkpoint, best, checkpoints, damage, load_state, newest, save, success_of


def write_weights(folder: Path) -> None:
    save_file({"weight": torch.arange(4.0)}, folder / "model.safetensors")


def steps_in(root: Path) -> list[int]:
    return [found.step for found in checkpoints(root)]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = save(tmp_path, 20, write_weights, {"step": 20, "seconds": 1.5}, keep=2)
    assert saved == Checkpoint(tmp_path / "step_000020", 20)
    assert newest(tmp_path) == saved
    assert load_state(saved) == {"step": 20, "seconds": 1.5}
    assert torch.equal(load_file(saved.path / "model.safetensors")["weight"], torch.arange(4.0))


def test_there_is_none_before_the_first(tmp_path):
    assert newest(tmp_path / "never_made") is None


def test_nothing_but_whole_checkpoints_stays_in_the_folder(tmp_path):
    (tmp_path / ".unfinished_step_000009").mkdir()
    save(tmp_path, 10, write_weights, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000010"]


def test_files_in_subfolders_are_checksummed_too(tmp_path):
    def write(folder: Path) -> None:
        (folder / "optimizer").mkdir()
        torch.save({"lr": torch.tensor(0.1)}, folder / "optimizer" / "state.pt")

    saved = save(tmp_path, 1, write, {}, keep=1)
    (saved.path / "optimizer" / "state.pt").write_bytes(b"something else")
    assert "optimizer/state.pt has 14 bytes" in (damage(saved) or "")


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, write_weights, {}, keep=2)
    assert steps_in(tmp_path) == [30, 40]


def test_the_best_by_held_out_success_are_kept_beside_the_newest(tmp_path):
    for step, success in ((10, 0.5), (20, 0.9), (30, 0.7), (40, None), (50, 0.6)):
        save(tmp_path, step, write_weights, {}, keep=1, keep_best=2, success=success)
    assert steps_in(tmp_path) == [20, 30, 50]
    found = best(tmp_path)
    assert found is not None and (found.step, success_of(found)) == (20, 0.9)


def test_of_equally_good_checkpoints_the_newest_is_the_best(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, write_weights, {}, keep=3, success=0.5)
    assert getattr(best(tmp_path), "step", None) == 30


def test_a_damaged_best_gives_way_to_the_next(tmp_path, caplog):
    save(tmp_path, 10, write_weights, {}, keep=2, success=0.5)
    flip_a_byte(save(tmp_path, 20, write_weights, {}, keep=2, success=0.9).path / "model.safetensors")
    assert getattr(best(tmp_path), "step", None) == 10
    assert "the next best is used" in caplog.text


def test_without_an_evaluation_none_is_the_best(tmp_path):
    save(tmp_path, 10, write_weights, {}, keep=1, keep_best=3)
    assert best(tmp_path) is None


def test_a_checkpoint_of_an_older_format_is_refused_with_a_way_out(tmp_path):
    saved = save(tmp_path, 10, write_weights, {}, keep=1)
    manifest = json.loads((saved.path / "manifest.json").read_text())
    del manifest["format"]
    (saved.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"of format 1 and this version of Grove reads format 2.*model\.path=.*model"
    ):
        load_state(saved)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 10, write_weights, {"try": 1}, keep=2)
    saved = save(tmp_path, 10, write_weights, {"try": 2}, keep=2)
    assert load_state(saved) == {"try": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step_000010"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    saved = save(tmp_path, 10, write_weights, {"try": 1}, keep=1)
    saved.path.rename(tmp_path / "step_000010.replaced")
    found = newest(tmp_path)
    assert found is not None
    assert load_state(found) == {"try": 1}
    save(tmp_path, 20, write_weights, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000020"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda folder: flip_a_byte(folder / "model.safetensors"), "model.safetensors does not match its checksum"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5), "model.safetensors has 5 bytes"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(tmp_path, caplog, spoil, why):
    before = save(tmp_path, 10, write_weights, {}, keep=2)
    spoil(save(tmp_path, 20, write_weights, {}, keep=2).path)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == before
    assert "step_000020" in caplog.text
    assert why in caplog.text


def test_a_damaged_one_of_an_abandoned_future_never_outlives_a_good_one(tmp_path):
    save(tmp_path, 20, write_weights, {}, keep=1)
    future = tmp_path / "step_000040"
    shutil.copytree(tmp_path / "step_000020", future)
    flip_a_byte(future / "model.safetensors")
    save(tmp_path, 30, write_weights, {}, keep=1)
    assert steps_in(tmp_path) == [30]


def fill_the_disk(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.safetensors"))


def fill_a_device(folder: Path) -> None:
    # opened, never renamed onto: safetensors, as root, would replace the device by a file
    with open("/dev/full", "r+b", buffering=0) as file:  # noqa: PTH123
        file.write(b"x" * 100)


def fill_under_torch_save(folder: Path) -> None:
    with open("/dev/full", "r+b", buffering=0) as file:  # noqa: PTH123
        torch.save({"weight": torch.zeros(1000)}, file)


def fill_under_safetensors(folder: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fill_under_torch_in_an_actor(folder: Path) -> None:
    raise RuntimeError(
        "ray::save()\n  File ...\nRuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos"
    )


FILLERS = [
    fill_the_disk,
    fill_a_device,
    fill_under_torch_save,
    fill_under_safetensors,
    fill_under_torch_in_an_actor,
]


@pytest.mark.parametrize("write", FILLERS)
def test_a_full_disk_says_what_survives_and_leaves_nothing_half_written(tmp_path, write):
    if write in (fill_a_device, fill_under_torch_save) and not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    last = save(tmp_path, 10, write_weights, {"step": 10}, keep=1)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 20, write, {}, keep=1)
    text = str(caught.value)
    assert f"checkpoint of step 20 could not be written to {tmp_path}" in text
    assert "\n" not in text
    assert "bytes are needed" in text
    assert "are free" in text
    assert f"{last.path} (step 10); run.resume=true uses it" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step_000010"]
    assert newest(tmp_path) == last


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none_earlier(tmp_path):
    with pytest.raises(CheckpointError, match=r"more than 100 bytes are needed.*There is no earlier checkpoint"):
        save(tmp_path, 20, fill_the_disk, {}, keep=1)


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1, write_weights, {}, keep=1)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_what_is_not_the_disks_fault_keeps_its_name_and_leaves_nothing(tmp_path, error):
    def write(folder: Path) -> None:
        write_weights(folder)
        raise error

    with pytest.raises(type(error)):
        save(tmp_path, 20, write, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_back_other_bytes_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 10, write_weights, {}, keep=1)
    put_in_place = checkpoint._put_in_place

    def put_and_rot(unfinished: Path, root: Path, step: int) -> Checkpoint:
        placed = put_in_place(unfinished, root, step)
        flip_a_byte(placed.path / "model.safetensors")
        return placed

    monkeypatch.setattr(checkpoint, "_put_in_place", put_and_rot)
    with pytest.raises(CheckpointError, match="reads back differently"):
        save(tmp_path, 20, write_weights, {}, keep=1)
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 10


def test_state_that_was_edited_is_refused(tmp_path):
    saved = save(tmp_path, 10, write_weights, {"step": 10}, keep=1)
    (saved.path / "state.json").write_text(json.dumps({"step": 11}))
    with pytest.raises(CheckpointError, match=r"state.json does not match its checksum"):
        load_state(saved)


def test_state_of_a_folder_that_is_gone_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(Checkpoint(tmp_path / "step_000010", 10))
