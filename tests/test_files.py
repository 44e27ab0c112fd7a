"""What people bring along and take away: LoRAs of other programs, whole transformers in a file, the files written."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dreambooth_lora_z_image as trainer
from running import error_line, fork_trainer
from test_compile import make_run
from tiny import lora_file, lora_metadata, lora_tensors, train_args


ATTENTION = "layers.0.attention"


@pytest.fixture(scope="module")
def config(tiny_model):
    return trainer.ZImageTransformer2DModel.load_config(tiny_model, subfolder="transformer")


def random_lora(config, rank=4, modules=None, seed=0):
    """{module: (A, B)} of a LoRA that changes the model, on attention by default."""
    linear, generator = trainer.linear_layers(config), torch.Generator().manual_seed(seed)
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return {
        module: tuple(torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        for module, (inputs, outputs) in linear.items()
        if (module in modules if modules else module.endswith(ends))
    }


def as_diffusers(lora, alpha):
    state = {f"transformer.{m}.lora_{side}.weight": t for m, pair in lora.items() for side, t in zip("AB", pair)}
    rank = len(next(iter(lora.values()))[0])
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(lora)}
    settings = {f"transformer.{name}": value for name, value in settings.items()}
    return state, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def as_comfyui(lora, alpha):
    state = {f"diffusion_model.{m}.lora_{s}.weight": t for m, pair in lora.items() for s, t in zip("AB", pair)}
    return state | {f"diffusion_model.{m}.alpha": torch.tensor(alpha) for m in lora}, {"format": "pt"}


def as_kohya(lora, alpha):
    state = {}
    for module, (down, up) in lora.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return state, {"ss_network_dim": "4"}


def as_onetrainer(lora, alpha):
    state = {}
    for module, (down, up) in lora.items():
        name = f"transformer.{module}"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return state, {}


def as_bare(lora, alpha):
    state, _ = as_onetrainer(lora, alpha)
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}, {}


def settings(config, *flags):
    argv = train_args("model", "photos", "out")
    return trainer.read_lora_settings(trainer.parse_args([*argv, *flags]), config)


def effects(lora, scale):
    """{module: B A x alpha / rank}."""
    return {module: scale * up @ down for module, (down, up) in lora.items()}


def effects_of(read):
    """The same of LoraSettings."""
    pairs = {m: tuple(read.initial[f"{m}.lora_{side}.weight"] for side in "AB") for m in read.modules}
    return effects(pairs, read.alpha / read.rank)


@pytest.mark.parametrize("write", [as_diffusers, as_comfyui, as_kohya, as_onetrainer, as_bare])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_of_each_programs_names_starts_with_its_effect_rank_and_alpha(write, dtype, config, tmp_path):
    lora = random_lora(config)
    state, metadata = write(lora, 2.0)
    save_file({name: t.to(dtype).contiguous() for name, t in state.items()}, tmp_path / "a.safetensors", metadata)
    read = settings(config, f"--init_lora={tmp_path / 'a.safetensors'}")
    assert (read.rank, read.alpha, set(read.modules)) == (4, 2.0, set(lora))
    assert set(read.targets) == {"to_q", "to_k", "to_v", "to_out.0"}
    stored = {module: tuple(t.to(dtype).float() for t in pair) for module, pair in lora.items()}
    for module, expected in effects(stored, 0.5).items():
        torch.testing.assert_close(effects_of(read)[module], expected)


def saved_lora(path, config, write=as_kohya, alpha=2.0, **options):
    state, metadata = write(random_lora(config, **options), alpha)
    save_file(state, path, metadata)
    return path


def test_a_given_alpha_is_folded_into_what_init_lora_starts_from(config, tmp_path):
    path = saved_lora(tmp_path / "a.safetensors", config)
    read = settings(
        config, f"--init_lora={path}", "--lora_alpha=8", "--rank=4", "--lora_layers=to_q,to_k,to_v,to_out.0"
    )
    assert (read.rank, read.alpha) == (4, 8.0)
    for module, expected in effects(random_lora(config), 0.5).items():
        torch.testing.assert_close(effects_of(read)[module], expected)


def test_alphas_that_differ_within_a_file_count(config, tmp_path):
    lora = random_lora(config)
    state, _ = as_kohya(lora, 2.0)
    state["lora_unet_layers_0_attention_to_q.alpha"] = torch.tensor(16.0)
    save_file(state, tmp_path / "a.safetensors")
    read = settings(config, f"--init_lora={tmp_path / 'a.safetensors'}")
    torch.testing.assert_close(effects_of(read)[f"{ATTENTION}.to_q"], effects(lora, 4.0)[f"{ATTENTION}.to_q"])
    torch.testing.assert_close(effects_of(read)[f"{ATTENTION}.to_k"], effects(lora, 0.5)[f"{ATTENTION}.to_k"])


def test_a_lora_without_any_alpha_acts_as_it_is(config, tmp_path):
    lora = random_lora(config)
    save_file(as_diffusers(lora, 2.0)[0], tmp_path / "a.safetensors")
    read = settings(config, f"--init_lora={tmp_path / 'a.safetensors'}")
    assert read.alpha == read.rank == 4
    torch.testing.assert_close(effects_of(read)[f"{ATTENTION}.to_q"], effects(lora, 1)[f"{ATTENTION}.to_q"])


def test_embedders_and_the_final_layer_are_found(config, tmp_path):
    modules = ["all_x_embedder.2-1", "all_final_layer.2-1.linear", "layers.0.adaLN_modulation.0", "t_embedder.mlp.0"]
    state, _ = as_comfyui(random_lora(config, modules=modules), 4.0)
    save_file(state, tmp_path / "a.safetensors")
    assert settings(config, f"--init_lora={tmp_path / 'a.safetensors'}").modules == sorted(modules)


def test_what_differs_from_the_file_or_cannot_be_trained_on_is_refused_with_both(config, tmp_path):
    lora, path = random_lora(config), tmp_path / "a.safetensors"

    def refusal(state, *flags):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        with pytest.raises(trainer.UserError) as error:
            settings(config, f"--init_lora={path}", *flags)
        assert str(path) in str(error.value) and "--init_lora" in str(error.value)
        return str(error.value)

    kohya = as_kohya(lora, 2.0)[0]
    text = refusal(kohya, "--rank=8")
    assert "rank 4" in text and "--rank 8" in text
    text = refusal(kohya, "--lora_layers=to_q,to_k")
    assert f"{len(lora)} layers" in text and f"the {len(lora) // 2} of --lora_layers" in text
    several = as_kohya(random_lora(config, 8, [f"{ATTENTION}.to_q"]), 2.0)[0]
    assert "rank 4, 8" in refusal(kohya | several)
    to_q = "lora_unet_layers_0_attention_to_q"
    for part, kind in {"lokr_w1": "LoKr", "hada_w1_a": "LoHa", "dora_scale": "DoRA"}.items():
        assert f"is a {kind}" in refusal(kohya | {f"{to_q}.{part}": torch.ones(1)})
    flux = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    assert "double.blocks" in refusal({flux: torch.ones(4, 8), flux.replace("down", "up"): torch.ones(8, 4)})
    other = as_kohya({m: (down[:, :16], up) for m, (down, up) in lora.items()}, 2.0)[0]
    assert "a LoRA of another model: its " in refusal(other)
    convolution = as_kohya({m: (down[..., None, None], up) for m, (down, up) in lora.items()}, 2.0)[0]
    assert "(48, 1, 1, 48), not (48, 48)" in refusal(convolution)
    broken = refusal(kohya | {f"{to_q}.alpha": torch.tensor(math.nan)})
    assert f"is broken: its {to_q}.alpha has infinite numbers, or NaN" in broken
    for state, held in (({f"{ATTENTION}.to_q.weight": torch.ones(2)}, f"{ATTENTION}.to_q.weight"), ({}, "nothing")):
        assert f"is of another model, not a LoRA: it holds {held}" in refusal(state)


def test_a_file_that_is_no_safetensors_file_is_named_for_what_it_is(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.zeros(100)}, whole)
    contents = {
        b"GGUF\x03\x00\x00\x00\x00": "a GGUF file",
        b"PK\x03\x04" + bytes(60): "a pickled checkpoint",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "a git-lfs pointer, not the weights",
        b"<!DOCTYPE html><html>": "a web page",
        b"": "no safetensors file",
        b"not weights at all": "no safetensors file",
        whole.read_bytes()[:-100]: "half a download",
        whole.read_bytes()[:40]: "half a download",
    }
    for content, kind in contents.items():
        path = tmp_path / "file.safetensors"
        path.write_bytes(content)
        with pytest.raises(trainer.UserError, match=f"file.safetensors is {kind}"):
            trainer.safetensors_header(path)
    with pytest.raises(trainer.UserError, match="cannot be read.* directory"):
        trainer.safetensors_header(tmp_path)
    assert set(trainer.safetensors_header(whole)) == {"a"}


def test_a_lora_is_found_by_its_folder_and_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repository, allow_patterns, cache_dir):
        asked.append((repository, allow_patterns, cache_dir))
        return str(tmp_path)

    monkeypatch.setattr(trainer, "snapshot_download", download)
    (tmp_path / "one.safetensors").touch()
    assert trainer.find_lora_file(str(tmp_path), None) == tmp_path / "one.safetensors"
    assert trainer.find_lora_file("someone/lora", "cache") == tmp_path / "one.safetensors"
    assert trainer.find_lora_file("someone/lora/files/two.safetensors", None) == tmp_path / "files" / "two.safetensors"
    assert asked == [("someone/lora", ["*.safetensors"], "cache"), ("someone/lora", ["files/two.safetensors"], None)]
    (tmp_path / "three.safetensors").touch()
    with pytest.raises(trainer.UserError, match="one.safetensors.*three.safetensors"):
        trainer.find_lora_file(str(tmp_path), None)
    (tmp_path / trainer.LORA_FILE).touch()
    assert trainer.find_lora_file(str(tmp_path), None) == tmp_path / trainer.LORA_FILE


@pytest.fixture(scope="module")
def warm_start(tiny_model, shared_photos, config, tmp_path_factory):
    """A run that begins with a LoRA of kohya's names and hardly moves it: (that file, its output folder)."""
    folder = tmp_path_factory.mktemp("warm")
    path = saved_lora(folder / "kohya.safetensors", config, rank=4)
    flags = {"init_lora": path, "learning_rate": 1e-9, "max_train_steps": 1, "upcast_before_saving": True}
    fork_trainer(*train_args(tiny_model, shared_photos, folder / "out", **flags))
    return path, folder / "out"


