"""README.md agrees with the program, and what it prints runs, with a small model in the place of the real one.

`python tests/test_readme.py` writes the table of flags into it anew.
"""

import inspect
import re
import shlex
import string
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from running import ROOT, SCRIPT, fork_trainer, launch, run
from tiny import lora_tensors, train_args


README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "tests" / "README.md", ROOT / "tests" / "benchmarks" / "README.md"]
BEGIN, END = "<!-- flags -->\n", "<!-- /flags -->\n"


def blocks(language):
    """README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def flags_table():
    """The parser's groups as a Markdown table."""
    lines = ["| flag | meaning |", "|---|---|"]
    for group in trainer.build_parser()._action_groups[2:]:
        lines.append(f"| **{group.title}** | |")
        for action in group._group_actions:
            meaning = (
                action.help % {"default": action.default, "choices": ", ".join(map(str, action.choices or []))}
            ).replace("|", "\\|")
            metavar = f" {action.metavar or ''}".rstrip() if action.nargs != 0 else ""
            if action.choices and not action.metavar:
                metavar = " {" + ",".join(action.choices) + "}"
            lines.append(f"| `{action.option_strings[0]}{metavar}` | {meaning} |")
    return "\n".join([*lines, ""])


def split(text):
    """README's text before, inside and after the table of flags."""
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


def test_the_table_of_flags_is_the_parsers():
    assert split(README.read_text(encoding="utf-8"))[1] == flags_table()


def option_strings(path):
    """The flags that a program of the tests takes."""
    return set(re.findall(r'add(?:_argument)?\(\s*"(--\w+)"', path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_a_document_names_exists(document):
    known = {option for action in trainer.build_parser()._actions for option in action.option_strings}
    known |= {
        "--config_file",
        "--logdir",
        "--check",
        "--cpu",
        "--num_processes",
        "--num_cpu_threads_per_process",
    }  # of others
    for path in [ROOT / "tests" / "kill_test.py", *(ROOT / "tests" / "benchmarks").glob("*.py")]:
        known |= option_strings(path)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+", document.read_text(encoding="utf-8")))
    assert named and named <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w/.-])(?:configs|tests)/[\w./-]+\w", text))
    names |= set(re.findall(r"`([\w-]+\.(?:py|ipynb))`", text))
    missing = {name for name in names if not (ROOT / name).exists() and not (document.parent / name).exists()}
    assert len(names) > 3 and not missing


def test_every_link_inside_a_document_leads_to_a_heading():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors, document


# The commands of the specification, which users of this family of trainers type.
MAIN_COMMAND = """
accelerate launch train_dreambooth_lora_z_image.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR \\
  --output_dir=$OUTPUT_DIR \\
  --mixed_precision="bf16" \\
  --gradient_checkpointing \\
  --cache_latents \\
  --instance_prompt="a photo of sks dog" \\
  --resolution=1024 \\
  --train_batch_size=1 \\
  --guidance_scale=5.0 \\
  --use_8bit_adam \\
  --gradient_accumulation_steps=4 \\
  --optimizer="adamW" \\
  --learning_rate=1e-4 \\
  --report_to="wandb" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=100 \\
  --max_train_steps=500 \\
  --validation_prompt="A photo of sks dog in a bucket" \\
  --validation_epochs=25 \\
  --seed="0" \\
  --push_to_hub
"""
CHANGES = {
    "main": {},
    "fp8": {'--mixed_precision="bf16"': "--do_fp8_training"},
    "prodigy": {
        "  --use_8bit_adam \\\n": "",
        '"adamW"': '"prodigy"',
        "1e-4": "1.0",
        '"constant"': '"constant_with_warmup"',
    },
}


def specified(name):
    """One of the specification's commands, in full."""
    command = MAIN_COMMAND
    for old, new in CHANGES[name].items():
        assert command.count(old) == 1
        command = command.replace(old, new)
    return command


def test_the_main_command_of_the_specification_is_printed():
    assert [block.endswith(MAIN_COMMAND) for block in blocks("bash")].count(True) == 1


