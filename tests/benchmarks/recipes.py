"""Which settings teach the small model best: recipes of the same number of samples, scored as in tests/learning.py.

    python tests/benchmarks/recipes.py                                   # all of them, some hours of a processor core
    python tests/benchmarks/recipes.py --recipes "default,feed-forward"  # the most telling rows of tests/README.md

A recipe is a line of the trainer's own flags. Both subjects are trained in this process, with the trainer's
objective, optimizer and schedule, on encodings that are made once. The LoRA is scored as it is at the end and, for
each decay that a recipe names, averaged as `--ema_decay` does. Rows show the mean over both subjects and all seeds,
and the standard deviation between seeds.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import get_peft_model_state_dict


BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent.parent
sys.path[:0] = [str(ROOT), str(BENCHMARKS.parent)]

import learning  # noqa: E402 (needs the path)
import train_dreambooth_lora_z_image as trainer  # noqa: E402


DEFAULT = "--rank=8 --lora_alpha=8 --learning_rate=1e-3 --train_batch_size=4 --max_train_steps=300"
FEED_FORWARD = "--lora_layers=to_k,to_q,to_v,to_out.0,ff.net.0.proj,ff.net.2"
COSINE = "--lr_scheduler=cosine --lr_warmup_steps=0"
SINGLE = "--train_batch_size=1 --max_train_steps=1200"
RECIPES = {  # label: (flags in addition to DEFAULT, decays of its average)
    "default": ("", (0.99,)),
    "rate 2e-3": ("--learning_rate=2e-3", (0.99, 0.995)),
    "feed-forward 2e-3": (f"{FEED_FORWARD} --learning_rate=2e-3", (0.995,)),
    "feed-forward": (FEED_FORWARD, (0.99,)),
    "cosine": (COSINE, ()),
    "cosine 2e-3": (f"{COSINE} --learning_rate=2e-3", (0.98,)),
    "rank 4": ("--rank=4 --lora_alpha=4", (0.99,)),
    "rank 32": ("--rank=32 --lora_alpha=32", (0.99,)),
    "alpha twice the rank": ("--lora_alpha=16", (0.99,)),
    "beta2 .99": ("--adam_beta2=0.99", (0.99,)),
    "weight decay .1": ("--adam_weight_decay=0.1", (0.99,)),
    "logit-normal": ("--weighting_scheme=logit_normal", (0.99,)),
    "logit-normal, shift 1, 2e-3": (
        "--weighting_scheme=logit_normal --timestep_shift=1 --learning_rate=2e-3",
        (0.995,),
    ),
    "shift 6": ("--timestep_shift=6", (0.99,)),
    "caption dropout .1": ("--caption_dropout=0.1", (0.99,)),
    "batch 1": (SINGLE, (0.998,)),
    "batch 1, 5e-4": (f"{SINGLE} --learning_rate=5e-4", (0.998,)),
    "later blocks": ("--lora_layers=layers.2,layers.3,layers.4", (0.99,)),
}


def read_recipe(flags, name):
    """The trainer's arguments for a recipe on a subject."""
    given = f"--pretrained_model_name_or_path=. --instance_data_dir=. {DEFAULT} {flags}".split()
    return trainer.parse_args([*given, f"--instance_prompt={learning.PROMPTS[name]}"])


