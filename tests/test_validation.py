"""Validation shows what is being learned, and changes nothing of it.

The runs are of a few steps in this process; several tests look at the same ones. Pictures are compared with those that
`ZImagePipeline` itself draws from the same noise.
"""

import json
import os
import pickle
import random
import re
import resource
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image, ImageOps
from transformers import Qwen3Model

import train_dreambooth_lora_z_image as trainer
from test_compile import make_run
from tiny import build_tiny_pipeline, events, lora_tensors, train_args


SIDE = 64
DOG, DOG_IN_BUCKET = "a photo of sks dog", "一只sks狗在桶里的照片"
TRAINING = {
    "max_train_steps": 6,  # two epochs
    "train_batch_size": 2,
    "learning_rate": 0.01,
    "lora_dropout": 0.1,  # draws from torch's global random state
    "cache_latents": True,
}
DRAWING = {
    "validation_epochs": 1,
    "validation_num_inference_steps": 2,
    "num_validation_images": 2,
    "skip_final_inference": None,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are faster so, and exact comparisons do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(*args, prompts=(), **flags):
    """A run in this process, as if it were the first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.main(
        trainer.parse_args([*train_args(*args, **flags), *(f"--validation_prompt={prompt}" for prompt in prompts)])
    )


def sample(out, step, prompt=0, number=0):
    """The pixels of a validation picture."""
    return pixels(out / "samples" / f"step-{step:06d}-prompt-{prompt}-image-{number}.png")


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def thumbnails(sheet):
    """The pictures of a contact sheet as an array [rows, columns, 256, 256, 3]."""
    sheet = pixels(sheet)
    rows, columns = sheet.shape[0] // 256, sheet.shape[1] // 256
    assert sheet.shape == (rows * 256, columns * 256, 3)
    return sheet.reshape(rows, 256, columns, 256, 3).swapaxes(1, 2)


class Page(HTMLParser):
    """What a reader sees of `samples/index.html`, and where its links lead.

    rows: the texts of each row's cells, the first row being the heads; links: {(step, column): [(file, thumbnail)]}.
    """

    def __init__(self, out):
        super().__init__()
        self.folder, self.rows, self.links, self.tags, self.words = out / "samples", [], {}, Counter(), []
        self.html = (self.folder / "index.html").read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "img":
            step = int(re.match(r"step\s(\d+)", self.rows[-1][0]).group(1))
            self.links.setdefault((step, len(self.rows[-1]) - 2), []).append((self.link, attributes["src"]))
        if tag == "a":
            self.link = attributes["href"]

    def handle_data(self, text):
        self.words.append(text)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += text


def draw_with_pipeline(model, prompt, number=0, lora=None, guidance_scale=5.0, **components):
    """What `ZImagePipeline` draws from the noise of validation picture `number`."""
    pipeline = ZImagePipeline.from_pretrained(model, **components)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    picture = pipeline(
        prompt,
        negative_prompt="",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(number),  # the run's seed is 0
    ).images[0]
    return np.asarray(picture)


def assert_same_picture(picture, expected):
    """Equal up to the rounding of a pixel's value."""
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def assert_same_weights(out, other):
    first, second = lora_tensors(out), lora_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def random_states():
    """torch's, Python's and numpy's global random states, comparable."""
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


@pytest.fixture(scope="module")
def held_out(shared_photos, tmp_path_factory):
    """Two pictures that are not trained on, one with a caption of its own."""
    folder = tmp_path_factory.mktemp("held-out")
    for name in ("coffee.jpg", "rocket_tall.jpg"):
        ImageOps.mirror(Image.open(shared_photos / name)).save(folder / name)
    (folder / "coffee.txt").write_text("a cup of sks coffee", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plain(tiny_model, shared_photos, tmp_path_factory):
    """The output of a run that does not validate."""
    out = tmp_path_factory.mktemp("plain")
    train(tiny_model, shared_photos, out, **TRAINING)
    return out


@pytest.fixture(scope="module")
def validated(tiny_model, shared_photos, held_out, tmp_path_factory):
    """The same run with everything that validation has; its output, and what was watched on the way.

    loads: how often each model was loaded; untouched: {step: whether the random states were left alone}; pages: {step:
    the page after it}; validation: the object, with the model as the run left it.
    """
    out, prompts = tmp_path_factory.mktemp("validated"), tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(f"{DOG_IN_BUCKET}\n\na cat\n", encoding="utf-8")
    watched = SimpleNamespace(out=out, loads=Counter(), untouched={}, pages={}, validation=None)
    validate = trainer.Validation.__call__

    def watch(validation, final=False):
        before, step = random_states(), validation.state.step
        gallery = validate(validation, final)
        watched.untouched[step] = random_states() == before
        watched.validation, watched.pages[step] = validation, Page(out)
        return gallery

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Validation, "__call__", watch)
        for model in (Qwen3Model, ZImageTransformer2DModel):

            def load(*args, model=model, load=model.from_pretrained, **kwargs):
                watched.loads[model.__name__] += 1
                return load(*args, **kwargs)

            patch.setattr(model, "from_pretrained", load)
        train(
            tiny_model,
            shared_photos,
            out,
            **TRAINING,
            **DRAWING,
            validation_data_dir=held_out,
            report_to="tensorboard",
            prompts=[DOG, prompts],
        )
    return watched


# Validation changes nothing


def test_final_weights_are_bit_identical_with_and_without_validation(plain, validated):
    assert_same_weights(plain, validated.out)


def test_validation_leaves_the_random_states_of_torch_python_and_numpy_alone(validated):
    assert validated.untouched == {0: True, 3: True, 6: True}


def test_validation_loads_no_second_text_encoder_and_no_second_transformer(validated):
    assert validated.loads == {"Qwen3Model": 1, "ZImageTransformer2DModel": 1}


def test_drawing_leaves_the_noise_levels_that_training_draws_from_alone(validated, tiny_model):
    fresh = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    assert torch.equal(validated.validation.run.pipeline.scheduler.sigmas, fresh.sigmas)


# Pictures


def test_every_validation_draws_every_prompt_the_untrained_model_first(validated):
    names = {file.name for file in (validated.out / "samples").glob("step-*.png")}
    assert names == {
        f"step-{step:06d}-prompt-{prompt}-image-{number}.png"
        for step in (0, 3, 6)
        for prompt in range(3)
        for number in range(2)
    }


def test_pictures_of_step_0_are_those_of_the_pipeline_without_a_lora(validated, tiny_model):
    for prompt, text in enumerate((DOG, DOG_IN_BUCKET, "a cat")):
        assert_same_picture(sample(validated.out, 0, prompt, 1), draw_with_pipeline(tiny_model, text, 1))


def test_final_pictures_are_those_of_the_pipeline_with_the_saved_lora(validated, tiny_model):
    expected = draw_with_pipeline(tiny_model, DOG_IN_BUCKET, lora=validated.out)
    assert_same_picture(sample(validated.out, 6, prompt=1), expected)
    assert np.abs(expected.astype(int) - sample(validated.out, 0, prompt=1)).mean() > 1


@pytest.fixture(scope="module")
def still(tiny_model, shared_photos, tmp_path_factory):
    """The output of a run that learns next to nothing, and draws without guidance."""
    out = tmp_path_factory.mktemp("still")
    flags = {"max_train_steps": 1, "learning_rate": 1e-12, "guidance_scale": 0, **DRAWING}
    train(tiny_model, shared_photos, out, **flags, prompts=[DOG])
    return out


def test_a_model_that_did_not_change_draws_the_same_pictures_again(still):
    for number in range(2):
        assert np.array_equal(sample(still, 0, number=number), sample(still, 1, number=number))
    assert not np.array_equal(sample(still, 0, number=0), sample(still, 0, number=1))


def test_guidance_changes_the_pictures_and_zero_is_none(still, validated, tiny_model):
    assert_same_picture(sample(still, 0), draw_with_pipeline(tiny_model, DOG, guidance_scale=0.0))
    assert np.abs(sample(still, 0).astype(int) - sample(validated.out, 0)).max() > 1


def test_the_contact_sheet_has_prompts_across_and_steps_down(validated):
    sheet = thumbnails(validated.out / "samples" / "contact-sheet.png")
    assert sheet.shape[:2] == (3, 3)
    for row, step in enumerate((0, 3, 6)):
        for prompt in range(3):
            file = validated.out / "samples" / "thumbnails" / f"step-{step:06d}-prompt-{prompt}-image-0.jpg"
            assert np.array_equal(sheet[row, prompt], np.asarray(ImageOps.pad(Image.open(file), (256, 256))))


def test_a_resumed_run_extends_the_page_and_the_contact_sheet(tiny_model, shared_photos, validated, tmp_path):
    flags = {**TRAINING, **DRAWING, "num_validation_images": 1, "prompts": [DOG, "a cat"]}
    train(tiny_model, shared_photos, tmp_path, **flags | {"max_train_steps": 3, "checkpointing_steps": 3})
    assert len(thumbnails(tmp_path / "samples" / "contact-sheet.png")) == 2
    (tmp_path / "samples" / "index.html").unlink()
    train(tiny_model, shared_photos, tmp_path, **flags, resume_from_checkpoint="latest")
    sheet = thumbnails(tmp_path / "samples" / "contact-sheet.png")
    assert np.array_equal(sheet, thumbnails(validated.out / "samples" / "contact-sheet.png")[:, [0, 2]])
    assert [row[0].split()[1] for row in Page(tmp_path).rows[1:]] == ["0", "3", "6"]


def test_pictures_of_a_run_that_left_no_checkpoint_do_not_enter_the_next_runs_page(
    tiny_model, shared_photos, tmp_path
):
    earlier = tmp_path / "samples" / "step-000005-prompt-0-image-0.png"
    earlier.parent.mkdir()
    Image.new("RGB", (SIDE, SIDE), "red").save(earlier)
    train(tiny_model, shared_photos, tmp_path, **DRAWING, prompts=[DOG])
    assert len(thumbnails(tmp_path / "samples" / "contact-sheet.png")) == 2 == len(Page(tmp_path).links)


def test_final_validation_prompt_replaces_the_prompts_of_the_final_pictures_alone(tiny_model, shared_photos, tmp_path):
    flags = DRAWING | {"num_validation_images": 1, "max_train_steps": 1, "final_validation_prompt": DOG_IN_BUCKET}
    train(tiny_model, shared_photos, tmp_path, **flags, prompts=[DOG, "a cat"])
    final = tmp_path / "samples" / "final-000001-prompt-0-image-0.png"
    assert_same_picture(pixels(final), draw_with_pipeline(tiny_model, DOG_IN_BUCKET, lora=tmp_path))
    contact = thumbnails(tmp_path / "samples" / "contact-sheet.png")  # its columns are still the two prompts
    assert contact.shape[:2] == (1, 2)
    page = Page(tmp_path)
    assert {key: len(links) for key, links in page.links.items()} == {(0, 0): 1, (0, 1): 1, (1, 2): 1}
    assert page.links[1, 2][0][0] == final.name and page.rows[0][3].startswith(DOG_IN_BUCKET)


def test_skip_final_inference_draws_no_pictures_after_training(tiny_model, shared_photos, tmp_path):
    train(tiny_model, shared_photos, tmp_path, **DRAWING | {"skip_final_inference": True}, prompts=[DOG])
    assert {file.name[:11] for file in (tmp_path / "samples").glob("step-*")} == {"step-000000"}


def test_tensorboard_gets_the_pictures_of_every_validation(validated):
    images = events(validated.out).images
    assert set(images) == {f"validation/prompt-{number}" for number in range(3)}
    for prompt, tag in enumerate(sorted(images)):
        assert [event.step for event in images[tag]] == [0, 3, 6]
        for event in images[tag]:
            picture = np.asarray(Image.open(trainer.io.BytesIO(event.encoded_image_string)))
            pair = [sample(validated.out, event.step, prompt, number) for number in range(2)]
            assert np.array_equal(picture, np.hstack(pair))


# Prompts and captions


def prompts_of(*flags):
    """The prompts that a command line means."""
    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]
    return [drawing.prompt for drawing in trainer.parse_args([*required, *flags]).validation_prompt]


