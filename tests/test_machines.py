"""Right on every machine: other file systems, terminals, signals; and nothing optional costs the training.

Each test makes the condition of the machine in this process: a system call that fails, a folder with files of the
user's, a signal. `trainer.main` runs here as well, on a tiny model; what is looked at is what is left on the disk.
"""

import collections
import contextlib
import errno
import functools
import json
import logging
import math
import os
import pwd
import shlex
import shutil
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import parse_flag_from_env
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import save_file

import train_dreambooth_lora_z_image as trainer
from running import SCRIPT, run
from test_checkpoint import make_state
from tiny import build_tiny_pipeline, events, train_args


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
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(trainer, "RENAMING_PAUSES", (0, 0))
    monkeypatch.setattr(trainer, "count_memory", lambda *_, **__: {"training": 0.0})  # takes seconds in a dry run
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


@pytest.mark.parametrize(
    "broken", ["save_for_comfyui", "write_model_card", "draw_latents", "save_pictures", "decode_latents"]
)
def test_what_comes_after_the_lora_may_break(broken, train, tmp_path, monkeypatch):
    save_result = trainer.save_result

    def save_and_break(*args):
        if broken != "save_for_comfyui":
            save_result(*args)
        monkeypatch.setattr(trainer, broken, break_something)
        if broken == "save_for_comfyui":
            save_result(*args)

    monkeypatch.setattr(trainer, "save_result", save_and_break)
    status, output = train(**{**PICTURES, "validation_epochs": 9}, max_train_steps=1, skip_final_inference=False)
    assert status == 0 and "it broke" in output
    assert f"The LoRA is in {tmp_path / 'out' / LORA}" in output
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def break_in_a_thread(*args, **kwargs):
    thread = threading.Thread(target=break_something)
    thread.start()
    thread.join()


@pytest.mark.parametrize("place", ["log", "end_training"])
@pytest.mark.parametrize("fault", [break_something, break_in_a_thread])
def test_a_tracker_that_breaks_is_said_once_and_the_run_goes_on(fault, place, train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Accelerator, place, fault)
    status, output = train(max_train_steps=3)
    assert status == 0 and output.count("--report_to failed (it broke)") == 1
    assert (tmp_path / "out" / LORA).is_file()


def test_a_tracker_that_takes_no_pictures_costs_none(train, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardTracker, "log_images", break_something)
    status, output = train(**PICTURES, report_to="tensorboard", max_train_steps=1)
    assert status == 0 and output.count("--report_to failed (it broke)") == 1
    page = (tmp_path / "out" / "samples" / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") == len([*(tmp_path / "out" / "samples").glob("step-*.png")]) == 2


def test_a_picture_that_can_no_longer_be_read_costs_no_update(train, tmp_path, monkeypatch):
    load_picture, read = trainer.load_picture, []

    def fail_in_the_third_update(example, **options):
        read.append(example)
        if len(read) == 6 + 3:  # each was looked at before
            raise trainer.UserError("it is gone")
        return load_picture(example, **options)

    monkeypatch.setattr(trainer, "load_picture", fail_in_the_third_update)
    status, output = train(max_train_steps=4)
    assert status == 2 and output.splitlines()[-1].endswith("error: it is gone")
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]


def test_a_lora_that_cannot_be_saved_costs_no_update(train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "save_result", lambda *_: (_ for _ in ()).throw(trainer.TrainingError("no room")))
    status, output = train(max_train_steps=3)
    assert status == 1 and checkpoints(tmp_path / "out") == ["checkpoint-3"]


def test_a_run_from_anothers_checkpoint_moves_what_its_own_folder_holds(train, tmp_path):
    train(output_dir=tmp_path / "a", checkpointing_steps=1)
    train(checkpointing_steps=1, max_train_steps=3)
    before = snapshot(tmp_path / "out")
    status, output = train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-1", checkpointing_steps=9)
    assert status == 0 and "held an earlier run: moved to" in output
    earlier = snapshot(tmp_path / "out" / "earlier-run-1")
    assert earlier == {name: content for name, content in before.items() if name in earlier}
    assert {f"checkpoint-{step}/manifest.json" for step in (1, 2, 3)} <= earlier.keys() and LORA in earlier


