"""Count what the recipes for cards need: python tests/benchmarks/cards.py [--model MODEL]

For each of `configs/8gb.args`, `12gb.args`, `16gb.args` and `24gb.args`: the highest memory of every stage at rank 16,
in GiB, and what of the card tensors can take (0.8 GB are CUDA's own, 8% is lost between them). Nothing is trained, and
no weights are needed: of a model on the Hub the configuration files are downloaded. It prints README's table, and
exits with 1 where a recipe does not fit.
"""

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_dreambooth_lora_z_image as trainer  # noqa: E402


def count_recipe(card, model):
    """(arguments, {stage: GiB}, GiB that tensors can take) of a card's recipe."""
    flags = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": "unused",
        "instance_prompt": "a photo of sks dog",
    }
    flags |= {"rank": 16, "max_train_steps": 8, "report_to": "none", "seed": 0, "plan_for": card}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    args = trainer.parse_args([f"@{ROOT}/configs/{card}gb.args", *arguments, "--dry_run"])
    accelerator = trainer.start_run(args)
    pipeline = trainer.read_pipeline_info(args, accelerator)
    lora = trainer.read_lora_settings(args, pipeline.transformer_config)
    run = trainer.Run(args, accelerator, pipeline, 0, trainer.DTYPES[args.mixed_precision], lora)
    side = (args.resolution[-1],) * 2
    example = trainer.Example("instance", "dog.png", Path("dog.png"), args.instance_prompt, side, side, 1)
    examples = {"instance": [example]}
    plan = trainer.TrainingPlan(examples, trainer.tokenize(examples, run), run)
    if args.gradient_checkpointing == "auto":
        run = trainer.dataclasses.replace(run, fraction=trainer.choose_fraction(plan, run))
    counted = {stage: size / trainer.GIB for stage, size in trainer.count_memory(plan, run).items()}
    return args, counted, trainer.room_for_tensors(run) / trainer.GIB


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Tongyi-MAI/Z-Image", help="Folder or Hub id. Default: the published one.")
    model, fits = parser.parse_args().model, True
    print("| card | for tensors | recipe | pixels | text encoder | VAE | training | |\n" + "|---" * 8 + "|")
    for card in (8, 12, 16, 24):
        args, counted, room = count_recipe(card, model)
        fits = fits and max(counted.values()) <= room
        stages = [f"{counted[name]:.1f}" for name in ("text encoder", "VAE", "training")]
        recipe = f"`@configs/{card}gb.args`: {args.base_model_precision or 'bf16'}" + ", `--offload`" * args.offload
        row = [f"{card} GB", f"{room:.1f}", recipe, args.resolution[-1], *stages, "predicted"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