def test_prompts_come_from_the_command_line_and_from_text_files_in_their_order(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff一只狗\r\n\r\nune forêt\r\n".encode())
    flags = [f"--validation_prompt={prompt}" for prompt in ("first", file, "last")]
    assert prompts_of(*flags) == ["first", "一只狗", "une forêt", "last"]


def test_a_prompt_file_that_is_not_utf_8_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("一只狗".encode("gbk"))
    with pytest.raises(trainer.UserError, match=str(file)):
        prompts_of(f"--validation_prompt={file}")


def read_line(line, tmp_path, **flags):
    """What a line of a file of prompts asks for."""
    file = tmp_path / "prompts.txt"
    file.write_text(f"a cat\n{line}\n", encoding="utf-8")
    args = trainer.parse_args(train_args("model", "photos", "out", validation_prompt=file, resolution=512, **flags))
    return args.validation_prompt[1]


def test_options_at_the_end_of_a_line_decide_over_the_flags(tmp_path):
    line = "一只狗，油画 --w 768 --h 1024  --s 9 --l 1.5 --d 42 --n blurry, low-res - 模糊"
    drawing = read_line(line, tmp_path, guidance_scale=4)
    assert vars(drawing) == {
        "prompt": "一只狗，油画",
        "width": 768,
        "height": 1024,
        "steps": 9,
        "guidance": 1.5,
        "seed": 42,
        "negative_prompt": "blurry, low-res - 模糊",
    }


def test_what_a_line_leaves_open_the_flags_decide(tmp_path):
    drawing = read_line("a dog -- in the snow --h 256", tmp_path, guidance_scale=4, validation_num_inference_steps=3)
    assert drawing == trainer.Drawing("a dog -- in the snow", width=512, height=256, guidance=4, steps=3)


def test_options_are_read_in_files_alone():
    assert prompts_of("--validation_prompt=a dog --w 64") == ["a dog --w 64"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a dog --ar 3:2", "--ar"),
        ("a dog --w", "--w"),
        ("a dog --w --h 64", "--w"),
        ("a dog --w wide", "--w"),
        ("a dog --s 0", "--s"),
        ("a dog --d -1", "--d"),
        ("a dog --l nan", "--l"),
        ("a dog --w=64", "--w=64"),
    ],
)
def test_an_option_that_is_unknown_or_without_its_number_is_named_with_its_line(line, words, tmp_path):
    with pytest.raises(trainer.UserError, match=f"{tmp_path / 'prompts.txt'}, line 2: {words}"):
        read_line(line, tmp_path)


