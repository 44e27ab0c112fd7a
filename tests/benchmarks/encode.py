"""Time and disk reads until the first step, with an empty encoding cache and with one that an earlier run filled.

    python tests/benchmarks/encode.py --folder full-size     # a full-size model: see full_size.py --build_only
    python tests/benchmarks/encode.py --pictures 50          # the tiny model of the tests

A trainer without --encoding_cache_dir runs twice all the same. The model's files are dropped from the page cache
before each run, so that every run reads what it needs from the disk.
"""

import sys
import tempfile
from pathlib import Path

import common

from tiny import build_tiny_pipeline


def parse_args():
    parser = common.benchmark_parser(__doc__)
    parser.set_defaults(steps=1)
    parser.add_argument("--folder", type=Path, help="the model; default: a tiny one")
    parser.add_argument("--pictures", type=int, default=10, help="how many to train on")
    return parser.parse_args()


def main():
    args, rows = parse_args(), []
    with tempfile.TemporaryDirectory() as temporary:
        model = args.folder.resolve() if args.folder else build_tiny_pipeline(Path(temporary, "model"))
        pictures = common.build_pictures(Path(temporary, "pictures"), args.pictures, args.resolution)
        for number in range(args.rounds):
            for start in ("cold", "warm"):
                for label, script in common.other_scripts(args).items():
                    name = f"{number}-{label.replace('/', '-')}"
                    flags = common.training_flags(model, pictures, Path(temporary, f"{name}-{start}"), args)
                    flags += ["--cache_latents", *args.flags.split()]
                    if common.knows_flag(script, "--encoding_cache_dir"):
                        flags.append(f"--encoding_cache_dir={Path(temporary, f'{name}-cache')}")
                    common.forget_files(model)
                    rows.append({"script": label, "run": start, **common.measure(script, flags, args)})
    columns = {
        "script": ("script", ""),
        "start": ("run", ""),
        "first step, s": ("first_step_s", ".1f"),
        "read GB": ("read_gb", ".3f"),
        "peak GB": ("resident_peak_gb", ".2f"),
    }
    return common.report(rows, columns, args)


if __name__ == "__main__":
    sys.exit(main())
