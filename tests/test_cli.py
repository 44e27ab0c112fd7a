"""The command line: its flags and defaults, LoRA targets, and mistakes of the user."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image
from safetensors.torch import save_file

import train_dreambooth_lora_z_image as trainer
from flags import WITHOUT_EFFECT
from running import GOES_ON, ROOT, SCRIPT, error_line, launch_script, run_here
from tiny import lora_metadata, lora_tensors, train_args


REQUIRED = ["--pretrained_model_name_or_path=model", "--instance_data_dir=dog", "--instance_prompt=a dog"]


@pytest.fixture
def uncounted(monkeypatch):
    """Memory, which takes a dry run some seconds to count, is not."""
    monkeypatch.setattr(trainer, "count_memory", lambda *_, **__: {"training": 0.0})


@pytest.fixture(scope="session")
def model_without_weights(tiny_model, tmp_path_factory):
    """A pipeline folder whose weight files hold no tensor: its configuration can be read, loading a model fails."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "no-weights")
    for path in folder.rglob("*.safetensors"):
        save_file({}, path)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_flag_without_effect_says_so_in_one_line(name, model_without_weights, photos, tmp_path):
    argv = train_args(model_without_weights, photos, tmp_path / "out", **{name: 1})
    finished = run_here(*argv, load_weights=False)
    assert finished.returncode == GOES_ON, finished
    assert [f"--{name} has no effect" in line for line in finished.stderr.splitlines()].count(True) == 1


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_attention_backend_whose_library_is_missing_is_named(model_without_weights, photos, tmp_path):
    argv = train_args(model_without_weights, photos, tmp_path / "out", attention_backend="flash")
    error_line(run_here(*argv), "--attention_backend flash")


def test_the_plan_names_a_damaged_picture(model_without_weights, photos, tmp_path):
    (photos / "cat.png").write_bytes((photos / "cat.png").read_bytes()[:3000])
    argv = train_args(model_without_weights, photos, tmp_path / "out")
    error_line(run_here(*argv, load_weights=False), "cat.png")


@pytest.mark.parametrize(
    "pattern", [r"(?i)flux", r"\bT5\b", r"(?i)\bunet", r"SD3(?! paper)", r"\bCLIP\b", r"(?i)sdxl"]
)
def test_help_mentions_no_other_model(pattern):
    text = re.sub(r"\s+", " ", trainer.build_parser().format_help())
    assert not re.search(pattern, text)


def test_help_explains_every_flag():
    assert not [action.option_strings for action in trainer.build_parser()._actions if not action.help]


def test_help_is_printed_with_status_0():
    finished = run_here("--help")
    assert finished.returncode == 0 and "--instance_prompt" in finished.stdout


@pytest.mark.parametrize(
    ("abbreviation", "name", "value"),
    [
        ("--gradient_accumulation=3", "gradient_accumulation_steps", 3),
        ("--max_train=7", "max_train_steps", 7),
        ("--bnb=nf4.json", "bnb_quantization_config_path", "nf4.json"),
    ],
)
def test_abbreviated_flag_reaches_the_full_one(abbreviation, name, value):
    assert getattr(trainer.parse_args([*REQUIRED, abbreviation]), name) == value


@pytest.mark.parametrize("name", ["prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"])
@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([""], True),
        (["", "True"], True),
        (["", "False"], False),
        (["=yes"], True),
        (["=no"], False),
        (["=1"], True),
        (["=0"], False),
        (["=FALSE"], False),
    ],
)
def test_boolean_flag_takes_a_value_or_none(name, words, value):
    words = [f"--{name}{words[0]}", *words[1:]]
    assert getattr(trainer.parse_args([*REQUIRED, *words]), name) == value


@pytest.mark.parametrize("text", ["AdamW", "adamW", "adamw", "ADAMW", "prodigy", "Prodigy"])
def test_optimizer_is_read_in_any_letter_case(text):
    assert trainer.parse_args([*REQUIRED, f"--optimizer={text}"]).optimizer == text.lower()


