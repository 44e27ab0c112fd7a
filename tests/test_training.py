"""Training runs, end to end on the tiny model: what reaches the model, what is logged, and what is saved.

Every run is a process of its own, forked from one that has imported the trainer, so that a run starts in a moment and
leaves nothing behind in the process of the tests. `train(*train_args(...))` gives a record of what the model saw.
"""

import gc
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, ZImagePipeline
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from running import ROOT, training_environment
from tiny import lora_metadata, lora_tensors, train_args


FORKSERVER = multiprocessing.get_context("forkserver")


# Pictures of one colour each: however they are cropped and mirrored, their latents tell which one it is.
COLOURS = {  # name: (colour, size as width, height)
    "red.png": ((255, 0, 0), (64, 64)),
    "green.png": ((0, 255, 0), (96, 64)),
    "blue.png": ((0, 0, 255), (64, 96)),
    "grey.png": ((90, 90, 90), (100, 60)),
}
CLASS_COLOURS = {
    "white.png": ((255, 255, 255), (64, 64)),
    "yellow.png": ((255, 255, 0), (60, 100)),
    "purple.png": ((255, 0, 255), (96, 64)),
}
PROMPT, CLASS_PROMPT = "a photo of sks dog", "a photo of a dog"
CAPTIONS = {  # of different lengths, one of them above the 32 tokens at which the transformer pads
    "red.png": "red",
    "green.png": "a green picture of nothing in particular, seen from the front",
    "blue.png": "blue, blue",
    "grey.png": "一片灰色",
}


@dataclass
class Pass:
    """One forward pass in training, as float64 arrays of shape [B, ...]; the prompt embeddings are a list."""

    noisy: np.ndarray
    sigmas: np.ndarray
    prompt_embeds: list[np.ndarray]
    velocity: np.ndarray
    latents: np.ndarray | None = None
    noise: np.ndarray | None = None


@dataclass
class Record:
    """What a run logged, and what its model saw."""

    metrics: list[dict] = field(default_factory=list)  # of each update
    ends: list[int] = field(default_factory=list)  # number of passes done at the end of each update
    passes: list[Pass] = field(default_factory=list)
    trainable_types: set[str] = field(default_factory=set)
    frozen_types: set[str] = field(default_factory=set)

    @property
    def losses(self):
        return [metrics["loss"] for metrics in self.metrics]

    @property
    def sigmas(self):
        return np.concatenate([step.sigmas for step in self.passes])

    @property
    def updates(self):
        """The passes of each update."""
        return [self.passes[start:end] for start, end in itertools.pairwise([0, *self.ends])]

    def samples(self):
        """(latents, prompt embedding) of every sample, in the order of training."""
        return [pair for step in self.passes for pair in zip(step.latents, step.prompt_embeds, strict=True)]


def as_array(tensor):
    return tensor.detach().double().numpy()


def recorded(arguments):
    """Runs the trainer on a command line, in this process, and gives the Record of it."""
    record = Record()
    predict_velocity, flow_matching_loss = trainer.predict_velocity, trainer.flow_matching_loss

    def seen(transformer, latents, sigmas, prompt_embeds, dtype):
        velocity = predict_velocity(transformer, latents, sigmas, prompt_embeds, dtype)
        embeds = [as_array(embed) for embed in prompt_embeds]
        record.passes.append(Pass(as_array(latents), as_array(sigmas), embeds, as_array(velocity)))
        for parameter in transformer.parameters():
            types = record.trainable_types if parameter.requires_grad else record.frozen_types
            types.add(str(parameter.dtype))
        return velocity

    def measured(velocity, latents, noise, *rest):
        record.passes[-1].latents, record.passes[-1].noise = as_array(latents), as_array(noise)
        return flow_matching_loss(velocity, latents, noise, *rest)

    def logged(accelerator, metrics, step):
        record.metrics.append(metrics)
        record.ends.append(len(record.passes))

    with (
        mock.patch.object(trainer, "predict_velocity", seen),
        mock.patch.object(trainer, "flow_matching_loss", measured),
        mock.patch.object(Accelerator, "log", logged),
    ):
        trainer.main(trainer.parse_args(arguments))
    return record


def recorded_without_encoders(arguments):
    """The same, in a process where neither text encoder nor VAE can be loaded."""
    failure = AssertionError("an encoder is loaded")
    with (
        mock.patch.object(ZImagePipeline, "from_pretrained", side_effect=failure),
        mock.patch.object(AutoencoderKL, "from_pretrained", side_effect=failure),
    ):
        return recorded(arguments)


