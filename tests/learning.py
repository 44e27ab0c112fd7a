"""Measures what a LoRA of the small trained model has learned, apart from the trainer: by diffusers' own pipeline.

    python tests/learning.py      # trains all that tests/test_learning.py looks at (half an hour) and prints a table

subject score   likeness of pictures of the subject's prompt to the subject: 0 for the base model, 1 for photographs
                that were held out, as the VAE shows them
held-out loss   flow-matching loss on those photographs over fixed noise and levels, as a share of the base model's
drift           how far pictures of other prompts moved from what the base model drew from the same noise, as a share
                of the distance between two of the base's pictures of one prompt
"""

import contextlib
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image

from make_tiny_z_image import SIZE
from running import ROOT, fork_trainer, launch_distributed, run
from tiny import train_args


ASSETS = ROOT / "tests" / "assets"
MODEL = ASSETS / "tiny-z-image"
PROMPTS = {"striped-ball": "a photo of sks ball", "cross-toy": "a photo of sks toy"}
OTHER_PROMPTS = (
    "a photo of a red ball on a green background",
    "a photo of a blue box on a yellow background",
    "a photo of a green heart on a pink background",
    "a photo of a yellow ring on a blue background",
)
STEPS, GUIDANCE = 20, 1.0
BOARD = [(240, 220, 0), (20, 20, 230)]


@functools.cache
def small_pipeline():
    pipeline = ZImagePipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(prompt, number, guidance=GUIDANCE):
    """Pictures [number, 64, 64, 3] in 0..1, from noise that is the same for every LoRA."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(number)]
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "np"}
    return small_pipeline()([prompt] * number, SIZE, SIZE, generator=generators, **options).images


@torch.no_grad()
def photographs(folder):
    """Latents [N, 16, 8, 8] of a folder's pictures, and the pictures as the VAE gives them back, [N, 64, 64, 3]."""
    pictures = [Image.open(path).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for path in sorted(folder.iterdir())]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = small_pipeline().vae
    raw = vae.encode(pixels).latent_dist.mode()
    seen = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return (raw - vae.config.shift_factor) * vae.config.scaling_factor, seen