def train(args, decays, name, seed):
    """Train a subject; returns {"": LoRA, decay: averaged LoRA, ...}, state dicts in which alpha is folded."""
    pipeline = learning.small_pipeline()
    latents, _ = learning.photographs(learning.ASSETS / "subjects" / name)
    embeds = {
        prompt: pipeline.encode_prompt([prompt], "cpu", do_classifier_free_guidance=False)[0][0].detach()
        for prompt in (learning.PROMPTS[name], "")
    }
    transformer = copy.deepcopy(pipeline.transformer).requires_grad_(False)
    lora, cpu = trainer.read_lora_settings(args, dict(transformer.config)), SimpleNamespace(device=torch.device("cpu"))
    parameters = trainer.add_lora(transformer, SimpleNamespace(args=args, lora=lora, seed=seed, accelerator=cpu))
    optimizer = trainer.build_optimizer(parameters, args, args.learning_rate)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    lr_scheduler = trainer.get_scheduler(args.lr_scheduler, optimizer, **steps)
    sigmas = trainer.training_sigmas(pipeline.scheduler, args.timestep_shift)
    generator, order = torch.Generator().manual_seed(seed), []
    averages = {decay: [torch.zeros_like(p) for p in parameters] for decay in decays}
    transformer.train()
    for _ in range(args.max_train_steps):
        while len(order) < args.train_batch_size:
            order += torch.randperm(len(latents), generator=generator).tolist()
        batch, order = latents[order[: args.train_batch_size]], order[args.train_batch_size :]
        noise = torch.randn(batch.shape, generator=generator)
        sigma = torch.stack([trainer.sample_sigma(sigmas, args, generator) for _ in batch])
        dropped = torch.rand(len(batch), generator=generator) < args.caption_dropout
        prompts = [embeds["" if drop else learning.PROMPTS[name]] for drop in dropped]
        level = sigma[:, None, None, None]
        noisy = (1 - level) * batch + level * noise
        velocity = trainer.predict_velocity(transformer, noisy, sigma, prompts, torch.float32)
        trainer.flow_matching_loss(velocity, batch, noise, sigma, args.weighting_scheme).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        for decay, average in averages.items():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
    states = {}
    for decay in ("", *decays):
        if decay:
            for parameter, average in zip(parameters, averages[decay], strict=True):
                parameter.data = average / (1 - decay**args.max_train_steps)
        state = get_peft_model_state_dict(transformer)
        scales = {name: lora.alpha / lora.rank if ".lora_B." in name else 1.0 for name in state}
        states[decay] = {f"transformer.{name}": scales[name] * t.detach() for name, t in state.items()}
    return states


def score(lora, name):
    """Subject score, drift and held-out loss of a LoRA's state dict, as in tests/learning.py."""
    return {
        "score": learning.subject_score(dict(lora), name),
        "drift": learning.drift(dict(lora)),
        "held-out": learning.held_out_share(dict(lora), name),
    }


def table(lines):
    """Markdown of what was measured: a row for each recipe and average."""
    rows, measures = {}, ("score", "drift", "held-out")
    for line in lines:
        label, _, seed = line["run"]
        for decay, scores in line["scores"].items():
            rows.setdefault((label, decay), {}).setdefault(seed, []).append(scores)
    text = "| recipe | averaged | seeds | subject score | drift | held-out loss |\n|---|---|---|---|---|---|\n"
    for (label, decay), seeds in rows.items():
        cells = []
        for measure in measures:
            values = [statistics.mean(scores[measure] for scores in both) for both in seeds.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        text += f"| {label} | {decay or 'no'} | {len(seeds)} | {' | '.join(cells)} |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", help="labels in quotes, separated by commas; all of them by default")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--steps", type=int, help="in place of each recipe's, to try the program out")
    parser.add_argument("--output", default="recipes.jsonl", help="a line for each run; runs in it are not repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output, labels = Path(options.output), options.recipes.split(",") if options.recipes else list(RECIPES)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    runs = [
        [label, name, int(seed)] for seed in options.seeds.split(",") for label in labels for name in learning.PROMPTS
    ]
    for label, name, seed in runs:
        if any(line["run"] == [label, name, seed] for line in lines):
            continue
        flags, decays = RECIPES[label]
        args = read_recipe(f"{flags} --max_train_steps={options.steps}" if options.steps else flags, name)
        states = train(args, decays, name, seed)
        lines.append({"run": [label, name, seed], "scores": {str(d): score(lora, name) for d, lora in states.items()}})
        with open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    print(table([line for line in lines if line["run"] in runs]))


if __name__ == "__main__":
    main()
