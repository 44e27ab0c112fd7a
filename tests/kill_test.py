"""Kills the trainer at random moments, again and again, and compares what comes out with a run that nobody killed.

    python tests/kill_test.py --kills 50            # prints kills, resumes, bit-identical or not; exit status 1 if not
    python tests/kill_test.py --kills 5 --seed 7
    python tests/kill_test.py --init_lora --no_fsync --do_fp8_training  # what it does not know goes to the trainer

A round is one run of the trainer with everything random switched on. Its process is killed with SIGKILL while it
starts, trains or writes a checkpoint, and started again with `--resume_from_checkpoint latest`, until it ends by
itself; then the next round begins. The processes are forked from one that has imported the trainer, so that a kill
costs a second or two and not ten.
"""

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from running import TrainerProcess
from tiny import build_photos, build_tiny_pipeline, lora_tensors, train_args


MOMENTS = ("starting", "training", "saving")


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
        "ema_decay": 0.5,
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


def refuse_fsync(descriptor):
    """`os.fsync` as some network mounts answer it."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init_lora", action="store_true", help="the runs start from a LoRA")
    parser.add_argument("--no_fsync", action="store_true", help="as on a file system that refuses it")
    args, more = parser.parse_known_args()
    if args.no_fsync:
        os.fsync = refuse_fsync
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, photos = build_tiny_pipeline(folder / "model"), build_photos(folder / "photos")
        write_captions(photos)
        classes = class_pictures(photos, folder / "classes")

        if args.init_lora:
            more.append(f"--init_lora={folder / 'warm'}")
            warm = TrainerProcess(train_args(model, photos, folder / "warm", learning_rate=0.01), folder / "log.txt")
            assert warm.finish().returncode == 0, (folder / "log.txt").read_text()

        def argv(out):
            return [*everything(model, photos, classes, out, max_train_steps=12, checkpointing_steps=2), *more]

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
