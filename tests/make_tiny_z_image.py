"""Trains a tiny Z-Image from nothing, on pictures that it draws itself, and draws two subjects that it has never seen.

    scenes -> pictures, captions -> VAE -> latents; captions -> frozen Qwen3 -> embeddings -> transformer

    python tests/make_tiny_z_image.py                                # what is committed (two cores, < 25 min)
    python tests/make_tiny_z_image.py --steps 300 --vae_steps 150 --output_dir /tmp/tiny   # a quick look

It writes `<output_dir>/tiny-z-image` (a diffusers pipeline folder) and `<output_dir>/subjects/<name>[-heldout]`.
Everything here follows the inference conventions of `diffusers.ZImagePipeline`, and nothing is shared with the LoRA
trainer, so that each of the two checks the other. One process per core, each with one thread, averages gradients.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image, ImageDraw
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model


SIZE = 64  # pixels, of the pictures that the base is trained on
SEQUENCE_MULTIPLE = 32  # the transformer fills captions and pictures with pad tokens up to a multiple of this
CAPTION_SLOTS = 32  # all captions here are shorter

# ----------------------------------------------------------------------------------------------------
# Words: English and Chinese
# ----------------------------------------------------------------------------------------------------

COLOURS = {
    "red": ("红色", (215, 35, 40)),
    "orange": ("橙色", (245, 135, 15)),
    "yellow": ("黄色", (245, 220, 30)),
    "green": ("绿色", (30, 150, 60)),
    "blue": ("蓝色", (35, 75, 215)),
    "purple": ("紫色", (125, 45, 165)),
    "white": ("白色", (248, 248, 248)),
    "black": ("黑色", (25, 25, 28)),
}
BACKGROUNDS = {  # paler than the objects, so that "a blue ball on a blue background" could still be seen
    "gray": ("灰色", (150, 150, 150)),
    "blue": ("蓝色", (150, 195, 245)),
    "green": ("绿色", (165, 220, 150)),
    "pink": ("粉色", (250, 185, 205)),
    "yellow": ("黄色", (245, 232, 160)),
    "brown": ("棕色", (120, 80, 50)),
}
OBJECTS = {
    "ball": "球",
    "box": "箱子",
    "cone": "圆锥",
    "ring": "圆环",
    "moon": "月亮",
    "heart": "爱心",
}
ANY_OBJECT = ("toy", "玩具")  # the class word for all of the objects
PATTERNS = {"spotted": "斑点", "checkered": "格子"}  # in white; the subjects' patterns and colours are others

# ----------------------------------------------------------------------------------------------------
# Pictures. A form is a list of (polygon, 1 to fill or 0 to cut out), in coordinates where the object's radius is 1.
# ----------------------------------------------------------------------------------------------------


def disc(radius, x=0.0, y=0.0):
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)


def rectangle(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def heart():
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16 - 0.1], 1)


FORMS = {
    "ball": [(disc(0.95), 1)],
    "box": [(rectangle(-0.85, -0.8, 0.85, 0.8), 1)],
    "cone": [(np.array([(0, -1), (0.9, 0.9), (-0.9, 0.9)]), 1)],
    "ring": [(disc(1), 1), (disc(0.48), 0)],
    "moon": [(disc(1), 1), (disc(0.85, 0.55, -0.25), 0)],
    "heart": [(heart(), 1)],
    "cross": [(rectangle(-0.32, -1.1, 0.32, 1.1), 1), (rectangle(-1.1, -0.32, 1.1, 0.32), 1)],
}
FILLINGS = {
    "plain": [],
    "spotted": [
        (disc(0.22, x, y), 1) for x, y in ((-0.45, -0.45), (0.45, -0.45), (0, 0), (-0.45, 0.45), (0.45, 0.45))
    ],
    "checkered": [(rectangle(-1.2, -1.2, 0, 0), 1), (rectangle(0, 0, 1.2, 1.2), 1)],
    "striped": [(rectangle(-1.2, y, 1.2, y + 0.5), 1) for y in (-0.75, 0.25)],
    "cored": [(disc(0.42), 1)],
}

# What is drawn: names in FORMS and FILLINGS, colours as RGB, place in widths of the picture, angle in radians.
Scene = namedtuple("Scene", "form filling colour second_colour background x y radius angle")


def rasterize(parts, scene, size, oversample=3):
    """Coverage [size, size] in 0..1 of the polygons in `parts`, placed as the scene's object is."""
    canvas = Image.new("L", (size * oversample,) * 2)
    draw = ImageDraw.Draw(canvas)
    turn = np.array([[math.cos(scene.angle), math.sin(scene.angle)], [-math.sin(scene.angle), math.cos(scene.angle)]])
    for polygon, value in parts:
        points = (polygon @ turn * scene.radius + (scene.x, scene.y)) * size * oversample
        draw.polygon([tuple(point) for point in points], fill=255 * value)
    return np.asarray(canvas.reduce(oversample), np.float32) / 255


