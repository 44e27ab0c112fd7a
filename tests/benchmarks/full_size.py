"""Memory and speed of a real launch on a full-size Z-Image with random weights.

    python tests/benchmarks/full_size.py --folder full-size                           # builds it (20.6 GB), measures
    python tests/benchmarks/full_size.py --folder full-size --resolution 1024 --steps 20 --variants plain,compile,fp8
    python tests/benchmarks/full_size.py --folder full-size --script other.py         # by turns with another trainer
    python tests/benchmarks/full_size.py --folder full-size --delete

The folder is built shard by shard: it needs little memory, and after an interruption it is built on. A folder that
holds a complete pipeline is measured as it is.

Columns: seconds a step, the median after the first step; seconds until the first step was done, from the launch; peak
resident memory of all processes in GB (10^9 bytes), over the whole run and after the first step; how much the peak
grew from the first half of the steps to the second; what the trainer's own plan expected of training; GB read from the
disk. The model's files are dropped from the page cache before each run. On a GPU also the memory that torch reserved,
and the share of the rate of a plain bf16 product that the step's own products reach.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

from tiny import build_tokenizer


BUILT = "built-by-benchmark"  # marks a folder that --delete may remove
SHARD_BYTES = 2 * 10**9

VARIANTS = {
    "plain": "--gradient_checkpointing",
    "half": "--gradient_checkpointing=0.5",
    "without-checkpointing": "",
    "compile": "--gradient_checkpointing --compile",
    "compile-half": "--gradient_checkpointing=0.5 --compile",
    "compile-without-checkpointing": "--compile",
    "offload": "--gradient_checkpointing --offload",
    "fp8": "--gradient_checkpointing --offload --do_fp8_training",
    "fp8-compile": "--gradient_checkpointing --offload --do_fp8_training --compile",
    "fp8-compile-without-checkpointing": "--do_fp8_training --compile",
    "nf4": "--gradient_checkpointing --offload --bnb_quantization_config_path=configs/nf4.json",
}

TEXT_ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "sample_size": 1024,
}


def build(folder, transformer=None, text_encoder=TEXT_ENCODER, vae=VAE):
    """Makes the pipeline folder of random bf16 weights, or goes on with it; `model_index.json` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILT).touch()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with init_empty_weights():
        models = {
            "transformer": ZImageTransformer2DModel(**(transformer or {})),
            "text_encoder": Qwen3Model(Qwen3Config(**text_encoder, **ids, dtype="bfloat16")),
            "vae": AutoencoderKL(**vae),
        }
    for name, model in models.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        config = model.config if name == "text_encoder" else model
        (config.save_pretrained if name == "text_encoder" else config.save_config)(folder / name)
        save_random_weights(model, folder / name, stem)
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_config(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def save_random_weights(model, folder, stem):
    """Writes the shards of a model without weights that are not there yet, one at a time, and their index."""
    shards, size = [{}], 0
    for name, tensor in model.state_dict().items():
        if size + 2 * tensor.numel() > SHARD_BYTES and shards[-1]:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor.shape
        size += 2 * tensor.numel()
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, (file, shapes) in enumerate(zip(files, shards)):
        if (folder / file).exists():
            continue
        generator = torch.Generator().manual_seed(number)
        tensors = {name: random_weight(name, shape, generator) for name, shape in shapes.items()}
        beside = folder / f".{file}.part"
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.rename(folder / file)
        print(f"built {folder / file}", flush=True)
    weight_map = {name: file for file, shapes in zip(files, shards) for name in shapes}
    total = sum(2 * shape.numel() for shapes in shards for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def random_weight(name, shape, generator):
    """Norms begin as ones and biases as zeros, so that activations stay in range; the rest is normal, 0.02 wide."""
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def step_flops(config, resolution, caption_tokens=32):
    """Operations that a step of one picture needs: forward products, input gradients, attention; no recomputation.

    The backward pass of attention is counted as twice the forward one; the LoRA's own products, under 1%, and those
    of the embedders are left out.
    """
    block = 4 * config["dim"] ** 2 + 3 * config["dim"] * int(config["dim"] / 3 * 8)
    picture = -(-((resolution // 16) ** 2) // 32) * 32
    passes = [(config["n_layers"], picture + caption_tokens)]
    passes += [(config["n_refiner_layers"], tokens) for tokens in (picture, caption_tokens)]
    products = sum(2 * 2 * blocks * tokens * block for blocks, tokens in passes)
    attention = sum(3 * 4 * blocks * tokens**2 * config["dim"] for blocks, tokens in passes)
    return products + attention


def bf16_matrix_rate(size=8192, products=50):
    """Operations a second of a plain product of two square bf16 matrices on the GPU."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(products):
        a @ b
    torch.cuda.synchronize()
    return products * 2 * size**3 / (time.perf_counter() - started)


def parse_args():
    parser = common.benchmark_parser(__doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("full-size-z-image"), help="where the model is, or is built")
    add("--layers", type=int, help="fewer transformer layers than the 30 of the real model, for a smaller machine")
    add("--variants", default="plain", help=f"of {', '.join(VARIANTS)}; separated by commas")
    add("--build_only", action="store_true", help="build the folder, measure nothing")
    add("--delete", action="store_true", help="remove the folder, measure nothing")
    args = parser.parse_args()
    if unknown := set(args.variants.split(",")) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))} is unknown")
    if args.delete and not (args.folder / BUILT).exists():
        parser.error(f"--delete: {args.folder} was not built by this program")
    return args


def main():
    args = parse_args()
    if args.delete:
        shutil.rmtree(args.folder)
        return 0
    if not (args.folder / "model_index.json").exists():
        build(args.folder, {"n_layers": args.layers} if args.layers else None)
    config = ZImageTransformer2DModel.load_config(args.folder, subfolder="transformer")
    if args.layers not in (None, config["n_layers"]):
        sys.exit(f"{args.folder} has {config['n_layers']} layers: --delete it first")
    if args.build_only:
        return 0
    rate = bf16_matrix_rate() if torch.cuda.is_available() else None
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        pictures = common.build_pictures(Path(temporary, "pictures"), size=args.resolution)
        for number in range(args.rounds):
            for variant in args.variants.split(","):
                for label, script in common.other_scripts(args).items():
                    output_dir = Path(temporary, f"{number}-{variant}-{label.replace('/', '-')}")
                    flags = common.training_flags(args.folder.resolve(), pictures, output_dir, args)
                    flags += ["--cache_latents", *VARIANTS[variant].split(), *args.flags.split()]
                    common.forget_files(args.folder)
                    row = {"script": label, "run": variant, **common.measure(script, flags, args)}
                    if "expected_gb" in row:
                        row["expected_training_gb"] = row["expected_gb"]["training"]
                    if rate and row.get("step_s"):
                        row["share_of_rate"] = step_flops(config, args.resolution) / row["step_s"] / rate
                    rows.append(row)
    columns = {
        "script": ("script", ""),
        "run": ("run", ""),
        "s/step": ("step_s", ".3f"),
        "first step, s": ("first_step_s", ".0f"),
        "peak GB": ("resident_peak_gb", ".2f"),
        "of it allocated": ("anonymous_peak_gb", ".2f"),
        "while training": ("training_peak_gb", ".2f"),
        "growth GB": ("growth_gb", ".3f"),
        "expected GB": ("expected_training_gb", ".2f"),
        "read GB": ("read_gb", ".2f"),
    }
    if rate:
        columns |= {"GPU GB": ("reserved_gb", ".2f"), "share of bf16 rate": ("share_of_rate", ".0%")}
    return common.report(rows, columns, args, step_flops=step_flops(config, args.resolution), bf16_rate=rate)


if __name__ == "__main__":
    sys.exit(main())
