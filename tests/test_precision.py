"""The base in float8, int8 and NF4: what stays of its gradient, and what is refused."""

import importlib.metadata
import importlib.util
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from torch._subclasses import FakeTensorMode

import train_dreambooth_lora_z_image as trainer
from patched_trainer import bitsandbytes_on_cpu
from running import ROOT, fork_trainer
from test_compile import gradients, make_batch, make_run, prepare
from tiny import lora_tensors, train_args


TRAINED_MODEL = ROOT / "tests" / "assets" / "tiny-z-image"


@pytest.fixture(scope="module")
def trained_gradient():
    """The LoRA's gradient on the trained model, of pictures of its own kind, at levels all over the schedule."""
    vae = AutoencoderKL.from_pretrained(TRAINED_MODEL, subfolder="vae", torch_dtype=torch.float32)
    pictures = sorted((ROOT / "tests" / "assets" / "subjects").rglob("*.png"))

    def trained_gradient(**flags):
        run = make_run(TRAINED_MODEL, precision="bf16", **flags)
        batch = make_batch(run, (64, 64), tokens=30, batch_size=len(pictures))
        pixels = [
            trainer.fit_to_bucket(trainer.decode_image(str(p), p), (64, 64), (0.5, 0.5), False) for p in pictures
        ]
        batch.latents = trainer.encode_images(vae, torch.stack(pixels), run)
        batch.sigmas = (torch.arange(len(pictures)) + 0.5) / len(pictures)
        return gradients(*prepare(run), batch, run)[1].double()

    return trained_gradient


@pytest.fixture(scope="module")
def bf16_gradient(trained_gradient):
    return trained_gradient()


@pytest.mark.parametrize(("precision", "least"), [("fp8", 0.97), ("int8", 0.999), ("nf4", 0.9)])
def test_the_gradient_is_that_of_bf16(precision, least, trained_gradient, bf16_gradient, monkeypatch):
    bitsandbytes_on_cpu(monkeypatch.setattr)
    gradient = trained_gradient(base_model_precision=precision)
    assert least <= torch.nn.functional.cosine_similarity(gradient, bf16_gradient, dim=0) < 1


def layer_types(transformer):
    """How often each type of tensor holds a weight of attention or feed-forward."""
    linear = [m for m in trainer.transformer_blocks(transformer)[-1].modules() if isinstance(m, torch.nn.Linear)]
    return Counter(
        "int8" if type(m.weight).__name__ == "Int8Tensor" else str(m.weight.dtype).removeprefix("torch.")
        for m in linear
        if m.bias is None
    )


def test_the_layers_of_attention_and_feed_forward_are_held_in_one_byte(tiny_model, caplog):
    caplog.set_level("INFO")
    for precision, held in {"fp8": "uint8", "int8": "int8"}.items():
        transformer = trainer.load_transformer(make_run(tiny_model, "bf16", base_model_precision=precision))
        assert layer_types(transformer) == {held: 7}
        assert not any(parameter.requires_grad for parameter in transformer.parameters())
        assert transformer.layers[0].adaLN_modulation[0].weight.dtype == torch.bfloat16
    assert "multiples of 16" not in caplog.text


def test_layers_that_float8_products_do_not_take_stay_and_that_is_said(caplog):
    trainer.error_once.cache_clear()
    transformer = trainer.load_transformer(make_run(TRAINED_MODEL, "bf16", base_model_precision="fp8"))
    assert layer_types(transformer) == {"uint8": 4, "bfloat16": 3}  # its feed-forward layers are 426 wide
    assert caplog.text.count("sizes are not multiples of 16 are not held in float8") == 1


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_base_of_shapes_without_numbers_is_quantized_and_trained_the_same_way(precision, tiny_model):
    """The plan counts memory so."""
    config = make_run(tiny_model).pipeline.transformer_config
    with FakeTensorMode():
        transformer = trainer.ZImageTransformer2DModel.from_config(config)
        transformer.requires_grad_(False)
        trainer.quantize(transformer, precision, torch.device("cpu"))
        hidden = torch.zeros(1, 32, transformer.config.dim, requires_grad=True)
        transformer.layers[0].feed_forward(hidden).sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_nf4_in_the_script_is_the_file_of_settings():
    assert json.loads((ROOT / "configs" / "nf4.json").read_text(encoding="utf-8")) == trainer.NF4


