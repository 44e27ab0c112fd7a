"""Kills the trainer at random moments, again and again, and compares what comes out with a run that nobody killed.

    python tests/kill_test.py --kills 50            # prints kills, resumes, bit-identical or not; exit status 1 if not
    python tests/kill_test.py --kills 5 --seed 7

A round is one run of the trainer with everything random switched on. Its process is killed with SIGKILL while it
starts, trains or writes a checkpoint, and started again with `--resume_from_checkpoint latest`, until it ends by
itself; then the next round begins. The processes are forked from one that has imported the trainer, so that a kill
costs a second or two and not ten. The tests borrow `fork_trainer` for every run whose start they do not look at.
"""

import argparse
import gc
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from transformers import Qwen2Tokenizer, Qwen3Model

from tiny import ROOT, Finished, build_photos, build_tiny_pipeline, lora_tensors, train_args, training_environment


LAZY = (Qwen2Tokenizer, Qwen3Model)  # the trainer imports them late: they are to be there before the fork
MOMENTS = ("starting", "training", "saving")


class TrainerProcess:
    """A trainer in a process of its own, forked from a server that has imported it."""

    def __init__(self, argv, log, before=None, env=None):
        """`before(trainer)`, a function of a module, is called in the process first, to change the trainer there."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kill_test", "train_dreambooth_lora_z_image"])
        folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = training_environment({"PYTHONPATH": folders, "ACCELERATE_USE_CPU": "1"})
        with mock.patch.dict(os.environ, environment, clear=True):
            forkserver.ensure_running()
        self.argv, self.log = [str(part) for part in argv], Path(log)
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=run_trainer, args=(self.argv, self.log, before, env or {}))
        self.process.start()
        deadline = time.monotonic() + 120  # the first time, the server has to import the trainer
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

    def finish(self, timeout=120):
        """Waits for the end, which must come within `timeout` seconds."""
        self.process.join(timeout)
        finished = Finished(["train_dreambooth_lora_z_image.py", *self.argv], self.process.exitcode, "", self.output)
        if self.running:
            self.kill()
            raise AssertionError(f"killed after {timeout} seconds, {finished}")
        return finished


def run_trainer(argv, log, before, env):
    """What the forked process does: the trainer's command line, with its output in the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a trainer that was started by itself
    gc.freeze()  # what was imported before the fork is no garbage: collections need not look at it
    import train_dreambooth_lora_z_image as trainer

    sys.argv = ["train_dreambooth_lora_z_image.py", *argv]
    if before:
        before(trainer)
    sys.exit(trainer.run_command_line())


def fork_trainer(*argv, log, before=None, env=None, check=True, timeout=120):
    """Runs the trainer to its end in a forked process. `before` and `log` as for `TrainerProcess`."""
    finished = TrainerProcess(argv, log, before, env).finish(timeout)
    assert not check or finished.returncode == 0, str(finished)
    return finished


def everything(model, photos, classes, out, **overrides):
    """The flags of a run in which everything is random that can be, of six updates, two to an epoch."""
    flags = {
        "aspect_ratio_buckets": "64,64;64,96;96,64",
        "random_flip": True,
        "caption_dropout": 0.3,
        "lora_dropout": 0.2,
        "with_prior_preservation": True,
        "class_data_dir": classes,
        "class_prompt": "a photo of a dog",
        "num_class_images": 3,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 2,
        "max_train_steps": 6,
        "checkpointing_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    }
    return train_args(model, photos, out, **{**flags, **overrides})


def write_captions(photos):
    """Gives every second picture a caption of its own, one of them longer than the others."""
    pictures = sorted(path for path in photos.iterdir() if path.suffix != ".txt")
    for number, picture in enumerate(pictures[::2]):
        picture.with_suffix(".txt").write_text(f"sks dog, number {number}" + ", sleeping" * (4 * number), "utf-8")


def class_pictures(photos, folder):
    """A folder with the first three pictures of `photos`, as pictures of the class."""
    folder.mkdir()
    for picture in sorted(path for path in photos.iterdir() if path.suffix != ".txt")[:3]:
        shutil.copy(picture, folder)
    return folder


def bit_identical(one, other):
    """Whether two output folders hold LoRA files of the same tensors, bit for bit."""
    first, second = lora_tensors(one), lora_tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for_moment(process, moment, out, start_up, training, generator):
    """Waits for a random time within `moment`; whether the process is still running then.

    `start_up` and `training` are the seconds that an uninterrupted run takes to its first update and from there on.
    """
    if moment == "starting":
        process.process.join(generator.uniform(0, start_up))
        return process.running
    process.wait_for("step ")
    if moment == "training":
        process.process.join(generator.uniform(0, training))
        return process.running
    seen, number = set(), generator.randint(1, 3)  # the first checkpoint that is being written, or a later one
    while process.running:
        seen.update(out.glob(".checkpoint-*.part"))
        if len(seen) >= number:
            process.process.join(generator.uniform(0, 0.02))
            return process.running
        time.sleep(0.001)
    return False


def kill_again_and_again(kills, seed, folder, argv, report=lambda line: None):
    """Rounds of kills until there were `kills`, and one result for each round: whether its weights are the same.

    `argv(out)` gives the flags of a run into the folder `out`.
    """
    generator, killed, resumes, results = random.Random(seed), Counter(), 0, []
    log = folder / "log.txt"
    expected = folder / "uninterrupted"
    process = TrainerProcess(argv(expected), log)
    started = time.monotonic()
    process.wait_for("step ")
    start_up = time.monotonic() - started
    finished = process.finish()
    training = time.monotonic() - started - start_up
    assert finished.returncode == 0, str(finished)
    while killed.total() < kills:
        out = folder / f"round-{len(results) + 1}"
        before = killed.total()
        while True:
            process = TrainerProcess([*argv(out), "--resume_from_checkpoint=latest"], log)
            resumes += any(out.glob("checkpoint-*"))
            moment = generator.choice(MOMENTS)
            if killed.total() < kills and wait_for_moment(process, moment, out, start_up, training, generator):
                process.kill()
                killed[moment] += 1
                continue
            finished = process.finish()
            assert finished.returncode == 0, str(finished)
            break
        results.append(bit_identical(out, expected))
        verdict = "bit-identical" if results[-1] else "DIFFERENT"
        report(f"round {len(results)}: {killed.total() - before} kills, weights {verdict}")
    return killed, resumes, results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, photos = build_tiny_pipeline(folder / "model"), build_photos(folder / "photos")
        write_captions(photos)
        classes = class_pictures(photos, folder / "classes")

        def argv(out):
            return everything(model, photos, classes, out, max_train_steps=12, checkpointing_steps=2)

        killed, resumes, results = kill_again_and_again(args.kills, args.seed, folder, argv, print)
    moments = ", ".join(f"{killed[moment]} {moment}" for moment in MOMENTS)
    print(
        f"{killed.total()} kills ({moments}), {resumes} resumes, {len(results)} runs, "
        f"{sum(results)} of them bit-identical to the uninterrupted one, {time.monotonic() - started:.0f} s"
    )
    return 0 if all(results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a temporary folder is removed
    sys.exit(main())
