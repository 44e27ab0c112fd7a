"""Nothing is lost: exact resume, whole checkpoints, signals, full disks, and losses that are not finite."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import train_dreambooth_lora_z_image as trainer
from kill_test import bit_identical, class_pictures, everything, kill_again_and_again, write_captions
from running import LAUNCHER_FLAGS, SCRIPT, error_line, fork_trainer, launch_distributed, training_environment
from tiny import build_tiny_pipeline, lora_tensors, train_args


LORA, STATE = "pytorch_lora_weights.safetensors", "training_state.pt"


@pytest.fixture
def captioned(photos):
    write_captions(photos)
    return photos


@pytest.fixture
def classes(photos, tmp_path):
    return class_pictures(photos, tmp_path / "classes")


@pytest.fixture
def fork(tmp_path):
    """Runs the trainer in a forked process: `fork(*flags)`, or `fork(flags, ...)` with those of `fork_trainer`."""

    def run(argv, *more, **kwargs):
        return fork_trainer(*argv, *more, log=tmp_path / "log.txt", **kwargs)

    return run


@pytest.fixture(scope="module")
def shared_run(tiny_model, shared_photos, tmp_path_factory):
    """A finished run of four updates with a checkpoint after each: copy it, never write to it."""
    folder = tmp_path_factory.mktemp("shared")
    argv = train_args(tiny_model, shared_photos, folder / "out", **SHORT)
    fork_trainer(*argv, log=folder / "log.txt")
    return folder / "out"


SHORT = {"max_train_steps": 4, "checkpointing_steps": 1}


@pytest.fixture
def stopped_run(shared_run, tmp_path):
    """Like `shared_run`, as if it had been stopped after its third update."""
    out = tmp_path / "out"
    for step in (1, 2, 3):
        shutil.copytree(shared_run / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out


@pytest.fixture
def until_encoding(monkeypatch, capsys):
    """Runs the trainer in this process up to the point where it would load the first weights; gives what it said."""

    class Reached(Exception):
        pass

    def stop(*args, **kwargs):
        raise Reached

    def run(argv):
        with pytest.raises(Reached):
            trainer.main(trainer.parse_args([str(part) for part in argv]))
        return capsys.readouterr().err

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(trainer, "encode_prompts", stop)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def checkpoints(out):
    """The numbers of the checkpoint folders there are, in order."""
    return sorted(int(path.name[11:]) for path in Path(out).glob("checkpoint-*") if path.name[11:].isdecimal())


def snapshot(folder):
    """The bytes and times of all files under a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume
# ---------------------------------------------------------------------------------------------------------------------

RUNS = {  # two updates to an epoch: checkpoints 1 and 3 are amid one, 2 and 4 at its edge
    "everything, AdamW, fp32": {},
    "everything, AdamW, bf16": {"mixed_precision": "bf16"},
    "everything, 8-bit AdamW, fp32": {"use_8bit_adam": True, "rank": 96},  # smaller matrices stay in 32 bits
    "everything, 8-bit AdamW, bf16": {"use_8bit_adam": True, "rank": 96, "mixed_precision": "bf16"},
    "everything, Prodigy, fp32": {"optimizer": "prodigy", "learning_rate": 1.0},
    "everything, Prodigy, bf16": {"optimizer": "prodigy", "learning_rate": 1.0, "mixed_precision": "bf16"},
    "cached latents": {"cache_latents": True, "weighting_scheme": "logit_normal"},
    "one picture at a time": {
        "aspect_ratio_buckets": None,
        "with_prior_preservation": False,
        "class_data_dir": None,
        "class_prompt": None,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 3,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": True,
        "lr_scheduler": "cosine_with_restarts",
        "lr_num_cycles": 2,
    },
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_run_resumed_amid_an_epoch_and_at_its_edge_ends_in_the_same_bits(
    flags, tiny_model, captioned, classes, tmp_path, fork
):
    flags = {"max_train_steps": 5, **flags}
    fork(everything(tiny_model, captioned, classes, tmp_path / "whole", **flags))
    for step in (2, 3):
        out = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
        resumed = fork(everything(tiny_model, captioned, classes, out, **flags), "--resume_from_checkpoint=latest")
        assert f"step {step + 1}/5" in resumed.output
        assert bit_identical(out, tmp_path / "whole"), f"resumed after update {step}"


def test_a_resumed_run_remembers_every_held_out_loss(tiny_model, photos, tmp_path, fork):
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for path in sorted(photos.iterdir())[:2]:
        shutil.move(path, held_out)
    flags = {
        **SHORT,
        "validation_data_dir": held_out,
        "validation_epochs": 1,
        "train_batch_size": 6,
        "save_best": True,
    }
    whole = fork(train_args(tiny_model, photos, tmp_path / "whole", **flags))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    shutil.copytree(tmp_path / "whole" / "best", tmp_path / "out" / "best")
    fork(train_args(tiny_model, photos, tmp_path / "out", **flags), "--resume_from_checkpoint=latest")
    assert "held-out loss" in whole.output
    histories = [
        torch.load(tmp_path / out / "checkpoint-4" / STATE, weights_only=True)["held_out"] for out in ("whole", "out")
    ]
    assert histories[0] == histories[1] and len(histories[0]) >= 3


def test_weights_move_in_every_update_of_the_runs_that_are_compared(shared_run):
    steps = [load_file(shared_run / f"checkpoint-{step}" / LORA) for step in (1, 2, 3, 4)]
    for earlier, later in zip(steps, steps[1:]):
        assert not any(torch.equal(earlier[name], later[name]) for name in earlier)


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tiny_model, captioned, classes, tmp_path):
    def argv(out):
        return everything(tiny_model, captioned, classes, out, max_train_steps=10, checkpointing_steps=2)

    killed, resumes, results = kill_again_and_again(3, 3, tmp_path, argv)
    assert killed.total() == 3 and resumes >= 1
    assert results == [True] * len(results)


