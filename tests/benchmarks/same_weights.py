"""Do two versions of the script train the same weights? Ten command lines, compared bit by bit.

    python tests/benchmarks/same_weights.py main~5 train_dreambooth_lora_z_image.py
    python tests/benchmarks/same_weights.py OLD NEW --only "prodigy,two processes"

OLD and NEW are files or git revisions. Each run is a fork of this process, which has imported the libraries, so that
the whole takes about a minute. What is compared are the tensors of the LoRA file, by name, type and bits, and not its
metadata. The exit status is 1 where a command line differs or fails, else 0.
"""

import argparse
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="1")  # before torch is imported
BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent.parent
sys.path[:0] = [str(ROOT), str(BENCHMARKS.parent)]

import torch  # noqa: E402 (needs the environment)
from safetensors.torch import load_file  # noqa: E402

from tiny import build_photos, build_tiny_pipeline, train_args  # noqa: E402 (needs the path)


MODULE = "train_dreambooth_lora_z_image"
CLASS = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a dog", "num_class_images": 2}
COMMAND_LINES = {  # what it is: the flags of each of its runs, beside those of `flags_of`
    "plain": [{"train_batch_size": 4}],
    "batch 2 accumulated 2": [{"train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.1}],
    "buckets with captions": [
        {"use_aspect_ratio_buckets": True, "train_batch_size": 2, "caption_dropout": 0.3, "max_train_steps": 8}
    ],
    "prior preservation": [{**CLASS, "train_batch_size": 2}],
    "cached latents": [{"cache_latents": True, "repeats": 2, "gradient_checkpointing": True}],
    "random crop and flip": [{"random_flip": True, "weighting_scheme": "logit_normal", "logit_mean": 0.5}],
    "prodigy": [{"optimizer": "prodigy", "learning_rate": 1, "lr_scheduler": "cosine", "lr_warmup_steps": 2}],
    "fp8 on the CPU": [{"do_fp8_training": True}],
    "resumed in the middle": [
        {"max_train_steps": 3, "checkpointing_steps": 3, "lora_dropout": 0.1},
        {"resume_from_checkpoint": "latest", "lora_dropout": 0.1},
    ],
    "two processes": [{"train_batch_size": 3, "random_flip": True}],
}


def flags_of(run, model, photos):
    """The flags of a run of six steps of the tiny model at 64 pixels, as a list of strings."""
    flags = {"max_train_steps": 6, "learning_rate": 0.01, "report_to": "none", "rank": 4}
    return train_args(model, photos, "out", **(flags | run))


def read_script(version, path):
    """Write the script of a file or git revision to `path`."""
    if Path(version).is_file():
        shutil.copy(version, path)
        return
    shown = subprocess.run(["git", "-C", ROOT, "show", f"{version}:{MODULE}.py"], capture_output=True)
    if shown.returncode:
        sys.exit(f"same_weights.py: error: {version} is neither a file nor a git revision")
    path.write_bytes(shown.stdout)


def load_script(path):
    """Import the script at `path` as its name."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fork(function, *args):
    """Run `function(*args)` in a fork of this process, which exits with 0, or with 1 where it raises; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except SystemExit:
            pass  # it has said why
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def succeeded(pids):
    """Wait for processes; whether all of them exited with 0."""
    return not sum([os.waitpid(pid, 0)[1] for pid in pids])


def run_command_line(script, folder, runs, processes):
    """Run the script in `folder` with each of these lists of flags; called in a fork. Output goes to `log.txt`."""
    folder.mkdir(parents=True)
    os.chdir(folder)  # so that both versions see the same paths
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for flags in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [fork(run_rank, script, flags, rank, processes, port) for rank in range(processes)]
        if not succeeded(ranks):
            sys.exit(1)


def run_rank(script, flags, rank, processes, port):
    """One process of a run; called in a fork."""
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=str(port))
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    trainer = load_script(script)
    trainer.main(trainer.parse_args(flags))


def compare(old, new):
    """What two LoRA files have in common, in words, and whether it is everything."""
    first, second = load_file(old), load_file(new)
    if first.keys() != second.keys():
        return f"other tensors: {', '.join(sorted(first.keys() ^ second.keys())[:3])}", False
    changed = [
        name
        for name, tensor in first.items()
        if tensor.dtype != second[name].dtype
        or tensor.shape != second[name].shape
        or not torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
    ]
    if not changed:
        return "the same", True
    norms = [(first[name].float() - second[name].float()).norm() / first[name].float().norm() for name in changed]
    return f"{len(changed)} of {len(first)} tensors differ, by up to {max(norms):.1e} of their norm", False


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Command lines: " + "; ".join(COMMAND_LINES) + "."
    )
    parser.add_argument("old", help="a file or a git revision")
    parser.add_argument("new", help="a file or a git revision")
    parser.add_argument("--only", metavar="NAMES", help="some of the command lines, separated by commas")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(COMMAND_LINES)
    if unknown := [name for name in names if name not in COMMAND_LINES]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(COMMAND_LINES)}")
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        scripts = {"old": folder / "old.py", "new": folder / "new.py"}
        for label, version in (("old", args.old), ("new", args.new)):
            read_script(version, scripts[label])
        model, photos = build_tiny_pipeline(folder / "model"), build_photos(folder / "photos")
        (photos / "cat.txt").write_text("a photo of a cat that is longer than the others", encoding="utf-8")
        (photos / "coffee.txt").write_text("一杯咖啡", encoding="utf-8")
        load_script(scripts["old"])  # with all libraries, so that the forks need not import them
        width = max(map(len, COMMAND_LINES))
        print(f"| {'command line':{width}} | LoRA of {args.old} and {args.new}\n|{'-' * (width + 2)}|---")
        for name in names:
            runs = [flags_of(run, model, photos) for run in COMMAND_LINES[name]]
            processes = 2 if name == "two processes" else 1
            pids = {
                label: fork(run_command_line, script, folder / label / name, runs, processes)
                for label, script in scripts.items()
            }
            failed = [label for label, pid in pids.items() if not succeeded([pid])]
            if failed:
                lines = (folder / failed[0] / name / "log.txt").read_text(encoding="utf-8").splitlines()
                result = f"{' and '.join(failed)} failed: {lines[-1] if lines else 'without a word'}"
            else:
                files = [folder / label / name / "out" / "pytorch_lora_weights.safetensors" for label in scripts]
                result, equal = compare(*files)
                same += equal
            print(f"| {name:{width}} | {result}", flush=True)
    print(f"{same} of {len(names)} the same")
    return int(same < len(names))


if __name__ == "__main__":
    sys.exit(main())