ARGUMENTS_FILE = """\
# how we train our dog
--instance_prompt="一只sks狗的照片"   # a photo of sks dog

--rank=8
--lora_alpha 16  # the dog's
--output_dir=dog#2
--validation_prompt='dog #1 in a bucket'
--cache_latents
"""


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_arguments_come_from_a_file(mark, tmp_path):
    file = tmp_path / "dog.args"
    file.write_text(mark + ARGUMENTS_FILE, encoding="utf-8")
    typed = ["--rank=8", "--lora_alpha=16", "--output_dir=dog#2", "--cache_latents"]
    typed.append("--validation_prompt=dog #1 in a bucket")
    from_file = trainer.parse_args([*REQUIRED, f"@{file}"])
    assert from_file == trainer.parse_args([*REQUIRED, "--instance_prompt=一只sks狗的照片", *typed])


def test_a_later_flag_overrides_the_file(tmp_path):
    (tmp_path / "dog.args").write_text("--rank=8\n")
    assert trainer.parse_args([*REQUIRED, f"@{tmp_path / 'dog.args'}", "--rank=2"]).rank == 2


# ---------------------------------------------------------------------------------------------------------------------
# LoRA targets
# ---------------------------------------------------------------------------------------------------------------------

BLOCKS = ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1")  # of the tiny model
ATTENTION = ("attention.to_k", "attention.to_q", "attention.to_v", "attention.to_out.0")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def modules_of(layers, blocks=BLOCKS):
    return {f"{block}.{layer}" for block in blocks for layer in layers}


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        ("to_k,to_q,to_v,to_out.0", modules_of(ATTENTION)),
        ("to_k,to_q,to_v,to_out.0,ff.net.0.proj,ff.net.2", modules_of(ATTENTION + FEED_FORWARD)),
        ("ff.net.0.proj", modules_of(["feed_forward.w1", "feed_forward.w3"])),
        ("ff.net.2", modules_of(["feed_forward.w2"])),
        ("layers.1.attention.to_q", {"layers.1.attention.to_q"}),
        ("layers.0.to_k, layers.1.feed_forward.w2", {"layers.0.attention.to_k", "layers.1.feed_forward.w2"}),
        ("layers.0.ff.net.2", {"layers.0.feed_forward.w2"}),
        ("noise_refiner.0.attention.to_v", {"noise_refiner.0.attention.to_v"}),
    ],
)
def test_lora_layers_trains_what_it_names_and_nothing_else(names, modules, tiny_model, photos, tmp_path):
    args = train_args(tiny_model, photos, tmp_path, lora_layers=names, rank=2, lora_alpha=6, max_train_steps=1)
    finished = run_here(*args)
    assert finished.returncode == 0, finished
    tensors = lora_tensors(tmp_path)
    assert set(tensors) == {f"transformer.{module}.lora_{side}.weight" for module in modules for side in "AB"}
    assert all(tensor.any() for tensor in tensors.values())  # B starts at zero
    adapter = {key.removeprefix("transformer."): value for key, value in lora_metadata(tmp_path).items()}
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 6)
    targets = adapter["target_modules"]  # whole names, or their ends where PEFT has shortened the list
    meant = {
        name for name in modules_of(ATTENTION + FEED_FORWARD) if any(f".{name}".endswith(f".{t}") for t in targets)
    }
    assert meant == modules


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes of the user
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--rank=0"], ["--rank", "0"]),
        (["--rank=four"], ["--rank", "four"]),
        (["--resolution=-16"], ["--resolution", "-16"]),
        (["--learning_rate=nan"], ["--learning_rate", "nan"]),
        (["--learning_rate=-1"], ["--learning_rate", "-1"]),
        (["--caption_dropout=1.5"], ["--caption_dropout", "1.5"]),
        (["--seed=-1"], ["--seed", "-1"]),
        (["--prodigy_decouple=maybe"], ["--prodigy_decouple", "maybe"]),
        (["--mixed_precision=fp8"], ["--mixed_precision", "bf16"]),
        (["--weighting_scheme=logit"], ["--weighting_scheme", "logit_normal"]),
        (["--lr_scheduler=cosin"], ["--lr_scheduler", "cosine"]),
        (["--optimizer=lion"], ["--optimizer", "lion", "prodigy"]),
        (["--adam_beta2=1"], ["--adam_beta2"]),
        (["--max"], ["--max", "--max_train_steps"]),
        (["--dataset_name=dogs"], ["--instance_data_dir", "--dataset_name"]),
        (["--dataset_config_name=small"], ["--dataset_config_name", "--dataset_name"]),
        (["--with_prior_preservation"], ["--with_prior_preservation", "--class_data_dir", "--class_prompt"]),
        (["--with_prior_preservation", "--class_data_dir=classes"], ["--class_prompt"]),
        (["--with_prior_preservation", "--class_prompt=a dog"], ["--class_data_dir"]),
        (
            ["--do_fp8_training", "--bnb_quantization_config_path=configs/nf4.json"],
            ["--do_fp8_training", "--bnb_quantization_config_path"],
        ),
        (["--fsdp_text_encoder"], ["--fsdp_text_encoder", "FSDP"]),
        (["--enable_npu_flash_attention"], ["--enable_npu_flash_attention", "torch_npu"]),
        (["--attention_backend=flashy"], ["--attention_backend", "flashy", "native"]),
        (["--report_to=tensorbord"], ["--report_to", "tensorbord", "tensorboard"]),
        (["--aspect_ratio_buckets=64,64;48"], ["--aspect_ratio_buckets", "48"]),
        (["--caption_column=text"], ["--caption_column", "metadata.jsonl"]),
        (["--resume_from_checkpoint=nowhere"], ["--resume_from_checkpoint", "nowhere"]),
        (["--lora_layers=,"], ["--lora_layers"]),
        (["--lora_layers=to_qq"], ["--lora_layers", "to_qq", "to_q", "to_k"]),
        (["--lora_layers=to_q,to_ot.0"], ["--lora_layers", "to_ot.0", "to_out.0"]),
        (["--lora_layers=feed_forwrd.w1"], ["--lora_layers", "feed_forwrd.w1", "feed_forward.w1"]),
        (["--lora_layers=layers.0.attn.to_q"], ["--lora_layers", "layers.0.attn.to_q", "layers.0.attention.to_q"]),
        (["--lora_layers=layers.7.attention.to_q"], ["--lora_layers", "layers.7.attention.to_q"]),
        (["--dataset_name="], ["--dataset_name is empty"]),
        (["--transformer_path", ""], ["--transformer_path is empty"]),
        (["@missing.args"], ["missing.args"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith(("--", "@")) and "=" in value[0] else None,
)
def test_mistake_in_a_flag_ends_before_any_model_is_loaded(flags, words, model_without_weights, photos, tmp_path):
    finished = run_here(*train_args(model_without_weights, photos, tmp_path / "out"), *flags)
    error_line(finished, *words)
    assert not (tmp_path / "out").exists()


def test_a_mistake_has_status_2_for_the_shell_too(model_without_weights, tmp_path):
    finished = launch_script(*train_args(model_without_weights, tmp_path / "nowhere", tmp_path / "out"), check=False)
    error_line(finished, "--instance_data_dir", tmp_path / "nowhere")


def test_neither_source_of_pictures_is_named(model_without_weights, tmp_path):
    finished = run_here(*train_args(model_without_weights, None, tmp_path / "out"))
    error_line(finished, "--instance_data_dir", "--dataset_name")


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "instance_prompt"])  # no picture has a caption
def test_a_required_flag_that_is_missing_is_named(flag, model_without_weights, photos, tmp_path):
    finished = run_here(*train_args(model_without_weights, photos, tmp_path / "out", **{flag: None}))
    error_line(finished, f"--{flag}")