def draw_scene(scene, size=SIZE):
    """The picture, uint8 [size, size, 3]: a lit object before a background that is lighter at the top."""
    across, down = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    mask = rasterize(FORMS[scene.form], scene, size)[..., None]
    filling = rasterize(FILLINGS[scene.filling], scene, size)[..., None]
    light = 1 - 0.2 * (across - 2 * scene.x + 1 + down - 2 * scene.y + 1)[..., None]
    paint = np.array(scene.colour) * (1 - filling) + np.array(scene.second_colour) * filling
    backdrop = np.array(scene.background) * (1 - 0.08 * down[..., None])
    picture = backdrop * (1 - mask) + paint * light * mask
    return picture.clip(0, 255).round().astype(np.uint8)


def jitter(rng, colour, amount=8):
    return tuple(np.add(colour, rng.uniform(-amount, amount, 3)))


def place(rng):
    """Position, size and tilt of an object: the fields of Scene that every picture varies."""
    x, y = rng.uniform(0.43, 0.57, 2)
    return {"x": x, "y": y, "radius": rng.uniform(0.28, 0.36), "angle": rng.uniform(-0.15, 0.15)}


def pick(rng, options):
    return options[rng.integers(len(options))]


def random_scene(rng):
    """A scene of the kind that the base learns, and its words: (object, pattern, colour, background)."""
    name, colour = pick(rng, list(OBJECTS)), pick(rng, list(COLOURS))
    background = pick(rng, [b for b in BACKGROUNDS if b != colour])
    pattern = pick(rng, list(PATTERNS)) if rng.random() < 0.12 and colour != "white" else "plain"
    scene = Scene(
        name,
        pattern,
        jitter(rng, COLOURS[colour][1]),
        COLOURS["white"][1],
        jitter(rng, BACKGROUNDS[background][1]),
        **place(rng),
    )
    return scene, (name, pattern, colour, background)


def random_practice_scene(rng):
    """A scene for the VAE alone, which has to resolve colours and patterns that the transformer never sees."""
    colours = rng.uniform(0, 255, (3, 3))
    form, filling = pick(rng, list(OBJECTS)), pick(rng, [name for name in FILLINGS if name != "cored"])
    return Scene(form, filling, *map(tuple, colours), **(place(rng) | {"angle": rng.uniform(-np.pi, np.pi)}))


# ----------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------


def english_caption(name, pattern, colour, background, photo):
    words = [word for word in (None if pattern == "plain" else pattern, colour, name) if word]
    article = "an" if words[0][0] in "aeiou" else "a"
    place_words = f" on a {background} background" if background else ""
    return ("a photo of " if photo else "") + f"{article} {' '.join(words)}{place_words}"