@pytest.mark.parametrize("name", ["fp8", "prodigy"])
def test_the_printed_changes_of_the_main_command_make_those_of_the_specification(name):
    (difference,) = re.findall(
        rf"^<!-- change: {name} -->\n+```diff\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    lines, place = MAIN_COMMAND.splitlines(), None
    for change in difference.splitlines():
        if change.startswith("-"):
            place = lines.index(change[1:])
            del lines[place]
        else:
            lines.insert(place, change[1:])
            place += 1
    assert lines == specified(name).splitlines()


COMMANDS = {  # as they are printed, and the specification's others in full
    **dict(zip(["first run", "main", "recipes"], [block for block in blocks("bash") if "accelerate launch" in block])),
    **{name: specified(name) for name in ("fp8", "prodigy")},
}


def words_of(block):
    """The words of the block's last line, `accelerate launch ...`, with the variables that the block exports."""
    lines = block.replace("\\\n", " ").strip().splitlines()
    exported = dict(shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export "))
    return shlex.split(string.Template(lines[-1]).safe_substitute(exported))


def small_flags(model, data, out, resolution=64):
    """Flags after a printed command, where the last one wins: the small model, and a run of seconds.

    Drawing pictures of 1024 pixels in 50 steps takes minutes without a GPU.
    """
    changes = {"report_to": "tensorboard", "resolution": resolution}
    drawing = {"num_validation_images": 1, "validation_num_inference_steps": 1, "skip_final_inference": None}
    return train_args(model, data, out, **changes, **drawing, instance_prompt=None, seed=None, train_batch_size=None)


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """The environment after `accelerate config default`, with everything that it writes in a folder of its own."""
    environment = {"HF_HOME": str(tmp_path_factory.mktemp("hf-home"))}
    run([Path(sys.executable).with_name("accelerate"), "config", "default"], env=environment)
    return environment


@pytest.fixture
def one_photo(photos):
    """A folder of one picture: enough for a run of which only the ending matters."""
    for path in sorted(photos.iterdir())[1:]:
        path.unlink()
    return photos


def assert_trained(out, dtype=torch.bfloat16):
    tensors = lora_tensors(out)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)
    assert list((out / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("block", COMMANDS.values(), ids=COMMANDS)
def test_a_printed_command_runs(block, configured, tiny_model, one_photo, tmp_path):
    words = words_of(block)
    script = words.index(SCRIPT.name)
    flags = [word for word in words[script + 1 :] if word != "--push_to_hub"]
    first_run = "@configs/first_run.args" in flags
    own = small_flags(tiny_model, one_photo, tmp_path, 256 if block.endswith(MAIN_COMMAND) else 64)
    if first_run:  # its model and pictures come with the repository
        own = [flag for flag in own if not flag.startswith(("--pretrained_model", "--instance_data"))]
    launch(*flags, *own, launcher_flags=words[2:script], env=configured)
    assert_trained(tmp_path, torch.float32 if first_run else torch.bfloat16)
    assert list((tmp_path / "samples").glob("*.png")) or "--validation_prompt" not in block


def test_the_main_command_runs_from_python(tiny_model, one_photo, tmp_path):
    code = (
        "import sys\n"
        "from accelerate.utils import write_basic_config\n"
        "write_basic_config()\n"
        "from train_dreambooth_lora_z_image import main, parse_args\n"
        "main(parse_args(sys.argv[1:]))\n"
    )
    flags = [word for word in words_of(COMMANDS["main"])[3:] if word != "--push_to_hub"]
    environment = {"HF_HOME": str(tmp_path / "hf-home"), "PYTHONPATH": str(ROOT)}
    run([sys.executable, "-c", code, *flags, *small_flags(tiny_model, one_photo, tmp_path / "out")], env=environment)
    assert_trained(tmp_path / "out")


def test_flags_that_are_printed_alone_are_accepted():
    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]
    alone = [block for block in blocks("bash") if block.startswith("--")]
    assert len(alone) == 2
    for block in alone:
        trainer.parse_args([*required, *shlex.split(block)])


@pytest.fixture(scope="module")
def trained(tiny_model, shared_photos, tmp_path_factory):
    """The output folder of a short run."""
    out = tmp_path_factory.mktemp("trained")
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.main(trainer.parse_args(train_args(tiny_model, shared_photos, out, learning_rate=0.01)))
    return out


def test_the_printed_python_loads_draws_with_and_fuses_the_lora(trained, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    downloads, *programs = blocks("python")
    namespace = {}
    for program in programs:
        for real, small in {
            "Tongyi-MAI/Z-Image": tiny_model,
            '"trained-z-image-lora"': repr(str(trained)),
            '"cuda"': '"cpu"',
            "1024": "64",
            "num_inference_steps=50": "num_inference_steps=1",
        }.items():
            program = program.replace(real, str(small))
        exec(program, namespace)
    assert Image.open("output.png").size == namespace["image"].size == (64, 64)
    before = trainer.ZImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer").state_dict()
    after = namespace["pipe"].transformer.state_dict()
    changed = {name for name in before if (after[name].float() - before[name]).abs().max() > 0.01}
    assert changed and all(".attention.to_" in name for name in changed)


def test_the_last_lines_of_a_run_draw_with_its_lora_as_it_drew(tiny_model, one_photo, tmp_path):
    flags = train_args(tiny_model, one_photo, tmp_path / "out", guidance_scale=1, validation_num_inference_steps=1)
    last = fork_trainer(*flags).output.split("To use the LoRA, after ")[1]
    imports, *lines = last.strip().splitlines()
    assert (
        re.findall("`(.*?)`", imports) == ["import torch", "from diffusers import ZImagePipeline"] and len(lines) == 3
    )
    picture = tmp_path / "picture.png"
    exec(
        "\n".join(map(str.strip, lines)).replace("'picture.png'", repr(str(picture))),
        vars(diffusers) | {"torch": torch},
    )
    assert Image.open(picture).size == (64, 64)
    assert "num_inference_steps=1, guidance_scale=1.0)" in lines[2] and "torch_dtype=torch.float32" in lines[0]


def test_the_printed_download_is_one_that_the_library_takes(monkeypatch):
    signature, taken = inspect.signature(huggingface_hub.snapshot_download), []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kw: taken.append(signature.bind(*args, **kw))
    )
    exec(blocks("python")[0], {})
    assert taken[0].arguments["repo_type"] == "dataset"


if __name__ == "__main__":
    before, _, after = split(README.read_text(encoding="utf-8"))
    README.write_text(before + BEGIN + flags_table() + END + after, encoding="utf-8")