def test_a_picture_is_drawn_as_its_line_says_and_the_page_and_the_log_say_it(
    tiny_model, shared_photos, tmp_path, capsys
):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog --w 33 --h 48 --s 3 --l 2.5 --d 7 --n a cat\n", encoding="utf-8")
    flags = DRAWING | {"max_train_steps": 1, "skip_final_inference": True}
    train(tiny_model, shared_photos, tmp_path / "out", **flags, prompts=[file])
    assert "33 (of --resolution or a prompt's --w, --h) is rounded to 32" in capsys.readouterr().err
    pipeline = ZImagePipeline.from_pretrained(tiny_model)
    for number in range(2):
        expected = pipeline(
            "a dog",
            negative_prompt="a cat",
            width=32,
            height=48,
            num_inference_steps=3,
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(7 + number),
        ).images[0]
        assert_same_picture(sample(tmp_path / "out", 0, number=number), np.asarray(expected))
    page = Page(tmp_path / "out")
    assert page.rows[0][1].strip() == "a dog32 x 48, guidance 2.5, 3 steps, not: a cat"
    assert page.rows[1][1].strip() == "seed 7seed 8"


def test_a_size_beyond_the_model_is_named_before_anything_is_loaded(tiny_model, shared_photos, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog --w 100000\n", encoding="utf-8")
    with pytest.raises(trainer.UserError, match="--validation_prompt: at most"):
        train(tiny_model, shared_photos, tmp_path / "out", dry_run=True, prompts=[file])


def test_validation_steps_counts_updates(tiny_model, shared_photos, tmp_path):
    flags = TRAINING | {"validation_steps": 4, "num_validation_images": 1, "validation_num_inference_steps": 1}
    train(tiny_model, shared_photos, tmp_path, **flags, prompts=[DOG])
    assert sorted({step for step, _ in Page(tmp_path).links}) == [0, 4]


@pytest.mark.parametrize("epochs", [7, 50])
def test_validation_steps_excludes_validation_epochs(epochs):
    with pytest.raises(trainer.UserError, match="--validation_steps: not allowed with argument --validation_epochs"):
        trainer.parse_args(train_args("model", "photos", "out", validation_epochs=epochs, validation_steps=3))


@pytest.mark.parametrize("prompt", ["一只狗" * 80, "a dog " * 200, "a/" * 100 + "b", "nul \0"])
def test_a_prompt_that_no_file_could_be_named_is_a_prompt(prompt):
    assert prompts_of(f"--validation_prompt={prompt}") == [prompt]


# The page


def test_the_page_has_steps_down_and_prompts_across_and_links_thumbnails_to_their_pictures(validated):
    page = Page(validated.out)
    assert [head.partition(f"{SIDE} x {SIDE}")[0] for head in page.rows[0]] == ["", DOG, DOG_IN_BUCKET, "a cat"]
    assert [row[0].split()[1].removesuffix("held-out") for row in page.rows[1:]] == ["0", "3", "6"]
    for (step, prompt), links in page.links.items():
        names = [f"step-{step:06d}-prompt-{prompt}-image-{number}" for number in range(2)]
        assert links == [(f"{name}.png", f"thumbnails/{name}.jpg") for name in names]
        for name in names:
            small = Image.open(page.folder / "thumbnails" / f"{name}.jpg")
            assert small.format == "JPEG" and max(small.size) <= 256
    assert len(page.links) == 9


def test_the_page_says_the_seed_of_each_picture_and_how_it_was_drawn(validated):
    page = Page(validated.out)
    assert {cell.strip() for row in page.rows[1:] for cell in row[1:]} == {"seed 0seed 1"}
    assert all(head.strip().endswith("64 x 64, guidance 5, 2 steps") for head in page.rows[0][1:])


def test_the_page_says_the_held_out_loss_of_each_step(validated):
    losses = [event.value for event in events(validated.out).scalars["held_out_loss"]]
    shown = [float(row[0].partition("loss")[2]) for row in Page(validated.out).rows[1:]]
    assert shown == pytest.approx(losses, abs=1e-4)


def test_while_the_run_goes_on_the_page_refreshes_itself_and_says_that_the_run_may_have_stopped(validated):
    for step, rows in ((0, 1), (3, 2)):
        page = validated.pages[step]
        assert len(page.rows) == 1 + rows and 'http-equiv="refresh"' in page.html
        assert re.search(rf"Written 20[-\d]+ [:\d]+ [-+]\d+, step {step} of 6\. .* may have stopped", page.text)


def test_at_the_end_the_page_says_when_the_run_ended_and_refreshes_no_more(validated):
    page = Page(validated.out)
    assert re.search(r"The run ended 20[-\d]+ [:\d]+ [-+]\d+, step 6 of 6\.", page.text)
    assert "may have stopped" not in page.text and "refresh" not in page.html


def test_a_run_that_is_stopped_says_so_on_its_page(tiny_model, shared_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "train", lambda *args: False)
    train(tiny_model, shared_photos, tmp_path, **DRAWING, prompts=[DOG])
    page = Page(tmp_path)
    assert "Stopped. There is no checkpoint." in page.text and "refresh" not in page.html


def test_a_run_says_where_to_look_and_at_its_end_how_to_use_the_lora(tiny_model, shared_photos, tmp_path, capsys):
    flags = DRAWING | {"num_validation_images": 1, "max_train_steps": 1}
    train(tiny_model, shared_photos, tmp_path, **flags, prompts=[DOG])
    output = capsys.readouterr().err
    assert output.index(str(tmp_path / "samples" / "index.html")) < output.index("step 1/1")
    *_, first, second, third = [line.strip() for line in output.splitlines() if line.strip()]
    namespace = {"ZImagePipeline": ZImagePipeline, "torch": torch}
    exec(f"{first}\n{second}", namespace)
    assert namespace["pipe"].get_active_adapters() and third.startswith(
        "pipe('a photo of sks dog', height=64, width=64"
    )


def test_a_run_without_prompts_writes_no_page(plain):
    assert not (plain / "samples").exists()


def draw_gallery(out, prompts, steps, size=(SIDE, SIDE)):
    """The files of validations at these steps, with pictures of one colour, and their page."""
    args = trainer.parse_args(
        [*train_args("model", "photos", out, num_validation_images=1, skip_final_inference=None)]
    )
    args.validation_prompt = [trainer.drawing_of(prompt, args) for prompt in prompts]
    run = SimpleNamespace(args=args, seed=0, accelerator=SimpleNamespace(trackers=[]))
    images = [Image.new("RGB", size, "red") for _ in prompts]
    for step in steps:
        trainer.save_pictures(images, args.validation_prompt, "step", step, None, run)
    trainer.write_gallery(trainer.OutputFolder(out), max(steps), "now", running=True)


def test_every_text_on_the_page_is_escaped(tmp_path):
    prompts = ["<script>alert(1)</script>", "\"'>&amp; 一只狗 🐶", "two\nlines", "</table>"]
    draw_gallery(tmp_path / "<b>&", prompts, [0])
    page = Page(tmp_path / "<b>&")
    assert [head.partition("64 x 64")[0] for head in page.rows[0][1:]] == prompts
    assert "<b>& " in page.text and not page.tags["script"] and not page.tags["b"] and page.tags["table"] == 1


def test_the_page_needs_no_network(validated):
    assert "//" not in Page(validated.out).html


@pytest.mark.parametrize("validations", [3, 40])
def test_every_validation_is_on_the_page_and_the_last_twenty_on_the_contact_sheet(tmp_path, validations):
    draw_gallery(tmp_path, [f"prompt {number}" for number in range(6)], range(validations))
    assert len(Page(tmp_path).links) == 6 * validations
    assert thumbnails(tmp_path / "samples" / "contact-sheet.png").shape[:2] == (min(validations, 20), 6)


def test_a_picture_on_the_contact_sheet_keeps_its_shape(tmp_path):
    draw_gallery(tmp_path, ["tall"], [0], size=(32, 64))
    [[thumbnail]] = thumbnails(tmp_path / "samples" / "contact-sheet.png")
    assert (thumbnail[:, :60] > 240).all() and (thumbnail[:, 70:186, 0] > 200).all()
    assert (thumbnail[:, 70:186, 1:] < 50).all()


def test_pictures_of_steps_that_are_still_to_come_again_are_not_on_the_page(tmp_path):
    """They are of a run that goes on from an earlier checkpoint."""
    draw_gallery(tmp_path, [DOG], range(0, 50, 10))
    trainer.write_gallery(trainer.OutputFolder(tmp_path), 20, "now", running=True)
    assert [step for step, _ in Page(tmp_path).links] == [0, 10, 20]
    assert len(thumbnails(tmp_path / "samples" / "contact-sheet.png")) == 3


def test_pictures_of_others_and_those_that_are_gone_are_not_on_the_page(tmp_path):
    draw_gallery(tmp_path, [DOG], [0, 1])
    for name in ("step-000003-prompt-0-image-0", "my-prompt-idea"):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "samples" / f"{name}.png")
    (tmp_path / "samples" / "step-000001-prompt-0-image-0.png").unlink()
    trainer.write_gallery(trainer.OutputFolder(tmp_path), 9, "now", running=True)
    assert list(Page(tmp_path).links) == [(0, 0)]


