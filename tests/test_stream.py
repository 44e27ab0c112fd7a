"""Which samples make an update, at which resolutions, and the threads that read them ahead of time."""

import math
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from kill_test import bit_identical
from running import TrainerProcess, fork_trainer
from tiny import load_all_examples, train_args


SHAPES = ((64, 64), (64, 96), (96, 64))
CAPTIONS = ("a dog", "a dog in a bucket, asleep")


def make_plan(pictures=5, repeats=1, processes=1, process=0, sharded=False, seed=0, classes=0, shapes=SHAPES, **flags):
    """A plan of so many pictures of three shapes and two lengths of caption."""
    examples = {
        "instance": [
            trainer.Example(
                "instance", str(i), Path(str(i)), CAPTIONS[i % 2], (64, 64), shapes[i % len(shapes)], repeats
            )
            for i in range(pictures)
        ]
    }
    if classes:
        examples["class"] = [
            trainer.Example("class", str(i), Path(str(i)), "a cat", (64, 64), (64, 64), 1) for i in range(classes)
        ]
    args = trainer.parse_args(train_args("model", "data", "out", **{"max_train_steps": None} | flags))
    accelerator = SimpleNamespace(num_processes=processes, process_index=process)
    run = SimpleNamespace(args=args, seed=seed, accelerator=accelerator, sharded=sharded)
    lengths = {"": 20, "a cat": 20, CAPTIONS[0]: 20, CAPTIONS[1]: 50}
    return trainer.TrainingPlan(examples, {text: [0] * n for text, n in lengths.items()}, run)


