"""Flags have their effect, looked at where they take it: in the functions of the trainer, on the tiny model."""

import ast
import dataclasses
import errno
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import train_dreambooth_lora_z_image as trainer
from flags import TESTED, WITHOUT_EFFECT
from running import ROOT, SCRIPT, run_here
from test_checkpoint import make_state
from test_compile import gradients, make_batch, make_run, prepare
from tiny import build_tiny_pipeline, load_all_examples, train_args


def parsed(**flags):
    return trainer.parse_args(train_args("model", "pictures", "out", **flags))


# ---------------------------------------------------------------------------------------------------------------------
# All flags
# ---------------------------------------------------------------------------------------------------------------------


def test_every_flag_is_tested_somewhere_or_accepted_without_effect():
    flags = {action.dest for action in trainer.build_parser()._actions} - {"help"}
    assert flags == TESTED.keys() | WITHOUT_EFFECT


def test_every_flag_has_its_documented_default():
    args = vars(trainer.build_parser().parse_args(["--pretrained_model_name_or_path=m", "--output_dir=out"]))
    given = {"pretrained_model_name_or_path", "output_dir"}
    found = {name: value for name, value in args.items() if name not in given | WITHOUT_EFFECT}
    assert found == {name: default for name, (default, _) in TESTED.items() if name not in given}
    assert not [name for name in WITHOUT_EFFECT if args[name] is not None]


@pytest.mark.parametrize("flag", TESTED)
def test_the_test_of_a_flag_exists_and_names_it(flag):
    file, _, name = TESTED[flag][1].partition("::")
    path = ROOT / "tests" / f"test_{file}.py"
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"^def test_{name}\(", text, re.M), f"{path.name} has no test_{name}"
    assert flag in text or flag.removeprefix("prodigy_") in text, f"{path.name} does not name --{flag}"


def test_every_flag_is_read():
    own_functions = ("build_parser", "ineffective_flags")  # what these read has no effect
    read = set()
    for statement in ast.parse(SCRIPT.read_text("utf-8")).body:
        if getattr(statement, "name", None) in own_functions:
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "args":
                read.add(node.attr)
    assert TESTED.keys() <= read


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def make_examples(run, folder):
    """The pictures in a folder, as the run trains on them."""
    run.args.instance_data_dir = str(folder)
    return load_all_examples(run.args)


@pytest.mark.parametrize(
    ("kind", "center_crop", "drawn"),
    [("instance", False, True), ("instance", True, False), ("held-out", False, False)],
)
def test_a_crop_is_drawn_anew_unless_it_is_centred(kind, center_crop, drawn, tiny_model, shared_photos):
    run = make_run(tiny_model, center_crop=center_crop)
    (wide,) = [example for example in make_examples(run, shared_photos)["instance"] if "coffee" in example.name]
    wide = dataclasses.replace(wide, kind=kind)
    assert wide.size[0] < wide.size[1] and wide.bucket[0] == wide.bucket[1]
    crops = [trainer.draw_crop(wide, run.args, run.seed, kind, number) for number in (1, 1, 2)]
    one, same, other = (trainer.fit_to_bucket(trainer.load_picture(wide), wide.bucket, crop, False) for crop in crops)
    assert torch.equal(one, same)
    assert torch.equal(one, other) is not drawn


