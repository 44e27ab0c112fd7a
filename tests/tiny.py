"""What the tests train with: a tiny random Z-Image pipeline, a few photographs, flags, and what a run leaves.

    build_tiny_pipeline(folder)                     a complete pipeline folder of the real classes, made offline
    build_photos(folder)                            six photographs of different shapes
    train_args(model, data, out, rank=8)            the flags of a quick training run, as a list
    lora_tensors(out), lora_metadata(out)           what the saved LoRA file holds

The ways to run the script are in running.py. Tests of single functions import it as a module
(`import train_dreambooth_lora_z_image as trainer`) and need no process.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch


# Like Qwen3's template for plain conversations: an empty thought is written out when thinking is switched off.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def build_tokenizer():
    """A Qwen2 tokenizer without merges: one token for each byte, and Qwen3's special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {character: token_id for token_id, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_pipeline(folder, seed=0, shift=6.0, dtype=torch.float32):
    """Saves a random Z-Image pipeline of about 0.5 M parameters to `folder` and returns the folder as a Path.

    Everything that the trainer and the pipeline rely on is as in the published model: the classes, 16 latent channels
    with their shift and scaling factors, the VAE's factor of 8, the scheduler's shift, the chat template. Every width
    is a multiple of 16, so that float8 products accept it.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=1024,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        transformer = ZImageTransformer2DModel(
            in_channels=16,
            dim=48,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 512, 512],
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=1024,
            force_upcast=True,
        )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False),
        vae=vae.eval().to(dtype),
        text_encoder=text_encoder.eval().to(dtype),
        tokenizer=tokenizer,
        transformer=transformer.eval().to(dtype),
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_photos(folder):
    """Saves six photographs of different shapes, 96 to 200 pixels on a side, and returns the folder as a Path.

    They come with scikit-image and need no download: JPEG and PNG, one square, three wide, two tall.
    """
    from PIL import Image
    from skimage import data

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    motorcycle, _, _ = data.stereo_motorcycle()
    crops = {  # file name: (picture, crop as left, top, right, bottom, size)
        "astronaut.jpg": (data.astronaut(), (0, 0, 512, 512), (128, 128)),
        "astronaut_tall.png": (data.astronaut(), (100, 0, 356, 384), (96, 144)),
        "cat.png": (data.chelsea(), (0, 0, 451, 300), (180, 120)),
        "coffee.jpg": (data.coffee(), (0, 0, 600, 400), (192, 128)),
        "motorcycle.jpg": (motorcycle, (0, 0, motorcycle.shape[1], motorcycle.shape[0]), (200, 135)),
        "rocket_tall.jpg": (data.rocket(), (180, 0, 465, 427), (112, 168)),
    }
    for name, (pixels, crop, size) in crops.items():
        Image.fromarray(pixels).crop(crop).resize(size, Image.Resampling.LANCZOS).save(folder / name)
    return folder


def train_args(model, data, out, **overrides):
    """The flags of a run of two steps at 64 pixels, as a list of strings.

    Keywords add or replace flags: True gives the bare flag, None or False leaves it out, anything else is its value. A
    `data` of None leaves the picture folder out, for `dataset_name`.
    """
    flags = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": data,
        "instance_prompt": "a photo of sks dog",
        "output_dir": out,
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "report_to": "none",
        "skip_final_inference": True,
        "seed": 0,
    }
    flags.update(overrides)
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in flags.items()
        if value is not None and value is not False
    ]


def lora_file(path):
    """The LoRA file at `path`, which may be the file or the output folder that holds it."""
    path = Path(path)
    return path / "pytorch_lora_weights.safetensors" if path.is_dir() else path


def lora_tensors(path):
    """The tensors of a LoRA file by name, in their stored type."""
    from safetensors.torch import load_file

    return load_file(lora_file(path))


def lora_metadata(path):
    """The adapter metadata of a LoRA file (rank, alpha, target modules, ...) by component, without tensors."""
    from safetensors import safe_open

    with safe_open(lora_file(path), framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata.get("lora_adapter_metadata", "{}"))


def events(out):
    """The tensorboard logs of a run: scalars and pictures by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = SimpleNamespace(scalars={}, images={})
    for folder in {file.parent for file in out.rglob("events.out.tfevents.*")}:
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
        accumulator.Reload()
        found.scalars |= {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
        found.images |= {tag: accumulator.Images(tag) for tag in accumulator.Tags()["images"]}
    return found


def load_all_examples(args):
    """{kind: examples} of the pictures that the flags ask for, as `main` of the script reads them."""
    import train_dreambooth_lora_z_image as trainer

    kinds = {"instance": True, "class": args.with_prior_preservation, "held-out": args.validation_data_dir}
    return {kind: trainer.load_examples(kind, args) for kind in kinds if kinds[kind]}