def test_a_page_that_cannot_be_written_leaves_the_last_one_whole(tmp_path, monkeypatch):
    draw_gallery(tmp_path, [DOG], [0])
    before = Page(tmp_path).html

    def fill_the_disk(part, path):
        if path.name == "index.html":
            raise OSError(28, "No space left on device")
        os.replace(part, path)

    monkeypatch.setattr(trainer, "rename", fill_the_disk)
    with pytest.raises(OSError):
        trainer.write_gallery(trainer.OutputFolder(tmp_path), 0, "another text", running=False)
    assert Page(tmp_path).html == before


# Held-out loss


def test_at_step_0_the_held_out_loss_is_the_base_models_and_then_it_moves_alone(validated):
    scalars = events(validated.out).scalars
    assert [event.step for event in scalars["held_out_loss"]] == [0, 3, 6]
    losses = [event.value for event in scalars["held_out_loss"]]
    base = [event.value for event in scalars["held_out_loss_base"]]
    assert losses[0] == base[0] == base[1] == base[2]
    assert len(set(losses)) == 3


def test_what_was_gained_on_held_out_pictures_is_measured_closer_than_by_plain_sampling(validated):
    """Over seeds: the loss less the base model's, on the same noise at even levels; and two means of free samples."""
    transformer, data = validated.validation.state.transformer, validated.validation.data
    examples = data.plan.examples["held-out"]

    def gain(run):
        loss = trainer.held_out_loss(transformer, data, run)
        transformer.disable_adapters()
        base = trainer.held_out_loss(transformer, data, run)
        transformer.enable_adapters()
        return loss - base

    def plain_mean(run):
        generator, losses = trainer.seeded_generator("plain", run.seed), []
        for _ in range(2 * 12):
            picture, level = (torch.randint(number, (), generator=generator).item() for number in (2, 1000))
            latents = data.latents[examples[picture], False]
            batch = trainer.MicroBatch(
                latents=latents[None],
                noise=torch.randn(latents[None].shape, generator=generator),
                sigmas=data.sigmas[level][None],
                weights=torch.ones(1),
                prompt_embeds=[data.prompt_embeds[examples[picture].caption]],
            )
            losses.append(trainer.training_loss(transformer, None, batch, "none", run).item())
        return statistics.fmean(losses)

    transformer.eval()
    with torch.no_grad():
        runs = [replace(validated.validation.run, seed=seed) for seed in range(6)]
        assert gain(runs[0]) == gain(runs[0])
        gains, means = [gain(run) for run in runs], [plain_mean(run) for run in runs]
    of_two_means = 2**0.5 * statistics.stdev(means)  # the standard deviation of their difference
    assert statistics.stdev(gains) < of_two_means / 2