def test_a_run_that_goes_back_leaves_its_later_checkpoints_aside(train, tmp_path):
    train(checkpointing_steps=1, max_train_steps=3)
    flags = {"checkpointing_steps": 9, "max_train_steps": 4, "learning_rate": 0.01}
    status, output = train(resume_from_checkpoint="checkpoint-1", **flags)
    assert status == 0 and "checkpoint-3 is of a run that went on: moved to" in output
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]
    assert checkpoints(tmp_path / "out" / "earlier-run-1") == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("scheduler", ["polynomial", "cosine", "linear"])
def test_a_warm_up_may_be_as_long_as_the_run(scheduler, train, tmp_path):
    status, output = train(lr_scheduler=scheduler, lr_warmup_steps=2)
    assert status == 0 and (tmp_path / "out" / LORA).is_file()


def test_a_run_in_the_same_process_has_its_own_precision(train, tmp_path):
    train(mixed_precision="bf16", max_train_steps=1, output_dir=tmp_path / "first")
    trainer.error_once("it failed")
    args = trainer.parse_args(train_args("m", "d", tmp_path / "out"))
    assert trainer.make_accelerator(args).mixed_precision == "no"
    assert trainer.error_once.cache_info().currsize == 0  # what failed is said again


def test_every_process_loads_its_weights_whatever_the_launcher_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # accelerate launch's default
    trainer.make_accelerator(trainer.parse_args(train_args("m", "d", tmp_path / "out")))
    assert not parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


@pytest.mark.skipif(not trainer.LINUX, reason="of Linux alone")
@pytest.mark.parametrize(("variable", "bound"), [("MIXED_PRECISION", False), ("DYNAMO_USE_FULLGRAPH", True)])
def test_a_run_is_bound_to_its_launcher_and_to_no_shell(variable, bound, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *args: calls.append(args)))
    monkeypatch.setenv(f"ACCELERATE_{variable}", "no")
    trainer.start_run(trainer.parse_args(train_args("m", "d", tmp_path / "out")))
    assert calls == [(1, signal.SIGTERM)] * bound


def test_a_run_that_stopped_without_a_checkpoint_says_so(train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "train", lambda *args: False)
    assert train()[1].splitlines()[-1] == "Stopped. There is no checkpoint."
    write(tmp_path / "out", **{"checkpoint-1__manifest_dot_json": "{}"})
    monkeypatch.setattr(trainer, "prepare_output", lambda *args: None)
    assert train()[1].splitlines()[-1].endswith("--resume_from_checkpoint latest.")