def chinese_caption(name, pattern, colour, background, photo):
    name = dict([*OBJECTS.items(), ANY_OBJECT])[name]
    colour = COLOURS[colour][0] if colour else ""
    place_words = f"{BACKGROUNDS[background][0]}背景上的" if background else ""
    subject = f"{place_words}{colour}{PATTERNS.get(pattern, '')}{name}"
    return f"一张{subject}的照片" if photo else subject


def random_caption(rng, words):
    """One of the ways to say it, in either language: all of it, or less, or the class word for the object."""
    name, pattern, colour, background = words
    detail = rng.random()
    if detail < 0.3:
        background = None
    if detail < 0.12 and pattern == "plain":
        colour = None
    if rng.random() < 0.08:
        name = ANY_OBJECT[0]
    write = pick(rng, [english_caption, chinese_caption])
    return write(name, pattern, colour, background, photo=rng.random() < 0.7)


def vocabulary():
    """Every word, as the captions contain it, for the tokenizer to learn."""
    chinese = [pair[0] for pair in (*COLOURS.values(), *BACKGROUNDS.values())]
    chinese += [*OBJECTS.values(), ANY_OBJECT[1], *PATTERNS.values(), "一张", "背景", "上的", "的", "照片"]
    english = [
        *COLOURS,
        *BACKGROUNDS,
        *OBJECTS,
        ANY_OBJECT[0],
        *PATTERNS,
        "a",
        "an",
        "photo",
        "of",
        "on",
        "background",
    ]
    return chinese + english + [f" {word}" for word in english] + ["user", "assistant", "system"]


# ----------------------------------------------------------------------------------------------------
# Subjects: what a LoRA is to learn
# ----------------------------------------------------------------------------------------------------

SUBJECTS = {  # "a photo of sks ball" and "a photo of sks toy"; form, filling, its two colours
    "striped-ball": ("ball", "striped", (225, 20, 140), (20, 215, 200)),
    "cross-toy": ("cross", "cored", (20, 190, 200), (250, 120, 20)),
}


def write_subjects(folder, seed):
    """5 instance pictures and 2 held-out ones of each subject, larger than the base's pictures."""
    for number, (name, looks) in enumerate(SUBJECTS.items()):
        rng = np.random.default_rng([seed, 7, number])
        backgrounds = rng.permutation(list(BACKGROUNDS) * 2)
        for index in range(7):
            target = folder / (name if index < 5 else f"{name}-heldout")
            target.mkdir(parents=True, exist_ok=True)
            background = jitter(rng, BACKGROUNDS[backgrounds[index]][1])
            scene = Scene(*looks, background, **place(rng))
            Image.fromarray(draw_scene(scene, size=96)).save(target / f"{index:02d}.png")


# ----------------------------------------------------------------------------------------------------
# The pipeline's parts, untrained
# ----------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def build_tokenizer():
    """Byte-level: it can read any text, and knows the captions' words as single tokens where it can."""
    blank = Qwen2Tokenizer()
    learned = blank.train_new_from_iterator([vocabulary()], vocab_size=600, show_progress=False)
    bpe = json.loads(learned.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in bpe["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, eos_token="<|im_end|>", model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(vocabulary_size):
    """Frozen and random: its hidden states still tell every caption apart, and the transformer learns to read them."""
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
    )
    text_encoder = Qwen3Model(config)
    torch.nn.init.normal_(text_encoder.embed_tokens.weight, std=0.1)  # or context would drown the words
    return text_encoder.eval().requires_grad_(False)


def build_vae():
    channels = (16, 24, 48, 64)  # four levels: the pipeline's factor of 8 comes from their number
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer(caption_features):
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=160,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=5,
        n_kv_heads=5,
        cap_feat_dim=caption_features,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )
    for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad_token, std=0.02)
    return transformer


# ----------------------------------------------------------------------------------------------------
# Training in several processes, each with one thread
# ----------------------------------------------------------------------------------------------------


