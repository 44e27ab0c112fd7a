"""One command for a card: whether the script is right on it, how fast, and in how much memory.

    python tests/benchmarks/gpu.py --quick --output gpu.md      # the most important rows, below 4 minutes
    python tests/benchmarks/gpu.py --output gpu.md --readme     # all of them; the table goes into README.md as well
    python tests/benchmarks/gpu.py --device cpu --tiny          # all of its code on a tiny model, without a card

Each row is a run of the script's own `main` on a full-size Z-Image with random weights, made on the spot. Only the
encoders are left out: prompt embeddings (20 tokens) and latents are random. Times are medians after three steps.

Columns: seconds a step and pictures a second; the most memory allocated in training, and what the script's plan says
of it; the step's own products (without recomputed ones) as a part of the rate of a plain bf16 product, measured in the
same run; the cosine of the first gradient to that of the first row of the same size; seconds until the first step is
done, with loading and compiling. GiB are 2^30 bytes.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

import common  # noqa: E402 (needs the path)
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from diffusers import AutoencoderKL, ZImageTransformer2DModel  # noqa: E402
from full_size import VAE, bf16_matrix_rate, step_flops  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train_dreambooth_lora_z_image as trainer  # noqa: E402


ASSET = ROOT / "tests" / "assets" / "tiny-z-image"
SUBJECTS = ROOT / "tests" / "assets" / "subjects"
LORA = "pytorch_lora_weights.safetensors"
WARM_UP = 3  # steps
QUICK_SECONDS = 215  # no row of --quick is begun after that
RECOMPUTED, COMPILED = "--gradient_checkpointing", "--compile"


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: its name, the side of its pictures, its flags, and the least cosine of its gradient."""

    name: str
    pixels: int
    flags: str = ""
    cosine: float = 0.999
    batch: int = 1
    draws: bool = False


QUICK = [
    Row("bf16, recomputed", 512, RECOMPUTED),
    Row("bf16, recomputed", 1024, RECOMPUTED),
    Row("bf16, compiled", 512, COMPILED),
    Row("bf16, compiled", 1024, COMPILED),
    Row("bf16, compiled, recomputed", 512, f"{COMPILED} {RECOMPUTED}"),
    Row("bf16, compiled, recomputed", 1024, f"{COMPILED} {RECOMPUTED}"),
    Row("float8, recomputed", 1024, f"--do_fp8_training {RECOMPUTED}", 0.97),
    Row("int8, recomputed", 1024, f"--base_model_precision=int8 {RECOMPUTED}"),
    Row("NF4, recomputed", 1024, f"--base_model_precision=nf4 {RECOMPUTED}", 0.85),
    Row("bf16, recomputed, LoRA on the last block", 1024, f"--lora_layers=layers.29.attention.to_q {RECOMPUTED}"),
    Row("one picture in 20 steps", 1024, f"{COMPILED} {RECOMPUTED}", draws=True),
]
MORE = [
    Row("bf16", 512),
    Row("bf16", 1024),
    Row("bf16, half recomputed", 1024, f"{RECOMPUTED}=0.5"),
    Row(
        "bf16, recomputed, attention and feed-forward",
        1024,
        f"--lora_layers=to_q,to_k,to_v,to_out.0,w1,w2,w3 {RECOMPUTED}",
    ),
    Row("bf16, recomputed, offload", 1024, f"--offload {RECOMPUTED}"),
    Row("bf16, compiled, recomputed, batch 2", 1024, f"{COMPILED} {RECOMPUTED}", batch=2),
    Row("bf16, compiled, recomputed, batch 4", 1024, f"{COMPILED} {RECOMPUTED}", batch=4),
    Row("bf16, recomputed, 8-bit Adam", 1024, f"--use_8bit_adam {RECOMPUTED}"),
    Row("bf16, recomputed, Prodigy", 1024, f"--optimizer=prodigy --learning_rate=1 {RECOMPUTED}"),
    Row("float8", 1024, "--do_fp8_training", 0.97),
    Row("int8, compiled, recomputed", 1024, f"--base_model_precision=int8 {COMPILED} {RECOMPUTED}"),
    Row("NF4, compiled, recomputed", 1024, f"--base_model_precision=nf4 {COMPILED} {RECOMPUTED}", 0.85),
]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=8, help="of each run; the first three are warm-up. Default: 8")
    add("--quick", action="store_true", help="the most important rows alone, for as long as the time lasts")
    add("--only", default="", metavar="REGEX", help="rows whose name it finds")
    add("--output", type=Path, metavar="FILE.md", help="write each row there as soon as it is done")
    add("--readme", action="store_true", help="put the table into README.md")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--tiny", action="store_true", help="a tiny model and tiny pictures: only for a test of this program")
    return parser.parse_args(argv)