# ---------------------------------------------------------------------------------------------------------------------
# Whole updates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("pictures", [1, 3, 5, 7, 1000])
def test_updates_are_whole_and_take_every_picture_equally_often(pictures, repeats, batch_size, processes):
    sizes = {"pictures": pictures, "repeats": repeats, "train_batch_size": batch_size, "processes": processes}
    total, steps = batch_size * processes, 60 if pictures < 1000 else 3 * 1000 // (batch_size * processes)
    plan = make_plan(**sizes, max_train_steps=steps)
    counts, numbers = Counter(dict.fromkeys(plan.examples["instance"], 0)), set()
    assert plan.max_train_steps == steps
    for step in range(steps):
        samples = plan.update(step)
        counts.update(sample.example for sample in samples)
        numbers.update(sample.number for sample in samples)
        assert len(samples) == total and len(numbers) == (step + 1) * total
        assert sum(sample.weight for sample in samples) == pytest.approx(1)
        # With each of its slots taken k or k + 1 times, a picture has been taken between k and k + 1 times `repeats`.
        assert max(counts.values()) - min(counts.values()) <= repeats
    for step in {0, steps // 3, steps - 1}:  # as a resumed run finds it
        assert make_plan(**sizes, max_train_steps=steps).update(step) == plan.update(step)


@pytest.mark.parametrize(("epochs", "pictures", "batch_size"), [(1, 5, 4), (2, 5, 4), (3, 7, 2), (3, 1, 4), (2, 4, 2)])
def test_the_last_update_of_a_run_set_by_epochs_is_the_front_part_of_that_of_a_longer_one(
    epochs, pictures, batch_size
):
    plan, longer = (
        make_plan(pictures, train_batch_size=batch_size, num_train_epochs=number) for number in (epochs, 10)
    )
    assert plan.max_train_steps == math.ceil(epochs * pictures / batch_size)
    updates = [plan.update(step) for step in range(plan.max_train_steps)]
    counts = Counter(sample.example.name for samples in updates for sample in samples)
    assert counts == {str(i): epochs for i in range(pictures)}
    for step, samples in enumerate(updates[:-1]):
        assert samples == longer.update(step)
    last, whole = ({sample.number for sample in p.update(plan.max_train_steps - 1)} for p in (plan, longer))
    assert last == set(sorted(whole)[: len(last)]) if len(last) < batch_size else last == whole
    assert sum(sample.weight for sample in updates[-1]) == pytest.approx(1)


def test_an_update_draws_the_permutations_of_its_own_epochs_alone(monkeypatch):
    seeds = []
    original = trainer.seeded_generator
    monkeypatch.setattr(trainer, "seeded_generator", lambda *parts: seeds.append(parts) or original(*parts))
    plan = make_plan(10_000, train_batch_size=4, max_train_steps=200_000)
    assert len(plan.update(100_000)) == 4
    assert [seed for seed in seeds if "order" in seed] == [(0, "order", 40)]
    assert len(seeds) < 20
    spanning = make_plan(10_000, train_batch_size=3, max_train_steps=200_000)
    seeds.clear()
    spanning.update(3333)
    assert [seed for seed in seeds if "order" in seed] == [(0, "order", 0), (0, "order", 1)]


def test_an_update_inside_an_epoch_has_one_size_and_length_where_they_suffice():
    plan = make_plan(600, train_batch_size=4, max_train_steps=300)
    updates = [{plan.key(sample) for sample in plan.update(step)} for step in range(300)]
    assert [len(keys) for keys in updates] == [1] * 300  # 600 pictures of six kinds, 100 of each
    mixed = make_plan(602, train_batch_size=4, max_train_steps=301)
    several = [step for step in range(301) if len({s.example.bucket for s in mixed.update(step)}) > 1]
    assert 0 < len(several) < 10 and 150 in several  # the one in the middle has pictures of both epochs


def test_an_update_of_two_epochs_has_the_rest_of_one_and_the_front_of_the_next():
    plan = make_plan(5, train_batch_size=4, max_train_steps=5)
    numbers = [sorted(sample.number for sample in plan.update(step)) for step in range(5)]
    assert numbers == [[4 * step + i for i in range(4)] for step in range(5)]


def test_the_order_and_the_seed_of_the_samples_change_with_the_seed_and_the_epoch():
    def order(seed, epoch):
        plan = make_plan(50, seed=seed, max_train_steps=200)
        return [plan.update(50 * epoch + place)[0].example.name for place in range(50)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_class_pictures_take_turns_one_for_each_instance_sample():
    flags = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a cat"}
    plan = make_plan(5, classes=3, train_batch_size=4, num_train_epochs=3, prior_loss_weight=0.5, **flags)
    turns = Counter()
    for step in range(plan.max_train_steps):
        samples = plan.update(step)
        priors = [sample for sample in samples if sample.example.kind == "class"]
        assert sorted(p.number for p in priors) == sorted(s.number for s in samples if s.example.kind == "instance")
        assert sum(prior.weight for prior in priors) == pytest.approx(0.5)
        turns.update(prior.example.name for prior in priors)
    assert turns == {"0": 5, "1": 5, "2": 5}


@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
@pytest.mark.parametrize(("processes", "batch_size", "accumulation"), [(1, 4, 1), (2, 2, 1), (1, 1, 4), (4, 1, 1)])
def test_an_update_is_the_same_however_it_is_divided(processes, batch_size, accumulation, sharded):
    flags = {"caption_dropout": 0.3, "random_flip": True, "num_train_epochs": 3}
    reference = make_plan(7, train_batch_size=4, **flags)
    sizes = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "processes": processes}
    plans = [make_plan(7, **sizes, **flags, process=i, sharded=sharded) for i in range(processes)]
    for step in range(reference.max_train_steps):
        parts = [plan.micro_batches(step) for plan in plans]
        taken = [sample for part in parts for batch in part for sample in batch if sample.weight]
        assert taken == reference.update(step)
        for batch in (batch for part in parts for batch in part):
            assert 0 < len(batch) <= batch_size
            assert len({plans[0].key(sample) for sample in batch}) == 1
        if sharded:  # every process must run as many forward passes as the others
            assert len({len(part) for part in parts}) == 1


@pytest.mark.parametrize(
    ("pictures", "batch_size", "epochs", "steps"),
    [(4, 1, 1, [0, 4, 8]), (4, 1, 2, [0, 8]), (5, 4, 1, [0, 2, 3, 4, 5, 7, 8, 9]), (1, 4, 2, list(range(10)))],
)
def test_validation_comes_when_the_samples_seen_pass_a_multiple_of_its_epochs(pictures, batch_size, epochs, steps):
    plan = make_plan(pictures, train_batch_size=batch_size, validation_epochs=epochs, max_train_steps=100)
    assert [step for step in range(10) if plan.validates(step)] == steps


def test_a_run_set_by_epochs_goes_on_when_it_is_made_longer(tiny_model, photos, tmp_path):
    flags = {"train_batch_size": 4, "max_train_steps": None, "cache_latents": True, "checkpointing_steps": 2}
    argv = train_args(tiny_model, photos, tmp_path / "out", **flags)
    log = tmp_path / "log.txt"
    first = fork_trainer(*argv, "--num_train_epochs=1", log=log)
    assert "2 steps of 4 pictures: 1.0 epochs of 6 samples" in first.output
    longer = fork_trainer(*argv, "--num_train_epochs=3", "--resume_from_checkpoint=latest", log=log)
    assert "5 steps of 4 pictures: 3.0 epochs of 6 samples" in longer.output
    assert "Resuming with a change: samples in all was 6, is 18" in longer.output and "step 3/5" in longer.output


@pytest.mark.parametrize("process", range(4))
def test_memory_is_counted_for_a_process_without_a_sample_too(process):
    plan = make_plan(pictures=1, processes=4, process=process, train_batch_size=1)
    assert trainer.largest_micro_batch(plan, plan.run) == (1, SHAPES[0], 32, False)


# ---------------------------------------------------------------------------------------------------------------------
# Several resolutions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes(tmp_path):
    """A folder of four pictures that are called by their sizes, height x width."""
    (tmp_path / "sizes").mkdir()
    for height, width in ((20, 24), (48, 96), (64, 64), (200, 120)):
        Image.new("RGB", (width, height)).save(tmp_path / "sizes" / f"{height}x{width}.png")
    return tmp_path / "sizes"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"resolution": "64"}, {"20x24": ["64x64"], "48x96": ["64x64"], "64x64": ["64x64"], "200x120": ["64x64"]}),
        (
            {"resolution": "96,32,64"},
            {
                "20x24": ["32x32"],
                "48x96": ["32x32"],
                "64x64": ["32x32", "64x64"],
                "200x120": ["32x32", "64x64", "96x96"],
            },
        ),
        (
            {"resolution": "32,64", "use_aspect_ratio_buckets": True},
            {
                "20x24": ["16x16"],
                "48x96": ["32x48", "48x96"],
                "64x64": ["32x32", "64x64"],
                "200x120": ["48x32", "80x48"],
            },
        ),
    ],
)
def test_a_picture_is_trained_at_each_resolution_that_does_not_enlarge_it(flags, expected, sizes, caplog):
    args = trainer.parse_args(train_args("model", sizes, "out", **flags))
    with caplog.at_level("INFO", logger=trainer.logger.name):
        examples = load_all_examples(args)["instance"]
    found = {}
    for example in examples:
        found.setdefault(Path(example.name).stem, []).append("{}x{}".format(*example.bucket))
    assert found == expected
    for number, side in enumerate(sorted(map(int, flags["resolution"].split(",")))):
        left_out = sum(len(buckets) <= number for buckets in found.values())
        assert (f"--resolution {side}: {left_out} instance pictures" in caplog.text) == bool(left_out)