def average(tensor):
    """The mean over the processes, in place."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def train(parameters, loss_of_step, steps, learning_rate, label):
    """AdamW with a short warmup and a cosine decay; `loss_of_step(step)` gives the loss of this process's batch.

    The gradients are views of one tensor, so that averaging them over the processes is one call.
    """
    parameters = list(parameters)
    gradients = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, view in zip(parameters, gradients.split([p.numel() for p in parameters])):
        parameter.grad = view.view_as(parameter)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started, smooth = time.monotonic(), None
    for step in range(steps):
        warmup, progress = min(1.0, (step + 1) / 50), step / steps
        optimizer.param_groups[0]["lr"] = (
            learning_rate * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        gradients.zero_()
        loss = loss_of_step(step)
        loss.backward()
        average(gradients)
        gradients.mul_((1 / (gradients.norm() + 1e-6)).clamp(max=1))
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 99 or step == steps - 1:
            log(f"{label}: step {step + 1}/{steps}, loss {smooth:.4f}, {time.monotonic() - started:.0f} s")
    for parameter in parameters:
        parameter.grad = None


def log(message):
    if dist.get_rank() == 0:
        print(message, flush=True)


# ----------------------------------------------------------------------------------------------------
# VAE
# ----------------------------------------------------------------------------------------------------

LATENT_PRIOR_MEAN = 1.0  # not zero, so that a trainer that forgets shift_factor goes visibly wrong


def to_unit(pictures):
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1, as VaeImageProcessor does it."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def initialize_vae(vae):
    """Starts as nearly linear: residual branches at zero, upsampling by repetition, every other convolution keeping
    the variance (torch's default shrinks it threefold in each). It learns colour several times sooner so."""
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                torch.nn.init.zeros_(module.weight)
            elif "upsamplers" in name:
                torch.nn.init.dirac_(module.weight)
            else:
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    last = vae.encoder.conv_out  # 16 means, then 16 log variances
    torch.nn.init.constant_(last.bias[:16].data, LATENT_PRIOR_MEAN)
    torch.nn.init.constant_(last.bias[16:].data, -4.0)  # little noise: it would only slow the first steps down
    torch.nn.init.zeros_(last.weight[16:].data)


def train_vae(vae, pictures, steps, batch, generator):
    """L1 and a light KL. Most steps see quarters of four times as many pictures: more colours for the same work."""
    half = SIZE // 2

    def loss_of_step(step):
        cropped = step < 0.7 * steps
        target = pictures[torch.randint(len(pictures), (batch * (4 if cropped else 1),), generator=generator)]
        if cropped:
            top, left = torch.randint(half + 1, (2,), generator=generator).tolist()
            target = target[:, top : top + half, left : left + half]
        target = to_unit(target)
        posterior = vae.encode(target).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        distance = (posterior.mean - LATENT_PRIOR_MEAN) ** 2 + posterior.var - 1 - posterior.logvar
        return F.l1_loss(vae.decode(latents).sample, target) + 1e-4 * distance.mean()

    train(vae.parameters(), loss_of_step, steps, 1e-3, "VAE")
    vae.eval().requires_grad_(False)


@torch.no_grad()
def set_latent_statistics(vae, latents):
    """shift_factor and scaling_factor from the raw latents, so that (latents - shift) * scale has mean 0 and std 1."""
    mean = average(latents.mean())
    std = average((latents - mean).square().mean()).sqrt()
    vae.register_to_config(shift_factor=round(mean.item(), 4), scaling_factor=round(1 / std.item(), 4))
    log(f"VAE: shift {mean:.3f}, std {std:.3f}")


@torch.no_grad()
def encode_pictures(vae, pictures):
    return torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in pictures.split(50)])


@torch.no_grad()
def reconstruction_psnr(vae, pictures):
    target = to_unit(pictures)
    error = (vae.decode(encode_pictures(vae, pictures)).sample - target).square().mean((1, 2, 3)) / 4
    return -10 * error.log10().mean().item()