REQUIRED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]


def test_float8_can_be_said_in_two_ways():
    ways = (["--do_fp8_training"], ["--base_model_precision=fp8"], ["--do_fp8_training", "--base_model_precision=fp8"])
    assert {trainer.parse_args([*REQUIRED, *way]).base_model_precision for way in ways} == {"fp8"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--base_model_precision=nf4", "--bnb_quantization_config_path=configs/nf4.json"],
        ["--base_model_precision=int8", "--do_fp8_training"],
        ["--base_model_precision=fp8", "--bnb_quantization_config_path=configs/int8.json"],
    ],
)
def test_two_different_precisions_exclude_each_other(flags):
    with pytest.raises(trainer.UserError) as error:
        trainer.parse_args([*REQUIRED, *flags])
    assert all(flag.split("=")[0] in str(error.value) for flag in flags)


@pytest.mark.parametrize(("version", "flags"), [("0.15.1", {}), (None, {"base_model_precision": "int8"})])
def test_torchao_that_is_too_old_or_absent_is_refused_with_the_pip_line(version, flags, tiny_model, monkeypatch):
    run, plain = make_run(tiny_model, **flags), make_run(tiny_model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(trainer.UserError, match=r"torchao.*pip install 'torchao>=0.16'"):
        trainer.check_precision(run)
    if version is None:  # no other flag needs it
        trainer.check_precision(plain)


@pytest.mark.parametrize(
    ("device", "rocm", "capability", "named"),
    [
        ("cuda", "6.4", (11, 0), "AMD"),
        ("xpu", None, None, "xpu"),
        ("mps", None, None, "mps"),
        ("cuda", None, (8, 6), "8.6"),
    ],
)
def test_float8_is_refused_by_what_the_device_is(device, rocm, capability, named, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", rocm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    run = make_run(tiny_model, do_fp8_training=True)
    run.accelerator.device = torch.device(device)
    with pytest.raises(trainer.UserError, match=f"--do_fp8_training.*{named}.*--base_model_precision int8"):
        trainer.check_precision(run)


@pytest.mark.parametrize("triton", [True, False])
def test_float8_on_a_gpu_compiles_its_blocks_where_there_is_triton(triton, tiny_model, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(trainer, "HAS_TRITON", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    run = make_run(tiny_model, base_model_precision="fp8")
    assert not run.compiled
    run.accelerator.device = torch.device("cuda")
    trainer.check_precision(run)
    assert run.compiled is triton
    assert ("compiles the transformer's blocks" if triton else "slower than bf16") in caplog.text


def test_int8_is_not_sharded(tiny_model):
    run = make_run(tiny_model, base_model_precision="int8")
    run.accelerator.distributed_type = DistributedType.FSDP
    run.accelerator.state.fsdp_plugin = SimpleNamespace(activation_checkpointing=False)
    with pytest.raises(trainer.UserError, match="int8 cannot be sharded"):
        trainer.check_precision(run)


WAYS = {"fp8": {"do_fp8_training": True}, "int8": {"base_model_precision": "int8"}}


@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_run_with_a_base_adapter_draws_and_is_the_same_after_a_stop(way, photos, tmp_path):
    """Its checkpoint after two updates serves as the base adapter of the runs that are compared."""
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "cache_latents": True, "rank": 2, **WAYS[way]}
    flags |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    fork_trainer(*train_args(TRAINED_MODEL, photos, tmp_path / "base", **flags | {"max_train_steps": 1}))
    adapter = tmp_path / "base" / "pytorch_lora_weights.safetensors"
    flags |= {"base_adapter": f"{adapter}:0.5", "validation_prompt": "a toy", "num_validation_images": 1}
    flags |= {"validation_num_inference_steps": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fork_trainer(*train_args(TRAINED_MODEL, photos, whole, **flags))
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    fork_trainer(*train_args(TRAINED_MODEL, photos, stopped, **flags, resume_from_checkpoint="latest"))
    one, other = lora_tensors(whole), lora_tensors(stopped)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.any() for name, tensor in one.items() if ".lora_B." in name)
    assert list((whole / "samples").rglob("*.png"))
