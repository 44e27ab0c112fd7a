"""Three ways to run the script, and one way to look at how it ended.

    run_here("--rank=0")             in this process: mistakes of the user, everything before training
    fork_trainer("--rank=8")         forked from a process that has imported it: whole runs, an exit status
    TrainerProcess(argv)             the same, and the test goes on meanwhile: what is killed or sent a signal
    launch("--rank=8")               through `accelerate launch`, as a user types it
    launch_distributed(2, ...)       several processes that torchrun starts
    error_line(finished, "--rank")   the one line in which a run says what was wrong, with exit status 2

Importing torch and its libraries takes some 8 seconds of CPU time: a launch pays for it each time, the others once.
The first three answer with the script's own exit status; `accelerate launch` makes 1 of every failure.
"""

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_dreambooth_lora_z_image.py"
LAUNCHER_FLAGS = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--cpu")


@dataclass
class Finished:
    """A run that has ended, with its output as text."""

    command: list[str]
    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self):
        return self.stdout + self.stderr

    def __str__(self):
        parts = [f"exit status {self.returncode}: {shlex.join(self.command)}"]
        for name, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            lines = text.splitlines()
            shown = lines[-60:]
            parts.append(f"--- {name}, last {len(shown)} of {len(lines)} lines ---")
            parts.extend(shown)
        return "\n".join(parts)


def error_line(finished, *words, status=2):
    """The one line, the last of the output, in which a run says why it ended with `status`: it holds the words."""
    assert finished.returncode == status, str(finished)
    assert "Traceback" not in finished.output, str(finished)
    lines = finished.output.rstrip().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{SCRIPT.name}: error: ")] or [""]
    assert line and line == lines[-1] and len(line) < 1500, str(finished)
    assert not [word for word in map(str, words) if word not in line], line
    return line


def training_environment(env=None):
    """The environment of a training process in the tests: offline, one thread, no trace of an outer launcher."""
    launcher_variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher_variables and not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    environment.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    environment.update(env or {})
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# In this process
# ---------------------------------------------------------------------------------------------------------------------

GOES_ON = "goes on"  # in the place of an exit status: the first weights would be loaded


class Reached(BaseException):
    """The trainer is about to load weights. Not an Exception, which the script might answer."""