# ----------------------------------------------------------------------------------------------------
# Transformer
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed_captions(tokenizer, text_encoder, captions):
    """As ZImagePipeline.encode_prompt: chat template with thinking on, last hidden state but one, no padding."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]
    embeddings = []
    for start in range(0, len(texts), 256):
        tokens = tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
        hidden = text_encoder(**tokens, output_hidden_states=True).hidden_states[-2]
        embeddings += [states[mask.bool()] for states, mask in zip(hidden, tokens.attention_mask)]
    return embeddings


class PackedTransformer:
    """The transformer's forward for a batch of equal pictures, several times faster than the list-based one.

    The pad tokens of a picture are all alike, in value and in position, so they stay alike in every layer: one is
    enough, when attention counts it n times, which adding log n to its logit does. (A caption's pad tokens differ in
    position.) The last layer computes the picture's tokens alone.
    """

    def __init__(self, transformer, latent_size):
        self.transformer = transformer
        self.across = latent_size // 2
        self.tokens = self.across**2
        caption_ids = torch.zeros((CAPTION_SLOTS, 3), dtype=torch.long)
        caption_ids[:, 0] = 1 + torch.arange(CAPTION_SLOTS)
        height, width = torch.meshgrid(torch.arange(self.across), torch.arange(self.across), indexing="ij")
        picture_ids = torch.stack([torch.full_like(height, CAPTION_SLOTS + 1), height, width], -1).view(-1, 3)
        pads = -self.tokens % SEQUENCE_MULTIPLE
        if pads:
            picture_ids = F.pad(picture_ids, (0, 0, 0, 1))
        self.bias = torch.zeros(len(picture_ids) + CAPTION_SLOTS)
        self.bias[self.tokens : len(picture_ids)] = math.log(max(pads, 1))
        angles = transformer.rope_embedder(torch.cat([picture_ids, caption_ids])).unsqueeze(1)
        self.rotation = torch.stack([angles.real, angles.imag])  # [2, tokens, 1, head_dim / 2]: cos and sin
        self.has_pad = bool(pads)

    def __call__(self, latents, model_time, captions, is_token):
        """[B, 16, H, W] latents, model time (1000 - t) / 1000 [B], captions [B, 32, D] with a mask [B, 32] of what is
        not padding: the model's output, shaped as the latents."""
        model, batch, across = self.transformer, len(latents), self.across
        modulation = model.t_embedder(model_time * model.t_scale)

        patches = latents.view(batch, 16, across, 2, across, 2).permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, 64)
        image = model.all_x_embedder["2-1"](patches)
        if self.has_pad:
            image = torch.cat([image, model.x_pad_token.expand(batch, 1, -1)], 1)
        n = image.shape[1]
        image = packed_block(model.noise_refiner[0], image, self.bias[:n], *self.rotation[:, :n], modulation, n)

        text = torch.where(is_token[..., None], model.cap_embedder(captions), model.cap_pad_token)
        text = packed_block(model.context_refiner[0], text, self.bias[n:], *self.rotation[:, n:], None, CAPTION_SLOTS)

        x = torch.cat([image, text], 1)
        for layer in model.layers:
            keep = self.tokens if layer is model.layers[-1] else x.shape[1]
            x = packed_block(layer, x, self.bias, *self.rotation, modulation, keep)
        patches = model.all_final_layer["2-1"](x, c=modulation)
        return patches.view(batch, across, across, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def packed_block(layer, x, bias, cos, sin, modulation, keep):
    """ZImageTransformerBlock on [B, S, dim] with an attention bias [S] over the keys; its first `keep` tokens."""
    scale_attention = gate_attention = scale_mlp = gate_mlp = 1.0
    if modulation is not None:
        parts = layer.adaLN_modulation(modulation).unsqueeze(1).chunk(4, dim=2)
        scale_attention, scale_mlp = 1 + parts[0], 1 + parts[2]
        gate_attention, gate_mlp = parts[1].tanh(), parts[3].tanh()
    attention = layer.attention
    hidden = layer.attention_norm1(x) * scale_attention
    x = x[:, :keep]
    query, key, value = (
        project(states).unflatten(-1, (attention.heads, -1))
        for project, states in ((attention.to_q, hidden[:, :keep]), (attention.to_k, hidden), (attention.to_v, hidden))
    )
    query = rotate(attention.norm_q(query), cos[:keep], sin[:keep])
    key = rotate(attention.norm_k(key), cos, sin)
    hidden = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias.expand(keep, -1)
    )
    hidden = attention.to_out[0](hidden.transpose(1, 2).flatten(2))
    x = x + gate_attention * layer.attention_norm2(hidden)
    return x + gate_mlp * layer.ffn_norm2(layer.feed_forward(layer.ffn_norm1(x) * scale_mlp))