def test_a_tracker_that_is_not_installed_comes_with_its_pip_line(model_without_weights, photos, tmp_path):
    missing = [name for name in map(str, LOGGER_TYPE_TO_CLASS) if find_spec(name) is None]
    if not missing:
        pytest.skip("every tracker is installed here")
    finished = run_here(*train_args(model_without_weights, photos, tmp_path / "out", report_to=missing[0]))
    error_line(finished, "--report_to", f"pip install {missing[0]}")


@pytest.mark.parametrize(
    ("flags", "library"),
    [
        ({"optimizer": "prodigy"}, "prodigyopt"),
        ({"use_8bit_adam": True}, "bitsandbytes"),
        ({"dataset_name": "dogs", "instance_data_dir": None}, "datasets"),
    ],
)
def test_an_optional_library_that_is_missing_comes_with_its_pip_line(
    flags, library, model_without_weights, photos, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.optim", None)
    finished = run_here(*train_args(model_without_weights, photos, tmp_path / "out", **flags))
    error_line(finished, f"--{next(iter(flags))}", f"pip install {library}")


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", '{"load_in_4bit": "yes"}', '{"load_in_4bit": true, "bnb_4bit_quant_type": 4}'],
    ids=["missing", "empty", "broken", "no object", "no boolean", "wrong type"],
)
def test_a_broken_quantization_config_is_named(text, model_without_weights, photos, tmp_path):
    path = tmp_path / "quantization.json"
    if text is not None:
        path.write_text(text)
    args = train_args(model_without_weights, photos, tmp_path / "out", bnb_quantization_config_path=path)
    error_line(run_here(*args), "--bnb_quantization_config_path", path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes works on this machine")
@pytest.mark.parametrize("config", ["nf4.json", "int8.json"])
def test_bitsandbytes_without_a_gpu_is_a_mistake(config, model_without_weights, photos, tmp_path):
    path = ROOT / "configs" / config
    args = train_args(model_without_weights, photos, tmp_path / "out", bnb_quantization_config_path=path)
    error_line(run_here(*args), "--bnb_quantization_config_path", "GPU")


def test_a_model_folder_that_does_not_exist_is_named(photos, tmp_path):
    finished = run_here(*train_args(tmp_path / "no-model", photos, tmp_path / "out"))
    error_line(finished, "--pretrained_model_name_or_path", tmp_path / "no-model")


def test_a_folder_that_is_no_pipeline_is_named(photos, tmp_path):
    finished = run_here(*train_args(photos, photos, tmp_path / "out"))
    error_line(finished, "--pretrained_model_name_or_path", photos)


@pytest.mark.parametrize("component", ["transformer", "vae", "scheduler"])
def test_a_pipeline_of_another_model_is_named(component, model_without_weights, photos, tmp_path):
    model = shutil.copytree(model_without_weights, tmp_path / "other-model")
    (file,) = (model / component).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AnotherModel"}))
    finished = run_here(*train_args(model, photos, tmp_path / "out"))
    error_line(finished, "--pretrained_model_name_or_path", component, "AnotherModel")


def test_a_folder_without_pictures_is_named(model_without_weights, tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "README.md").write_text("no pictures yet")
    (tmp_path / "dog" / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic")  # as telephones give them
    finished = run_here(*train_args(model_without_weights, tmp_path / "dog", tmp_path / "out"))
    error_line(finished, "--instance_data_dir", tmp_path / "dog", "convert HEIC")


def test_a_file_in_place_of_the_folder_is_named(model_without_weights, photos, tmp_path):
    finished = run_here(*train_args(model_without_weights, photos / "cat.png", tmp_path / "out"))
    error_line(finished, "--instance_data_dir", photos / "cat.png")


@pytest.mark.parametrize("kept", [0, 30, 2000], ids=["empty", "header cut", "pixels cut"])
def test_a_corrupt_picture_is_named_before_any_model_is_loaded(kept, model_without_weights, photos, tmp_path):
    path = photos / "coffee.jpg"
    path.write_bytes(path.read_bytes()[:kept])
    finished = run_here(*train_args(model_without_weights, photos, tmp_path / "out"))
    error_line(finished, path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_an_arguments_file_in_another_encoding_is_named(encoding, tmp_path):
    (tmp_path / "dog.args").write_text(ARGUMENTS_FILE, encoding=encoding)
    finished = run_here(*REQUIRED, f"@{tmp_path / 'dog.args'}")
    error_line(finished, tmp_path / "dog.args", "UTF-8")


def test_an_open_quote_in_an_arguments_file_is_a_mistake(tmp_path):
    (tmp_path / "dog.args").write_text("--rank=8\n--instance_prompt=a dog's photo\n")
    error_line(run_here(*REQUIRED, f"@{tmp_path / 'dog.args'}"), "quotation")


def test_rounding_of_the_resolution_is_announced(model_without_weights, photos, tmp_path):
    argv = train_args(model_without_weights, photos, tmp_path / "out", resolution=100)
    finished = run_here(*argv, load_weights=False)
    assert finished.returncode == GOES_ON, finished
    (line,) = [line for line in finished.output.splitlines() if "rounded" in line]
    assert "--resolution" in line and "100 " in line and "96" in line


def test_a_resolution_that_fits_is_not_announced_as_rounded(model_without_weights, photos, tmp_path):
    argv = train_args(model_without_weights, photos, tmp_path / "out", resolution=96)
    finished = run_here(*argv, load_weights=False)
    assert finished.returncode == GOES_ON and "rounded" not in finished.output, finished


# ---------------------------------------------------------------------------------------------------------------------
# The plan of --dry_run
# ---------------------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_becomes_of_the_pictures_and_captions(model_without_weights, photos, tmp_path, uncounted):
    for path in photos.iterdir():
        if path.name not in ("astronaut.jpg", "coffee.jpg"):  # of 128 x 128 and 192 x 128
            path.unlink()
    shutil.copy(photos / "coffee.jpg", photos / "tea.jpg")
    Image.new("RGB", (48, 48)).save(photos / "dot.png")
    (photos / "dot.txt").write_text("x" * 600 + " end", encoding="utf-8")
    flags = {"aspect_ratio_buckets": "64,64;64,96", "train_batch_size": 2, "max_train_steps": 5, "repeats": 2}
    finished = run_here(*train_args(model_without_weights, photos, tmp_path / "out", dry_run=True, **flags))
    assert finished.returncode == 0 and not (tmp_path / "out").exists(), finished
    for line in (
        "4 instance pictures:",
        "  2 at height 64, width 64: 1 enlarged, 0% cut off on average",
        "  2 at height 64, width 96: 0 enlarged, 0% cut off on average",
        "5 steps of 2 pictures: 1.2 epochs of 8 samples",
    ):
        assert line in finished.stderr.splitlines(), finished
    assert re.search(
        r"--max_sequence_length: a prompt of \d+ tokens is cut to 512: 'x+'\.\.\. ends at", finished.stderr
    )


def test_the_plan_counts_the_parameters_that_a_run_saves(tiny_model, photos, tmp_path):
    args = train_args(tiny_model, photos, tmp_path / "out", lora_layers="to_q,ff.net.2", rank=2, max_train_steps=1)
    finished = run_here(*args)
    counts = dict(re.findall(r"LoRA on (\S+): .* ([\d,]+) parameters", finished.stderr))
    tensors = lora_tensors(tmp_path / "out")
    for name, end in {"to_q": ".to_q.", "ff.net.2": ".w2."}.items():
        saved = sum(tensor.numel() for key, tensor in tensors.items() if end in key)
        assert int(counts[name].replace(",", "")) == saved > 0


def test_the_plan_says_what_flags_about_memory_would_change(tiny_model, photos, tmp_path, uncounted):
    flags = {"dry_run": True, "plan_for": 8, "mixed_precision": "bf16", "offload": True, "do_fp8_training": True}
    flags |= {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    finished = run_here(*train_args(tiny_model, photos, tmp_path / "out", **flags))
    assert "Expected peak memory, GiB: training 0.00" in finished.stderr
    told = re.findall(r"^  with (--.*): [\d.]+ at most in all$", finished.stderr, re.MULTILINE)
    precisions = [f"--base_model_precision {precision} without --do_fp8_training" for precision in ("int8", "nf4")]
    smaller = "--train_batch_size 1 --gradient_accumulation_steps 6"  # an update has as many pictures
    assert told == ["--cache_latents", "--gradient_checkpointing", "--use_8bit_adam", *precisions, smaller]


# ---------------------------------------------------------------------------------------------------------------------
# What to type and to look at next
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--hub_token", "secret", "--dry"], ["--hub_tok=secret", "--plan=8", "--dry_run"]])
def test_a_dry_run_ends_with_the_command_to_type_next(flags, model_without_weights, photos, tmp_path, uncounted):
    argv = train_args(model_without_weights, photos, tmp_path / "out", instance_prompt="a dog's --dragon on --plate x")
    last = run_here(*argv[:-1], *flags, argv[-1]).stderr.splitlines()[-1]
    assert last.endswith(f"accelerate launch {shlex.join([SCRIPT.name, *argv])}")


def test_what_takes_long_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, caplog):
    clock = iter(range(0, 30, 3))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(trainer.logger, "propagate", True)
    caplog.set_level("INFO")
    process = SimpleNamespace(is_main_process=True)
    assert list(trainer.with_progress(range(4), "pictures", process)) == [0, 1, 2, 3]
    assert [record.getMessage().split(" s ")[0] for record in caplog.records] == ["pictures 1/4: 3.00"]