def test_the_field_of_captions_is_that_of_held_out_pictures_too(shared_photos, tmp_path):
    folder = tmp_path / "held-out"
    folder.mkdir()
    (folder / "cat.png").symlink_to(shared_photos / "cat.png")
    row = {"file_name": "cat.png", "text": "a cat", "zh": "一只猫"}
    (folder / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    flags = {"caption_column": "zh", "validation_data_dir": folder}
    examples = load_all_examples(trainer.parse_args(train_args("model", folder, "out", **flags)))
    assert [examples[kind][0].caption for kind in ("instance", "held-out")] == ["一只猫", "一只猫"]


def test_the_configuration_of_a_data_set_is_asked_for():
    flags = {"dataset_name": "dogs", "dataset_config_name": "small", "cache_dir": "here"}
    args = trainer.parse_args(train_args("model", None, "out", **flags))
    with (
        mock.patch("datasets.load_dataset", side_effect=ValueError("seen")) as load,
        pytest.raises(trainer.UserError, match="seen"),
    ):
        load_all_examples(args)
    assert load.call_args == mock.call("dogs", "small", cache_dir="here")


# ---------------------------------------------------------------------------------------------------------------------
# Encodings on disk
# ---------------------------------------------------------------------------------------------------------------------

LONG = "a photo of sks dog " * 10


@pytest.mark.parametrize("change", ["precision", "length", "model"])
def test_a_prompt_that_would_be_encoded_differently_is_not_taken_from_the_cache(change, tiny_model, tmp_path):
    settings = {"precision": "no", "max_sequence_length": 512}

    def encode(model, cache):
        run = make_run(model, encoding_cache_dir=cache, **settings)
        return trainer.encode_prompts(trainer.tokenize({"instance": [SimpleNamespace(caption=LONG)]}, run), run)[LONG]

    encode(tiny_model, tmp_path)
    settings |= {"precision": {"precision": "bf16"}, "length": {"max_sequence_length": 40}}.get(change, {})
    model = build_tiny_pipeline(tmp_path / "other", seed=1) if change == "model" else tiny_model
    cached, anew = (encode(model, cache) for cache in (tmp_path, None))
    assert cached.dtype == anew.dtype and torch.equal(cached, anew)


@pytest.mark.parametrize("change", ["resolution", "crop", "flip", "model"])
def test_a_picture_that_would_be_encoded_differently_is_not_taken_from_the_cache(
    change, tiny_model, shared_photos, tmp_path
):
    def encode(model, cache, **flags):
        run = make_run(model, encoding_cache_dir=cache, **{"resolution": 32} | flags)
        latents = trainer.cache_latents(make_examples(run, shared_photos)["instance"], run)
        return {(example.name, flip): tensor for (example, flip), tensor in latents.items()}

    flags = {"resolution": {"resolution": 48}, "crop": {"center_crop": True}, "flip": {"random_flip": True}}
    model = build_tiny_pipeline(tmp_path / "other", seed=1) if change == "model" else tiny_model
    encode(tiny_model, tmp_path / "cache")
    cached, anew = (encode(model, cache, **flags.get(change, {})) for cache in (tmp_path / "cache", None))
    assert cached.keys() == anew.keys() and all(torch.equal(cached[key], anew[key]) for key in anew)


def test_a_damaged_encoding_is_made_anew_and_a_full_disk_stops_nothing(tiny_model, tmp_path, caplog):
    run = make_run(tiny_model, encoding_cache_dir=tmp_path)
    whole = trainer.encode_prompts({"a dog": [0] * 13}, run)["a dog"]
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(trainer.encode_prompts({"a dog": [0] * 13}, run)["a dog"], whole)
    assert f"Reading {file} of --encoding_cache_dir, which is damaged" in caplog.text
    file.unlink()
    with mock.patch.object(trainer, "save_file", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        assert torch.equal(trainer.encode_prompts({"a dog": [0] * 13}, run)["a dog"], whole)
    assert f"Writing to --encoding_cache_dir {tmp_path} failed (" in caplog.text and not list(
        tmp_path.glob("*.safetensors")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Model and LoRA
# ---------------------------------------------------------------------------------------------------------------------


def test_dropout_of_the_lora_is_felt_in_training(tiny_model):
    results = []
    for dropout in (0, 0.5):
        run = make_run(tiny_model, lora_dropout=dropout)
        transformer, parameters = prepare(run)
        results.append(gradients(transformer, parameters, make_batch(run, (64, 64), tokens=5), run))
    assert results[0][0] != results[1][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_attention_backend_is_that_of_the_flag(compiled, tiny_model):
    with mock.patch.object(torch.nn.Module, "compile"):
        transformer, _ = prepare(make_run(tiny_model, attention_backend="_native_math"), compiled)
    backends = {block.attention.processor._attention_backend for block in trainer.transformer_blocks(transformer)}
    assert {backend.value for backend in backends} == {"_native_math"}


def test_where_weights_come_from_is_passed_on(tiny_model):
    flags = {"revision": "v2", "cache_dir": "here", "variant": "fp16"}
    run = make_run(tiny_model, **flags)
    loader = mock.Mock()
    loader.from_pretrained.return_value = ("the VAE", {"missing_keys": []})
    assert run.pipeline.load(loader, "vae", dtype=torch.float32) == "the VAE"
    loader.from_pretrained.assert_called_once_with(
        run.pipeline.path, subfolder="vae", variant="fp16", dtype=torch.float32, output_loading_info=True
    )
    run.args.pretrained_model_name_or_path = "someone/z-image"
    accelerator = mock.MagicMock()
    where = {name: flags[name] for name in ("revision", "cache_dir")}
    for dry_run in (False, True):
        run.args.dry_run = dry_run
        with (
            mock.patch.object(trainer, "snapshot_download") as configuration,
            mock.patch.object(trainer.DiffusionPipeline, "download") as weights,
            pytest.raises(trainer.UserError),
        ):
            trainer.read_pipeline_info(run.args, accelerator)
        assert weights.call_args == (None if dry_run else mock.call("someone/z-image", **flags))
    assert configuration.call_args.args == ("someone/z-image",)
    assert configuration.call_args.kwargs.items() >= where.items()
    assert not any("safetensors" in pattern for pattern in configuration.call_args.kwargs["allow_patterns"])
    with (
        mock.patch.object(trainer, "snapshot_download", return_value="nowhere") as download,
        pytest.raises(trainer.UserError),
    ):
        trainer.read_base_adapter(parsed(base_adapter="someone/adapter:0.5", cache_dir="here"), {})
    assert download.call_args.kwargs["cache_dir"] == "here"
    assert download.call_args.args == ("someone/adapter",)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_where_it_is_asked_for(allowed, tiny_model, shared_photos, tmp_path):
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        argv = train_args(tiny_model, shared_photos, tmp_path / "out", allow_tf32=allowed)
        run_here(*argv, load_weights=False)
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


@pytest.mark.parametrize(
    ("flags", "dtype"), [({}, torch.float32), ({"prior_generation_precision": "bf16"}, torch.bfloat16)]
)
def test_class_pictures_are_drawn_in_the_precision_that_is_asked_for(flags, dtype, tiny_model, tmp_path):
    run = make_run(tiny_model, class_data_dir=tmp_path, class_prompt="a dog", **flags)
    run.accelerator.wait_for_everyone = lambda: None
    drawing = mock.patch.object(trainer, "draw_latents", side_effect=KeyboardInterrupt)
    with drawing as draw_latents, pytest.raises(KeyboardInterrupt):
        trainer.generate_class_images(1, {}, run)
    assert draw_latents.call_args.args[0].dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Optimization
# ---------------------------------------------------------------------------------------------------------------------


def test_the_learning_rate_can_be_scaled_by_the_total_batch_size(tiny_model, shared_photos):
    sizes = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-4}
    rates = []
    for scale in (False, True):
        run = make_run(tiny_model, **sizes, scale_lr=scale)
        run.accelerator.num_processes = 2
        rates.append(trainer.TrainingPlan(make_examples(run, shared_photos), {}, run).learning_rate)
    assert rates == pytest.approx([1e-4, 12e-4])


def test_adamw_is_built_as_the_flags_say():
    flags = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.02, "adam_epsilon": 1e-6}
    (group,) = trainer.build_optimizer([torch.nn.Parameter(torch.zeros(1))], parsed(**flags), 0.1).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.8, 0.95), 0.02, 1e-6)