def reset_accelerate():
    """accelerate keeps its state for the life of the process: a second run in it has to forget the first."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def stopped_before_weights(trainer):
    """Whoever would load weights is stopped."""

    def reach(*args, **kwargs):
        raise Reached

    with mock.patch.object(trainer.PipelineInfo, "load", reach), mock.patch.object(trainer, "encode_prompts", reach):
        yield


def run_here(*argv, env=None, load_weights=True):
    """Runs the script's command line in this process. Without `load_weights` it ends with `GOES_ON` before that."""
    import train_dreambooth_lora_z_image as trainer

    argv = [SCRIPT.name, *map(str, argv)]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    environment = training_environment({"ACCELERATE_USE_CPU": "1", **(env or {})})
    handlers, level = logging.root.handlers[:], logging.root.level
    reset_accelerate()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
            stack.enter_context(mock.patch.object(sys, "argv", argv))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            if not load_weights:
                stack.enter_context(stopped_before_weights(trainer))
            status = trainer.run_command_line()
    except SystemExit as end:
        status = end.code or 0
    except Reached:
        status = GOES_ON
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        reset_accelerate()
    for stream in (out, err):
        stream.flush()
    return Finished(argv, status, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


# ---------------------------------------------------------------------------------------------------------------------
# Forked from a process that has imported the script
# ---------------------------------------------------------------------------------------------------------------------


IMPORTED_LATE = ("transformers.models.qwen2.tokenization_qwen2", "transformers.models.qwen3.modeling_qwen3")


class TrainerProcess:
    """A trainer in a process of its own, forked from a server that has imported it; its output goes to the file `log`.

    The server's environment is that of its start: what libraries read while they are imported does not follow `env`.
    """

    def __init__(self, argv, log=None, before=None, env=None, cwd=ROOT):
        """`before(trainer)`, a function of a module, is called in the process first, to change the trainer there."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["running", SCRIPT.stem, *IMPORTED_LATE])
        folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = training_environment({"PYTHONPATH": folders, "ACCELERATE_USE_CPU": "1"})
        with mock.patch.dict(os.environ, environment, clear=True):
            forkserver.ensure_running()
        self.argv = [str(part) for part in argv]
        self.folder = None if log else tempfile.TemporaryDirectory()
        self.log = Path(log or self.folder.name, "" if log else "log.txt")
        self.log.unlink(missing_ok=True)
        environment = {**environment, **(env or {})}
        self.process = context.Process(target=run_trainer, args=(self.argv, self.log, before, environment, cwd))
        self.process.start()
        deadline = time.monotonic() + 300  # the first time, the server has to import the trainer
        while not self.log.exists() and self.running:
            assert time.monotonic() < deadline, "the process does not start"
            time.sleep(0.005)

    @property
    def output(self):
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""

    @property
    def running(self):
        return self.process.is_alive()

    def kill(self):
        self.process.kill()
        self.process.join()

    def wait_for(self, text, timeout=120):
        """Waits until the output holds `text` or the process has ended."""
        deadline = time.monotonic() + timeout
        while self.running and text not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} after {timeout} seconds in\n{self.output}"
            time.sleep(0.005)

    def finish(self, timeout=300):
        """Waits for the end, which must come within `timeout` seconds."""
        self.process.join(timeout)
        finished = Finished([SCRIPT.name, *self.argv], self.process.exitcode, "", self.output)
        if self.running:
            self.kill()
            raise AssertionError(f"killed after {timeout} seconds, {finished}")
        return finished


def run_trainer(argv, log, before, env, cwd):
    """What the forked process does: the trainer's command line, with its output in the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork is no garbage: collections need not look at it
    import train_dreambooth_lora_z_image as trainer

    sys.argv = [SCRIPT.name, *argv]
    if before:
        before(trainer)
    sys.exit(trainer.run_command_line())


def fork_trainer(*argv, log=None, before=None, env=None, cwd=ROOT, check=True, timeout=300):
    """Runs the trainer to its end in a forked process. The rest as for `TrainerProcess`."""
    finished = TrainerProcess(argv, log, before, env, cwd).finish(timeout)
    assert not check or finished.returncode == 0, str(finished)
    return finished


# ---------------------------------------------------------------------------------------------------------------------
# Launched as a user types it
# ---------------------------------------------------------------------------------------------------------------------


def run(command, env=None, cwd=ROOT, timeout=600, check=True):
    """Runs a command in a process group of its own, which is killed when `timeout` seconds are over."""
    command = [str(part) for part in command]
    process = subprocess.Popen(
        command,
        env=training_environment(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        finished = Finished(command, process.returncode, stdout, stderr)
        raise AssertionError(f"killed after {timeout} seconds, {finished}") from None
    finished = Finished(command, process.returncode, stdout, stderr)
    assert not check or finished.returncode == 0, str(finished)
    return finished


def launch(*args, launcher_flags=LAUNCHER_FLAGS, env=None, cwd=ROOT, timeout=600, check=True):
    """Runs the trainer through `accelerate launch`, by default as one CPU process, whatever the machine's own config.

    For a config file: `launcher_flags=["--config_file", "configs/cpu.yaml"]`. For several processes there is
    `launch_distributed`: `accelerate launch --cpu` starts one, whatever `--num_processes` says.
    """
    accelerate = Path(sys.executable).with_name("accelerate")
    return run([accelerate, "launch", *launcher_flags, SCRIPT, *args], env, cwd, timeout, check)


def launch_script(*args, env=None, cwd=ROOT, timeout=600, check=True):
    """Runs `python train_dreambooth_lora_z_image.py`, without a launcher, on the CPU."""
    return run([sys.executable, SCRIPT, *args], {"ACCELERATE_USE_CPU": "1", **(env or {})}, cwd, timeout, check)


def launch_distributed(num_processes, *args, script=SCRIPT, env=None, cwd=ROOT, timeout=600, check=True):
    """Runs the trainer as `num_processes` CPU processes that speak gloo, through torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return run([*torchrun, script, *args], {"ACCELERATE_USE_CPU": "1", **(env or {})}, cwd, timeout, check)