def test_a_run_that_starts_from_a_lora_goes_on_from_it(warm_start, config):
    _, out = warm_start
    adapter = lora_metadata(out)
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (4, 2.0)
    saved = lora_tensors(out)
    for module, (down, up) in random_lora(config).items():
        torch.testing.assert_close(saved[f"transformer.{module}.lora_A.weight"], down, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(saved[f"transformer.{module}.lora_B.weight"], up, rtol=1e-4, atol=1e-6)


def test_our_file_our_comfyui_file_and_a_kohya_named_one_give_the_same_velocity(warm_start, config, tiny_model):
    path, out = warm_start
    velocities = []
    for file in (path, lora_file(out), out / "comfyui" / "out.safetensors"):
        transformer = trainer.ZImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        lora, args = settings(config, f"--init_lora={file}"), SimpleNamespace(lora_dropout=0.0)
        trainer.add_lora(transformer, SimpleNamespace(lora=lora, args=args, seed=0, accelerator=accelerator))
        generator = torch.Generator().manual_seed(0)
        latents, embed = (torch.randn(shape, generator=generator) for shape in ((1, 16, 4, 4), (7, 32)))
        with torch.no_grad():
            velocities.append(
                trainer.predict_velocity(transformer, latents, torch.tensor([0.5]), [embed], torch.float32)
            )
            transformer.disable_adapters()
            base = trainer.predict_velocity(transformer, latents, torch.tensor([0.5]), [embed], torch.float32)
        assert (velocities[-1] - base).norm() > 0.1 * base.norm()
    for other in velocities[1:]:
        torch.testing.assert_close(other, velocities[0], rtol=1e-3, atol=1e-4)


def test_a_finished_run_without_checkpoints_says_how_to_train_its_lora_on(warm_start, tiny_model, shared_photos):
    path, out = warm_start
    flags = {"init_lora": path, "learning_rate": 1e-9, "max_train_steps": 1, "resume_from_checkpoint": "latest"}
    finished = fork_trainer(
        *train_args(tiny_model, shared_photos, out, upcast_before_saving=True, **flags), check=False
    )
    error_line(finished, f"another --output_dir and, to train its LoRA on, --init_lora {out}", "--checkpointing_steps")


# ---------------------------------------------------------------------------------------------------------------------
# A transformer in one file
# ---------------------------------------------------------------------------------------------------------------------


def original_names(state):
    """A transformer under the original model's names, as ComfyUI keeps it: q, k and v in one matrix."""
    renamed = {
        name.replace("all_x_embedder.2-1", "x_embedder")
        .replace("all_final_layer.2-1", "final_layer")
        .replace("attention.norm_", "attention.")
        .replace("attention.q.", "attention.q_norm.")
        .replace("attention.k.", "attention.k_norm.")
        .replace("to_out.0", "out"): tensor
        for name, tensor in state.items()
    }
    for name in [name for name in renamed if name.endswith("to_q.weight")]:
        block = name.removesuffix("to_q.weight")
        renamed[f"{block}qkv.weight"] = torch.cat(
            [renamed.pop(f"{block}to_{projection}.weight") for projection in "qkv"]
        )
    return renamed


def with_prefix(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def in_float8(state, scale_name, rowwise=False):
    """Matrices as float8 and their scale; vectors stay as they are."""
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.startswith(("layers.", "noise_refiner.", "context_refiner.")):
            largest = tensor.abs().amax(1, keepdim=True) if rowwise else tensor.abs().max()
            scale = largest.float() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + scale_name] = scale
        else:
            stored[name] = tensor
    return stored


def comfy_quant(state, form):
    note = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    return {n.replace("weight_scale", "comfy_quant"): note for n in state if n.endswith("weight_scale")}


def older_scaled_float8(state):
    return in_float8(original_names(state), "scale_weight") | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}


