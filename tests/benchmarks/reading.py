"""How long training waits for pictures, and what an update of a tiny model takes, beside another trainer.

    python tests/benchmarks/reading.py --script OLD/train_dreambooth_lora_z_image.py --rounds 5

The trainer reads photographs of 12 megapixels, four to an update, whose latents are not cached, with 1, 2 and 4 for
--dataloader_num_workers. The step itself is a sleep, so that all that is left between two steps is waiting for
pictures (and the few milliseconds of an optimizer). Then the tiny model of the tests trains with cached latents: its
updates take so little that what the trainer adds to them shows. The trainers take turns, and begin by turns.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from PIL import Image

from running import training_environment
from tiny import build_tiny_pipeline


def build_photographs(folder, number, megapixels):
    """Save JPEG files of coloured shapes under grain, 4:3, as large as photographs of so many pixels."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    size = (round((megapixels * 4e6 / 3) ** 0.5), round((megapixels * 3e6 / 4) ** 0.5))
    for index in range(number):
        colours = torch.randint(0, 256, (24, 32, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(colours.numpy()).resize(size, Image.Resampling.BICUBIC)
        grain = torch.randn(size[1], size[0], generator=generator).mul(20).add(128).clamp(0, 255).byte()
        grain = Image.fromarray(grain.numpy()).convert("RGB")
        Image.blend(image, grain, 0.3).save(folder / f"{index:03d}.jpg", quality=92)
    return folder


def run_with_sleeps(script, seconds, flags):
    """Run a trainer whose step is a sleep; print the seconds between the end of each and the start of the next."""
    spec = importlib.util.spec_from_file_location("trainer", script)
    trainer = sys.modules["trainer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    starts, ends = [], []

    def training_loss(transformer, *_):
        starts.append(time.perf_counter())
        time.sleep(seconds)
        ends.append(time.perf_counter())
        return 0 * sum(parameter.sum() for parameter in transformer.parameters() if parameter.requires_grad)

    trainer.training_loss = training_loss
    sys.argv = [str(script), *flags]
    status = trainer.run_command_line()
    print(json.dumps([start - end for end, start in zip(ends, starts[1:])]))
    return status


def waiting(script, threads, flags, args):
    """Seconds of waiting before each step after the first, as a trainer with so many readers has them."""
    flags = [*flags, "--train_batch_size=4", f"--dataloader_num_workers={threads}", *args.flags.split()]
    command = [sys.executable, __file__, f"--run={script}", f"--sleep={args.sleep}", f"--flags={json.dumps(flags)}"]
    environment = training_environment({"ACCELERATE_USE_CPU": "1"})
    finished = subprocess.run(command, env=environment, cwd=common.ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{script} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def by_turns(args, number):
    """[(label, script)], the other way round in every second round."""
    scripts = list(common.other_scripts(args).items())
    return scripts[::-1] if number % 2 else scripts


def parse_args():
    parser = common.benchmark_parser(__doc__)
    parser.set_defaults(steps=19, rounds=5, mixed_precision="no", resolution=1024)
    add = parser.add_argument
    add("--photographs", type=int, default=24, help="how many to read")
    add("--megapixels", type=float, default=12, help="size of each")
    add("--sleep", type=float, default=0.5, help="seconds of a step")
    add("--threads", type=int, nargs="+", default=[1, 2, 4], help="values of --dataloader_num_workers")
    add("--updates", type=int, default=200, help="updates of the tiny model; 0 leaves them out")
    add("--run", metavar="SCRIPT", help="run this trainer with sleeps and print how long it waited")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.run:
        return run_with_sleeps(args.run, args.sleep, json.loads(args.flags))
    seconds = {}  # {(script, what): [one figure of each round]}
    with tempfile.TemporaryDirectory() as temporary:
        model = build_tiny_pipeline(Path(temporary, "model"))
        photographs = build_photographs(Path(temporary, "photographs"), args.photographs, args.megapixels)
        small = common.build_pictures(Path(temporary, "small"), number=6, size=64)
        for number in range(args.rounds):
            for threads in args.threads:
                for label, script in by_turns(args, number):
                    out = Path(temporary, f"{number}-{threads}-{label.replace('/', '-')}")
                    flags = common.training_flags(model, photographs, out, args)
                    waited = waiting(script, threads, [*flags, "--report_to=none"], args)
                    seconds.setdefault((label, f"waiting, {threads}"), []).append(statistics.fmean(waited))
            for label, script in by_turns(args, number) if args.updates else []:
                out = Path(temporary, f"{number}-tiny-{label.replace('/', '-')}")
                flags = common.training_flags(model, small, out, args)
                flags += ["--cache_latents", "--resolution=64", f"--max_train_steps={args.updates}"]
                result = common.measure(script, flags, args)
                seconds.setdefault((label, "update of the tiny model"), []).append(result["step_s"])
    rows = [
        {"script": label, "what": what, "s": statistics.median(s), "low": min(s), "high": max(s), "rounds_s": s}
        for (label, what), s in sorted(seconds.items(), key=lambda item: item[0][::-1])
    ]
    columns = {
        "seconds of each step": ("what", ""),
        "script": ("script", ""),
        "median": ("s", ".4f"),
        "lowest": ("low", ".4f"),
        "highest": ("high", ".4f"),
    }
    return common.report(rows, columns, args)


if __name__ == "__main__":
    sys.exit(main())
