"""What the benchmarks share: launching a trainer, watching its processes, reading when its steps ended.

Nothing here looks into the trainer: memory and bytes read are the kernel's (/proc), the end of each step is the wall
time of its `loss` in the tensorboard log, so that every trainer with the same command line is measured alike. GB are
10^9 bytes.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import diffusers
import torch
from PIL import Image


BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent.parent
SCRIPT = ROOT / "train_dreambooth_lora_z_image.py"
sys.path[:0] = [str(ROOT), str(BENCHMARKS.parent)]

from running import training_environment  # noqa: E402 (needs the path)
from tiny import events  # noqa: E402 (needs the path)


PROMPT = "a photo of sks dog"
GB = 1e9


def benchmark_parser(docstring):
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=docstring.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--script", action="append", default=[], metavar="PATH", help="another trainer to run by turns with this one")
    add("--output", metavar="FILE.json", help="write the figures there")
    add("--resolution", type=int, default=256, help="side of the training pictures")
    add("--steps", type=int, default=5, help="steps of each run; the first is warm-up")
    add("--rounds", type=int, default=1, help="runs of each trainer")
    add("--mixed_precision", default="bf16", choices=["no", "bf16"], help="precision of the training")
    add("--rank", type=int, default=16, help="of the LoRA")
    add("--flags", default="", help='more flags for every run, for example "--use_8bit_adam"')
    add(
        "--products",
        choices=["float32", "none"],
        help="multiply bf16 matrices in float32, or not at all: for a CPU that is too slow in bf16 (products.py)",
    )
    return parser


def build_pictures(folder, number=2, size=512):
    """Saves pictures of smooth random colours, as JPEG, and returns the folder."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:05d}.jpg")
    return folder


def training_flags(model, pictures, output_dir, args):
    """The flags of a run, all of which the reference trainer knows too."""
    flags = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures,
        "instance_prompt": PROMPT,
        "output_dir": output_dir,
        "mixed_precision": args.mixed_precision,
        "resolution": args.resolution,
        "rank": args.rank,
        "train_batch_size": 1,
        "max_train_steps": args.steps,
        "checkpointing_steps": 1_000_000,
        "report_to": "tensorboard",
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()] + ["--skip_final_inference"]


def knows_flag(script, flag):
    """Whether a trainer has that flag."""
    return f'"{flag}"' in Path(script).read_text(encoding="utf-8")


def other_scripts(args):
    """{label: path} of ours and of the trainers of `--script`."""
    others = {f"{Path(path).parent.name}/{Path(path).name}": Path(path).resolve() for path in args.script}
    return {"ours": SCRIPT, **others}


def launch_command(script, flags, args):
    """The `accelerate launch` that a user types, for one process on whatever device there is."""
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes=1", "--num_machines=1"]
    launcher += [f"--mixed_precision={args.mixed_precision}", "--dynamo_backend=no"]
    if not torch.cuda.is_available():
        launcher.append("--cpu")
    if args.products:
        launcher += [BENCHMARKS / "products.py", args.products]
    return [str(word) for word in (*launcher, script, *flags)]


def measure(script, flags, args):
    """Run a trainer once and give what it took, as a dictionary; `error` in it where it failed."""
    output_dir = next(Path(flag.split("=", 1)[1]) for flag in flags if flag.startswith("--output_dir="))
    command = launch_command(script, flags, args)
    threads = os.environ.get("OMP_NUM_THREADS")
    environment = training_environment({"OMP_NUM_THREADS": threads} if threads else None)
    if not threads:
        environment.pop("OMP_NUM_THREADS")
    with tempfile.TemporaryFile() as log:
        started = time.time()
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        with ProcessTree(process.pid) as tree:
            status = process.wait()
        wall = time.time() - started
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    result = {"command": shlex.join(command), "wall_s": wall, **tree.peaks()}
    logged = events(output_dir).scalars
    ends = logged.get("loss", [])
    if status or not ends:
        return result | {"error": "\n".join(lines[-15:]) or f"exit status {status}"}
    times = [event.wall_time for event in ends]
    steps = [after - before for before, after in zip(times, times[1:])]
    result |= {
        "first_step_s": times[0] - started,
        "step_s": statistics.median(steps) if steps else None,
        "steps_s": steps,
        "losses": [event.value for event in ends],
        "training_peak_gb": tree.peak_between(times[0], times[-1]),
        "growth_gb": tree.growth(times),
    }
    expected = [line for line in lines if line.startswith("Expected peak memory, GiB: ")]
    if expected:
        stages = (stage.rsplit(" ", 1) for stage in expected[0].partition(": ")[2].split(", "))
        result["expected_gb"] = {stage: float(size) * 2**30 / GB for stage, size in stages}
    if "memory_gib" in logged:
        result["reserved_gb"] = max(event.value for event in logged["memory_gib"]) * 2**30 / GB
    return result