def newer_scaled_float8(state, rowwise=False):
    stored = in_float8(original_names(state), "weight_scale", rowwise)
    inputs = {name.replace("weight_scale", "input_scale"): torch.ones(()) for name in stored if "weight_scale" in name}
    return stored | comfy_quant(stored, "float8_e4m3fn") | inputs


def to(dtype):
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


def whole_checkpoint(state):
    rest = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.qwen3_4b.model.norm.weight": torch.ones(2)}
    return with_prefix(original_names(state), "model.diffusion_model.") | rest


FORMS = {  # {form: (how it is made, how far its weights may be from the original's)}
    "diffusers' names": (lambda state: state, 0),
    "a prefix before diffusers' names": (lambda state: with_prefix(state, "model.diffusion_model."), 0),
    "the original's names, fused": (original_names, 0),
    "the original's last norm, which is not used": (
        lambda state: original_names(state) | {"norm_final.weight": torch.ones(48)},
        0,
    ),
    "ComfyUI's prefix": (lambda state: with_prefix(original_names(state), "diffusion_model."), 0),
    "a whole checkpoint": (whole_checkpoint, 0),
    "bf16": (lambda state: original_names(to(torch.bfloat16)(state)), 2**-8),
    "fp16": (to(torch.float16), 2**-10),
    "plain fp8": (lambda state: original_names(to(torch.float8_e4m3fn)(state)), 2**-3),
    "scaled fp8, older": (older_scaled_float8, 2**-4),
    "scaled fp8, newer": (newer_scaled_float8, 2**-4),
    "scaled fp8 by rows": (lambda state: newer_scaled_float8(state, rowwise=True), 2**-4),
    "scaled fp8, diffusers' names and a prefix": (
        lambda state: with_prefix(in_float8(state, "weight_scale"), "model.diffusion_model."),
        2**-4,
    ),
}