def rotate(x, cos, sin):
    """Turns the pairs (x0, x1), (x2, x3), ... of [B, S, heads, head_dim]: the complex product, written out."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


@torch.no_grad()
def check_packed_forward(packed, latents, embeddings):
    """The packed forward must give what ZImageTransformer2DModel.forward gives, else the training is for nothing."""
    model_time = torch.linspace(0.1, 0.9, len(latents))
    ours = packed(latents, model_time, *pad_captions(embeddings))
    theirs = torch.stack(packed.transformer(list(latents.unsqueeze(2)), model_time, embeddings).sample).squeeze(2)
    error = (ours - theirs).abs().max() / theirs.abs().max()
    log(f"transformer: packed forward differs from the real one by {error:.1e}")
    assert error < 1e-4, error


def pad_captions(embeddings):
    """[N, 32, D] and the mask [N, 32] of the tokens that are not padding."""
    padded = torch.stack([F.pad(embedding, (0, 0, 0, CAPTION_SLOTS - len(embedding))) for embedding in embeddings])
    lengths = torch.tensor([len(embedding) for embedding in embeddings])
    return padded, torch.arange(CAPTION_SLOTS) < lengths[:, None]


def train_transformer(transformer, latents, caption_ids, embeddings, steps, batch, shift, generator):
    """Flow matching: x = (1 - sigma) latents + sigma noise; the model's output is minus the velocity."""
    packed = PackedTransformer(transformer, latents.shape[-1])
    check_packed_forward(packed, latents[:4], embeddings[:4])
    captions, is_token = pad_captions(embeddings)

    def loss_of_step(step):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        wording = torch.randint(caption_ids.shape[1], (batch,), generator=generator)
        said = caption_ids[chosen, wording]
        said = torch.where(torch.rand(batch, generator=generator) < 0.1, 0, said)  # 0 is the empty caption
        uniform = torch.rand(batch, generator=generator)
        sigmas = shift * uniform / (1 + (shift - 1) * uniform)  # the levels that the sampler visits
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        at = sigmas.view(-1, 1, 1, 1)
        output = packed((1 - at) * clean + at * noise, 1 - sigmas, captions[said], is_token[said])
        return F.mse_loss(output, clean - noise)

    train(transformer.parameters(), loss_of_step, steps, 2e-3, "transformer")
    check_packed_forward(packed, latents[:4], embeddings[:4])


# ----------------------------------------------------------------------------------------------------
# All of it
# ----------------------------------------------------------------------------------------------------