@pytest.mark.slow
def test_a_real_launch_killed_while_it_trains_is_resumed_to_the_same_bits(tiny_model, photos, shared_run, tmp_path):
    argv = train_args(tiny_model, photos, tmp_path / "out", **SHORT, resume_from_checkpoint="latest")
    log = tmp_path / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *argv], env=training_environment({"ACCELERATE_USE_CPU": "1"}), stderr=file
        )
    deadline = time.monotonic() + 120
    while process.poll() is None and not list((tmp_path / "out").glob("checkpoint-*")):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert checkpoints(tmp_path / "out")
    fork_trainer(*argv)
    assert bit_identical(tmp_path / "out", shared_run)


SPLITS = {"4 at once": (4, 1), "2 x 2": (2, 2), "1 x 4": (1, 4)}


def nearly_equal(one, other, start):
    """Whether two LoRAs differ by less than a thousandth of the way that training has taken from `start`."""
    way = sum((one[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((one[name] - other[name]).square().sum() for name in start).sqrt()
    assert way > 0
    return apart < 1e-3 * way


def split_args(split, model, photos, out, **flags):
    batch, accumulation = SPLITS[split]
    flags = {"use_aspect_ratio_buckets": True, "caption_dropout": 0.3, "random_flip": True, **flags}
    return train_args(
        model, photos, out, train_batch_size=batch, gradient_accumulation_steps=accumulation, **SHORT, **flags
    )


@pytest.mark.parametrize("split", ["2 x 2", "1 x 4"])
def test_a_run_resumed_with_another_split_of_the_batch_ends_in_the_same_weights(
    split, tiny_model, captioned, tmp_path, fork
):
    fork(split_args("4 at once", tiny_model, captioned, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    fork(split_args(split, tiny_model, captioned, tmp_path / "out"), "--resume_from_checkpoint=latest")
    start = load_file(tmp_path / "whole" / "checkpoint-2" / LORA)
    assert nearly_equal(lora_tensors(tmp_path / "whole"), lora_tensors(tmp_path / "out"), start)


@pytest.mark.slow
def test_a_run_resumed_with_two_processes_ends_in_the_same_weights(tiny_model, captioned, tmp_path, fork):
    fork(split_args("2 x 2", tiny_model, captioned, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    flags = train_args(
        tiny_model,
        captioned,
        tmp_path / "out",
        train_batch_size=2,
        use_aspect_ratio_buckets=True,
        caption_dropout=0.3,
        random_flip=True,
        resume_from_checkpoint="latest",
        **SHORT,
    )
    launch_distributed(2, *flags)
    start = load_file(tmp_path / "whole" / "checkpoint-2" / LORA)
    assert nearly_equal(lora_tensors(tmp_path / "whole"), lora_tensors(tmp_path / "out"), start)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint is taken
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", "/"])
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_checkpoint_is_resumed_by_its_path(
    place, ending, stopped_run, shared_run, tiny_model, photos, tmp_path, fork
):
    path = stopped_run / "checkpoint-2"
    if place == "outside":
        shutil.move(stopped_run, tmp_path / "elsewhere")
        path = tmp_path / "elsewhere" / "checkpoint-2"
    argv = train_args(tiny_model, photos, stopped_run, **SHORT)
    finished = fork(argv, f"--resume_from_checkpoint={path}{ending}")
    assert "step 3/4" in finished.output
    assert bit_identical(stopped_run, shared_run)


def test_a_checkpoint_is_resumed_by_its_name_alone(stopped_run, shared_run, tiny_model, photos, fork):
    finished = fork(
        train_args(tiny_model, photos, stopped_run, **SHORT), "--resume_from_checkpoint=checkpoint-2", timeout=60
    )
    assert "step 3/4" in finished.output
    assert bit_identical(stopped_run, shared_run)


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated state": lambda path: truncate(path / STATE),
    "truncated LoRA": lambda path: truncate(path / LORA),
    "bit flipped in the LoRA": lambda path: flip_a_bit(path / LORA, 0.9),
    "bit flipped in the state": lambda path: flip_a_bit(path / STATE, 0.9),
    "no LoRA": lambda path: (path / LORA).unlink(),
    "manifest cut": lambda path: truncate(path / "manifest.json"),
    "manifest empty": lambda path: (path / "manifest.json").write_bytes(b""),
    "manifest not JSON": lambda path: (path / "manifest.json").write_text("step 3"),
    "manifest not UTF-8": lambda path: (path / "manifest.json").write_bytes(b'{"step": "\xff"}'),
    "manifest a number": lambda path: (path / "manifest.json").write_text("3"),
    "manifest an empty object": lambda path: (path / "manifest.json").write_text("{}"),
    "manifest without a run": lambda path: (path / "manifest.json").write_text('{"files": {}}'),
    "manifest with a list of files": lambda path: (path / "manifest.json").write_text('{"files": []}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_latest_names_a_damaged_checkpoint_and_takes_the_one_before(damage, stopped_run, until_encoding, monkeypatch):
    damage(stopped_run / "checkpoint-3")
    args = trainer.parse_args(train_args("m", "d", stopped_run, resume_from_checkpoint="latest"))
    messages = []
    monkeypatch.setattr(trainer.logger, "warning", messages.append)
    assert trainer.find_checkpoint(args).path == stopped_run / "checkpoint-2"
    assert len(messages) == 1 and str(stopped_run / "checkpoint-3") in messages[0]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_given_by_path_is_refused_by_name(damage, stopped_run):
    path = stopped_run / "checkpoint-3"
    damage(path)
    args = trainer.parse_args(train_args("m", "d", stopped_run, resume_from_checkpoint=path))
    with pytest.raises(trainer.UserError, match=re.escape(str(path))):
        trainer.find_checkpoint(args)


def test_a_manifest_that_was_changed_is_found_out(stopped_run):
    path = stopped_run / "checkpoint-3"
    content = (path / "manifest.json").read_text("utf-8")
    (path / "manifest.json").write_text(content.replace('"step": 3', '"step": 2'), "utf-8")
    with pytest.raises(trainer.UserError, match=re.escape(str(path))):
        trainer.read_checkpoint(path)


def test_a_run_whose_newest_checkpoint_is_damaged_still_ends_in_the_same_bits(
    stopped_run, shared_run, tiny_model, photos, fork
):
    truncate(stopped_run / "checkpoint-3" / STATE)
    finished = fork(train_args(tiny_model, photos, stopped_run, **SHORT), "--resume_from_checkpoint=latest")
    assert "Passed over" in finished.output and "checkpoint-3 is damaged" in finished.output
    assert bit_identical(stopped_run, shared_run)
    assert trainer.read_checkpoint(stopped_run / "checkpoint-3").step == 3  # written anew


def test_latest_starts_anew_where_there_is_no_checkpoint(tiny_model, photos, shared_run, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out", **SHORT)
    finished = fork(argv, "--resume_from_checkpoint=latest")
    assert "no complete checkpoint; starting anew" in finished.output
    assert bit_identical(tmp_path / "out", shared_run)


def test_a_path_that_is_no_checkpoint_is_refused_by_name(tiny_model, photos, tmp_path):
    for path in (tmp_path / "nothing", photos):
        argv = train_args(tiny_model, photos, tmp_path / "out", resume_from_checkpoint=path)
        with pytest.raises(trainer.UserError, match=re.escape(str(path))):
            trainer.find_checkpoint(trainer.parse_args(argv))


FOREIGN = ("checkpoint-best", "checkpoint-foo", "checkpoint-", "checkpoint-1.5", "checkpoint--7", "old-checkpoint-9")


def test_foreign_folders_and_files_do_no_harm_and_stay(stopped_run, shared_run, tiny_model, photos, fork):
    for name in FOREIGN:
        (stopped_run / name).mkdir()
        (stopped_run / name / "notes.txt").write_text(name)
    (stopped_run / "checkpoint-99").write_text("a file, not a folder")
    argv = train_args(tiny_model, photos, stopped_run, **SHORT, checkpoints_total_limit=1)
    finished = fork(argv, "--resume_from_checkpoint=latest")
    assert "step 4/4" in finished.output and "Passed over" not in finished.output
    assert bit_identical(stopped_run, shared_run)
    assert [(stopped_run / name / "notes.txt").read_text() for name in FOREIGN] == list(FOREIGN)
    assert (stopped_run / "checkpoint-99").is_file()


@pytest.mark.parametrize("limit", [1, 2])
def test_only_the_newest_checkpoints_are_kept(limit, tiny_model, photos, tmp_path, fork):
    fork(train_args(tiny_model, photos, tmp_path / "out", **SHORT, checkpoints_total_limit=limit))
    assert checkpoints(tmp_path / "out") == [1, 2, 3, 4][-limit:]


def test_all_checkpoints_are_kept_without_a_limit(shared_run):
    assert checkpoints(shared_run) == [1, 2, 3, 4]


def test_an_older_checkpoint_goes_only_after_the_new_one_stands(tiny_model, photos, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out", **SHORT, checkpoints_total_limit=1)
    finished = fork(argv, before=count_whole_checkpoints_at_every_change)
    counts = [int(line.split()[1]) for line in finished.output.splitlines() if line.startswith("whole: ")]
    assert len(counts) > 3 and min(counts) >= 1


def count_whole_checkpoints_at_every_change(trainer):
    save_checkpoint, folders = trainer.save_checkpoint, []

    def save(state, fingerprint, run):
        save_checkpoint(state, fingerprint, run)
        folders.append(run.args.output_dir)

    def counted(change):
        def call(*paths, **kwargs):
            change(*paths, **kwargs)
            if folders and "checkpoint-" in str(paths):
                print("whole:", sum((path / STATE).is_file() for path in trainer.list_checkpoints(folders[0])))

        return call

    trainer.save_checkpoint, os.replace, os.unlink = save, counted(os.replace), counted(os.unlink)


def test_the_checkpoint_just_saved_is_never_the_one_that_the_limit_removes(
    stopped_run, shared_run, tiny_model, photos, fork
):
    (stopped_run / "checkpoint-100").mkdir()  # newer by its number, and worth nothing
    argv = train_args(tiny_model, photos, stopped_run, **SHORT, checkpoints_total_limit=1)
    fork(argv, "--resume_from_checkpoint=latest")
    assert 4 in checkpoints(stopped_run)
    assert trainer.read_checkpoint(stopped_run / "checkpoint-4").step == 4


def test_nothing_in_a_checkpoint_can_execute_code(shared_run):
    for path in (shared_run / "checkpoint-4").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        else:
            load_file(path) if path.name == LORA else torch.load(path, weights_only=True)


def test_a_resumed_run_unpickles_nothing_but_tensors_and_plain_values(stopped_run, tiny_model, photos, fork):
    argv = train_args(tiny_model, photos, stopped_run, **SHORT)
    finished = fork(argv, "--resume_from_checkpoint=latest", before=note_what_is_unpickled)
    assert f"unpickled: {STATE}, weights only: True" in finished.output
    assert "weights only: False" not in finished.output


def note_what_is_unpickled(trainer):
    load = torch.load

    def note(file, *args, weights_only=False, **kwargs):
        print(f"unpickled: {Path(file).name}, weights only: {weights_only}")
        return load(file, *args, weights_only=weights_only, **kwargs)

    torch.load = note


def sign_manifest(checkpoint):
    """Makes the manifest of a checkpoint that of the files as they are."""
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    for name in manifest["files"]:
        manifest["files"][name] = trainer.digest_of((checkpoint / name).read_bytes())
    del manifest["digest"]
    manifest = {"digest": trainer.digest_of(json.dumps(manifest)), **manifest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_an_adapter_of_another_model_in_a_checkpoint_is_refused(stopped_run, tiny_model, photos, fork):
    path = stopped_run / "checkpoint-3"
    state = load_file(path / LORA)
    save_file({name: torch.cat([tensor, tensor], dim=0) for name, tensor in state.items()}, path / LORA)
    sign_manifest(path)
    argv = train_args(tiny_model, photos, stopped_run, **SHORT, resume_from_checkpoint=path)
    error_line(fork(argv, check=False), path)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all
# ---------------------------------------------------------------------------------------------------------------------


def watch_writes(note):
    """Has `note(what, path)` called before everything that writes to the disk, and again, with "after", behind it."""

    def watched(function, name):
        def call(*args, **kwargs):
            writes = name != "open" or any(
                c in str(kwargs.get("mode", args[1] if len(args) > 1 else "r")) for c in "wax"
            )
            if writes:
                note(name, "before")
            result = function(*args, **kwargs)
            if writes:
                note(name, "after")
            return result

        return call

    import io

    for name in ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name), name))
    io.open = watched(io.open, "open")
    safetensors.torch.serialize_file = watched(safetensors.torch.serialize_file, "safetensors")


def break_each_write(trainer):
    """In the second checkpoint, has each write fail in turn, and prints what is left on the disk each time."""
    save_checkpoint, place = trainer.save_checkpoint, {"calls": 0, "failing": None}

    def note(name, when):
        if when == "before" and place["failing"] is not None:
            place["calls"] += 1
            if place["calls"] == place["failing"]:
                place["name"] = name
                raise OSError(errno.ENOSPC, "No space left on device")

    def save(state, fingerprint, run):
        out = Path(run.args.output_dir)
        for failing in range(1, 100) if state.step == 2 else ():
            place.update(calls=0, failing=failing, name=None)
            save_checkpoint(state, fingerprint, run)
            place["failing"] = None
            print("broken:", json.dumps([place["name"], sorted(path.name for path in out.iterdir())]))
            for path in trainer.list_checkpoints(out):
                trainer.read_checkpoint(path)
            if place["name"] is None:
                return
            shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
        save_checkpoint(state, fingerprint, run)

    watch_writes(note)
    trainer.save_checkpoint = save


def test_a_checkpoint_is_whole_or_absent_whichever_write_fails(tiny_model, photos, shared_run, tmp_path, fork):
    out = tmp_path / "out"
    finished = fork(train_args(tiny_model, photos, out, **SHORT), before=break_each_write)
    broken = [json.loads(line[8:]) for line in finished.output.splitlines() if line.startswith("broken: ")]
    assert {name for name, _ in broken} >= {"mkdir", "safetensors", "open", "fsync", "replace", None}
    for _, left in broken:
        folders = [name for name in left if name not in ("comfyui", "run.json", ".run.json.part")]
        assert folders in (["checkpoint-1"], ["checkpoint-1", "checkpoint-2"])
    said = [line for line in finished.output.splitlines() if "could not be saved" in line]
    failed = [left for name, left in broken if name and "checkpoint-2" not in left]
    assert len(said) >= len(failed) > 5
    assert all("checkpoint-2" in line and "No space left" in line for line in said)
    assert bit_identical(out, shared_run)  # and training went on


def refuse_to_remove(trainer):
    """Files of checkpoints cannot be removed."""
    unlink = os.unlink

    def fail(path, **kwargs):
        if Path(path).name == STATE:
            raise OSError(errno.EROFS, "Read-only file system")
        unlink(path, **kwargs)

    os.unlink = fail


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tiny_model, photos, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out", **SHORT, checkpoints_total_limit=1)
    finished = fork(argv, before=refuse_to_remove, check=False)
    assert finished.returncode == 0, str(finished)
    assert "Read-only file system" in finished.output
    assert checkpoints(tmp_path / "out") == [1, 2, 3, 4]


def kill_at_each_write(trainer):
    """Saves the second checkpoint in forked processes that are killed before and after each write in turn."""
    save_checkpoint, place = trainer.save_checkpoint, {"calls": 0, "killing": None}

    def note(name, when):
        if place["killing"] is not None:
            place["calls"] += 1
            if place["calls"] == place["killing"]:
                os.kill(os.getpid(), signal.SIGKILL)

    def save(state, fingerprint, run):
        out = Path(run.args.output_dir)
        for killing in range(1, 200) if state.step == 2 else ():
            child = os.fork()
            if child == 0:
                place.update(calls=0, killing=killing)
                save_checkpoint(state, fingerprint, run)
                os._exit(0)
            killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            whole = []
            for path in trainer.list_checkpoints(out):  # of one that is half removed its manifest is there
                with contextlib.suppress(trainer.UserError):
                    whole.append(trainer.read_checkpoint(path).step)
            print("killed:", json.dumps([killed, sorted(whole)]))
            if not killed:
                return
            shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
            shutil.copytree(out.parent / "spare", out / "checkpoint-1", dirs_exist_ok=True)
        save_checkpoint(state, fingerprint, run)
        if state.step == 1:
            shutil.copytree(out / "checkpoint-1", out.parent / "spare")

    watch_writes(note)
    trainer.save_checkpoint = save


def test_a_checkpoint_is_whole_or_absent_wherever_saving_is_killed(tiny_model, photos, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out", **SHORT, checkpoints_total_limit=1)
    finished = fork(argv, before=kill_at_each_write)
    left = [json.loads(line[8:]) for line in finished.output.splitlines() if line.startswith("killed: ")]
    assert len(left) > 20 and [killed for killed, _ in left].count(False) == 1
    assert {tuple(whole) for _, whole in left} == {(1,), (1, 2), (2,)}  # not yet, before and after the old one went


def test_what_a_killed_process_left_half_written_or_half_removed_is_cleared_away(
    stopped_run, tiny_model, photos, fork
):
    shutil.copytree(stopped_run / "checkpoint-1", stopped_run / ".checkpoint-7.part")
    (stopped_run / "checkpoint-1" / STATE).unlink()
    argv = train_args(tiny_model, photos, stopped_run, **SHORT, checkpoints_total_limit=3)
    fork(argv, "--resume_from_checkpoint=latest")
    assert checkpoints(stopped_run) == [2, 3, 4] and not (stopped_run / ".checkpoint-7.part").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Disks that are full, folders that cannot be written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs a user who may mount a small tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_checkpoints_fail_in_one_line_and_the_run_goes_on(tiny_model, photos, small_disk, fork):
    argv = train_args(tiny_model, photos, small_disk / "out", **{**SHORT, "max_train_steps": 8})
    finished = fork(argv, before=no_result, check=False)
    assert finished.returncode == 0, str(finished)
    failed = [line for line in finished.output.splitlines() if "could not be saved" in line]
    saved = checkpoints(small_disk / "out")
    assert 0 < len(saved) < 8 and len(failed) == 8 - len(saved)
    assert all("No space left" in line for line in failed)
    assert "step 8/8" in finished.output
    for step in saved:
        trainer.read_checkpoint(small_disk / "out" / f"checkpoint-{step}")


def no_result(trainer):
    """The run ends where it would save the LoRA."""
    trainer.save_result = lambda *args: sys.exit(0)


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_full_disk_is_told_before_anything_is_loaded(tracker, tiny_model, photos, small_disk, fork):
    (small_disk / "filling").write_bytes(bytes(290_000))
    argv = train_args(tiny_model, photos, small_disk / "out", report_to=tracker)
    line = error_line(fork(argv, check=False, before=refuse_to_load))
    assert str(small_disk / "out") in line and "No space left" in line
    assert not [path for path in (small_disk / "out").rglob("*") if path.is_file()]


def fill_the_disk_while_saving(trainer):
    """Every safetensors file after the second checkpoint meets a full disk."""
    serialize = safetensors.torch.serialize_file

    def fail(tensors, path, *args, **kwargs):
        if any((folder / "checkpoint-2").exists() for folder in Path(path).parents):
            raise safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        return serialize(tensors, path, *args, **kwargs)

    safetensors.torch.serialize_file = fail


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints_and_ends_with_status_1(
    tiny_model, photos, shared_run, tmp_path, fork
):
    out = tmp_path / "out"
    argv = train_args(tiny_model, photos, out, **SHORT)
    finished = fork(argv, before=fill_the_disk_while_saving, check=False)
    assert str(out) in error_line(finished, status=1)
    assert finished.output.count("could not be saved") == 4  # two checkpoints, the LoRA, and so a last checkpoint
    assert checkpoints(out) == [1, 2]
    fork(argv, "--resume_from_checkpoint=latest")  # there is room again
    assert bit_identical(out, shared_run)


def test_an_output_folder_that_is_a_file_is_refused_before_weights_are_loaded(tiny_model, photos, tmp_path, fork):
    (tmp_path / "out").write_text("mine")
    finished = fork(train_args(tiny_model, photos, tmp_path / "out"), check=False, before=refuse_to_load)
    line = error_line(finished)
    assert "--output_dir" in line and str(tmp_path / "out") in line
    assert (tmp_path / "out").read_text() == "mine"


def refuse_to_load(trainer):
    def refuse(*args, **kwargs):
        raise AssertionError("weights are loaded")

    trainer.PipelineInfo.load = refuse


@pytest.mark.parametrize("flag", ["encoding_cache_dir", "logging_dir"])
def test_a_folder_for_output_that_is_a_file_is_refused_in_one_line(flag, tiny_model, photos, tmp_path, fork):
    (tmp_path / "file").write_text("mine")
    argv = train_args(tiny_model, photos, tmp_path / "out", report_to="tensorboard", **{flag: tmp_path / "file"})
    line = error_line(fork(argv, check=False))
    assert f"--{flag}" in line and str(tmp_path / "file") in line


def test_a_card_that_cannot_be_written_is_a_line_after_the_lora(tiny_model, photos, tmp_path, fork):
    for name in ("README.md", "model_card.md"):
        (tmp_path / "out" / name).mkdir(parents=True)
    finished = fork(train_args(tiny_model, photos, tmp_path / "out"))
    assert "The model card failed" in finished.output and "model_card.md" in finished.output
    assert (tmp_path / "out" / LORA).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


def signal_in_second_step(trainer, number, times=1):
    training_loss, calls = trainer.training_loss, []

    def loss(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return training_loss(*args, **kwargs)

    trainer.training_loss = loss


def send_sigterm(trainer):
    signal_in_second_step(trainer, signal.SIGTERM)


def send_sigint(trainer):
    signal_in_second_step(trainer, signal.SIGINT)


def send_sigterm_twice(trainer):
    signal_in_second_step(trainer, signal.SIGTERM, times=2)


def send_sigint_twice(trainer):
    signal_in_second_step(trainer, signal.SIGINT, times=2)


def send_sigterm_and_again_while_saving(trainer):
    signal_in_second_step(trainer, signal.SIGTERM)
    save_lora = trainer.save_lora

    def save(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return save_lora(*args, **kwargs)

    trainer.save_lora = save


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (send_sigterm, 143),
        (send_sigint, 130),
        (send_sigterm_twice, 143),
        (send_sigint_twice, 130),
        (send_sigterm_and_again_while_saving, 143),
    ],
)
def test_a_signal_lets_the_step_end_and_be_saved(send, status, tiny_model, photos, shared_run, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out", **{**SHORT, "checkpointing_steps": 500})
    finished = fork(argv, before=send, check=False)
    assert finished.returncode == status, str(finished)
    assert "Traceback" not in finished.output and "--resume_from_checkpoint latest" in finished.output
    assert checkpoints(tmp_path / "out") == [2]
    fork(argv, "--resume_from_checkpoint=latest")
    assert bit_identical(tmp_path / "out", shared_run)


def send_sigint_early_in_the_step(trainer):
    training_loss, calls = trainer.training_loss, []

    def loss(*args):
        calls.append(0)
        if len(calls) == 2:
            assert not psutil.Process().children()  # who would get it too, at a terminal
            os.kill(os.getpid(), signal.SIGINT)
        return training_loss(*args)

    trainer.training_loss = loss


def test_a_signal_lets_a_step_end_whose_pictures_have_not_all_been_read(tiny_model, photos, tmp_path, fork):
    flags = {"max_train_steps": 2, "repeats": 4, "gradient_accumulation_steps": 12, "dataloader_num_workers": 2}
    argv = train_args(tiny_model, photos, tmp_path / "out", **flags)
    finished = fork(argv, before=send_sigint_early_in_the_step, check=False)
    assert finished.returncode == 130, str(finished)
    assert "Traceback" not in finished.output
    assert checkpoints(tmp_path / "out") == [1]
    fork(argv, "--resume_from_checkpoint=latest")
    fork(train_args(tiny_model, photos, tmp_path / "whole", **flags))
    assert bit_identical(tmp_path / "out", tmp_path / "whole")


def interrupt_encoding(trainer):
    def encode(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    trainer.encode_prompts = encode


def test_an_interrupt_before_training_ends_without_a_traceback(tiny_model, photos, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out")
    finished = fork(argv, before=interrupt_encoding, check=False)
    assert finished.returncode == 130, str(finished)
    assert "Traceback" not in finished.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_alone_saves_a_checkpoint(number, tiny_model, photos, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = train_args(tiny_model, photos, out, max_train_steps=100_000)
    accelerate = Path(sys.executable).with_name("accelerate")
    with open(log, "wb") as file:
        launcher = subprocess.Popen(
            [accelerate, "launch", *LAUNCHER_FLAGS, SCRIPT, *argv],
            env=training_environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
    try:
        wait_until(lambda: "step 1/" in log.read_text("utf-8"), log)
        launcher.send_signal(number)
        launcher.wait(60)
        wait_until(lambda: checkpoints(out) and "Stopped." in log.read_text("utf-8"), log)
        (step,) = checkpoints(out)
        assert trainer.read_checkpoint(out / f"checkpoint-{step}").step == step
        wait_until(lambda: not group_lives(launcher.pid), log)
    finally:
        if group_lives(launcher.pid):
            os.killpg(launcher.pid, signal.SIGKILL)


def wait_until(condition, log, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, log.read_text("utf-8")
        time.sleep(0.02)


def group_lives(group):
    """Whether a process of the group is there that has not ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state not in "ZX":
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Other settings, finished runs, folders that hold a run
# ---------------------------------------------------------------------------------------------------------------------

CHANGES_THAT_STOP = {
    "rank": {"rank": 4},
    "lora_alpha": {"lora_alpha": 8},
    "lora_layers": {"lora_layers": "to_q"},
    "lora_dropout": {"lora_dropout": 0.1},
    "seed": {"seed": 1},
    "resolution": {"resolution": 128},
    "sizes": {"use_aspect_ratio_buckets": True},
    "repeats": {"repeats": 2},
    "batch size": {"train_batch_size": 2},
    "optimizer": {"optimizer": "prodigy"},
    "use_8bit_adam": {"use_8bit_adam": True},
    "adam_beta2": {"adam_beta2": 0.9},
    "adam_weight_decay": {"adam_weight_decay": 0.1},
    "caption_dropout": {"caption_dropout": 0.5},
    "random_flip": {"random_flip": True},
    "center_crop": {"center_crop": True},
    "cache_latents": {"cache_latents": True},
    "weighting_scheme": {"weighting_scheme": "cosmap"},
    "timestep_shift": {"timestep_shift": 3.0},
    "base_model_precision": {"base_model_precision": "int8"},
    "captions": {"instance_prompt": "a photo of another dog"},
}
CHANGES_THAT_WARN = {
    "learning_rate": {"learning_rate": 1e-5},
    "lr_scheduler": {"lr_scheduler": "linear"},
    "lr_warmup_steps": {"lr_warmup_steps": 1},
    "max_train_steps": {"max_train_steps": 9},
    "max_grad_norm": {"max_grad_norm": 0.5},
}
BASE = {**SHORT, "rank": 8}


@pytest.fixture(scope="module")
def rank_8_run(tiny_model, shared_photos, tmp_path_factory):
    """One update of a run of four: read it, never write to it."""
    folder = tmp_path_factory.mktemp("rank-8")
    flags = {**BASE, "max_train_steps": 1}
    fork_trainer(*train_args(tiny_model, shared_photos, folder / "out", **flags), log=folder / "log.txt")
    return folder / "out"


@pytest.mark.parametrize("change", CHANGES_THAT_STOP.values(), ids=CHANGES_THAT_STOP)
def test_a_run_is_not_resumed_with_other_mathematics(
    change, request, rank_8_run, tiny_model, shared_photos, until_encoding
):
    before = snapshot(rank_8_run)
    flags = {**BASE, **change, "resume_from_checkpoint": "latest"}
    name = request.node.callspec.id
    with pytest.raises(trainer.UserError, match=name) as error:
        trainer.main(trainer.parse_args(train_args(tiny_model, shared_photos, rank_8_run, **flags)))
    assert len(str(error.value).splitlines()) == 1
    assert snapshot(rank_8_run) == before


@pytest.mark.parametrize("change", CHANGES_THAT_WARN.values(), ids=CHANGES_THAT_WARN)
def test_a_harmless_change_is_said_and_the_run_goes_on(
    change, request, rank_8_run, tiny_model, shared_photos, until_encoding
):
    flags = {**BASE, **change, "resume_from_checkpoint": "latest"}
    said = until_encoding(train_args(tiny_model, shared_photos, rank_8_run, **flags))
    assert f"Resuming with a change: {request.node.callspec.id} was" in said


def test_a_run_is_not_resumed_with_a_base_adapter_that_it_did_not_have(
    rank_8_run, tiny_model, shared_photos, until_encoding
):
    flags = {**BASE, "base_adapter": rank_8_run / LORA, "resume_from_checkpoint": "latest"}
    with pytest.raises(trainer.UserError, match="base_adapter was None"):
        trainer.main(trainer.parse_args(train_args(tiny_model, shared_photos, rank_8_run, **flags)))


def test_a_run_is_not_resumed_with_other_weights_of_the_same_shape(
    rank_8_run, shared_photos, until_encoding, tmp_path
):
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(trainer.UserError, match="transformer was"):
        trainer.main(
            trainer.parse_args(train_args(other, shared_photos, rank_8_run, **BASE, resume_from_checkpoint="latest"))
        )


def test_a_seed_that_was_drawn_is_taken_from_the_checkpoint(rank_8_run, tiny_model, shared_photos, until_encoding):
    flags = {**BASE, "seed": None, "resume_from_checkpoint": "latest", "max_train_steps": 1}
    assert "drew" not in until_encoding(train_args(tiny_model, shared_photos, rank_8_run, **flags))


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced", "recaptioned"])
def test_a_run_is_not_resumed_with_other_data(change, rank_8_run, tiny_model, photos, until_encoding):
    cat = photos / "cat.png"
    if change == "removed":
        cat.unlink()
    elif change == "renamed":
        cat.rename(photos / "kitten.png")
    elif change == "replaced":  # another picture of the same size
        from PIL import Image, ImageOps

        with Image.open(cat) as picture:
            ImageOps.invert(picture.convert("RGB")).save(cat)
    else:
        cat.with_suffix(".txt").write_text("a cat")
    flags = {**BASE, "resume_from_checkpoint": "latest"}
    with pytest.raises(trainer.UserError, match="pictures|captions"):
        trainer.main(trainer.parse_args(train_args(tiny_model, photos, rank_8_run, **flags)))


def test_a_data_folder_may_move(rank_8_run, tiny_model, photos, until_encoding, tmp_path):
    photos.rename(tmp_path / "moved")
    until_encoding(train_args(tiny_model, tmp_path / "moved", rank_8_run, **BASE, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("limit", [4, 2])
def test_a_finished_run_says_so_and_keeps_its_files(limit, shared_run, tiny_model, shared_photos, fork):
    before = snapshot(shared_run)
    argv = train_args(tiny_model, shared_photos, shared_run, **{**SHORT, "max_train_steps": limit})
    finished = fork(argv, "--resume_from_checkpoint=latest", before=refuse_to_load)
    assert f"{shared_run} holds a finished run" in finished.output
    assert snapshot(shared_run) == before


def kill_while_the_last_pictures_are_drawn(trainer):
    def draw(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.Validation.draw = draw


def test_a_run_killed_before_its_last_pictures_is_not_finished(tiny_model, photos, tmp_path, fork):
    flags = {**SHORT, "checkpointing_steps": 3, "skip_final_inference": False, "resolution": 32}
    pictures = {"final_validation_prompt": "a dog", "num_validation_images": 1, "validation_num_inference_steps": 2}
    argv = train_args(tiny_model, photos, tmp_path / "out", **flags, **pictures)
    assert fork(argv, before=kill_while_the_last_pictures_are_drawn, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / LORA).exists()
    fork(argv, "--resume_from_checkpoint=latest")
    assert len(list((tmp_path / "out" / "samples").glob("final-000004-*.png"))) == 1
    assert "finished run" in fork(argv, "--resume_from_checkpoint=latest").output


def lose_the_disk_for_pictures(trainer):
    def save(image, path, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.Image.Image.save = save


def test_pictures_that_cannot_be_written_do_not_end_the_run(tiny_model, photos, shared_run, tmp_path, fork):
    pictures = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_num_inference_steps": 1}
    argv = train_args(tiny_model, photos, tmp_path / "out", **SHORT, **pictures)
    finished = fork(argv, before=lose_the_disk_for_pictures)
    assert "No space left" in finished.output and "Traceback" not in finished.output
    assert bit_identical(tmp_path / "out", shared_run)


def change_the_prompts_while_training(trainer):
    train = trainer.train

    def change(*args):
        Path(os.environ["PROMPTS"]).write_text("another prompt\n", encoding="utf-8")
        return train(*args)

    trainer.train = change


def test_a_file_of_prompts_may_change_while_the_run_goes_on(tiny_model, photos, tmp_path, fork):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n", encoding="utf-8")
    pictures = {"validation_prompt": prompts, "num_validation_images": 1, "validation_num_inference_steps": 1}
    flags = {"skip_final_inference": False, "resolution": 32, "max_train_steps": 1}
    argv = train_args(tiny_model, photos, tmp_path / "out", **flags, **pictures)
    fork(argv, before=change_the_prompts_while_training, env={"PROMPTS": str(prompts)})
    assert len(list((tmp_path / "out" / "samples").glob("step-000001-prompt-*.png"))) == 2


def test_the_lora_can_be_read_by_those_whom_the_umask_allows(shared_run):
    umask = os.umask(0)
    os.umask(umask)
    files = [shared_run / LORA, *(shared_run / "comfyui").iterdir()]
    assert [oct(path.stat().st_mode & 0o777) for path in files] == [oct(0o666 & ~umask)] * len(files)


def test_a_finished_run_can_be_made_longer(shared_run, tiny_model, photos, tmp_path, fork):
    out = Path(shutil.copytree(shared_run, tmp_path / "out"))
    argv = train_args(tiny_model, photos, out, **{**SHORT, "max_train_steps": 5})
    assert "step 5/5" in fork(argv, "--resume_from_checkpoint=latest").output
    assert not bit_identical(out, shared_run)


def test_a_damaged_list_of_files_ends_the_run_that_cannot_tell_whose_they_are(
    shared_run, tiny_model, photos, tmp_path, until_encoding
):
    out = Path(shutil.copytree(shared_run, tmp_path / "out"))
    for content in ("", "[1]", "{}", '{"steps": "x"}', "{", '{"files": 3}'):
        (out / "run.json").write_text(content)
        before = snapshot(out)
        with pytest.raises(trainer.UserError, match="run.json"):
            until_encoding(train_args(tiny_model, photos, out, **SHORT, resume_from_checkpoint="latest"))
        assert snapshot(out) == before


def test_a_new_run_moves_an_earlier_one_aside_and_says_so(shared_run, tiny_model, photos, tmp_path, fork):
    out = Path(shutil.copytree(shared_run, tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    for number in (1, 2):
        earlier = snapshot_by_name(out, "notes.txt", "earlier-run-1")
        finished = fork(train_args(tiny_model, photos, out, seed=number))
        assert f"moved to {out / f'earlier-run-{number}'}" in finished.output
        assert snapshot_by_name(out / f"earlier-run-{number}") == earlier
        assert not bit_identical(out, out / f"earlier-run-{number}")
        assert checkpoints(out) == []  # no checkpoint of the earlier run is mistaken for one of this
    assert (out / "notes.txt").read_text() == "mine"


def test_logs_in_the_output_folder_itself_do_not_keep_an_earlier_run_from_moving(tiny_model, photos, tmp_path, fork):
    argv = train_args(tiny_model, photos, tmp_path / "out", logging_dir=".", max_train_steps=1)
    fork(argv)
    assert "earlier-run-1" in fork(argv).output
    assert (tmp_path / "out" / "earlier-run-1" / LORA).exists()


@pytest.mark.parametrize("shared", ["absolute", "beside"])
def test_a_new_run_leaves_a_folder_of_logs_that_it_shares_with_others_in_place(
    shared, shared_run, tiny_model, photos, tmp_path, fork
):
    out = Path(shutil.copytree(shared_run, tmp_path / "out"))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "of another run").write_text("mine")
    fork(train_args(tiny_model, photos, out, logging_dir=logs if shared == "absolute" else "../logs"))
    assert (logs / "of another run").read_text() == "mine"
    assert (out / "earlier-run-1" / LORA).is_file()


def snapshot_by_name(folder, *left_out):
    """The bytes of all files under a folder by relative path, those under the names of `left_out` excepted."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if path.parts[0] not in left_out}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def spoil(trainer, steps, how):
    training_loss, calls = trainer.training_loss, []

    def loss(*args, **kwargs):
        calls.append(None)
        result = training_loss(*args, **kwargs)
        if len(calls) not in steps:
            return result
        if how == "loss":
            return result * float("inf")
        result.register_hook(lambda gradient: gradient * float("nan"))
        return result

    trainer.training_loss = loss


def spoil_second_loss(trainer):
    spoil(trainer, {2}, "loss")


def spoil_second_gradient(trainer):
    spoil(trainer, {2}, "gradient")


def spoil_all_from_third(trainer):
    spoil(trainer, set(range(3, 100)), "loss")


def spoil_nine_of_ten(trainer):
    spoil(trainer, set(range(2, 11)) | set(range(12, 21)), "gradient")


def all_finite(*paths):
    return all(torch.isfinite(tensor).all() for path in paths for tensor in load_file(path).values())


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("AdamW", 1e-3), ("prodigy", 1.0)])
@pytest.mark.parametrize("spoiler", [spoil_second_loss, spoil_second_gradient])
def test_a_step_that_is_not_finite_is_skipped_and_told(
    spoiler, optimizer, learning_rate, tiny_model, photos, tmp_path, fork
):
    out = tmp_path / "out"
    argv = train_args(tiny_model, photos, out, **SHORT, optimizer=optimizer, learning_rate=learning_rate)
    finished = fork(argv, before=spoiler)
    (skipped,) = [line for line in finished.output.splitlines() if "skipped" in line]
    assert skipped.startswith("Step 2 is skipped")
    one, two, three = (load_file(out / f"checkpoint-{step}" / LORA) for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(two[name], three[name]) for name in two)
    assert all_finite(out / LORA, *out.glob("checkpoint-*/*.safetensors"))


def test_ten_such_steps_in_a_row_end_the_run_with_one_line(tiny_model, photos, tmp_path, fork):
    out = tmp_path / "out"
    argv = train_args(tiny_model, photos, out, max_train_steps=30, checkpointing_steps=4)
    finished = fork(argv, before=spoil_all_from_third, check=False)
    assert "ten steps in a row" in error_line(finished, status=1)
    assert finished.output.count("is skipped") == 10
    assert checkpoints(out) == [4, 8, 12]  # the last for another learning rate to go on from
    assert all_finite(*out.glob("checkpoint-*/*.safetensors"))
    assert not (out / LORA).exists()


def test_nine_such_steps_in_a_row_do_not_end_it(tiny_model, photos, tmp_path, fork):
    finished = fork(train_args(tiny_model, photos, tmp_path / "out", max_train_steps=21), before=spoil_nine_of_ten)
    assert finished.output.count("is skipped") == 18
    assert all_finite(tmp_path / "out" / LORA)


# ---------------------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_environmentSecretOfTheHub0001",
    "WANDB_API_KEY": "5ec4e7" * 6 + "0002",
    "AWS_SECRET_ACCESS_KEY": "cloudSecretOfTheEnvironment0003",
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_no_secret_is_written_anywhere(tracker, tiny_model, photos, tmp_path):
    if tracker == "wandb":
        pytest.importorskip("wandb")
    token = "hf_tokenOfTheCommandLine0004"
    out, work, log = tmp_path / "out", tmp_path / "work", tmp_path / "log.txt"
    work.mkdir()
    flags = {"hub_token": token, "report_to": tracker, "skip_final_inference": False, "checkpointing_steps": 1}
    argv = train_args(
        tiny_model,
        photos,
        out,
        **flags,
        validation_prompt="a photo of sks dog",
        num_validation_images=1,
        validation_num_inference_steps=1,
    )
    finished = fork_trainer(*argv, env={**SECRETS, "WANDB_DIR": str(work), "HOME": str(work)}, cwd=work)
    log.write_text(finished.output, "utf-8")
    written = [path for folder in (out, work) for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name or path.suffix == ".wandb" for path in written)
    assert (out / "README.md") in written and (out / "checkpoint-2" / "manifest.json") in written
    leaks = [
        (path.name, secret)
        for path in (*written, log)
        for secret in (token, *SECRETS.values())
        if secret.encode() in path.read_bytes()
    ]
    assert leaks == []