def test_save_best_keeps_the_lora_of_the_lowest_held_out_loss(
    tiny_model, shared_photos, held_out, tmp_path, monkeypatch, capsys
):
    losses = iter([1.0, 1.0, 0.5, 0.7])  # of the base model, and of steps 0, 3 and 6
    monkeypatch.setattr(trainer, "held_out_loss", lambda *args: next(losses))
    flags = {"validation_data_dir": held_out, "validation_epochs": 1, "save_best": True, "checkpointing_steps": 3}
    train(tiny_model, shared_photos, tmp_path, **TRAINING, **flags)
    assert_same_weights(tmp_path / "best", tmp_path / "checkpoint-3")
    assert "step 6: held-out loss 0.7000 (base model 1.0000; lowest 0.5000, at step 3)" in capsys.readouterr().err


def test_a_run_may_go_on_without_its_held_out_pictures(tiny_model, shared_photos, held_out, tmp_path, capsys):
    flags = {"checkpointing_steps": 1, "max_train_steps": 1}
    train(tiny_model, shared_photos, tmp_path, **flags, validation_data_dir=held_out)
    train(tiny_model, shared_photos, tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    assert capsys.readouterr().err.count("The LoRA is in") == 2


# Another model, and an adapter for training alone


def test_validation_model_path_draws_with_that_model_and_its_scheduler_with_the_lora(
    tiny_model, shared_photos, plain, tmp_path
):
    other = build_tiny_pipeline(tmp_path / "turbo", seed=1, shift=3.0)
    out = tmp_path / "out"
    flags = {**TRAINING, **DRAWING, "num_validation_images": 1, "guidance_scale": 0, "validation_model_path": other}
    train(tiny_model, shared_photos, out, **flags, prompts=[DOG])
    assert_same_weights(out, plain)
    components = ZImagePipeline.from_pretrained(tiny_model, transformer=None).components
    encoders = {name: components[name] for name in ("text_encoder", "tokenizer", "vae")}
    for step, lora in ((0, None), (6, out)):
        expected = draw_with_pipeline(other, DOG, lora=lora, guidance_scale=0.0, **encoders)
        assert_same_picture(sample(out, step), expected)


def test_a_validation_model_that_does_not_exist_is_named_before_training(tiny_model, shared_photos, tmp_path):
    with pytest.raises(trainer.UserError, match=f"--validation_model_path:? {re.escape(str(tmp_path))}"):
        train(tiny_model, shared_photos, tmp_path / "out", validation_model_path=tmp_path, dry_run=True)


def test_a_validation_model_of_another_size_is_refused_before_training(tiny_model, shared_photos, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"n_layers": 7}))
    with pytest.raises(trainer.UserError, match="--validation_model_path .*: its transformer has another size"):
        train(tiny_model, shared_photos, tmp_path / "out", validation_model_path=other)