class ProcessTree(threading.Thread):
    """Samples the memory of a process and its descendants five times a second, until left.

    `resident` adds up the resident sets, so it counts the libraries that processes share more than once; `anonymous`
    is what they allocated, `file` the pages of mapped files (weights that are read in place), which the kernel can
    drop and read again. `read` is what they had to read from the disk, page faults in mapped files included; what was
    in the page cache already is not in it.
    """

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.samples, self.left = pid, [], threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.left.set()
        self.join()

    def run(self):
        while not self.left.wait(0.2):
            counts = [self.counts_of(pid) for pid in descendants(self.pid)]
            self.samples.append((time.time(), *(sum(column) for column in zip(*counts))))

    def counts_of(self, pid):
        """(resident, anonymous, file, read so far) in bytes; what its ended children read is in a process's own."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            read = int(Path(f"/proc/{pid}/io").read_text().split("read_bytes: ")[1].split()[0])
        except (OSError, IndexError):  # it has ended
            return 0, 0, 0, 0
        fields = dict(line.split(":", 1) for line in status.splitlines())
        resident, anonymous, file = (
            int(fields.get(name, "0").split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssFile")
        )
        return resident, anonymous, file, read

    def peaks(self):
        """The largest of each over all samples, in GB."""
        names = ("resident_peak_gb", "anonymous_peak_gb", "file_peak_gb", "read_gb")
        columns = zip(*(sample[1:] for sample in self.samples))
        return {name: max(column) / GB for name, column in zip(names, columns)}

    def peak_between(self, start, end):
        """The largest resident memory between two moments, in GB."""
        return max((sample[1] for sample in self.samples if start <= sample[0] <= end), default=0) / GB

    def growth(self, times):
        """How much higher the peak of the second half of the steps is than that of the first, in GB."""
        if len(times) < 3:
            return None
        middle = times[0] + (times[-1] - times[0]) / 2
        return self.peak_between(middle, times[-1]) - self.peak_between(times[0], middle)


def descendants(pid):
    """A process and all below it."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                pids += map(int, children.read_text().split())
            except OSError:  # the thread has ended
                continue
    return pids


def forget_files(folder):
    """Drop a folder's files from the page cache, so that the next run reads them from the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def machine():
    """What the figures were measured on."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    return {
        "cpu": cpus[0].split(":")[1].strip() if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": memory / GB,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def report(rows, columns, args, **extra):
    """Print the columns {title: (key, format)} of the rows as a table, and write everything as JSON."""
    here = machine()
    device = here["gpu"] or "no GPU"
    print(f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']:.0f} GB, {device}, torch {here['torch']}")
    cells = [list(columns)]
    for row in rows:
        values = [(row.get(key), form) for key, form in columns.values()]
        cells.append(["" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if line is cells[0]:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in rows:
        if "error" in row:
            print(f"{row['script']} {row.get('run', '')} failed: {row['error']}", file=sys.stderr)
    if args.output:
        content = {"command": shlex.join(["python", *sys.argv]), "machine": here, "results": rows, **extra}
        Path(args.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in row for row in rows) else 0
