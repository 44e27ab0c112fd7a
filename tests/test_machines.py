"""Right on every machine: other file systems, terminals, signals; and nothing optional costs the training.

Each test makes the condition of the machine in this process: a system call that fails, a folder with files of the
user's, a signal. `trainer.main` runs here as well, on a tiny model; what is looked at is what is left on the disk.
"""

import errno
import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train_dreambooth_lora_z_image as trainer
from tiny import SCRIPT, events, run, train_args


LORA = "pytorch_lora_weights.safetensors"
PICTURES = {"validation_prompt": "a dog", "num_validation_images": 2, "validation_num_inference_steps": 1}


@pytest.fixture
def train(monkeypatch, tiny_model, shared_photos, tmp_path, capfd):
    """Runs the trainer's command line in this process; returns exit status and output. The folder is tmp_path/out."""

    def run(*more, **flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer.error_once.cache_clear()
        flags = {"resolution": 32, "output_dir": tmp_path / "out", **flags}
        argv = [*train_args(tiny_model, shared_photos, tmp_path / "out", **flags), *map(str, more)]
        monkeypatch.setattr(sys, "argv", ["train_dreambooth_lora_z_image.py", *argv])
        capfd.readouterr()
        try:
            status = trainer.run_command_line()
        except SystemExit as end:
            status = end.code
        finally:
            raised, logging.raiseExceptions = logging.raiseExceptions, True
        assert not raised
        output = "".join(capfd.readouterr())
        assert "Traceback" not in output, output
        return status, output

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(trainer, "RENAMING_PAUSES", (0, 0))
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refuse_models(monkeypatch):
    """Fails the test where weights are loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(trainer, "encode_prompts", refuse)


def snapshot(folder):
    """The bytes of all files under a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder, **files):
    """Writes texts into files of the user's, named with __ for /, and returns them as `snapshot` does."""
    files = {name.replace("__", "/").replace("_dot_", "."): text for name, text in files.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {name: text.encode() for name, text in files.items()}


def checkpoints(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


# ---------------------------------------------------------------------------------------------------------------------
# What comes after training
# ---------------------------------------------------------------------------------------------------------------------


def break_something(*args, **kwargs):
    raise RuntimeError("it broke")


@pytest.mark.parametrize("broken", ["comfyui_state", "write_model_card", "draw_images", "save_picture", "load_vae"])
def test_what_comes_after_the_lora_may_break(broken, train, tmp_path, monkeypatch):
    save_result = trainer.save_result

    def save_and_break(*args):
        if broken != "comfyui_state":
            save_result(*args)
        monkeypatch.setattr(trainer, broken, break_something)
        if broken == "comfyui_state":
            save_result(*args)

    monkeypatch.setattr(trainer, "save_result", save_and_break)
    status, output = train(**{**PICTURES, "validation_epochs": 9}, max_train_steps=1, skip_final_inference=False)
    assert status == 0 and "it broke" in output
    assert f"The LoRA is in {tmp_path / 'out' / LORA}" in output
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_a_tracker_that_breaks_is_said_once_and_the_run_goes_on(train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Accelerator, "log", break_something)
    monkeypatch.setattr(trainer.Accelerator, "end_training", break_something)
    status, output = train(max_train_steps=3)
    assert status == 0 and output.count("--report_to failed (it broke)") == 1
    assert (tmp_path / "out" / LORA).is_file()


def test_a_run_whose_standard_output_is_closed_ends_with_status_0(tiny_model, shared_photos, tmp_path):
    argv = train_args(tiny_model, shared_photos, tmp_path / "\u7ea2\u8272", max_train_steps=1, resolution=32)
    command = shlex.join([sys.executable, str(SCRIPT), *argv])
    env = {"ACCELERATE_USE_CPU": "1", "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    finished = run(["bash", "-c", f"{command} >&- 2>/dev/full; echo $?"], env)
    assert finished.stdout == ""
    finished = run(
        ["bash", "-c", f"{command} --resume_from_checkpoint=latest | head -c 0; exit ${{PIPESTATUS[0]}}"],
        env,
        check=False,
    )
    assert finished.returncode == 2 and "is finished" in finished.stderr


# ---------------------------------------------------------------------------------------------------------------------
# File systems
# ---------------------------------------------------------------------------------------------------------------------


def refuse_fsync(error):
    def fsync(descriptor):
        raise OSError(error, os.strerror(error))

    return fsync


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_without_fsync_costs_one_warning(error, train, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse_fsync(error))
    status, output = train(checkpointing_steps=1, max_train_steps=3)
    assert status == 0 and checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert output.count("no fsync") == 1
    trainer.read_checkpoint(tmp_path / "out" / "checkpoint-3")


def test_an_fsync_that_fails_for_want_of_room_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse_fsync(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        trainer.flush_to_disk(tmp_path)


def test_on_windows_no_folder_is_opened_and_files_are_flushed_through_a_writable_descriptor(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WINDOWS", True)
    opened = []
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or 99)
    monkeypatch.setattr(os, "fsync", opened.append)
    monkeypatch.setattr(os, "close", opened.append)
    trainer.flush_to_disk(tmp_path)
    assert opened == []
    trainer.flush_to_disk(tmp_path / "file")
    assert opened == [(tmp_path / "file", os.O_RDWR), 99, 99]


@pytest.mark.parametrize("function", ["rename", "replace"])
def test_a_rename_is_tried_again_while_another_program_holds_the_file(function, tmp_path, monkeypatch):
    original, pauses, calls = getattr(os, function), [], []

    def held(source, target):
        calls.append(source)
        if len(calls) < 4:
            raise PermissionError(13, "held by a scanner")
        original(source, target)

    monkeypatch.setattr(os, function, held)
    monkeypatch.setattr(trainer.time, "sleep", pauses.append)
    source = tmp_path / "part"
    source.mkdir() if function == "rename" else source.write_text("new")
    trainer.rename(source, tmp_path / "whole")
    assert (tmp_path / "whole").exists() and len(pauses) == 3
    assert 3 < sum(trainer.RENAMING_PAUSES) < 10


def test_files_of_the_user_in_the_output_folder_stay_as_they_are(train, tmp_path):
    out = tmp_path / "out"
    mine = write(out, README_dot_md="mine", samples__note_dot_txt="mine", comfyui__other_dot_txt="mine", best="mine")
    for n in range(2):  # the second run moves the first aside
        status, output = train(**PICTURES, max_train_steps=1, seed=n)
        assert status == 0 and {name: snapshot(out)[name] for name in mine} == mine
    assert "sks dog" in (out / "model_card.md").read_text()
    earlier = snapshot(out / "earlier-run-1")
    assert {LORA, "run.json", "model_card.md", "comfyui/out.safetensors"} < earlier.keys()
    assert "samples/step-000000-prompt-0-image-1.png" in earlier and not any(
        earlier.get(name) == b"mine" for name in mine
    )


def test_a_card_that_the_user_has_changed_stays_when_the_next_run_begins(train, tmp_path):
    train(max_train_steps=1)
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "Mine.")
    train(max_train_steps=1)
    assert card.read_text().endswith("Mine.")
    assert (tmp_path / "out" / "model_card.md").is_file() and not (
        tmp_path / "out" / "earlier-run-1" / "README.md"
    ).exists()


@pytest.mark.parametrize("name", [LORA, "run.json"])
def test_a_file_of_the_user_whose_name_the_run_needs_ends_it_before_anything_is_loaded(
    name, train, tmp_path, refuse_models
):
    write(tmp_path / "out", **{name.replace(".", "_dot_"): '{"mine": 1}'})
    status, output = train()
    assert status == 2 and name in output.splitlines()[-1] and "move it away" in output
    assert snapshot(tmp_path / "out") == {name: b'{"mine": 1}'}


def test_a_file_is_listed_before_it_is_written_and_with_its_digest_after(tmp_path):
    output = trainer.OutputFolder(tmp_path)
    with output.writing("samples/a.png") as path:
        assert trainer.OutputFolder(tmp_path).record["files"] == {"samples/a.png": None}
        path.write_text("half a pict")
        assert output.owns("samples/a.png")  # as after a kill in the middle
    with output.writing("samples/a.png") as path:
        path.write_text("picture")
    assert output.record["files"] == {"samples/a.png": trainer.file_digest(path)}
    path.write_text("mine")
    assert not output.owns("samples/a.png") and output.own_files == []
    with pytest.raises(FileExistsError), output.writing("samples/a.png"):
        path.write_text("the program's")
    assert path.read_text() == "mine"


def test_a_folder_of_logs_moves_with_its_run_unless_it_holds_other_files(train, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        train(max_train_steps=1, report_to="tensorboard")
    assert events(out / "earlier-run-1" / "logs").scalars
    write(out, logs__note="mine")
    train(max_train_steps=1)
    assert (out / "logs" / "note").exists() and not (out / "earlier-run-2" / "logs").exists()


def test_folders_and_files_of_the_user_that_look_like_checkpoints_stay(train, tmp_path):
    out = tmp_path / "out"
    mine = write(
        out,
        **{"checkpoint-2__optimizer_dot_bin": "another trainer's", "checkpoint-2__" + LORA.replace(".", "_dot_"): "x"},
    )
    status, output = train(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=1)
    assert status == 0 and output.count("checkpoint-2 could not be saved") == 1
    assert {name: snapshot(out)[name] for name in mine} == mine
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]


def test_a_note_of_the_user_in_a_checkpoint_outlives_it(tmp_path):
    files = write(tmp_path, **{"checkpoint-1__manifest_dot_json": "{}", "checkpoint-1__note": "mine"})
    trainer.remove_checkpoint(tmp_path / "checkpoint-1")
    assert snapshot(tmp_path) == {"checkpoint-1/note": files["checkpoint-1/note"]}


def test_a_dry_run_writes_nothing(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"class_data_dir": tmp_path / "class", "class_prompt": "a dog", "encoding_cache_dir": tmp_path / "cache"}
    status, output = train("--dry_run", "--with_prior_preservation", report_to="tensorboard", **flags)
    assert status == 0 and [*tmp_path.iterdir()] == []


def test_a_folder_of_a_very_long_name_works(train, tmp_path):
    out = tmp_path / ("a" * 250)
    status, output = train(output_dir=out, max_train_steps=1, checkpointing_steps=1)
    assert status == 0 and len([*out.glob("comfyui/*.safetensors")]) == 1


def full_disk(*args, **kwargs):
    raise trainer.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_mmap(path):
    raise OSError(errno.ENODEV, "No such device")


def test_folders_that_cannot_take_the_run_are_told_before_anything_is_loaded(
    train, tmp_path, refuse_models, monkeypatch
):
    status, output = train(output_dir=os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert status == 2 and "--output_dir" in output
    status, output = train(output_dir=tmp_path / ("a" * 256))
    assert status == 2 and "--output_dir" in output and "too long" in output
    monkeypatch.setattr(trainer, "load_file", no_mmap)
    status, output = train(encoding_cache_dir=tmp_path / "cache")
    assert status == 2 and "--output_dir" in output and "No such device" in output
    monkeypatch.setattr(trainer, "save_file", full_disk)
    status, output = train()
    assert status == 2 and "No space left" in output
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


def send(monkeypatch, function, number, call):
    """Sends this process a signal at that call of a function of the trainer's."""
    original, calls = getattr(trainer, function), []

    def sending(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, function, sending)
    return calls


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM"])
def test_a_signal_of_a_terminal_or_a_cluster_saves_a_checkpoint(name, train, tmp_path, monkeypatch):
    before = signal.getsignal(getattr(signal, name))
    send(monkeypatch, "training_loss", getattr(signal, name), call=2)
    status, output = train(max_train_steps=4)
    assert status == 128 + getattr(signal, name) and f"{name}: finishing the step" in output
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with trainer.StopSignal(list) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_system_without_some_signals_does_with_the_others(monkeypatch):
    monkeypatch.setattr(trainer, "STOP_SIGNALS", [signal.SIGINT])
    with trainer.StopSignal(list) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT


def test_a_signal_while_pictures_are_drawn_does_not_wait_for_all_of_them(train, tmp_path, monkeypatch):
    drawn = send(monkeypatch, "draw_images", signal.SIGTERM, call=2)
    status, output = train(**{**PICTURES, "num_validation_images": 9}, max_train_steps=4)
    assert status == 143 and len(drawn) == 2
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


def test_a_signal_while_the_last_pictures_are_drawn_leaves_a_finished_run(train, tmp_path, monkeypatch):
    drawn = send(monkeypatch, "draw_images", signal.SIGTERM, call=1)
    flags = {"final_validation_prompt": "a dog", "num_validation_images": 9, "validation_num_inference_steps": 1}
    status, output = train(**flags, max_train_steps=1, skip_final_inference=False)
    assert status == 143 and len(drawn) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_kept(caplog, monkeypatch):
    clock = iter([100.0, 100.2, 102.0])
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), trainer.StopSignal(lambda: [Path("out/checkpoint-7")]) as stop:
        stop.note(signal.SIGINT, None)
        stop.note(signal.SIGINT, None)  # the same, passed on by the launcher
        assert stop.number == signal.SIGINT
        stop.note(signal.SIGINT, None)
    assert str(Path("out/checkpoint-7")) in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are finished, lost or continued
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_a_finished_run_without_checkpoints_cannot_be_resumed_and_is_not_touched(steps, train, tmp_path):
    train(max_train_steps=1)
    before = snapshot(tmp_path)
    status, output = train("--resume_from_checkpoint=latest", max_train_steps=steps)
    assert status == 2 and "is finished" in output and "starting anew" not in output
    assert "--checkpointing_steps" in output and "--output_dir" in output
    assert snapshot(tmp_path) == before


def test_no_step_stands_twice_in_the_logs_of_a_resumed_run(train, tmp_path, monkeypatch):
    original, calls = trainer.training_loss, []

    def die_in_step_4(*args):
        calls.append(None)
        if len(calls) == 4:
            raise trainer.TrainingError("lost")
        return original(*args)

    monkeypatch.setattr(trainer, "training_loss", die_in_step_4)
    flags = {"report_to": "tensorboard", "max_train_steps": 5, "checkpointing_steps": 2}
    assert train(**flags)[0] == 1
    assert train("--resume_from_checkpoint=latest", **flags)[0] == 0
    steps = [event.step for event in events(tmp_path / "out").scalars["loss"]]
    assert steps == [1, 2, 3, 4, 5]


def test_a_resumed_run_goes_on_with_the_run_of_its_tracker(train, tmp_path, monkeypatch):
    started = []

    class Tracker:
        name, run = "wandb", type("Run", (), {"id": "abc"})
        requires_logging_directory = False

        def log(self, *args, **kwargs):
            pass

        finish = start = store_init_configuration = log

    def start(self, project, config, init_kwargs):
        started.append(init_kwargs.get("wandb"))
        self.trackers = [Tracker()]

    monkeypatch.setattr(trainer.Accelerator, "init_trackers", start)
    train(max_train_steps=1, checkpointing_steps=1)
    train("--resume_from_checkpoint=latest", max_train_steps=2)
    train(
        f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}",
        max_train_steps=2,
        output_dir=tmp_path / "other",
    )
    assert started == [None, {"id": "abc", "resume": "allow"}, None]