def test_the_launchers_accumulation_does_not_divide_the_loss(train, tmp_path, monkeypatch):
    train(output_dir=tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train()
    plain, divided = (trainer.load_file(tmp_path / name / LORA) for name in ("plain", "out"))
    assert all(torch.equal(plain[name], divided[name]) for name in plain)


def test_a_run_whose_standard_output_is_closed_ends_with_status_0(tiny_model, shared_photos, tmp_path):
    argv = train_args(tiny_model, shared_photos, tmp_path / "\u7ea2\u8272", max_train_steps=1, resolution=32)
    command = shlex.join([sys.executable, str(SCRIPT), *argv])
    env = {"ACCELERATE_USE_CPU": "1", "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    finished = run(["bash", "-c", f"{command} >&- 2>/dev/full; echo $?"], env)
    assert finished.stdout == "0\n"
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


@pytest.mark.parametrize(("reserved", "lines"), [(9, 1), (7, 0)])
def test_on_windows_a_card_that_is_full_is_said_once(reserved, lines, monkeypatch, caplog):
    def step(state, *_):
        state.step += 1
        return 0.5, False, 1.0

    monkeypatch.setattr(trainer, "WINDOWS", True)
    monkeypatch.setattr(trainer, "accumulate_gradients", lambda *_: None)
    monkeypatch.setattr(trainer, "apply_gradients", step)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved * trainer.GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 * trainer.GIB))
    trainer.error_once.cache_clear()
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    state = SimpleNamespace(step=0, transformer=torch.nn.Linear(1, 1), parameters=[], optimizer=optimizer)
    plan = SimpleNamespace(max_train_steps=2, samples_seen=int, samples_per_epoch=1, validates=lambda step: False)
    data = SimpleNamespace(plan=plan, vae=None, read=lambda *_: ((step, []) for step in (1, 2)))
    accelerator = SimpleNamespace(device=torch.device("cuda"), is_main_process=True, log=lambda *_, **__: None)
    run = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(checkpointing_steps=9))
    assert trainer.train(state, SimpleNamespace(data=data, stop=SimpleNamespace(number=0)), {}, run)
    assert sum("The card is full" in message for message in caplog.messages) == lines


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_rename_is_tried_again_while_another_program_holds_the_file(kind, tmp_path, monkeypatch):
    original, pauses, calls = os.replace, [], []

    def held(source, target):
        calls.append(source)
        if len(calls) < 4:
            raise PermissionError(13, "held by a scanner")
        original(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(trainer.time, "sleep", pauses.append)
    source = tmp_path / "part"
    source.mkdir() if kind == "folder" else source.write_text("new")
    trainer.rename(source, tmp_path / "whole")
    assert (tmp_path / "whole").exists() and len(pauses) == 3
    assert 3 < sum(trainer.RENAMING_PAUSES) < 10


def test_where_folders_cannot_be_renamed_they_are_copied(train, tmp_path, monkeypatch):
    original = os.replace

    def refuse_folders(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        original(source, target)

    monkeypatch.setattr(os, "replace", refuse_folders)
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "earlier-run-1" / "checkpoint-2"):
        assert train(**flags)[0] == 0
        assert trainer.read_checkpoint(folder).step == 2
        assert [path.name for path in folder.parent.glob("*checkpoint-*")] == ["checkpoint-2"]


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
    output, path = trainer.OutputFolder(tmp_path), tmp_path / "samples" / "a.png"
    with output.writing("samples/a.png") as part:
        assert trainer.OutputFolder(tmp_path).record["files"] == {"samples/a.png": None}
        part.write_text("picture")
        assert not path.exists()  # and no half of it after a kill in the middle
    assert output.record["files"] == {"samples/a.png": trainer.digest_of(b"picture")}
    path.write_text("mine")
    assert not output.owns("samples/a.png")
    with pytest.raises(FileExistsError), output.writing("samples/a.png") as part:
        part.write_text("the program's")
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


def test_a_checkpoint_with_a_note_of_the_user_moves_away_whole_where_a_new_one_takes_its_place(train, tmp_path):
    train(checkpointing_steps=1)
    (tmp_path / "out" / "checkpoint-2" / "note").write_text("mine")
    before = snapshot(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "run.json").write_text(json.dumps({"finished": False, "files": {LORA: None}}))
    status, output = train(checkpointing_steps=1, resume_from_checkpoint="checkpoint-1")
    assert status == 0 and checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
    assert snapshot(tmp_path / "out" / "earlier-run-1" / "checkpoint-2") == before


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
    assert status == 0 and len([*out.glob("comfyui/*.safetensors")]) == 2  # of the checkpoint and of the end


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
    drawn = send(monkeypatch, "draw_latents", signal.SIGTERM, call=2)
    status, output = train(**{**PICTURES, "num_validation_images": 9}, max_train_steps=4)
    assert status == 143 and len(drawn) == 2
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


def test_a_signal_while_the_last_pictures_are_drawn_leaves_a_finished_run(train, tmp_path, monkeypatch):
    drawn = send(monkeypatch, "draw_latents", signal.SIGTERM, call=1)
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


def test_the_loss_is_logged_as_it_is_and_shown_smoothed(train, tmp_path, monkeypatch):
    """One bad loss hardly shows, one that is not finite not at all; the trackers get every one."""
    original, losses = trainer.training_loss, [1.0, 1.0, 5.0, math.inf]
    values = iter(losses)
    monkeypatch.setattr(trainer, "training_loss", lambda *args: 0 * original(*args) + next(values))
    status, output = train(report_to="tensorboard", max_train_steps=4)
    assert status == 0 and " loss=1.2," in output.partition("step 4/4: ")[2].splitlines()[0]
    assert [event.value for event in events(tmp_path / "out").scalars["loss"]] == losses


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


# ---------------------------------------------------------------------------------------------------------------------
# Variables, devices
# ---------------------------------------------------------------------------------------------------------------------


def test_variables_that_are_set_but_empty_are_as_good_as_none(train, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "ACCELERATE_DEBUG_MODE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert train("--dry_run")[0] == 0
    assert "WORLD_SIZE" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == ""  # that one means no GPU


def test_a_user_without_a_home_and_a_name_can_train(train, tmp_path, monkeypatch):
    def no_entry(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    flags = {**PICTURES, "validation_prompt": "\u4e00\u53ea\u72d7"}  # which asks for fonts
    status, output = train(**flags, max_train_steps=1, report_to="tensorboard")
    assert status == 0 and "failed" not in output


def test_fp16_on_the_cpu_is_refused_and_bf16_named(train, refuse_models):
    status, output = train(mixed_precision="fp16")
    assert status == 2 and "--mixed_precision fp16" in output and "bf16" in output.splitlines()[-1]


@pytest.mark.parametrize(("emulated", "warnings"), [(True, 1), (False, 0)])
def test_bf16_on_a_gpu_that_emulates_it_is_warned_about(emulated, warnings, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulated)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    of_gpu = {"mixed_precision": "bf16", "device": torch.device("cuda"), "distributed_type": "NO"}
    accelerator = SimpleNamespace(**of_gpu, is_main_process=True)
    monkeypatch.setattr(trainer, "make_accelerator", lambda args: accelerator)
    trainer.start_run(parsed())
    assert capfd.readouterr().err.count("Tesla T4 emulates it") == warnings


def test_only_cuda_copies_to_the_host_without_waiting(monkeypatch):
    """A copy from memory that is not pinned, for which nobody waits, gives wrong numbers on MPS."""
    pinned = []
    monkeypatch.setattr(
        torch.autograd.graph, "save_on_cpu", lambda pin_memory: pinned.append(pin_memory) or contextlib.nullcontext()
    )
    block, given = torch.nn.Linear(2, 2), []
    transformer = SimpleNamespace(
        noise_refiner=[], context_refiner=[], layers=[block], enable_gradient_checkpointing=given.append
    )
    gpu = SimpleNamespace(device=torch.device("mps"))
    run = SimpleNamespace(checkpointed_fraction=1.0, sharded=False, args=parsed(offload=True), accelerator=gpu)
    trainer.checkpoint_blocks(transformer, run)
    given[0](block, torch.zeros(1, 2)).sum().backward()
    assert pinned == [False]


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def parsed(*more, **flags):
    return trainer.parse_args([*train_args("m", "d", "o", **flags), *map(str, more)])


def test_a_tilde_is_the_home_folder_in_files_of_arguments_and_after_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.args").write_text(
        '--class_data_dir=~/dogs\n--class_prompt "a ~/b"\n--cache_dir ~/cache # mine\n'
    )
    args = parsed("@~/flags.args", "--encoding_cache_dir=~/encodings")
    assert args.class_data_dir == str(tmp_path / "dogs") and args.class_prompt == "a ~/b"
    assert (args.cache_dir, args.encoding_cache_dir) == (str(tmp_path / "cache"), str(tmp_path / "encodings"))


@pytest.mark.parametrize(("windows", "folder"), [(True, r"C:\Users\me\dogs"), (False, "C:Usersmedogs")])
def test_backslashes_in_a_file_of_arguments_are_kept_on_windows(windows, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WINDOWS", windows)
    (tmp_path / "flags.args").write_text("--class_data_dir=C:\\Users\\me\\dogs\n")
    assert parsed(f"@{tmp_path / 'flags.args'}").class_data_dir == folder


def test_true_and_false_are_taken_for_gradient_checkpointing():
    given = {"True": 1, "False": 0, "true": 1, "0.5": 0.5, "1": 1}
    assert {text: parsed(gradient_checkpointing=text).gradient_checkpointing for text in given} == given


def test_no_pictures_and_no_learning_rate_can_be_asked_for():
    args = parsed(num_validation_images=0, learning_rate=0, validation_prompt="a dog", skip_final_inference=False)
    assert args.validation_prompt == args.final_validation_prompt == []
    assert args.learning_rate == 0


@pytest.mark.parametrize("file", ["missing.txt", "empty.txt", "blank"])
def test_a_file_of_prompts_that_gives_none_is_refused(file, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank").write_text("\n  \n")
    with pytest.raises(trainer.UserError, match=f"--validation_prompt {tmp_path / file} is"):
        parsed(validation_prompt=tmp_path / file)


@pytest.mark.parametrize(("mean", "noise"), [(0.5, "more"), (-0.5, "less")])
def test_the_sign_of_the_logit_mean_is_explained(mean, noise):
    assert [noise in line for line in trainer.ineffective_flags(parsed(logit_mean=mean))] == [True]
    assert trainer.ineffective_flags(parsed(logit_mean=0)) == []


def test_a_warm_up_as_long_as_the_run_is_warned_about(train):
    assert "--lr_warmup_steps 500" in train("--dry_run", lr_scheduler="cosine", max_train_steps=500)[1]
    assert "--lr_warmup_steps" not in train("--dry_run", lr_scheduler="cosine", max_train_steps=501)[1]


def linear_layers(tiny_model):
    return trainer.linear_layers(json.loads((tiny_model / "transformer" / "config.json").read_text()))


def test_all_linear_means_every_linear_layer_of_the_blocks(tiny_model):
    linear = linear_layers(tiny_model)
    blocks = [path for path in linear if path.split(".")[0] in ("layers", "noise_refiner", "context_refiner")]
    assert len(blocks) > 28
    assert sorted(trainer.resolve_lora_layers("all-linear", linear)["all-linear"]) == sorted(blocks)
    first = trainer.resolve_lora_layers("layers.0", linear)["layers.0"]
    assert sorted(first) == [path for path in sorted(linear) if path.startswith("layers.0.")]


TO_Q = "transformer.layers.0.attention.to_q"
ADAPTERS = {
    "wrong size": (
        {f"{TO_Q}.lora_A.weight": (2, 64), f"{TO_Q}.lora_B.weight": (64, 2)},
        r"to_q is \(64, 64\), not \(48, 48\)",
    ),
    "unknown module": ({"transformer.layers.9.attention.to_q.lora_A.weight": (2, 48)}, r"layers\.9\.attention\.to_q"),
    "half of a pair": ({f"{TO_Q}.lora_A.weight": (2, 48)}, r"to_q is \(48, 0\), not \(48, 48\)"),
    "missing": (None, "no such file"),
}


@pytest.mark.parametrize(("shapes", "reason"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_base_adapter_that_does_not_fit_is_refused_with_module_and_sizes(shapes, reason, tiny_model, tmp_path):
    file = tmp_path / "adapter.safetensors"
    if shapes:
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    with pytest.raises(trainer.UserError, match=f"--base_adapter .*{reason}"):
        trainer.read_base_adapter(parsed(base_adapter=f"{file}:0.5"), linear_layers(tiny_model))


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Puts a model into a cache as `hf download` does, and no Hub is in reach; returns the flags that name it."""

    def cache(model, revision="main"):
        folder, commit = tmp_path / "hub" / "models--someone--z-image", trainer.digest_of(revision)
        shutil.copytree(model, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        return {"pretrained_model_name_or_path": "someone/z-image", "cache_dir": tmp_path / "hub"}

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_model_in_the_cache_of_the_hub_works_offline_by_its_id(offline, train, tiny_model, tmp_path):
    status, output = train(**offline(tiny_model), max_train_steps=1)
    assert status == 0 and (tmp_path / "out" / LORA).is_file()
    assert "base_model:\n- someone/z-image\n" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_run_goes_on_with_the_same_model_from_elsewhere_and_not_with_another_revision(
    offline, train, tiny_model, tmp_path
):
    train(max_train_steps=1, checkpointing_steps=1)
    resume = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    by_id = offline(tiny_model)
    assert train("--dry_run", **by_id, **resume)[0] == 0
    offline(build_tiny_pipeline(tmp_path / "other", seed=1), revision="v2")
    status, output = train("--dry_run", **by_id, **resume, revision="v2")
    assert status == 2 and "transformer was" in output


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (errors.GatedRepoError, "accept its terms"),
        (errors.RepositoryNotFoundError, "hf auth login"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "hf download"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_line_with_what_to_do(
    kind, advice, train, refuse_models, monkeypatch
):
    def refuse(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(trainer, "snapshot_download", refuse)
    status, output = train(pretrained_model_name_or_path="someone/z-image")
    assert status == 2 and "someone/z-image" in output and advice in output.splitlines()[-1]


def test_the_card_names_the_model_on_which_the_pictures_were_looked_at(tmp_path):
    flags = {
        "pretrained_model_name_or_path": "org/Z-Image",
        "validation_model_path": "org/Turbo",
        "output_dir": tmp_path,
    }
    args = trainer.parse_args(train_args(None, "d", None, **flags))
    lora = SimpleNamespace(rank=4, alpha=4, targets={})
    assert trainer.write_model_card("dog", [], SimpleNamespace(args=args, lora=lora)) == "README.md"
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["org/Z-Image", "org/Turbo"]
    assert "num_inference_steps=50, guidance_scale=5.0)" in card.text


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def test_on_gpus_objects_go_over_gloo_and_a_process_waits_two_hours_for_one_that_draws(monkeypatch):
    joined = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", joined.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **more: joined.append((args, more)) or 1 / 0
    )
    with pytest.raises(trainer.UserError):
        trainer.make_accelerator(parsed())
    assert joined == [3, (("cuda:nccl,cpu:gloo",), {"timeout": timedelta(hours=2)})]


def test_another_version_of_the_script_is_noticed_before_the_first_step(monkeypatch, tmp_path):
    seen = []
    for version in ("this", "that"):
        (tmp_path / version).write_text(version)
        monkeypatch.setattr(trainer, "__file__", tmp_path / version)
        monkeypatch.setattr(trainer, "gather_object", lambda objects: seen.extend(objects) or objects)
        trainer.check_fingerprint(None, {"rank": 4})
    monkeypatch.setattr(trainer, "gather_object", lambda objects: seen)
    with pytest.raises(trainer.UserError, match="differ in .* script"):
        trainer.check_fingerprint(None, {"rank": 4})


@pytest.mark.parametrize("reason", ["[/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:5", "it broke"])
def test_a_process_whose_others_have_ended_says_so_in_one_line(reason, monkeypatch, capsys):
    def end(args):
        raise RuntimeError(reason)

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(trainer, "parse_args", lambda: None)
    monkeypatch.setattr(trainer, "main", end)
    if reason == "it broke":  # a fault of the program's, whose place is of interest
        with pytest.raises(RuntimeError, match=reason):
            trainer.run_command_line()
    else:
        assert trainer.run_command_line() == 1
        line = capsys.readouterr().err.strip()
        assert "error: process 2 of 4: another process has ended" in line and reason in line


def test_processes_without_a_device_for_each_are_refused(monkeypatch):
    monkeypatch.setattr(trainer, "Accelerator", lambda **settings: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(trainer.UserError, match="several processes"):
        trainer.make_accelerator(parsed())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert trainer.make_accelerator(parsed()).num_processes == 1


# ---------------------------------------------------------------------------------------------------------------------
# What no test saw when it was changed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"guidance_scale": 1.5}, (50, 5.0)),
        ({"guidance_scale": 0}, (8, 0.0)),
        ({"guidance_scale": 0, "validation_model_path": "Turbo"}, (50, 5.0)),
    ],
)
def test_class_pictures_are_drawn_as_the_pipeline_draws(flags, expected, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(trainer, "load_transformer", lambda run, kind: drawn.append(kind) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(
        trainer,
        "draw_latents",
        lambda transformer, drawing, *rest: drawn.append((drawing.steps, drawing.guidance)) or [torch.zeros(1)],
    )
    monkeypatch.setattr(trainer, "decode_latents", lambda latents, run: [Image.new("RGB", (8, 8))])
    flags = {**flags, "class_data_dir": tmp_path, "num_class_images": 1, "prior_generation_precision": "fp16"}
    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, device=torch.device("cpu"))
    args = parsed(**flags, validation_num_inference_steps=8)
    run = SimpleNamespace(args=args, accelerator=accelerator, own_part=list, pipeline=None, seed=0)
    trainer.generate_class_images(1, {}, run)
    assert drawn == ["fp16", expected] and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_the_attention_backend_holds_for_class_pictures_and_the_validation_model(precision, tiny_model, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        trainer.ZImageTransformer2DModel, "set_attention_backend", lambda model, name: chosen.append(name)
    )
    pipeline = SimpleNamespace(
        transformer_file=None, load=lambda cls, part, **more: cls.from_pretrained(tiny_model, subfolder=part)
    )
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    args = parsed(attention_backend="native")
    run = trainer.Run(args, accelerator, pipeline, 0, torch.float32, None)
    monkeypatch.setattr(trainer.Run, "sharded", False)
    monkeypatch.setattr(trainer.Run, "compiled", False)
    trainer.load_transformer(run, precision)
    assert chosen == ["native"]


def test_the_held_out_levels_of_the_pictures_cover_the_schedule_evenly(monkeypatch):
    levels = []
    monkeypatch.setattr(
        trainer,
        "training_loss",
        lambda transformer, vae, batch, *rest: levels.append(batch.sigmas.item()) or torch.ones(()),
    )
    example = functools.partial(
        trainer.Example, "held-out", source=Path("x"), caption="a", origin="", size=(8, 8), bucket=(8, 8), repeats=1
    )
    examples = [example(name=str(n)) for n in range(4)]
    data = SimpleNamespace(
        plan=SimpleNamespace(examples={"held-out": examples}),
        prompt_embeds={"a": torch.zeros(1, 1)},
        latents=collections.defaultdict(lambda: torch.zeros(1, 1, 1)),
        sigmas=torch.linspace(0, 1, 4801)[:-1],
    )
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer.held_out_loss(None, data, SimpleNamespace(sharded=True, seed=0, accelerator=accelerator))
    assert sorted(levels) == pytest.approx([(n + 0.5) / 48 for n in range(48)], abs=1e-4)


def test_two_runs_may_write_one_entry_of_the_cache_at_the_same_time(tmp_path, monkeypatch):
    save, run = trainer.save_file, SimpleNamespace(args=SimpleNamespace(encoding_cache_dir=tmp_path))

    def encode(number):
        return trainer.cached_encoding(run, ("key",), lambda: torch.ones(number))

    def save_while_another_does(tensors, path):
        monkeypatch.setattr(trainer, "save_file", save)
        save(tensors, path)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        encode(3)  # the other run, from its begin to its end
        assert Path(path).exists()  # this one's is not in its way

    monkeypatch.setattr(trainer, "save_file", save_while_another_does)
    assert torch.equal(encode(3), torch.ones(3)) and len([*tmp_path.iterdir()]) == 1
    assert torch.equal(encode(4), torch.ones(3))  # read from there


def test_fp16_is_scaled_skips_what_is_not_finite_and_keeps_its_scale_in_checkpoints(tiny_model, tmp_path):
    state = make_state(tiny_model)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state.optimizer.param_groups[0]["lr"] = 1e-3  # warmed up
    accelerator = SimpleNamespace(unscale_gradients=state.scaler.unscale_, num_processes=1)
    run = SimpleNamespace(args=parsed(max_grad_norm=1.0), accelerator=accelerator)
    before = [parameter.clone() for parameter in state.parameters]
    for factor in (1.0, float("inf")):
        loss = state.scaler.scale(sum(parameter.sum() for parameter in state.parameters) * factor)
        loss.backward()
        norm = trainer.apply_gradients(state, loss.detach(), False, run)[2]
        assert math.isfinite(norm) == (factor == 1.0)
        if factor == 1.0:
            assert norm == pytest.approx(sum(p.numel() for p in state.parameters) ** 0.5)  # of the gradients unscaled
            after = [parameter.clone() for parameter in state.parameters]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(torch.equal(*pair) for pair in zip(after, state.parameters, strict=True))
    assert state.scaler.get_scale() == 512.0
    state.save(tmp_path)
    other = make_state(tiny_model)
    other.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    other.load(tmp_path)
    assert other.scaler.get_scale() == 512.0