@pytest.fixture(scope="module")
def weights(tiny_model):
    return trainer.ZImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer").state_dict()


def in_one_file(tiny_model, config, path):
    """What PipelineInfo is for a transformer in one file, as far as loading asks."""
    return SimpleNamespace(path=str(tiny_model), transformer_file=path, transformer_config=config)


def save(state, path, metadata=None):
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata)
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_form_of_file_gives_the_same_transformer(form, dtype, weights, tiny_model, tmp_path):
    make, tolerance = FORMS[form]
    path = save(make(weights), tmp_path / "model.safetensors")
    run = make_run(tiny_model, {torch.float32: "no", torch.bfloat16: "bf16"}[dtype], transformer_path=path)
    shapes = trainer.read_transformer_file(run.pipeline)
    assert all(tensor.is_meta for tensor in shapes.values())
    loaded = trainer.load_transformer(run).state_dict()
    assert loaded.keys() == weights.keys() == shapes.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == dtype
        allowed = tolerance + (2**-8 if dtype == torch.bfloat16 else 0)
        assert (tensor.float() - weights[name]).norm() <= allowed * weights[name].norm(), name


def test_a_file_of_anything_else_is_refused_for_what_it_is(weights, config, tiny_model, tmp_path):
    def refusal(state, metadata=None):
        pipeline = in_one_file(tiny_model, config, save(state, tmp_path / "model.safetensors", metadata))
        with pytest.raises(trainer.UserError) as error:
            trainer.read_transformer_file(pipeline)
        return str(error.value)

    one = torch.ones(2, 2)
    kinds = {
        "transformer.layers.0.attention.to_q.lora_A.weight": "a LoRA, not a Z-Image transformer",
        "control_noise_refiner.0.attention_norm1.weight": "a ControlNet",
        "double_blocks.0.img_attn.qkv.weight": "FLUX",
        "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion",
        "model.layers.0.self_attn.q_proj.weight": "a text encoder",
        "decoder.conv_in.weight": "a VAE",
        "blocks.0.ffn.0.weight": "of another model, not a Z-Image transformer: it holds blocks.0.ffn.0.weight",
    }
    for name, kind in kinds.items():
        assert f"model.safetensors is {kind}" in refusal({name: one})
    scaled = in_float8(original_names(weights), "weight_scale")
    for form in ("nvfp4", "mxfp8", "int8_tensorwise"):
        assert f"stores weights as {form}: give" in refusal(scaled | comfy_quant(scaled, form))
        layers = {"layers": {"layers.0.attention.qkv": {"format": form}}}
        assert f"stores weights as {form}: give" in refusal(scaled, {"_quantization_metadata": json.dumps(layers)})
    assert "what it says of its formats is not JSON" in refusal(scaled, {"_quantization_metadata": "{"})
    blocks = {name: torch.ones(3, 3) for name in scaled if name.endswith("weight_scale")}
    assert "has scales for blocks of " in refusal(scaled | blocks)
    note = {"layers.0.attention.qkv.comfy_quant": torch.tensor([*b"{no"], dtype=torch.uint8)}
    assert "what it says of its formats is not JSON" in refusal(scaled | note)
    assert "stores weights as I8: give" in refusal(weights | {f"{ATTENTION}.to_q.weight": one.to(torch.int8)})
    lacking = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    assert "another model or size: layers.1." in refusal(original_names(lacking))
    assert "siglip.weight is [2, 2], not absent" in refusal(weights | {"siglip.weight": one})
    small = refusal(weights | {f"{ATTENTION}.to_q.weight": one})
    assert "layers.0.attention.to_q.weight is [2, 2], not [48, 48]" in small


