"""A trainer's step against a bare forward and backward pass of the same transformer with the same LoRA.

    python tests/benchmarks/step.py
    python tests/benchmarks/step.py --script other.py --output step.json

The transformer is of middle size (--dim, --layers), with random weights and a float32 LoRA on the attention, as in
training. The bare pass runs in a process of its own on the same number of tokens; the step is a real launch with
cached latents, its optimizer, clipping and logs included. They take turns; the figures are medians over all steps of
all rounds, the first step of each run left out.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig

from tiny import build_tiny_pipeline


def build_model(folder, dim, layers):
    """A pipeline whose transformer is of that size, and whose encoders are tiny."""
    build_tiny_pipeline(folder)
    head_dims = [32, 48, 48] if dim % 128 == 0 else [4, 6, 6]
    heads = dim // sum(head_dims)
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, cap_feat_dim=32, axes_dims=head_dims
    )
    transformer.save_pretrained(folder / "transformer")
    return folder


def bare_steps(model, args):
    """Seconds of each forward and backward pass of the transformer with its LoRA, under autocast as in training."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = ZImagePipeline.from_pretrained(model, vae=None, transformer=None)
    embed = pipeline.encode_prompt([common.PROMPT], do_classifier_free_guidance=False)[0][0].detach().to(device, dtype)
    transformer = ZImageTransformer2DModel.from_pretrained(model, subfolder="transformer", torch_dtype=dtype).to(
        device
    )
    transformer.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
    )
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if "--gradient_checkpointing" in args.flags:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    latents = torch.randn(16, 1, args.resolution // 8, args.resolution // 8, device=device, dtype=dtype)
    times = []
    for _ in range(args.steps):
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = transformer([latents], torch.full((1,), 0.5, device=device), [embed], return_dict=False)[0][0]
        output.float().square().mean().backward()
        for parameter in parameters:
            parameter.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def parse_args():
    parser = common.benchmark_parser(__doc__)
    parser.set_defaults(steps=20, rounds=3)
    parser.add_argument("--dim", type=int, default=1024, help="width of the transformer")
    parser.add_argument("--layers", type=int, default=6, help="its layers")
    parser.add_argument("--bare", metavar="MODEL", help="run the bare pass on this model and print its times")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.bare:
        print(json.dumps(bare_steps(args.bare, args)))
        return 0
    times, errors = {"bare forward and backward": []}, {}
    with tempfile.TemporaryDirectory() as temporary:
        model = build_model(Path(temporary, "model"), args.dim, args.layers)
        pictures = common.build_pictures(Path(temporary, "pictures"), size=args.resolution)
        for number in range(args.rounds):
            command = [sys.executable, __file__, *sys.argv[1:], "--bare", str(model)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            times["bare forward and backward"] += json.loads(finished.stdout.splitlines()[-1])[1:]
            for label, script in common.other_scripts(args).items():
                output_dir = Path(temporary, f"{number}-{label.replace('/', '-')}")
                flags = common.training_flags(model, pictures, output_dir, args)
                result = common.measure(script, [*flags, "--cache_latents", *args.flags.split()], args)
                errors |= {label: result["error"]} if "error" in result else {}
                times.setdefault(label, []).extend(result.get("steps_s", []))
    bare = statistics.median(times["bare forward and backward"])
    rows = []
    for label, seconds in times.items():
        median = statistics.median(seconds) if seconds else None
        row = {"script": label, "step_s": median, "ratio": median and median / bare, "steps": len(seconds)}
        rows.append(row | {"steps_s": seconds} | ({"error": errors[label]} if label in errors else {}))
    columns = {
        "": ("script", ""),
        "s/step": ("step_s", ".4f"),
        "of the bare pass": ("ratio", ".3f"),
        "steps": ("steps", ""),
    }
    return common.report(rows, columns, args)


if __name__ == "__main__":
    sys.exit(main())