@pytest.mark.parametrize(
    "flags",
    [
        {"resolution": "32,64", "aspect_ratio_buckets": "64,64"},
        {"resolution": "64,32,64"},
        {"resolution": "64,66"},
        {"resolution": "64,many"},
        {"resolution": "64,"},
        {"resolution": ""},
    ],
)
def test_resolutions_that_make_no_sense_are_a_mistake(flags):
    with pytest.raises(trainer.UserError, match="--resolution"):
        trainer.parse_args(train_args("model", "data", "out", **flags))


def test_two_resolutions_are_cached_trained_and_drawn_at_the_last(tiny_model, sizes, tmp_path):
    flags = {"resolution": "64,32", "max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 4}
    flags |= {"cache_latents": True, "encoding_cache_dir": tmp_path / "cache", "skip_final_inference": False}
    flags |= {"validation_prompt": "a dog", "num_validation_images": 1, "validation_num_inference_steps": 1}
    flags |= {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class"}
    argv = train_args(tiny_model, sizes, tmp_path / "out", **flags, num_class_images=2, checkpointing_steps=2)
    finished = fork_trainer(*argv, log=tmp_path / "log.txt")
    assert "3 steps of 4 pictures: 2.0 epochs of 6 samples" in finished.output
    assert "--resolution 64: 2 instance pictures are smaller" in finished.output
    shapes = [trainer.load_file(path)["encoding"].shape for path in (tmp_path / "cache").iterdir()]
    assert Counter(tuple(shape) for shape in shapes if len(shape) == 3) == {(16, 4, 4): 6, (16, 8, 8): 2}
    (drawn,) = (tmp_path / "out" / "samples").glob("step-000003-*image-0.png")
    assert Image.open(drawn).size == (32, 32)
    fork_trainer(*argv, "--resume_from_checkpoint=checkpoint-2", log=tmp_path / "log.txt")  # it is the same run


# ---------------------------------------------------------------------------------------------------------------------
# Threads that read ahead
# ---------------------------------------------------------------------------------------------------------------------


def loaded(number):
    value = torch.tensor([float(number)])
    return trainer.MicroBatch(value, value, value, [value])


@pytest.fixture
def reader():
    """`reader(load, jobs, threads)`: micro-batches that are read ahead; a job is any value."""
    opened = []

    def reader(load, jobs, threads=2, stopping=lambda: False, sharded=False):
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        run = SimpleNamespace(
            args=SimpleNamespace(dataloader_num_workers=threads), accelerator=accelerator, sharded=sharded
        )
        data = trainer.TrainingData(None, {}, None, run)
        data.load = load
        opened.append(data.read_ahead(iter(jobs), stopping))
        return opened[-1]

    yield reader
    for reading in opened:
        reading.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_micro_batches_come_in_their_order_whichever_is_read_first(threads, reader):
    hasty = threading.Event()

    def load(number):
        if number == 0 and threads > 1:
            assert hasty.wait(30)  # the second is read before
        elif number == 1:
            hasty.set()
        return loaded(number)

    reading = reader(load, range(20), threads)
    assert [batch.noise.item() for batch in reading] == list(range(20))


def test_what_is_read_ahead_is_bounded(reader):
    read = []

    def jobs():
        for number in range(1000):
            read.append(number)
            yield number

    reading = reader(loaded, jobs(), 3)
    for taken in range(1, 50):
        next(reading)
        assert len(read) - taken <= 3 + 2


class Strange(Exception):
    pass


def test_an_error_in_a_thread_keeps_its_type_and_message_and_comes_in_its_turn(reader):
    def load(number):
        if number == 2:
            raise Strange("cat.png")
        return loaded(number)

    reading = reader(load, range(10))
    assert [next(reading).noise.item() for _ in range(2)] == [0, 1]
    with pytest.raises(Strange, match=r"^cat\.png$"):
        next(reading)


def test_a_stop_is_not_held_up_by_a_read_that_never_returns(reader, monkeypatch):
    monkeypatch.setattr(trainer, "PATIENCE", 0.5)
    stuck, entered, stop = threading.Event(), threading.Event(), threading.Event()

    def load(number):
        if number == 1:
            entered.set()
            stuck.wait()
        return loaded(number)

    reading = reader(load, range(10), 1, stop.is_set)
    assert next(reading).noise.item() == 0
    assert entered.wait(30)
    started = time.monotonic()
    stop.set()
    assert next(reading) is None
    reading.close()
    assert time.monotonic() - started < 5
    stuck.set()


def test_a_sharded_run_waits_for_its_pictures_as_the_other_processes_compute_with_it(reader, monkeypatch):
    monkeypatch.setattr(trainer, "PATIENCE", 0.05)
    monkeypatch.setattr(trainer.concurrent.futures, "wait", lambda *_, **__: time.sleep(0.01))

    def load(number):
        time.sleep(0.2)
        return loaded(number)

    reading = reader(load, range(2), 1, lambda: True, sharded=True)
    assert [batch.noise.item() for batch in reading] == [0, 1]


def test_an_update_in_progress_waits_a_little_for_its_pictures(reader, monkeypatch):
    monkeypatch.setattr(trainer, "PATIENCE", 30)
    asked = threading.Event()

    def load(number):
        assert number == 0 or asked.wait(30)
        return loaded(number)

    reading = reader(load, range(2), 1, lambda: asked.set() or True)
    assert [batch.noise.item() for batch in reading] == [0, 1]


def test_threads_end_when_they_are_closed(reader):
    before = {*threading.enumerate()}
    reading = reader(loaded, range(100), 3)
    next(reading)
    reading.close()
    for thread in {*threading.enumerate()} - before:
        thread.join(30)
        assert not thread.is_alive()


def stick_after_six(trainer):
    """The seventh picture that a thread reads never comes."""
    decode_image, read = trainer.decode_image, []

    def decode(*args):
        if threading.current_thread() is not threading.main_thread():
            read.append(args)
            if len(read) > 6:
                threading.Event().wait()
        return decode_image(*args)

    trainer.decode_image, trainer.PATIENCE = decode, 0.5


@pytest.mark.parametrize("accumulation", [1, 4], ids=["between two updates", "amid an update"])
def test_a_run_whose_pictures_stop_coming_is_stopped_and_resumed(accumulation, tiny_model, photos, tmp_path):
    flags = {"gradient_accumulation_steps": accumulation, "max_train_steps": 12 // accumulation}
    saved = 6 // accumulation  # the update that is finished
    argv = train_args(tiny_model, photos, tmp_path / "out", **flags, checkpointing_steps=saved, resolution=32)
    process = TrainerProcess(argv, tmp_path / "log.txt", stick_after_six)
    process.wait_for(f"Saved {tmp_path / 'out' / f'checkpoint-{saved}'}")
    os.kill(process.process.pid, signal.SIGTERM)
    finished = process.finish(timeout=60)
    assert finished.returncode == 143, str(finished)
    assert "Traceback" not in finished.output
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    fork_trainer(*argv, "--resume_from_checkpoint=latest", log=tmp_path / "log.txt")
    whole = train_args(tiny_model, photos, tmp_path / "whole", **flags, resolution=32, dataloader_num_workers=3)
    fork_trainer(*whole, log=tmp_path / "log.txt")
    assert bit_identical(tmp_path / "out", tmp_path / "whole")