def test_a_run_on_a_transformer_in_one_file_needs_no_other_and_its_content_is_the_runs_identity(
    weights, tiny_model, shared_photos, tmp_path
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for file in (model / "transformer").glob("*.safetensors"):
        file.unlink()
    path = save(whole_checkpoint(weights), tmp_path / "model.safetensors")
    flags = {"transformer_path": path, "checkpointing_steps": 1}
    for name, pipeline, options in (("one", model, flags), ("folder", tiny_model, {})):
        finished = fork_trainer(*train_args(pipeline, shared_photos, tmp_path / name, **options))
        assert ("holds more than the transformer: that alone is taken" in finished.output) == (name == "one")
    one, folder = lora_tensors(tmp_path / "one"), lora_tensors(tmp_path / "folder")
    assert one.keys() == folder.keys() and all(torch.equal(one[name], folder[name]) for name in one)
    save(original_names({name: 2 * tensor for name, tensor in weights.items()}), path)
    resumed = train_args(model, shared_photos, tmp_path / "one", resume_from_checkpoint="latest", **flags)
    finished = fork_trainer(*resumed, check=False)
    assert finished.returncode == 2 and "transformer was " in finished.stderr


def test_validation_pictures_come_from_a_transformer_in_one_file(weights, tiny_model, shared_photos, tmp_path):
    path = save(
        original_names({name: 1.5 * tensor for name, tensor in weights.items()}), tmp_path / "other.safetensors"
    )
    flags = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_num_inference_steps": 2}
    pictures = []
    for name, other in (("other", path), ("own", None)):
        flags |= {"skip_final_inference": False, "validation_model_path": other, "max_train_steps": 1}
        fork_trainer(*train_args(tiny_model, shared_photos, tmp_path / name, **flags))
        (picture,) = (tmp_path / name / "samples").glob("*-000001-prompt-0-image-0.png")
        pictures.append(picture.read_bytes())
    assert pictures[0] != pictures[1]


def test_a_file_beside_a_pipeline_in_the_hubs_cache_is_loaded(weights, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "snapshot_download", lambda *_, **__: str(tiny_model))
    monkeypatch.setattr(trainer.DiffusionPipeline, "download", lambda *_, **__: Path(tiny_model))  # of what is cached
    path = save(original_names(weights), tmp_path / "one.safetensors")
    trainer.load_transformer(make_run("org/Z-Image", transformer_path=path))


@pytest.mark.parametrize("flag", ["transformer_path", "validation_model_path"])
def test_a_file_that_cannot_be_used_is_one_line_and_exit_status_2(flag, tiny_model, shared_photos, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"GGUF" + bytes(100))
    flags = {flag: tmp_path / "model.safetensors"}
    finished = fork_trainer(*train_args(tiny_model, shared_photos, tmp_path / "out", **flags), check=False)
    assert finished.returncode == 2
    assert f"{tmp_path / 'model.safetensors'} is a GGUF file: give" in finished.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Files out
# ---------------------------------------------------------------------------------------------------------------------

PROMPT = "a photo of sks dog"


def module_of_comfyui(config):
    """{prefix of a LoRA's keys: (weight of ComfyUI's model, its part of the rows, shape)}, by its loader's rules.

    For Z-Image it knows diffusers' names of the blocks and of what is around them, after `diffusion_model.`; q, k
    and v are thirds of one matrix. Keys of other names are left out with a warning.
    """
    known, dim = {}, config["dim"]
    for module, shape in trainer.linear_layers(config).items():
        *_, last = module.split(".attention.to_")
        if last in ("q", "k", "v"):
            weight, rows = module.replace(f"to_{last}", "qkv"), ("q", "k", "v").index(last) * dim
            known[f"diffusion_model.{module}"] = weight, rows, shape
        else:
            weight = module.replace("to_out.0", "out").replace("all_", "").replace(".2-1", "")
            known[f"diffusion_model.{module}"] = weight, 0, shape
    return known


@pytest.fixture(scope="module")
def checkpointed(tiny_model, shared_photos, tmp_path_factory):
    """The output folder of a run with checkpoints, of which one is kept, and the best LoRA."""
    out = tmp_path_factory.mktemp("checkpointed") / "toy"
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "max_train_steps": 4, "validation_epochs": 1}
    flags |= {
        "validation_data_dir": out.parent / "held-out",
        "save_best": True,
        "lora_layers": f"layers.0,{LAYERS}",
        "rank": 2,
    }
    (out.parent / "held-out").mkdir()
    Image.new("RGB", (64, 64), "orange").save(out.parent / "held-out" / "orange.png")
    fork_trainer(*train_args(tiny_model, shared_photos, out, **flags))
    return out