@pytest.mark.parametrize("value", [False, True])
def test_prodigy_is_built_as_the_flags_say(value):
    switches = dict.fromkeys(("decouple", "use_bias_correction", "safeguard_warmup"), value)
    flags = {f"prodigy_{name}": str(on) for name, on in switches.items()} | {"prodigy_beta3": 0.7, "adam_beta1": 0.8}
    args = parsed(optimizer="prodigy", **flags)
    (group,) = trainer.build_optimizer([torch.nn.Parameter(torch.zeros(1))], args, 1.0).param_groups
    assert (group["beta3"], group["betas"][0]) == (0.7, 0.8)
    assert {name: group[name] for name in switches} == switches


@pytest.mark.parametrize("norm", [0.25, 8.0])
def test_gradients_are_clipped_to_the_norm_that_is_given(norm, tiny_model):
    run = make_run(tiny_model, max_grad_norm=norm)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    run.accelerator.unscale_gradients = lambda optimizer: None
    state = trainer.TrainingState(None, [parameter], optimizer, schedule, torch.amp.GradScaler(enabled=False))
    *_, logged = trainer.apply_gradients(state, torch.tensor(0.0), False, run)
    assert logged == pytest.approx(5.0)
    assert parameter.norm().item() == pytest.approx(min(5.0, norm), rel=1e-4)


def polynomial(step, total=10, warmup=2, power=2, last=1e-7):
    return step / warmup if step < warmup else (1 - last) * (1 - (step - warmup) / (total - warmup)) ** power + last


def two_cosines(step, total=10, warmup=2):
    turned = 2 * (step - warmup) / (total - warmup) % 1
    return step / warmup if step < warmup else (1 + math.cos(math.pi * turned)) / 2


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ({"lr_scheduler": "polynomial", "lr_power": 2}, polynomial),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, two_cosines),
    ],
)
def test_the_learning_rate_follows_its_schedule(flags, rate, tiny_model):
    state, rates = make_state(tiny_model, **flags, learning_rate=1.0), []
    for _ in range(10):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        state.lr_scheduler.step()
    assert rates == pytest.approx([rate(step) for step in range(10)], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint belongs to
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_model, shared_photos):
    """`settings(**flags)` is the fingerprint of a run with these flags."""

    def settings(missing_class_images=0, **flags):
        run = make_run(tiny_model)
        run.accelerator.mixed_precision = "no"
        examples = make_examples(run, shared_photos)
        if "repeats" in flags:
            examples["instance"] = [dataclasses.replace(e, repeats=flags["repeats"]) for e in examples["instance"]]
        tokens = trainer.tokenize(examples, run)
        vars(run.args).update(flags)
        plan = trainer.TrainingPlan(examples, tokens, run)
        plan.missing_class_images = missing_class_images
        return json.loads(json.dumps(trainer.make_fingerprint(plan, run)))

    return settings