@pytest.mark.parametrize(("dry_run", "wanted"), [(True, "transformer/*.json"), (False, "transformer/*")])
def test_a_dry_run_downloads_no_weights_of_the_validation_model(dry_run, wanted, tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        trainer, "snapshot_download", lambda name, allow_patterns, **_: asked.extend(allow_patterns) or str(tiny_model)
    )
    trainer.validation_pipeline(make_run(tiny_model, validation_model_path="org/turbo", dry_run=dry_run))
    assert asked == ["scheduler/*", wanted]


@pytest.fixture(scope="module")
def with_base_adapter(tiny_model, shared_photos, held_out, validated, tmp_path_factory):
    """The output of a run whose base has the LoRA of another run merged while it trains."""
    out = tmp_path_factory.mktemp("with-base-adapter")
    flags = {**TRAINING, **DRAWING, "lora_dropout": None, "base_adapter": f"{validated.out}:0.5"}
    flags |= {"validation_data_dir": held_out, "report_to": "tensorboard", "num_validation_images": 1}
    train(tiny_model, shared_photos, out, **flags, prompts=[DOG])
    return out


def test_base_adapter_changes_what_is_learned_by_its_weight(
    with_base_adapter, validated, tiny_model, shared_photos, tmp_path
):
    flags = TRAINING | {"lora_dropout": None}
    train(tiny_model, shared_photos, tmp_path / "weight 0", **flags, base_adapter=f"{validated.out}:0")
    train(tiny_model, shared_photos, tmp_path / "without", **flags)
    assert_same_weights(tmp_path / "weight 0", tmp_path / "without")
    learned, unaided = lora_tensors(with_base_adapter), lora_tensors(tmp_path / "without")
    assert all(not torch.equal(learned[name], unaided[name]) for name in unaided)


def test_base_adapter_is_absent_from_the_saved_file(with_base_adapter, plain):
    assert lora_tensors(with_base_adapter).keys() == lora_tensors(plain).keys()


def test_base_adapter_is_absent_from_pictures_and_held_out_loss(with_base_adapter, validated, tiny_model):
    assert np.array_equal(sample(with_base_adapter, 0), sample(validated.out, 0))
    expected = draw_with_pipeline(tiny_model, DOG, lora=with_base_adapter)
    assert_same_picture(sample(with_base_adapter, 6), expected)
    losses = [events(out).scalars["held_out_loss"][0].value for out in (with_base_adapter, validated.out)]
    assert losses[0] == losses[1]


def test_a_page_of_many_steps_keeps_no_files_open(tmp_path):
    draw_gallery(tmp_path, [DOG], range(60))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limits[1]))
    try:
        trainer.write_gallery(trainer.OutputFolder(tmp_path), 60, "now", running=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(Page(tmp_path).links) == 60