def resident_memory(arguments):
    """Resident bytes of the process at the end of each update."""
    process, sizes = psutil.Process(), []
    with mock.patch.object(Accelerator, "log", lambda *_, **__: sizes.append(process.memory_info().rss)):
        trainer.main(trainer.parse_args(arguments))
    return sizes


def answer(sender, function, arguments):
    """What a run's process does: call the function and send back what it gives, or how it failed."""
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage between its stages: not in all that was imported
    try:
        sender.send((True, function(arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def in_own_process(function, arguments):
    """Calls a function of this module in a new process, and gives what it returns."""
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=answer, args=(sender, function, list(map(str, arguments))))
    process.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        succeeded, result = False, "the process died"
    process.join()
    assert succeeded, result
    return result


@pytest.fixture(scope="session")
def warm_process():
    """The process from which the runs are forked: the trainer is imported, on the CPU, offline, with one thread."""
    environment = training_environment(
        {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    )
    FORKSERVER.set_forkserver_preload(["test_training", "datasets"])
    with mock.patch.dict(os.environ, environment, clear=True):
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def train(warm_process):
    """Trains with a command line in a process of its own, and gives the Record."""

    def train(*arguments, function=recorded):
        return in_own_process(function, arguments)

    return train


@pytest.fixture(scope="session")
def pipeline(tiny_model):
    """The tiny pipeline as diffusers loads it. Shared by all tests: leave no adapter in it."""
    pipeline = ZImagePipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pictures(folder, colours):
    folder.mkdir(parents=True)
    for name, (colour, size) in colours.items():
        Image.new("RGB", size, colour).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Four pictures of one colour each, in the four ways to give captions: {way: flags of that source}."""
    folder = tmp_path_factory.mktemp("sources")
    for way in ("prompt", "sidecar", "metadata", "dataset"):
        save_pictures(folder / way, COLOURS)
    for name, caption in CAPTIONS.items():
        (folder / "sidecar" / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    rows = [json.dumps({"file_name": name, "text": caption}) for name, caption in CAPTIONS.items()]
    for way in ("metadata", "dataset"):
        (folder / way / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    ways = {way: {"instance_data_dir": folder / way} for way in ("prompt", "sidecar", "metadata")}
    dataset = {"dataset_name": folder / "dataset", "caption_column": "text", "cache_dir": folder / "cache"}
    return {**ways, "dataset": {"instance_data_dir": None, **dataset}}


@pytest.fixture(scope="session")
def class_pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("class") / "pictures", CLASS_COLOURS)


@pytest.fixture(scope="session")
def recognise(pipeline):
    """Tells which picture and which caption a sample is, by what the pipeline's own encoders make of them."""
    vae, cached = pipeline.vae, {}

    def latents_of(colours, height, width):
        if (height, width) not in cached:
            pixels = torch.stack([torch.tensor(colour) / 127.5 - 1 for colour, _ in colours.values()])
            pixels = pixels[:, :, None, None].expand(-1, -1, 8 * height, 8 * width)
            with torch.no_grad():
                encoded = vae.encode(pixels).latent_dist.mode()
            cached[height, width] = as_array((encoded - vae.config.shift_factor) * vae.config.scaling_factor)
        return cached[height, width]

    def recognise(latents, prompt_embeds, captions):
        colours = COLOURS | CLASS_COLOURS
        errors = np.abs(latents_of(colours, *latents.shape[1:]) - latents).max(axis=(1, 2, 3))
        pictures = [name for name, error in zip(colours, errors, strict=True) if error < 1e-3]
        texts = [
            text
            for text, embeds in captions.items()
            if embeds.shape == prompt_embeds.shape and np.abs(embeds - prompt_embeds).max() < 1e-4
        ]
        assert len(pictures) == len(texts) == 1, (errors, texts)
        return pictures[0], texts[0]

    return recognise


@pytest.fixture(scope="session")
def captions(pipeline):
    """{caption: embedding as the pipeline makes it} of all captions here, and of the empty one."""
    texts = [*CAPTIONS.values(), PROMPT, CLASS_PROMPT, ""]
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
    return {text: as_array(embed) for text, embed in zip(texts, embeds, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Every way to give data, with every way to go through it
# ---------------------------------------------------------------------------------------------------------------------

BUCKETS = {
    "one-size": {},
    "listed-buckets": {"aspect_ratio_buckets": "32,32;32,48;48,32"},
    "computed-buckets": {"use_aspect_ratio_buckets": True},
}
COMBINATIONS = list(
    itertools.product((1, 2, 3), ("prompt", "sidecar", "metadata", "dataset"), (False, True), (False, True), BUCKETS)
)
FLAGS = {"instance_prompt": PROMPT, "resolution": 32, "max_train_steps": 12}


def describe(combination):
    batch_size, source, cached, prior, buckets = combination
    return f"{batch_size}-{source}-{'cached' if cached else 'uncached'}-{'prior' if prior else 'alone'}-{buckets}"


@pytest.fixture(scope="session")
def runs(request, warm_process, tiny_model, sources, class_pictures, tmp_path_factory):
    """{combination: future of its Record} of those that are selected, as many at once as there are cores."""
    folder = tmp_path_factory.mktemp("combinations")
    callspecs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {params["combination"]: None for params in callspecs if "combination" in params}

    def train_combination(combination):
        batch_size, source, cached, prior, buckets = combination
        prior_flags = {
            "with_prior_preservation": True,
            "class_data_dir": class_pictures,
            "class_prompt": CLASS_PROMPT,
            "num_class_images": len(CLASS_COLOURS),
        }
        flags = FLAGS | sources[source] | BUCKETS[buckets] | (prior_flags if prior else {})
        out = folder / describe(combination)
        arguments = train_args(tiny_model, None, out, train_batch_size=batch_size, cache_latents=cached, **flags)
        return in_own_process(recorded, arguments)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield {combination: threads.submit(train_combination, combination) for combination in selected}
        threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=describe)
def test_trains_each_picture_with_its_own_caption_in(combination, runs, recognise, captions):
    batch_size, source, _, prior, buckets = combination
    record = runs[combination].result()

    assert len(record.losses) == 12
    assert all(math.isfinite(loss) for loss in record.losses)

    own = dict.fromkeys(COLOURS, PROMPT) if source == "prompt" else CAPTIONS
    own = own | dict.fromkeys(CLASS_COLOURS, CLASS_PROMPT)
    seen = Counter(recognise(latents, embeds, captions) for latents, embeds in record.samples())
    epochs = 12 * batch_size / len(COLOURS)
    assert {pair: n for pair, n in seen.items() if pair[0] in COLOURS} == {
        (name, own[name]): epochs for name in COLOURS
    }
    class_pairs = {pair: n for pair, n in seen.items() if pair[0] in CLASS_COLOURS}
    assert set(class_pairs) == ({(name, CLASS_PROMPT) for name in CLASS_COLOURS} if prior else set())
    assert sum(class_pairs.values()) == (epochs * len(COLOURS) if prior else 0)

    assert max(len(step.latents) for step in record.passes) <= batch_size
    sizes = {step.latents.shape[2:] for step in record.passes}
    assert sizes == {(4, 4)} if buckets == "one-size" else len(sizes) >= 3


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_keep_their_captions_with_several_threads(train, tiny_model, sources, recognise, captions, tmp_path):
    flags = FLAGS | sources["sidecar"] | BUCKETS["listed-buckets"]
    record = train(
        *train_args(tiny_model, None, tmp_path / "out", train_batch_size=2, dataloader_num_workers=2, **flags)
    )
    seen = Counter(recognise(latents, embeds, captions) for latents, embeds in record.samples())
    assert seen == dict.fromkeys(CAPTIONS.items(), 6)


def test_threads_change_nothing(train, tiny_model, sources, tmp_path):
    flags = FLAGS | sources["sidecar"] | {"random_flip": True}
    alone = train(*train_args(tiny_model, None, tmp_path / "a", **flags))
    helped = train(*train_args(tiny_model, None, tmp_path / "b", dataloader_num_workers=2, **flags))
    assert helped.losses == alone.losses


def test_an_epoch_takes_every_picture_as_often_as_repeats_says(
    train, tiny_model, sources, recognise, captions, tmp_path
):
    flags = FLAGS | sources["sidecar"] | {"repeats": 3, "num_train_epochs": 1, "max_train_steps": None}
    record = train(*train_args(tiny_model, None, tmp_path / "out", train_batch_size=5, **flags))
    seen = Counter(recognise(latents, embeds, captions) for latents, embeds in record.samples())
    assert len(record.losses) == 3  # of 5, 5 and 2 pictures
    assert seen == dict.fromkeys(CAPTIONS.items(), 3)


def test_the_order_is_drawn_anew_every_epoch(train, tiny_model, sources, recognise, captions, tmp_path):
    record = train(*train_args(tiny_model, None, tmp_path / "out", **FLAGS, **sources["sidecar"]))
    names = [recognise(latents, embeds, captions)[0] for latents, embeds in record.samples()]
    epochs = [names[start : start + 4] for start in range(0, 12, 4)]
    assert all(sorted(epoch) == sorted(COLOURS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_caption_dropout_trains_that_share_on_the_empty_prompt(
    train, tiny_model, sources, recognise, captions, tmp_path
):
    flags = sources["sidecar"] | {"resolution": 16, "max_train_steps": 50, "caption_dropout": 0.3}
    record = train(*train_args(tiny_model, None, tmp_path / "out", train_batch_size=8, cache_latents=True, **flags))
    pairs = [recognise(latents, embeds, captions) for latents, embeds in record.samples()]
    assert {caption for name, caption in pairs} == {*CAPTIONS.values(), ""}
    assert all(caption in (CAPTIONS[name], "") for name, caption in pairs)
    assert np.mean([caption == "" for _, caption in pairs]) == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_random_flip_mirrors_about_half_of_the_samples(train, tiny_model, photos, tmp_path, cached):
    for path in sorted(photos.iterdir())[1:]:
        path.unlink()
    flags = {"resolution": 32, "max_train_steps": 24, "center_crop": True, "cache_latents": cached}
    record = train(*train_args(tiny_model, photos, tmp_path / "out", random_flip=True, **flags))
    versions = Counter(latents.round(3).tobytes() for latents, _ in record.samples())
    assert len(versions) == 2
    assert min(versions.values()) >= 6


def class_flags(folder, number):
    flags = {"class_data_dir": folder, "class_prompt": CLASS_PROMPT, "num_class_images": number}
    return {"with_prior_preservation": True, "validation_num_inference_steps": 2, **flags}


@pytest.mark.parametrize("present", [(), ("white.png", "yellow.png"), ("class-00001.png", "class-00003.png")])
def test_missing_class_pictures_are_generated_and_trained_on(train, tiny_model, sources, tmp_path, captions, present):
    folder = save_pictures(tmp_path / "class", dict(zip(present, CLASS_COLOURS.values())))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = FLAGS | sources["sidecar"] | class_flags(folder, 5)
    record = train(*train_args(tiny_model, None, tmp_path / "out", sample_batch_size=2, **flags, center_crop=True))
    pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(pictures) == len(set(pictures.values())) == 5
    assert before.items() <= pictures.items()
    trained = {
        latents.round(3).tobytes()
        for latents, embeds in record.samples()
        if np.array_equal(embeds.shape, captions[CLASS_PROMPT].shape)
        and np.allclose(embeds, captions[CLASS_PROMPT], atol=1e-4)
    }
    assert len(trained) == 5


def test_the_class_folder_is_made_where_there_is_none(train, tiny_model, sources, tmp_path):
    flags = FLAGS | sources["prompt"] | class_flags(tmp_path / "not" / "yet", 2)
    train(*train_args(tiny_model, None, tmp_path / "out", **flags))
    assert len(list((tmp_path / "not" / "yet").iterdir())) == 2


def test_generating_class_pictures_does_not_change_the_training(train, tiny_model, sources, tmp_path):
    flags = FLAGS | sources["prompt"] | class_flags(save_pictures(tmp_path / "class", {}), 2)
    first = train(*train_args(tiny_model, None, tmp_path / "a", **flags))
    second = train(*train_args(tiny_model, None, tmp_path / "b", **flags))
    assert np.array_equal(first.sigmas, second.sigmas)
    assert second.losses == first.losses


def test_sources_with_the_same_captions_train_alike(train, tiny_model, sources, tmp_path):
    losses = {
        way: train(*train_args(tiny_model, None, tmp_path / way, **FLAGS, **sources[way])).losses
        for way in ("sidecar", "metadata", "dataset")
    }
    # a data set keeps the order of its table, which is not that of the names
    assert losses["metadata"] == losses["sidecar"]
    assert sorted(map(len, losses.values())) == [12, 12, 12]


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and their caches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_cached_latents_give_the_same_losses(train, tiny_model, photos, tmp_path, batch_size):
    flags = {"resolution": 32, "max_train_steps": 12, "center_crop": True, "use_aspect_ratio_buckets": True}
    flags |= {"train_batch_size": batch_size}
    decoded = train(*train_args(tiny_model, photos, tmp_path / "a", **flags))
    cached = train(*train_args(tiny_model, photos, tmp_path / "b", cache_latents=True, **flags))
    assert cached.losses == pytest.approx(decoded.losses, rel=1e-5)


def test_a_second_run_takes_every_encoding_from_the_cache(train, tiny_model, photos, tmp_path):
    flags = {"cache_latents": True, "random_flip": True, "encoding_cache_dir": tmp_path / "cache", "resolution": 32}
    train(*train_args(tiny_model, photos, tmp_path / "a", **flags))
    train(*train_args(tiny_model, photos, tmp_path / "b", **flags), function=recorded_without_encoders)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_run_with_another_seed_takes_every_encoding_from_the_cache_too(train, tiny_model, photos, tmp_path):
    flags = {"cache_latents": True, "encoding_cache_dir": tmp_path / "cache", "resolution": 32}
    train(*train_args(tiny_model, photos, tmp_path / "a", **flags))
    train(*train_args(tiny_model, photos, tmp_path / "b", seed=1, **flags), function=recorded_without_encoders)


def test_a_prompt_that_the_model_has_no_room_for_is_cut(train, tiny_model, photos, tmp_path):
    flags = {"instance_prompt": "dog " * 2000, "max_sequence_length": 9000, "resolution": 32, "max_train_steps": 1}
    train(*train_args(tiny_model, photos, tmp_path / "out", **flags))
    assert lora_tensors(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------


def sample_losses(step, scheme):
    """Loss of each sample of a pass, in float64, from what the model saw and gave."""
    s = step.sigmas
    weights = {"sigma_sqrt": s**-2, "cosmap": 2 / (math.pi * (1 - 2 * s + 2 * s**2))}.get(scheme, np.ones_like(s))
    return weights * ((step.velocity - (step.noise - step.latents)) ** 2).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_the_logged_loss_is_the_objective(
    train, tiny_model, sources, class_pictures, recognise, captions, tmp_path, scheme, prior, batch_size
):
    flags = FLAGS | sources["sidecar"] | BUCKETS["listed-buckets"] | {"max_train_steps": 4, "learning_rate": 0.01}
    flags |= {"weighting_scheme": scheme, "train_batch_size": batch_size}
    if prior:
        flags |= class_flags(class_pictures, len(CLASS_COLOURS)) | {"prior_loss_weight": 1.7}
    record = train(*train_args(tiny_model, None, tmp_path / "out", **flags))
    for loss, passes in zip(record.losses, record.updates, strict=True):
        instance, prior_losses = [], []
        for step in passes:
            level = step.sigmas[:, None, None, None]
            assert np.abs(step.noisy - ((1 - level) * step.latents + level * step.noise)).max() < 1e-5
            for latents, embeds, value in zip(step.latents, step.prompt_embeds, sample_losses(step, scheme)):
                name, _ = recognise(latents, embeds, captions)
                (instance if name in COLOURS else prior_losses).append(value)
        assert len(prior_losses) == (len(instance) if prior else 0)
        expected = np.mean(instance) + (1.7 * np.mean(prior_losses) if prior else 0)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_noise_is_standard_normal_and_never_the_same_twice(train, tiny_model, sources, tmp_path):
    record = train(*train_args(tiny_model, None, tmp_path, train_batch_size=4, **FLAGS, **sources["prompt"]))
    noise = np.concatenate([step.noise for step in record.passes])
    assert len({sample.tobytes() for sample in noise}) == len(noise) == 48
    assert abs(noise.mean()) < 0.03
    assert noise.std() == pytest.approx(1, abs=0.03)


def in_table(sigmas, shift):
    """Whether all noise levels are those of a scheduler with that shift."""
    even = np.arange(1, 1001) / 1000
    return np.abs(sigmas[:, None] - shift * even / (1 + (shift - 1) * even)).min(axis=1).max() < 1e-6


def test_timestep_shift_moves_the_noise_of_training_and_not_that_of_pictures(train, tiny_model, photos, tmp_path):
    flags = {"resolution": 32, "max_train_steps": 12, "validation_prompt": PROMPT, "num_validation_images": 1}
    flags |= {"validation_num_inference_steps": 3}
    own = train(*train_args(tiny_model, photos, tmp_path / "own", **flags))
    even = train(*train_args(tiny_model, photos, tmp_path / "even", timestep_shift=1, **flags))
    assert in_table(own.sigmas, 6)
    assert in_table(even.sigmas, 1)
    assert np.mean(own.sigmas) > np.mean(even.sigmas) + 0.1
    first = {name: sorted((tmp_path / name / "samples").glob("*000000*image*.png")) for name in ("own", "even")}
    assert [path.read_bytes() for path in first["own"]] == [path.read_bytes() for path in first["even"]] != []


# ---------------------------------------------------------------------------------------------------------------------
# Ways to train that must not change the result
# ---------------------------------------------------------------------------------------------------------------------


def assert_same_weights(a, b, atol=0.0):
    a, b = lora_tensors(a), lora_tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_the_same_seed_gives_the_same_weights_and_another_does_not(train, tiny_model, photos, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(*train_args(tiny_model, photos, tmp_path / name, resolution=32, seed=seed))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_validation_pictures_do_not_change_the_weights(train, tiny_model, photos, tmp_path):
    flags = {"resolution": 32, "max_train_steps": 4, "lora_dropout": 0.2, "train_batch_size": 2}
    train(*train_args(tiny_model, photos, tmp_path / "without", **flags))
    pictures = {"validation_prompt": PROMPT, "validation_epochs": 1, "num_validation_images": 1}
    pictures |= {"validation_num_inference_steps": 2}
    train(*train_args(tiny_model, photos, tmp_path / "with", **flags, **pictures))
    assert list((tmp_path / "with" / "samples").glob("*000003*"))  # drawn in the middle of training
    assert_same_weights(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("share", [True, 0.5])
def test_gradient_checkpointing_gives_the_same_weights(train, tiny_model, photos, tmp_path, share):
    flags = {"resolution": 32, "max_train_steps": 4, "lora_dropout": 0.2}
    train(*train_args(tiny_model, photos, tmp_path / "a", **flags))
    train(*train_args(tiny_model, photos, tmp_path / "b", **flags, gradient_checkpointing=share))
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_offload_gives_the_same_weights(train, tiny_model, photos, tmp_path, cached):
    flags = {"resolution": 32, "cache_latents": cached}
    train(*train_args(tiny_model, photos, tmp_path / "a", **flags))
    train(*train_args(tiny_model, photos, tmp_path / "b", **flags, offload=True))
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_four_accumulated_batches_of_one_train_like_one_batch_of_four(
    train, tiny_model, sources, class_pictures, tmp_path
):
    flags = FLAGS | sources["sidecar"] | BUCKETS["listed-buckets"] | class_flags(class_pictures, len(CLASS_COLOURS))
    # Adam divides by the gradient's size: epsilon keeps it from blowing up the rounding of gradients near zero
    flags |= {"repeats": 3, "random_flip": True, "adam_epsilon": 1e-3}
    whole = train(*train_args(tiny_model, None, tmp_path / "whole", **flags, train_batch_size=4))
    parts = train(*train_args(tiny_model, None, tmp_path / "parts", **flags, gradient_accumulation_steps=4))
    assert max(len(step.latents) for step in whole.passes) > 1
    assert {len(step.latents) for step in parts.passes} == {1}
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole", atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_resident_memory_does_not_grow_with_the_steps(train, tiny_model, photos, tmp_path, cached):
    flags = {"max_train_steps": 200, "cache_latents": cached, "aspect_ratio_buckets": "16,16;16,32;32,16"}
    sizes = train(*train_args(tiny_model, photos, tmp_path / "out", **flags), function=resident_memory)
    assert len(sizes) == 200
    assert max(sizes[150:]) < 1.02 * max(sizes[:50])


# ---------------------------------------------------------------------------------------------------------------------
# The LoRA
# ---------------------------------------------------------------------------------------------------------------------


def draw(pipeline, lora=None):
    """A picture [H, W, 3] of the pipeline, with the LoRA that `load_lora_weights` finds there, if one is given."""
    if lora:
        pipeline.load_lora_weights(lora)
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    try:
        return pipeline(PROMPT, 32, 32, num_inference_steps=4, latents=noise, output_type="np").images[0]
    finally:
        if lora:
            pipeline.unload_lora_weights()


def test_the_saved_lora_changes_the_pictures_of_the_pipeline(train, tiny_model, pipeline, photos, tmp_path):
    train(*train_args(tiny_model, photos, tmp_path, resolution=32, max_train_steps=6, learning_rate=0.02))
    assert np.abs(draw(pipeline, tmp_path) - draw(pipeline)).max() > 0.01


def test_an_untrained_lora_changes_nothing(train, tiny_model, pipeline, photos, tmp_path):
    train(*train_args(tiny_model, photos, tmp_path, resolution=32, learning_rate=1e-30))
    state = lora_tensors(tmp_path)
    assert all(tensor.abs().max() < 1e-25 for name, tensor in state.items() if ".lora_B." in name)
    assert all(tensor.std() > 0.01 for name, tensor in state.items() if ".lora_A." in name)
    assert np.array_equal(draw(pipeline, tmp_path), draw(pipeline))


@pytest.mark.parametrize("alpha", [1, 4, 16])
def test_the_comfyui_file_has_the_same_effect(train, tiny_model, pipeline, photos, tmp_path, alpha):
    flags = {"rank": 4, "lora_alpha": alpha, "learning_rate": 0.02, "max_train_steps": 6, "resolution": 32}
    train(*train_args(tiny_model, photos, tmp_path, **flags))
    (comfyui,) = (tmp_path / "comfyui").glob("*.safetensors")
    expected = draw(pipeline, tmp_path)
    assert np.abs(expected - draw(pipeline)).max() > 0.005
    assert np.abs(draw(pipeline, comfyui) - expected).max() < 1e-4  # of at most 1


def test_alpha_over_rank_scales_the_update(train, tiny_model, pipeline, photos, tmp_path):
    flags = {"rank": 4, "learning_rate": 0.02, "max_train_steps": 1, "resolution": 32}
    train(*train_args(tiny_model, photos, tmp_path / "a", **flags, lora_alpha=4))
    train(*train_args(tiny_model, photos, tmp_path / "b", **flags, lora_alpha=8))
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-5)  # Adam's first step ignores the gradient's size
    assert np.abs(draw(pipeline, tmp_path / "b") - draw(pipeline, tmp_path / "a")).max() > 1e-4


@pytest.mark.parametrize(
    ("flags", "frozen", "saved"),
    [
        ({}, torch.float32, torch.float32),
        ({"mixed_precision": "bf16"}, torch.bfloat16, torch.bfloat16),
        ({"mixed_precision": "bf16", "upcast_before_saving": True}, torch.bfloat16, torch.float32),
    ],
    ids=["no", "bf16", "bf16-upcast"],
)
def test_lora_weights_train_in_float32_and_are_saved_in_the_training_precision(
    train, tiny_model, photos, tmp_path, flags, frozen, saved
):
    record = train(*train_args(tiny_model, photos, tmp_path, resolution=32, **flags))
    assert record.trainable_types == {"torch.float32"}
    assert str(frozen) in record.frozen_types
    assert {tensor.dtype for tensor in lora_tensors(tmp_path).values()} == {saved}


def test_bf16_training_takes_steps_smaller_than_bf16_resolves(train, tiny_model, photos, tmp_path):
    flags = {"mixed_precision": "bf16", "upcast_before_saving": True, "resolution": 32, "learning_rate": 1e-6}
    train(*train_args(tiny_model, photos, tmp_path / "a", **flags, max_train_steps=2))
    train(*train_args(tiny_model, photos, tmp_path / "b", **flags, max_train_steps=3))
    a, b = lora_tensors(tmp_path / "a"), lora_tensors(tmp_path / "b")
    changes = torch.cat([(b[name] - a[name]).flatten() for name in a if ".lora_A." in name])
    assert changes.abs().max() < 1e-5
    assert (changes != 0).float().mean() > 0.9


def test_the_adapter_metadata_holds_rank_alpha_and_targets(train, tiny_model, photos, tmp_path):
    train(*train_args(tiny_model, photos, tmp_path, resolution=32, rank=3, lora_alpha=6, lora_layers="to_q,w2"))
    metadata = lora_metadata(tmp_path)
    assert metadata["transformer.r"] == 3
    assert metadata["transformer.lora_alpha"] == 6
    assert set(metadata["transformer.target_modules"]) == {
        name.removeprefix("transformer.").rpartition(".lora_")[0] for name in lora_tensors(tmp_path)
    }
    assert {name.split(".")[-1] for name in metadata["transformer.target_modules"]} == {"to_q", "w2"}