def checkpoint_of(fingerprint):
    return trainer.Checkpoint(path=Path("checkpoint-1"), step=1, seed=0, fingerprint=fingerprint, trackers={})


@pytest.mark.parametrize("name", trainer.MATHEMATICS)
def test_every_flag_that_decides_the_mathematics_is_in_the_fingerprint(name, settings):
    before, after = settings(), settings(**{name: "else" if name != "repeats" else 3})
    checkpoint = checkpoint_of(before)
    trainer.check_fingerprint(checkpoint, before)
    if name in trainer.MAY_CHANGE:
        trainer.check_fingerprint(checkpoint, after)
    else:
        with pytest.raises(trainer.UserError, match=f"{name} was "):
            trainer.check_fingerprint(checkpoint, after)


def test_all_flags_that_decide_the_mathematics_are_known():
    """The rest decides what is trained on, how it is divided, or what is shown."""
    decides = {"rank", "lora_", "adam_", "prodigy_", "lr_", "prior_loss", "logit_", "mode_", "timestep_", "caption_d"}
    named = {name for name in vars(parsed()) if name.startswith(tuple(decides))}
    named -= {"rank", "lora_alpha", "lora_layers"}  # by the LoRA's settings, which a file can decide too
    named -= {"adam_weight_decay_text_encoder"}  # without effect
    assert named <= set(trainer.MATHEMATICS)


def test_class_images_and_quantization_are_in_the_fingerprint(settings, tmp_path):
    moved, edited = tmp_path / "moved.json", tmp_path / "edited.json"
    config = json.loads((ROOT / "configs" / "nf4.json").read_text(encoding="utf-8"))
    moved.write_text(json.dumps(config), encoding="utf-8")
    edited.write_text(json.dumps(config | {"bnb_4bit_quant_type": "fp4"}), encoding="utf-8")
    before = settings(bnb_quantization_config_path=str(ROOT / "configs" / "nf4.json"))
    checkpoint = checkpoint_of(before)
    trainer.check_fingerprint(checkpoint, settings(bnb_quantization_config_path=str(moved)))
    with pytest.raises(trainer.UserError, match="bnb_quantization_config_path was "):
        trainer.check_fingerprint(checkpoint, settings(bnb_quantization_config_path=str(edited)))
    with pytest.raises(trainer.UserError, match="number of class images was 0, is 3"):
        trainer.check_fingerprint(checkpoint_of(settings()), settings(3))


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, ""),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, ""),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "use_8bit_adam": True}, "--use_8bit_adam has no effect"),
        ({"class_prompt": "a dog"}, "have no effect without --with_prior_preservation"),
        ({"optimizer": "prodigy"}, "is low for Prodigy"),
        ({"lr_warmup_steps": 20}, "--lr_warmup_steps has no effect"),
    ],
)
def test_flags_that_change_nothing_are_said(flags, words):
    lines = trainer.ineffective_flags(parsed(**flags))
    assert len(lines) == bool(words) and words in "".join(lines)


def test_a_full_device_is_said_in_one_line_with_what_helps(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory.\nmore")
    with mock.patch.object(trainer, "main", side_effect=error), mock.patch.object(trainer, "parse_args"):
        assert trainer.run_command_line() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA out of memory." in line and "--gradient_checkpointing" in line


def test_a_file_that_does_not_read_back_is_an_error(tiny_model, tmp_path, caplog):
    run = make_run(tiny_model, output_dir=tmp_path)
    transformer, _ = prepare(run)
    trainer.save_result(transformer, run)
    save_file = trainer.save_file

    def save_other_alphas(state, *rest):
        save_file({name: tensor * (2 if ".alpha" in name else 1) for name, tensor in state.items()}, *rest)

    with mock.patch.object(trainer, "save_file", save_other_alphas):
        trainer.save_result(transformer, run)
    assert "does not read back" in caplog.text  # the LoRA itself is there
    save_lora = trainer.save_lora
    doubled = mock.patch.object(
        trainer, "save_lora", lambda *args: {name: 2 * tensor for name, tensor in save_lora(*args).items()}
    )
    with doubled, pytest.raises(trainer.TrainingError, match="does not read back"):
        trainer.save_result(transformer, run)