LAYERS = "to_q,to_k,to_v,to_out.0,all_x_embedder.2-1,all_final_layer.2-1.linear"


def test_every_key_of_the_comfyui_file_is_one_that_its_loader_takes(checkpointed, config):
    known, state = module_of_comfyui(config), load_file(checkpointed / "comfyui" / "toy.safetensors")
    modules = {name.rpartition(".alpha")[0] for name in state if name.endswith(".alpha")}
    assert modules <= known.keys() and len(modules) > 10
    parts = ("lora_A.weight", "lora_B.weight", "alpha")
    assert state.keys() == {f"{module}.{part}" for module in modules for part in parts}
    for module in modules:
        down, up, alpha = (state[f"{module}.{part}"] for part in parts)
        _, _, (inputs, outputs) = known[module]
        assert down.shape == (2, inputs) and up.shape == (outputs, 2) and alpha.shape == () and alpha.item() == 4


def test_each_checkpoint_and_the_best_have_a_file_for_comfyui_and_it_goes_with_its_checkpoint(checkpointed):
    assert sorted(file.name for file in (checkpointed / "comfyui").iterdir()) == [
        "toy-000003.safetensors",
        "toy-000004.safetensors",
        "toy-best.safetensors",
        "toy.safetensors",
    ]
    assert sorted(folder.name for folder in checkpointed.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]

    def prefixed(folder):
        return {name.replace("transformer.", "diffusion_model."): t for name, t in lora_tensors(folder).items()}

    for folder, name in (("checkpoint-3", "toy-000003"), ("best", "toy-best"), (".", "toy")):
        state = load_file(checkpointed / "comfyui" / f"{name}.safetensors")
        expected = prefixed(checkpointed / folder)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_comfyui_file_describes_itself_and_tells_nothing_private(checkpointed, tiny_model, tmp_path):
    def metadata(file):
        with safe_open(file, framework="pt") as opened:
            return opened.metadata()

    described = metadata(checkpointed / "comfyui" / "toy.safetensors")
    assert described.pop("modelspec.date").count("-") == 2
    assert described == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "z-image/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "toy",
        "modelspec.resolution": "64x64",
    }
    transformer = trainer.ZImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    args = trainer.parse_args(train_args(tiny_model, "photos", tmp_path / "pushed", push_to_hub=True))
    lora, cpu = trainer.read_lora_settings(args, dict(transformer.config)), SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(args=args, lora=lora, seed=0, accelerator=cpu, saving_dtype=torch.float32)
    trainer.add_lora(transformer, run)
    file = trainer.save_for_comfyui(transformer, "", run)
    assert metadata(file)["modelspec.trigger_phrase"] == PROMPT


