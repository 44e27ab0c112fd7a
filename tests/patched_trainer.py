"""Test-only: runs the trainer with one thing about it changed, on the CPU.

    python tests/patched_trainer.py velocity --pretrained_model_name_or_path=... (the trainer's flags)

Most changes are faults that a trainer can have and still see its loss fall: tests/test_learning.py shows that it would
notice each of them. `bitsandbytes_on_cpu` is none: it lets diffusers quantize without a GPU.
"""

import dataclasses
import os
import sys

import torch

import train_dreambooth_lora_z_image as trainer


def velocity():
    """The model's output is taken for the velocity, which is its negative."""
    original = trainer.predict_velocity
    trainer.predict_velocity = lambda *args: -original(*args)


def time():
    """The model is told t / 1000 in place of (1000 - t) / 1000."""
    original = trainer.predict_velocity

    def predict_velocity(transformer, *args):
        return original(lambda x, time, *rest, **options: transformer(x, 1 - time, *rest, **options), *args)

    trainer.predict_velocity = predict_velocity


def latent_scale():
    """The VAE's latents are used as they come, without shift and scale."""
    trainer.encode_images = lambda vae, pixels, run: vae.encode(pixels).latent_dist.mode()


def captions():
    """Each picture is trained with the caption of another, half of the folder away."""
    original = trainer.TrainingPlan.draw

    def draw(self, example, *args):
        examples = self.examples[example.kind]
        other = examples[(examples.index(example) + len(examples) // 2) % len(examples)]
        return dataclasses.replace(original(self, example, *args), prompt=other.caption)

    trainer.TrainingPlan.draw = draw


def bf16_lora():
    """The LoRA's weights are rounded to bfloat16 after every update, as if they were held in it."""
    original = trainer.build_optimizer

    def build_optimizer(parameters, *args):
        optimizer = original(parameters, *args)
        optimizer.register_step_post_hook(lambda *_: [p.data.copy_(p.data.bfloat16()) for p in parameters])
        return optimizer

    trainer.build_optimizer = build_optimizer


def bitsandbytes_on_cpu(set_attribute=setattr):
    """bitsandbytes has kernels for the CPU; diffusers would not ask for them. For this process, or as monkeypatch."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        set_attribute(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        set_attribute(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})


CHANGES = {change.__name__: change for change in (velocity, time, latent_scale, captions, bf16_lora)}
CHANGES["bitsandbytes_on_cpu"] = bitsandbytes_on_cpu


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "1"
    torch.set_num_threads(1)
    CHANGES[sys.argv.pop(1)]()
    sys.exit(trainer.run_command_line())