def build_model(folder, tiny, device):
    """A pipeline folder whose transformer and VAE are random, of the real size unless `tiny`; returns its config.

    Its tokenizer and text encoder are the small model's: prompts are not encoded.
    """
    shutil.copytree(ASSET, folder)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    config = {"dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [4, 6, 6]}
    with torch.device(device):
        models = {"transformer": ZImageTransformer2DModel(**config if tiny else {})}
        if not tiny:
            models["vae"] = AutoencoderKL(**VAE)
    torch.set_default_dtype(default)
    for name, model in models.items():
        shutil.rmtree(folder / name)
        model.save_pretrained(folder / name, max_shard_size="20GB")
    config = models["transformer"].config
    text_config = folder / "text_encoder" / "config.json"
    text = re.sub(r'"hidden_size": \d+', f'"hidden_size": {config.cap_feat_dim}', text_config.read_text("utf-8"))
    text_config.write_text(text, encoding="utf-8")
    return dict(config)


class Measured:
    """What is read off a run of the script from inside, by replacing functions of it for as long as it runs."""

    def __init__(self):
        self.ends, self.gradient, self.peak, self.planned, self.draws = [], None, None, None, []

    def __enter__(self):
        self.started = time.perf_counter()
        self.originals = {}
        for name in (
            "plan_memory",
            "encode_prompts",
            "cache_latents",
            "load_training_state",
            "apply_gradients",
            "draw_latents",
        ):
            self.originals[name] = original = getattr(trainer, name)
            setattr(trainer, name, functools.partial(getattr(self, name), original))
        return self

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(trainer, name, original)

    def plan_memory(self, original, *arguments):
        run, counted = original(*arguments)
        training = counted.get("training")  # nothing is counted for a run on the CPU
        self.planned = training and training / 2**30
        self.started = time.perf_counter()
        return run, counted

    def encode_prompts(self, original, prompts, run):
        generator, width = torch.Generator().manual_seed(1), run.pipeline.transformer_config["cap_feat_dim"]
        return {prompt: torch.randn(20, width, generator=generator).to(run.weight_dtype) for prompt in prompts}

    def cache_latents(self, original, examples, run):
        generator = torch.Generator().manual_seed(2)
        return {(e, False): torch.randn(run.pipeline.latent_shape(e.bucket), generator=generator) for e in examples}

    def load_training_state(self, original, *arguments):
        state = original(*arguments)
        generator = torch.Generator().manual_seed(3)
        for parameter in state.parameters:  # B begins at zero: A would have no gradient
            if not parameter.any():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return state

    def apply_gradients(self, original, state, *arguments):
        if self.gradient is None:
            self.gradient = torch.cat([parameter.grad.flatten() for parameter in state.parameters]).double().cpu()
        result = original(state, *arguments)
        self.ends.append(time.perf_counter())
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() / 2**30
        return result

    def draw_latents(self, original, *arguments):
        started = time.perf_counter()
        images = original(*arguments)
        self.draws.append(time.perf_counter() - started)
        return images


class Benchmark:
    """The card, the model, and the rows so far."""

    def __init__(self, args, work):
        self.args, self.work, self.started = args, work, time.perf_counter()
        self.folder, self.gradients, self.lines, self.results = work / "model", {}, [], {}
        self.failed = False
        self.config = build_model(self.folder, args.tiny, args.device)
        self.pictures = common.build_pictures(work / "pictures", size=64 if args.tiny else 1024)
        self.rate = bf16_matrix_rate() if args.device == "cuda" else None
        card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        rate = f", {self.rate / 1e12:.0f} TFLOP/s in plain bf16 products" if self.rate else ""
        self.title = f"{card}, torch {torch.__version__}{rate}; full size, random weights, rank 16, batch 1"

    def flags(self, row, out):
        """The row's command line."""
        size = row.pixels // 16 if self.args.tiny else row.pixels
        flags = [f"--pretrained_model_name_or_path={self.folder}", f"--instance_data_dir={self.pictures}"]
        flags += ["--instance_prompt=a photo of sks dog", f"--output_dir={out}", f"--resolution={size}", "--seed=0"]
        flags += ["--mixed_precision=bf16", "--rank=16", f"--train_batch_size={row.batch}", "--cache_latents"]
        flags += [f"--max_train_steps={1 if row.draws else self.args.steps}", "--report_to=none"]
        if row.draws:
            flags += ["--validation_prompt=a dog", "--num_validation_images=2", "--validation_num_inference_steps=20"]
        last = f"layers.{self.config['n_layers'] - 1}."
        return [*flags, "--skip_final_inference", *row.flags.replace("layers.29.", last).split()]

    def measure(self, row):
        """Run the row; what it took, as a dictionary."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        with Measured() as measured, contextlib.redirect_stdout(io.StringIO()):
            trainer.main(trainer.parse_args(self.flags(row, out)))
        gc.collect()
        torch._dynamo.reset()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        if row.draws:  # the first picture compiles
            return {"step": measured.draws[1], "first": measured.draws[0]}
        times = [end - start for start, end in zip(measured.ends, measured.ends[1:])]
        result = {
            "step": statistics.median(times[WARM_UP - 1 :] or times),
            "first": measured.ends[0] - measured.started,
        }
        result |= {"samples": row.batch / result["step"], "peak": measured.peak, "planned": measured.planned}
        reference = self.gradients.setdefault((row.pixels, row.batch), measured.gradient)
        if reference.shape == measured.gradient.shape:
            result["cosine"] = torch.nn.functional.cosine_similarity(reference, measured.gradient, dim=0).item()
            if not result["cosine"] >= row.cosine:
                self.say(f"WRONG: the gradient of {row.name} has a cosine of {result['cosine']:.4f}")
        if self.rate and reference.shape == measured.gradient.shape:
            result["rate"] = row.batch * step_flops(self.config, row.pixels) / result["step"] / self.rate
        return result

    def environment(self):
        here = {"ACCELERATE_USE_CPU": "1"} if self.args.device == "cpu" else {}
        return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | here

    def say(self, line):
        """A finding: printed, and written under the table. One that begins in capitals is a failure."""
        self.failed |= line.split(":")[0].isupper()
        self.lines.append(line)
        print(line, flush=True)
        self.write()

    def table(self):
        """The rows so far in Markdown."""
        columns = {"step": ("s a step", ".3f"), "samples": ("pictures/s", ".2f"), "peak": ("peak GiB", ".2f")}
        columns |= {"planned": ("planned", ".2f"), "rate": ("of the product rate", ".0%")}
        columns |= {"cosine": ("gradient's cosine", ".4f"), "first": ("first step, s", ".0f")}
        rows = [["run", "px", *(title for title, _ in columns.values())], ["---"] * (2 + len(columns))]
        for row, result in self.results.items():
            cells = [f"{result[k]:{form}}" if result.get(k) is not None else "" for k, (_, form) in columns.items()]
            rows.append([row.name, str(row.pixels), *cells])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

    def write(self):
        if self.args.output:
            findings = "\n".join(f"- {line}" for line in self.lines)
            self.args.output.write_text(f"{self.title}\n\n{self.table()}\n\n{findings}\n", encoding="utf-8")

    def run_rows(self, rows):
        for row in rows:
            if self.args.quick and time.perf_counter() - self.started > QUICK_SECONDS:
                self.say(f"Left out for lack of time: {row.name}, {row.pixels} px")
                continue
            try:
                self.results[row] = self.measure(row)
                print(f"{row.name}, {row.pixels} px: {self.results[row]}", flush=True)
            except Exception as error:
                print(traceback.format_exc(), flush=True)
                self.say(
                    f"FAILED: {row.name}, {row.pixels} px: {str(error).splitlines()[0] if str(error) else error!r}"
                )
            self.write()

    def check_goals(self):
        """Say of each goal whether it is met."""
        by_name = {(row.name, row.pixels): result for row, result in self.results.items()}

        def goal(text, *names, met):
            results = [by_name.get(name) for name in names]
            if all(results) and all(result.get("peak") for result in results):
                self.say(f"{'goal met' if met(*results) else 'goal missed'}: {text}")

        compiled, float8 = ("bf16, compiled", 1024), ("float8, recomputed", 1024)
        both = ("bf16, compiled, recomputed", 1024)
        goal("65% of the product rate, bf16 compiled at 1024 px", compiled, met=lambda r: r["rate"] >= 0.65)
        goal("float8 1.25 times as fast as bf16, both compiled and recomputed", both, float8,
             met=lambda bf16, fp8: bf16["step"] >= 1.25 * fp8["step"])  # fmt: skip
        goal("at 512 px ahead of 0.243 s and 21.25 GiB (H100, published by others)", ("bf16, compiled", 512),
             met=lambda r: r["step"] < 0.243 and r["peak"] < 21.25)  # fmt: skip
        goal("recomputed at 512 px ahead of 0.479 s and 12.87 GiB (the same)", ("bf16, recomputed", 512),
             met=lambda r: r["step"] < 0.479 and r["peak"] < 12.87)  # fmt: skip
        for row, result in self.results.items():
            if result.get("planned") and result.get("peak") and not row.draws:
                off, eager = (
                    result["peak"] / result["planned"] - 1,
                    COMPILED not in row.flags and "fp8" not in row.flags,
                )
                if off > 0.03 or (eager and off < -0.03):
                    self.say(f"goal missed: the peak of {row.name}, {row.pixels} px, is {off:+.1%} off the plan")

    def small_run(self, out, *flags):
        """The command line of a run of four steps of the small trained model, in float32."""
        given = [f"--pretrained_model_name_or_path={ASSET}", f"--instance_data_dir={self.subject}", "--seed=0"]
        given += ["--instance_prompt=a toy", f"--output_dir={out}", "--resolution=64", "--train_batch_size=2"]
        given += ["--max_train_steps=4", "--checkpointing_steps=2", "--report_to=none", "--skip_final_inference"]
        return [*given, "--mixed_precision=no", "--cache_latents", *flags]

    def run_small(self, name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.main(trainer.parse_args(self.small_run(self.work / name, *flags)))
        AcceleratorState._reset_state(reset_partial_state=True)
        return load_file(self.work / name / LORA)

    def check_small_model(self):
        """Train the small model here and on the CPU, and resume it."""
        self.subject = next(path.parent for path in sorted(SUBJECTS.rglob("*.png")))
        command = [sys.executable, str(trainer.__file__), *self.small_run(self.work / "small-cpu")]
        environment = self.environment() | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (self.work / "small-cpu.log").open("w") as log:
            on_cpu = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        here = self.run_small("small")
        resumed = self.run_small("resumed", f"--resume_from_checkpoint={self.work / 'small' / 'checkpoint-2'}")
        again = self.run_small("small-again")

        def apart(one, other):
            return max((one[name] - other[name]).abs().max().item() for name in one)

        if apart(here, resumed) == 0:
            self.say("a resumed run is the run itself, bit for bit")
        elif apart(here, resumed) <= 2 * apart(here, again):
            text = "a resumed run is as far from the run as a repeated one (backward passes that add up in any order)"
            self.say(f"{text}: {apart(here, resumed):.1e}, {apart(here, again):.1e}")
        else:
            text = f"{apart(here, resumed):.1e} from the run, a repeated one {apart(here, again):.1e}"
            self.say(f"WRONG: a resumed run is {text}")
        if on_cpu.wait():
            self.say(f"FAILED: the small run on the CPU: {(self.work / 'small-cpu.log').read_text()[-300:]!r}")
            return
        cpu = load_file(self.work / "small-cpu" / LORA)
        vectors = [torch.cat([t[name].flatten() for name in sorted(t) if "lora_B" in name]) for t in (here, cpu)]
        cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0).item()
        self.say(
            f"{'' if cosine > 0.99 else 'WRONG: '}the small model trained here and on the CPU: cosine {cosine:.6f}"
        )


BEGIN, END = "<!-- gpu table -->\n", "<!-- end of gpu table -->\n"


def put_into_readme(text, readme=ROOT / "README.md"):
    """Replace what stands between the two marks."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    assert END in rest, f"{readme} has no place for the table"
    readme.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def prepare_for_cpu():
    """bitsandbytes without a GPU; blocks compiled without Inductor, which takes minutes on a processor."""
    from patched_trainer import bitsandbytes_on_cpu

    os.environ["ACCELERATE_USE_CPU"] = "1"
    bitsandbytes_on_cpu()
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **options: compile_module(module, **options, backend="eager")


def main(argv=None):
    args = parse_args(argv)
    if args.device == "cpu":
        prepare_for_cpu()
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device: --device cpu --tiny runs everything on a tiny model")
    trainer.logger.disabled = True
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 16e9
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as work:
        benchmark = Benchmark(args, Path(work))
        print(benchmark.title, flush=True)
        benchmark.check_small_model()
        benchmark.run_rows([row for row in [*QUICK, *([] if args.quick else MORE)] if re.search(args.only, row.name)])
        benchmark.check_goals()
    print(benchmark.table())
    if args.readme:
        put_into_readme(f"{benchmark.title}:\n\n{benchmark.table()}")
    return int(benchmark.failed)


if __name__ == "__main__":
    sys.exit(main())