def appearance(picture):
    """The object alone, [22, 22, 3]: moved to the middle, before grey, blurred to half the size."""
    edges = (picture[:4], picture[:, :4], picture[:, -4:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    difference = np.abs(picture - np.median(border, 0)).max(-1)
    mask = ((difference - 0.1) / 0.15).clip(0, 1)
    down, across = np.indices(mask.shape)
    total = mask.sum() + 1e-6
    top, left = (round(float((mask * axis).sum() / total)) - 22 for axis in (down, across))
    top, left = (min(max(edge, 0), SIZE - 44) for edge in (top, left))
    object_alone = (0.5 + mask[..., None] * (picture - 0.5))[top : top + 44, left : left + 44]
    return object_alone.reshape(22, 2, 22, 2, 3).mean((1, 3))


@functools.cache
def likeness(name):
    """A function from pictures to the subject score, for the subject of that name."""
    reference = np.mean([appearance(picture) for picture in photographs(ASSETS / "subjects" / name)[1]], 0)

    def distance(pictures):
        return np.mean([np.sqrt(np.square(appearance(picture) - reference).mean()) for picture in pictures])

    zero, one = distance(draw(PROMPTS[name], 8)), distance(photographs(ASSETS / "subjects" / f"{name}-heldout")[1])
    return lambda pictures: float((zero - distance(pictures)) / (zero - one))


@torch.no_grad()
def held_out_loss(name, prompt):
    """Mean squared error of the velocity on the held-out photographs: 12 levels, 4 noises, always the same."""
    pipeline = small_pipeline()
    latents, _ = photographs(ASSETS / "subjects" / f"{name}-heldout")
    embedding = pipeline.encode_prompt([prompt], "cpu", do_classifier_free_guidance=False)[0][0]
    generator, errors = torch.Generator().manual_seed(0), []
    sigmas = (torch.arange(12) + 0.5) / 12
    sigmas = (3 * sigmas / (1 + 2 * sigmas)).repeat(4)[:, None, None, None]
    for clean in latents:
        noise = torch.randn(len(sigmas), *clean.shape, generator=generator)
        noisy = (1 - sigmas) * clean + sigmas * noise
        output = pipeline.transformer(
            list(noisy.unsqueeze(2)), 1 - sigmas.flatten(), [embedding] * len(sigmas), return_dict=False
        )[0]
        errors.append((torch.stack(output).squeeze(2) - (clean - noise)).square().mean())
    return torch.stack(errors).mean().item()


def drift(lora, number=4):
    """How far the LoRA moves pictures of other prompts."""
    moved, apart = [], []
    for prompt in OTHER_PROMPTS:
        base = drawn_by_the_base(prompt, number)
        with with_lora(lora):
            now = draw(prompt, number)
        moved.append(np.sqrt(np.square(now - base).mean((1, 2, 3))).mean())
        apart.append(np.sqrt(np.square(base - np.roll(base, 1, 0)).mean((1, 2, 3))).mean())
    return float(np.mean(moved) / np.mean(apart))


@functools.cache
def drawn_by_the_base(prompt, number):
    return draw(prompt, number)


@functools.cache
def loss_of_the_base(name, prompt):
    return held_out_loss(name, prompt)


@contextlib.contextmanager
def with_lora(lora):
    """The pipeline with a LoRA on, as a user loads it."""
    small_pipeline().load_lora_weights(lora)
    try:
        yield
    finally:
        small_pipeline().unload_lora_weights()


def subject_score(lora, name, guidance=GUIDANCE):
    """Likeness of what the LoRA draws to the subject."""
    score = likeness(name)
    with with_lora(lora):
        return score(draw(PROMPTS[name], 8, guidance))


def held_out_share(lora, name, prompt=None):
    """The held-out loss with the LoRA, over that without; for the subject's prompt, or another such as the empty."""
    prompt = PROMPTS[name] if prompt is None else prompt
    base = loss_of_the_base(name, prompt)
    with with_lora(lora):
        return held_out_loss(name, prompt) / base


# ----------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------


def both_subjects(folder):
    """A folder of the pictures of both subjects, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompt in PROMPTS.items():
        for picture in sorted((ASSETS / "subjects" / name).iterdir()):
            copy = shutil.copy(picture, folder / f"{name}-{picture.name}")
            (folder / copy.name).with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return folder


def before_a_board(folder, name):
    """The pictures of a subject, cut out and put before a board of blue and yellow squares, with their masks."""
    folder.mkdir(parents=True)
    for path in sorted((ASSETS / "subjects" / name).iterdir()):
        picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
        edges = np.concatenate([picture[:4].reshape(-1, 3), picture[:, :4].reshape(-1, 3)])
        subject = np.abs(picture - np.median(edges, 0)).max(-1) > 60
        squares = (np.indices(subject.shape) // 12).sum(0) % 2
        board = np.take(np.array(BOARD), squares, axis=0)
        Image.fromarray(np.where(subject[..., None], picture, board).astype(np.uint8)).save(folder / path.name)
        Image.fromarray((subject * 255).astype(np.uint8)).save(folder / f"{path.stem}-masklabel.png")
    return folder


def board_share(lora, name):
    """Of the edges of what the LoRA draws, the part that has one of the board's colours."""
    with with_lora(lora):
        pictures = draw(PROMPTS[name], 8)
    edges = np.concatenate([edge.reshape(-1, 3) for edge in (pictures[:, :6], pictures[:, -6:], pictures[:, :, :6])])
    return float((np.abs(edges[:, None] - np.array(BOARD) / 255).max(-1).min(-1) < 0.25).mean())


def train(out, name, change=None, processes=1, **flags):
    """Teach the small model a subject (or `name` both); gives the output folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    data = both_subjects(out.with_name("both")) if name == "both" else ASSETS / "subjects" / name
    flags = {
        "instance_prompt": PROMPTS.get(name, "a photo"),
        "max_train_steps": 200,
        "train_batch_size": 4,
        "cache_latents": True,
        "rank": 8,
        "lora_alpha": 8,
        "learning_rate": 1e-3,
        "upcast_before_saving": True,
        **flags,
    }
    if flags.get("with_prior_preservation"):
        flags["class_data_dir"] = out.with_name("class")  # generated by the trainer
    args = train_args(MODEL, data, out, **flags)
    if change:
        run([sys.executable, ROOT / "tests" / "patched_trainer.py", change, *args], {"PYTHONPATH": ROOT}, timeout=900)
    elif processes > 1:
        launch_distributed(processes, *args, timeout=900)
    else:
        fork_trainer(*args, timeout=900)
    return out


# What tests/test_learning.py trains: {label: arguments of `train`}.
SMALL_RATE = {"learning_rate": 2e-5, "max_train_steps": 400}
PRIOR = {
    "with_prior_preservation": True,
    "class_prompt": "a photo of a ball",
    "num_class_images": 24,
    "guidance_scale": GUIDANCE,
    "sample_batch_size": 8,
}
RUNS = {
    "striped-ball": {"name": "striped-ball"},
    "cross-toy": {"name": "cross-toy"},
    "both at once, by their captions": {"name": "both", "max_train_steps": 400},
    "two processes": {"name": "striped-ball", "processes": 2, "train_batch_size": 2},
    "8-bit AdamW": {"name": "striped-ball", "use_8bit_adam": True, "rank": 32},  # smaller matrices stay in 32 bits
    "Prodigy": {"name": "striped-ball", "optimizer": "prodigy", "learning_rate": 1.0},
    "FP8": {"name": "striped-ball", "do_fp8_training": True},
    "base in 8 bits": {
        "name": "striped-ball",
        "change": "bitsandbytes_on_cpu",
        "bnb_quantization_config_path": "configs/int8.json",
    },
    "base in NF4": {
        "name": "striped-ball",
        "change": "bitsandbytes_on_cpu",
        "bnb_quantization_config_path": "configs/nf4.json",
    },
    "prior preservation": {"name": "striped-ball", **PRIOR},
    "caption dropout 0.2": {"name": "striped-ball", "caption_dropout": 0.2},
    "learning rate 2e-5": {"name": "striped-ball", **SMALL_RATE},
    "fault: velocity not negated": {"name": "striped-ball", "change": "velocity"},
    "fault: time t / 1000": {"name": "striped-ball", "change": "time"},
    "fault: no VAE shift and scale": {"name": "striped-ball", "change": "latent_scale"},
    "fault: captions exchanged": {"name": "both", "max_train_steps": 400, "change": "captions"},
    "fault: bf16 LoRA, learning rate 2e-5": {"name": "striped-ball", "change": "bf16_lora", **SMALL_RATE},
}


def table(folder):
    """Trains all RUNS and prints their scores as Markdown."""
    print("| run | subject score | held-out loss | drift |\n|---|---|---|---|")
    for number, (label, run_arguments) in enumerate(RUNS.items()):
        out = train(folder / str(number) / "out", **run_arguments)
        for name in PROMPTS if run_arguments["name"] == "both" else [run_arguments["name"]]:
            shown = f"{label} ({name})" if run_arguments["name"] == "both" else label
            print(
                f"| {shown} | {subject_score(out, name):.2f} | {held_out_share(out, name):.2f} | {drift(out):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        table(Path(scratch))