# ---------------------------------------------------------------------------------------------------------------------
# Averaged weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tiny_model, shared_photos, tmp_path_factory):
    """Output folders of a run of four steps with --ema_decay: at once, and stopped after two and resumed."""
    folder, outputs = tmp_path_factory.mktemp("averaged"), []
    flags = {"ema_decay": 0.5, "checkpointing_steps": 1, "learning_rate": 0.01, "upcast_before_saving": True}
    for name, lengths in (("at once", [4]), ("resumed", [2, 4])):
        for steps in lengths:
            options = flags | {"max_train_steps": steps, "resume_from_checkpoint": "latest"}
            options |= {"validation_prompt": "a dog", "num_validation_images": 0}
            finished = fork_trainer(*train_args(tiny_model, shared_photos, folder / name, **options))
        outputs.append((folder / name, finished.output))
    return outputs


def test_the_averaged_weights_are_what_is_validated_and_saved(averaged):
    out, output = averaged[0]
    assert "the weights that are validated are averaged" in output
    own = [lora_tensors(out / f"checkpoint-{step}") for step in range(1, 5)]
    weights = torch.tensor([0.0625, 0.125, 0.25, 0.5])
    for name, saved in lora_tensors(out).items():
        expected = sum(weight * state[name] for weight, state in zip(weights / weights.sum(), own, strict=True))
        torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-7)
        assert ".lora_B." not in name or not torch.equal(saved, own[-1][name])
    comfyui = load_file(out / "comfyui" / "at once-000004.safetensors")
    for name, saved in lora_tensors(out).items():
        assert torch.equal(comfyui[name.replace("transformer.", "diffusion_model.")], saved)


def test_a_resumed_run_has_the_same_average(averaged):
    one, other = (lora_tensors(out) for out, _ in averaged)
    assert all(torch.equal(one[name], other[name]) for name in one)