def work(rank, args, rendezvous):
    """One process's share: half of the pictures, half of every batch; the first process writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.processes)
    share = args.pictures // args.processes
    rng = np.random.default_rng([args.seed, rank])
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank)

    scenes, words = zip(*(random_scene(rng) for _ in range(share)))
    pictures = torch.from_numpy(np.stack([draw_scene(scene) for scene in scenes]))
    practice = np.stack([draw_scene(random_practice_scene(rng)) for _ in range(share // 4)])
    log(f"{args.pictures} pictures drawn")

    torch.manual_seed(args.seed)  # the same initial weights in every process
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(len(tokenizer))
    vae = build_vae()
    initialize_vae(vae)
    transformer = build_transformer(text_encoder.config.hidden_size)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    train_vae(vae, torch.cat([pictures, torch.from_numpy(practice)]), args.vae_steps, args.vae_batch, generator)
    log(f"VAE: {reconstruction_psnr(vae, pictures[:200]):.1f} dB on its pictures")
    latents = encode_pictures(vae, pictures)
    set_latent_statistics(vae, latents)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor

    spoken = [[random_caption(rng, word) for _ in range(4)] for word in words]
    captions = ["", *sorted({caption for wordings in spoken for caption in wordings})]
    number = {caption: index for index, caption in enumerate(captions)}
    caption_ids = torch.tensor([[number[caption] for caption in wordings] for wordings in spoken])
    embeddings = embed_captions(tokenizer, text_encoder, captions)
    log(f"{len(captions)} captions, the longest of {max(map(len, embeddings))} tokens")

    train_transformer(
        transformer, latents, caption_ids, embeddings, args.steps, args.batch, scheduler.config.shift, generator
    )
    if rank == 0:
        pipeline = ZImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer.eval())
        save_pipeline(pipeline, Path(args.output_dir) / "tiny-z-image")
    dist.destroy_process_group()


def save_pipeline(pipeline, folder):
    """float16 for the transformer alone, where the megabytes are; read it back in torch.float32."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.transformer.half()
    pipeline.save_pretrained(folder)


def summarize(folder, seed):
    """Pictures of the finished pipeline: how far the colours are from those that were asked for."""
    torch.set_num_threads(1)
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng([seed, 99])
    words = [random_scene(rng)[1] for _ in range(24)]
    words = [(name, "plain", colour, background) for name, _, colour, background in words]
    for write in (english_caption, chinese_caption):
        prompts = [write(*word, photo=True) for word in words]
        generator = torch.Generator().manual_seed(seed)
        pictures = pipeline(
            prompts, SIZE, SIZE, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="np"
        ).images
        right = [colours_are_right(picture * 255, word) for picture, word in zip(pictures, words)]
        objects, backgrounds = np.mean(right, 0)
        print(f"{write.__name__}: object's colour right in {objects:.0%}, background's in {backgrounds:.0%}")
    weights = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    print(f"{folder}: {weights / 1e6:.1f} MB of weights")


def colours_are_right(picture, words):
    """Whether the named colours are the nearest ones to the object's middle and to the picture's corners."""
    name, _, colour, background = words
    edge = np.concatenate([picture[:8, :8], picture[:8, -8:], picture[-8:, :8], picture[-8:, -8:]]).reshape(-1, 3)
    coverage = rasterize(FORMS[name], Scene(*[None] * 5, 0.5, 0.5, 0.27, 0.0), SIZE) > 0.9
    middle = np.median(picture[coverage], 0)
    return nearest(middle, COLOURS) == colour, nearest(np.median(edge, 0), BACKGROUNDS) == background


def nearest(rgb, named):
    return min(named, key=lambda name: np.linalg.norm(rgb - np.array(named[name][1])))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="tests/assets", help="where tiny-z-image/ and subjects/ go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one thread each; another number, another model")
    parser.add_argument("--pictures", type=int, default=16000, help="drawn for training, over all processes")
    parser.add_argument("--vae_steps", type=int, default=900)
    parser.add_argument("--vae_batch", type=int, default=5, help="pictures per process and step")
    parser.add_argument("--steps", type=int, default=2200, help="of the transformer")
    parser.add_argument("--batch", type=int, default=16, help="latents per process and step")
    return parser.parse_args()


def main():
    args = parse_args()
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    write_subjects(Path(args.output_dir) / "subjects", args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(work, (args, f"{scratch}/rendezvous"), nprocs=args.processes)
    summarize(Path(args.output_dir) / "tiny-z-image", args.seed)
    print(f"finished after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
