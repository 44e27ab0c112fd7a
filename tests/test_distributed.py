"""Several processes and machines train the run that one process trains, and share its work and its memory.

The processes are forked from one that has imported the trainer and find each other as torchrun's do, over gloo. Each
notes what it did: what it trained on, read, encoded and wrote, and the bytes of weights that it held.
"""

import contextlib
import functools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, ZImagePipeline
from PIL import Image
from torch.distributed.tensor import DTensor

from fsdp_cpu_launcher import ENVIRONMENT, allow_fsdp_on_cpu
from patched_trainer import bitsandbytes_on_cpu
from running import ROOT, SCRIPT, TrainerProcess, training_environment
from tiny import lora_tensors, train_args


INSTANCE_PROMPT, CLASS_PROMPT = "a photo of sks tile", "a photo of a tile"
PICTURES = {  # name: (colour, (width, height), caption or None); one colour survives every crop and flip
    "blue": ((30, 40, 210), (64, 64), "a blue sks tile"),
    "green": ((20, 160, 60), (80, 80), "a green sks tile, slightly larger than the others but of the same shape"),
    "grey": ((120, 120, 120), (64, 64), None),
    "orange": ((240, 140, 20), (96, 64), "an orange sks tile"),
    "pink": ((250, 150, 190), (96, 64), "a pink sks tile"),
    "red": ((200, 30, 30), (64, 64), "a red sks tile"),
    "yellow": ((240, 230, 40), (64, 96), None),
}
CLASS_PICTURES = {
    "black": ((0, 0, 0), (64, 64), None),
    "brown": ((120, 70, 30), (64, 96), "a brown tile"),
    "white": ((255, 255, 255), (96, 64), None),
}
REPEATS = 2


# ---------------------------------------------------------------------------------------------------------------------
# Running several processes
# ---------------------------------------------------------------------------------------------------------------------


def local_bytes(module):
    """Bytes of a module's frozen parameters that are in this process."""
    frozen = [parameter.data for parameter in module.parameters() if not parameter.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)


def observe(path, fsdp, change, trainer):
    """Has the trainer in this process note what it does; the notes are in the file `path` when it ends."""
    if fsdp:
        allow_fsdp_on_cpu()
    if change:
        change()
    notes = {"updates": [[]], "decoded": [], "prompts": [], "written": [], "bytes": {}}
    original = vars(trainer).copy()
    text_encoders = []

    def load(pipeline, cls, part, **options):
        component = original_load(pipeline, cls, part, **options)
        text_encoders.extend([component] if part == "text_encoder" else [])
        return component

    def encode_prompt(pipeline, prompt, *args, **options):
        notes["prompts"].append(prompt)
        notes["bytes"]["text encoder"] = local_bytes(text_encoders[0])
        return original_encode(pipeline, prompt, *args, **options)

    def decode_image(name, source, *side, **options):
        if side != (64,):  # else it is only looked at for damage
            notes["decoded"].append(Path(name).stem)
        return original["decode_image"](name, source, *side, **options)

    def train(state, *args):
        text_encoders.clear()
        notes["bytes"]["transformer"] = local_bytes(state.transformer)
        return original["train"](state, *args)

    def training_loss(transformer, vae, batch, *args):
        if transformer.training:
            notes["updates"][-1].append({name: value for name, value in vars(batch).items() if value is not None})
        return original["training_loss"](transformer, vae, batch, *args)

    def apply_gradients(*args):
        notes["updates"].append([])
        return original["apply_gradients"](*args)

    def main(args):
        try:
            original["main"](args)
        finally:
            notes["updates"].pop()
            torch.save({**notes, "written": list(notes["written"])}, path)

    def note_writing(event, arguments):
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and not isinstance(arguments[0], int)
        if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            notes["written"].append(os.fspath(arguments[0]))

    original_load, trainer.PipelineInfo.load = trainer.PipelineInfo.load, load
    original_encode, trainer.ZImagePipeline.encode_prompt = trainer.ZImagePipeline.encode_prompt, encode_prompt
    changed = (decode_image, train, training_loss, apply_gradients, main)
    vars(trainer).update({function.__name__: function for function in changed})
    sys.addaudithook(note_writing)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(processes, argv, folder, fsdp=False, env=None, change=None):
    """That many trainer processes, running; killed at the end. `argv`: the flags, or a function of the rank; `change`:
    called in each process first."""
    folder.mkdir(parents=True, exist_ok=True)
    port, group = free_port(), []
    try:
        for rank in range(processes):
            environment = {**ENVIRONMENT} if fsdp else {}
            if processes > 1 or fsdp:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"LOCAL_WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            before = functools.partial(observe, folder / f"notes-{rank}.pt", fsdp, change)
            flags = argv(rank) if callable(argv) else argv
            group.append(TrainerProcess(flags, folder / f"log-{rank}.txt", before, environment | (env or {})))
        yield group
    finally:
        for process in group:
            process.kill()


class Result(NamedTuple):
    """What a run left: its output folder, and of each process the notes, exit status and output."""

    out: Path
    notes: list
    exit_statuses: list
    outputs: list


def train_together(processes, argv, folder, fsdp=False, env=None, check=True, timeout=240, change=None):
    """Runs the trainer as so many processes to its end. `argv` as for `started`; `--output_dir` is `folder/out`."""
    with started(processes, argv, folder, fsdp, env, change) as group:
        finished = [process.finish(timeout) for process in group]
    if check:
        assert not any(process.returncode for process in finished), "\n".join(map(str, finished))
    files = [folder / f"notes-{rank}.pt" for rank in range(processes)]
    notes = [torch.load(file, weights_only=False) for file in files if file.exists()]
    return Result(folder / "out", notes, [p.returncode for p in finished], [p.stdout + p.stderr for p in finished])


def paint(folder, pictures):
    folder.mkdir()
    for name, (colour, size, caption) in pictures.items():
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
        if caption:
            (folder / f"{name}.txt").write_text(caption, "utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of a data set with captions, class pictures and three buckets, two of them with few pictures."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": paint(folder / "tiles", PICTURES),
        "instance_prompt": INSTANCE_PROMPT,
        "with_prior_preservation": True,
        "class_data_dir": paint(folder / "class", CLASS_PICTURES),
        "class_prompt": CLASS_PROMPT,
        "num_class_images": len(CLASS_PICTURES),
        "prior_loss_weight": 0.7,
        "aspect_ratio_buckets": "64,64;64,96;96,64",
        "repeats": REPEATS,
        "learning_rate": 1e-3,
    }


CACHED = {"cache_latents": True, "max_train_steps": 20, "checkpointing_steps": 10}
ANEW = {"random_flip": True, "num_train_epochs": 2, "max_train_steps": None}
SIZES = {  # batch and accumulation
    "4": {"train_batch_size": 4},
    "2": {"train_batch_size": 2},
    "1+1": {"train_batch_size": 1, "gradient_accumulation_steps": 2},
    "1+1+1+1": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
    "6": {"train_batch_size": 6},
}
SAVING_MEMORY = {"fsdp_text_encoder": True, "gradient_checkpointing": True}
RUNS = {  # name: (processes, FSDP, flags)
    "one": (1, False, {**CACHED, **SIZES["4"]}),
    "one, accumulating": (1, False, {**CACHED, **SIZES["1+1+1+1"]}),
    "two": (2, False, {**CACHED, **SIZES["2"]}),
    "two, accumulating": (2, False, {**CACHED, **SIZES["1+1"], "gradient_checkpointing": True}),
    "two, sharded": (2, True, {**CACHED, **SIZES["2"]}),
    "two, sharded, accumulating": (2, True, {**CACHED, **SIZES["1+1"], **SAVING_MEMORY}),
    "one for three": (1, False, {**ANEW, **SIZES["6"]}),
    "three": (3, False, {**ANEW, **SIZES["2"]}),
    "three, sharded": (3, True, {**ANEW, **SIZES["2"]}),
}


@pytest.fixture(scope="module")
def finished_run(tiny_model, data, tmp_path_factory):
    """`finished_run(name)` is the `Result` of one of `RUNS`, each made once."""

    @functools.cache
    def run(name):
        processes, fsdp, flags = RUNS[name]
        folder = tmp_path_factory.mktemp("run")
        return train_together(
            processes,
            train_args(tiny_model, **data, out=folder / "out", **{"max_train_steps": None} | flags),
            folder,
            fsdp,
        )

    return run


def difference(one, other):
    """How far the A matrices of two LoRA files are apart, or the B matrices if they are further, relative to the norm.

    Over all layers: where a gradient is hardly more than rounding, Adam makes a whole step of it.
    """
    first, second = lora_tensors(one), lora_tensors(other)
    assert first.keys() == second.keys()
    worst = 0.0
    for kind in (".lora_A.", ".lora_B."):
        a, b = (torch.cat([tensors[n].flatten() for n in sorted(second) if kind in n]) for tensors in (first, second))
        worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# The same run, however it is divided
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("one, accumulating", "one"),
        ("two", "one"),
        ("two, accumulating", "one"),
        ("two, sharded", "one"),
        ("two, sharded, accumulating", "one"),
        ("three", "one for three"),
        ("three, sharded", "one for three"),
    ],
)
def test_weights_do_not_depend_on_how_an_update_is_divided(finished_run, record_property, name, reference):
    relative = difference(finished_run(name).out, finished_run(reference).out)
    record_property("relative difference", relative)
    assert relative < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["two", "two, sharded"])
def test_compiled_blocks_train_alike_in_two_processes(fsdp, tiny_model, data, tmp_path):
    one, two, inductor = (tmp_path / name for name in ("one", "two", "inductor"))
    flags = data | CACHED | {"max_train_steps": 4, "aspect_ratio_buckets": "64,64", "gradient_checkpointing": True}
    plain = train_together(1, train_args(tiny_model, out=one / "out", **flags, **SIZES["4"]), one)
    compiled = train_together(
        2,
        train_args(tiny_model, out=two / "out", **flags, **SIZES["2"], compile=True),
        two,
        fsdp,
        env={"TORCHINDUCTOR_CACHE_DIR": str(inductor)},
        timeout=600,
    )
    assert difference(compiled.out, plain.out) < 1e-3
    assert list(inductor.rglob("*.so"))


@pytest.fixture(scope="module")
def references(tiny_model):
    """What a picture and a caption look like to the transformer, made without the trainer."""
    vae = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")
    pipeline = ZImagePipeline.from_pretrained(tiny_model, transformer=None, vae=None)
    pictures, latents = {}, {}
    for name, (colour, (width, height), _) in (PICTURES | CLASS_PICTURES).items():
        size = (64, 64) if width == height else (height, width)
        pictures[name] = (torch.tensor(colour) / 127.5 - 1).view(3, 1, 1).expand(3, *size)
        with torch.no_grad():
            mode = vae.encode(pictures[name][None]).latent_dist.mode()[0]
        latents[name] = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    prompts = {caption for _, _, caption in (PICTURES | CLASS_PICTURES).values() if caption}
    prompts |= {INSTANCE_PROMPT, CLASS_PROMPT}
    with torch.no_grad():
        embeds = {p: pipeline.encode_prompt([p], "cpu", do_classifier_free_guidance=False)[0][0] for p in prompts}
    return {"pixels": pictures, "latents": latents, "prompt_embeds": embeds}


def recognize(tensor, known):
    """The name of the one tensor of `known` that this is."""
    (name,) = [k for k, v in known.items() if v.shape == tensor.shape and torch.allclose(v, tensor, atol=1e-4)]
    return name


def trained_pairs(result, references):
    """[(picture, caption)] of each update, over all processes."""
    updates = []
    for micro_batches in zip(*(notes["updates"] for notes in result.notes)):
        pairs = []
        for batch in (batch for process in micro_batches for batch in process):
            kind = "latents" if "latents" in batch else "pixels"
            for picture, embed, weight in zip(batch[kind], batch["prompt_embeds"], batch["weights"]):
                if weight > 0:  # others only keep sharded processes in step
                    picture = recognize(picture, references[kind])
                    pairs.append((picture, recognize(embed, references["prompt_embeds"])))
        updates.append(pairs)
    return updates


@pytest.mark.parametrize("name", RUNS)
def test_every_process_trains_on_pictures_with_their_own_captions(finished_run, references, name):
    captions = {picture: caption or INSTANCE_PROMPT for picture, (_, _, caption) in PICTURES.items()}
    captions |= {picture: caption or CLASS_PROMPT for picture, (_, _, caption) in CLASS_PICTURES.items()}
    result = finished_run(name)
    assert all(any(update for update in notes["updates"]) for notes in result.notes)
    pairs = {pair for update in trained_pairs(result, references) for pair in update}
    assert pairs == set(captions.items())


@pytest.mark.parametrize("name", RUNS)
def test_updates_are_whole_and_show_each_picture_as_often_as_another_and_class_pictures_in_turn(
    finished_run, references, name
):
    updates = trained_pairs(finished_run(name), references)
    total_batch = 6 if "three" in name else 4
    samples = 2 * len(PICTURES) * REPEATS if "three" in name else 20 * total_batch  # two epochs, or twenty updates
    shown = Counter()
    for number, update in enumerate(updates, 1):
        shown.update(picture for picture, _ in update)
        instances = {picture: shown[picture] for picture in PICTURES}
        assert sum(instances.values()) == min(number * total_batch, samples)
        assert max(instances.values()) - min(instances.values()) <= REPEATS
    assert len(updates) == math.ceil(samples / total_batch)
    turns = [shown[picture] for picture in CLASS_PICTURES]
    assert sum(turns) == samples
    if samples % (len(PICTURES) * REPEATS) == 0:
        assert max(turns) - min(turns) <= 1


@pytest.mark.parametrize("name", RUNS)
def test_every_sample_has_noise_of_its_own(finished_run, name):
    batches = [batch for notes in finished_run(name).notes for update in notes["updates"] for batch in update]
    noises = [n.flatten()[:8] for b in batches for n, weight in zip(b["noise"], b["weights"]) if weight > 0]
    assert len({tuple(noise.tolist()) for noise in noises}) == len(noises) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Shared work, memory and files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "two, sharded"])
def test_each_picture_and_each_prompt_is_encoded_by_one_process(finished_run, name):
    notes = finished_run(name).notes
    decoded = [note["decoded"] for note in notes]
    assert sorted(sum(decoded, [])) == sorted([*PICTURES, *CLASS_PICTURES])
    assert all(len(share) >= 5 for share in decoded)
    prompts = [note["prompts"] for note in notes]
    captions = {caption for _, _, caption in (PICTURES | CLASS_PICTURES).values() if caption}
    assert sorted(sum(prompts, [])) == sorted(captions | {INSTANCE_PROMPT, CLASS_PROMPT, ""})
    assert all(len(share) >= 4 for share in prompts)


@pytest.mark.parametrize("name", ["two", "two, sharded", "three, sharded"])
def test_only_the_main_process_writes_to_the_output_folder(finished_run, name):
    result = finished_run(name)
    main, *others = [
        [path for path in map(str, notes["written"]) if path.startswith(str(result.out))] for notes in result.notes
    ]
    assert main
    assert not any(others)


@pytest.mark.parametrize(("name", "share"), [("two, sharded", 0.6), ("three, sharded", 0.43)])
def test_fsdp_leaves_each_process_its_share_of_the_frozen_weights(finished_run, name, share):
    whole = finished_run("one").notes[0]["bytes"]["transformer"]
    for notes in finished_run(name).notes:
        assert notes["bytes"]["transformer"] <= share * whole


def test_fsdp_text_encoder_leaves_each_process_its_share_of_the_text_encoder(finished_run):
    whole = finished_run("one").notes[0]["bytes"]["text encoder"]
    for notes in finished_run("two, sharded, accumulating").notes:
        assert notes["bytes"]["text encoder"] <= 0.6 * whole


@pytest.fixture(scope="module")
def pictures_of(tiny_model, data, tmp_path_factory):
    """`pictures_of(processes, fsdp)`: a run that generates class pictures, draws and measures the held-out loss."""

    @functools.cache
    def run(processes, fsdp):
        folder = tmp_path_factory.mktemp("pictures")
        flags = {
            **data,
            "class_data_dir": folder / "class",
            "num_class_images": 5,
            "sample_batch_size": 2,
            "validation_prompt": "a sks tile in the rain",
            "final_validation_prompt": "a sks tile in the sun",
            "skip_final_inference": False,
            "num_validation_images": 3,
            "validation_num_inference_steps": 2,
            "guidance_scale": 0,  # as of a distilled model, whose class pictures take those steps as well
            "validation_data_dir": data["data"],
            "train_batch_size": 2 // processes,
            "max_train_steps": 1,
            "aspect_ratio_buckets": None,
            "validation_epochs": 1,
        }
        return train_together(processes, train_args(tiny_model, **flags, out=folder / "out"), folder, fsdp)

    return run


def pixels(path):
    return torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.int)


@pytest.mark.parametrize("fsdp", [False, True], ids=["two", "two, sharded"])
def test_class_pictures_are_drawn_once_and_are_those_of_one_process(pictures_of, fsdp):
    one, two = pictures_of(1, False), pictures_of(2, fsdp)
    expected = sorted(path.name for path in (one.out.parent / "class").iterdir())
    assert sorted(path.name for path in (two.out.parent / "class").iterdir()) == expected
    assert len(expected) == 5
    for name in expected:
        assert (pixels(one.out.parent / "class" / name) - pixels(two.out.parent / "class" / name)).abs().max() <= 1
    drawn = [
        {Path(path).stem.split(".")[1] for path in map(str, notes["written"]) if "/.class-" in path}
        for notes in two.notes
    ]
    assert sorted(map(len, drawn)) == [2, 3]
    assert not drawn[0] & drawn[1]


def test_missing_class_pictures_are_drawn_beside_those_that_stand(tiny_model, data, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    shutil.copy(data["class_data_dir"] / "black.png", folder / "class-00002.png")
    flags = {**data, "class_data_dir": folder, "num_class_images": 3, "validation_num_inference_steps": 1}
    train_together(2, train_args(tiny_model, **flags, out=tmp_path / "out", max_train_steps=1), tmp_path)
    assert len(list(folder.iterdir())) == 3
    assert not pixels(folder / "class-00002.png").any()  # as black as it was


@pytest.mark.parametrize("fsdp", [False, True], ids=["two", "two, sharded"])
def test_validation_pictures_and_held_out_loss_are_those_of_one_process(pictures_of, fsdp):
    one, two = pictures_of(1, False), pictures_of(2, fsdp)
    expected = sorted(path.name for path in (one.out / "samples").glob("*.png"))
    assert sorted(path.name for path in (two.out / "samples").glob("*.png")) == expected
    assert sum("-image-" in name for name in expected) == 6  # three before training and three after
    for name in expected:
        assert (pixels(one.out / "samples" / name) - pixels(two.out / "samples" / name)).abs().max() <= 2
    *_, line = [line for line in one.outputs[0].splitlines() if ": held-out loss" in line]
    assert line in two.outputs[0]
    assert ": held-out loss" not in two.outputs[1]


@pytest.mark.parametrize("fsdp", [False, True], ids=["two", "two, sharded"])
def test_three_epochs_of_one_picture_leave_one_of_two_processes_without_a_sample_at_the_end(
    tiny_model, tmp_path, fsdp
):
    paint(tmp_path / "tile", {"red": PICTURES["red"]})
    flags = {"max_train_steps": None, "num_train_epochs": 3}
    result = train_together(2, train_args(tiny_model, tmp_path / "tile", tmp_path / "out", **flags), tmp_path, fsdp)
    updates = []
    for micro_batches in zip(*(notes["updates"] for notes in result.notes), strict=True):
        weights = [weight for process in micro_batches for batch in process for weight in batch["weights"].tolist()]
        updates.append([weight for weight in weights if weight])
    assert updates == [[0.5, 0.5], [1.0]]
    assert "2 steps of 2 pictures: 3.0 epochs of 1 samples" in result.outputs[0]


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_by", "resumed_as"),
    [("two", "one"), ("one", "two"), ("two, sharded", "two"), ("two", "two, sharded")],
)
def test_a_run_goes_on_as_another_kind_of_run(tiny_model, data, finished_run, tmp_path, saved_by, resumed_as):
    processes, fsdp, flags = RUNS[resumed_as]
    checkpoint = finished_run(saved_by).out / "checkpoint-10"
    argv = train_args(tiny_model, **data, out=tmp_path / "out", resume_from_checkpoint=checkpoint, **flags)
    result = train_together(processes, argv, tmp_path, fsdp)
    assert [len(notes["updates"]) for notes in result.notes] == [10] * processes
    assert difference(result.out, finished_run(saved_by).out) < 1e-4


def test_a_stop_signal_to_one_process_stops_all_after_the_same_step(tiny_model, data, tmp_path):
    out = tmp_path / "out"
    argv = train_args(tiny_model, **data, out=out, max_train_steps=100_000)
    with started(2, argv, tmp_path) as group:
        group[0].wait_for("step 1/")
        os.kill(group[1].process.pid, signal.SIGTERM)
        assert [process.finish().returncode for process in group] == [143, 143]
    (checkpoint,) = out.glob("checkpoint-*")
    steps = [len(torch.load(tmp_path / f"notes-{rank}.pt", weights_only=False)["updates"]) for rank in range(2)]
    assert steps == [int(checkpoint.name.removeprefix("checkpoint-"))] * 2


@pytest.mark.parametrize(("killed", "fsdp"), [(0, False), (1, True)], ids=["main process", "other process, sharded"])
def test_when_a_process_is_killed_the_others_end_within_a_minute(tiny_model, data, tmp_path, killed, fsdp):
    argv = train_args(tiny_model, **data, out=tmp_path / "out", max_train_steps=100_000)
    with started(2, argv, tmp_path, fsdp) as group:
        group[0].wait_for("step 1/")
        group[killed].kill()
        assert group[1 - killed].finish(timeout=60).returncode not in (0, None)


def machine(config, rank, port, folder):
    """The command that a user starts on a machine, with `configs/CONFIG` filled in for it."""
    settings = yaml.safe_load((ROOT / "configs" / config).read_text("utf-8"))
    settings |= {"machine_rank": rank, "num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": port}
    file = folder / f"machine-{rank}.yaml"
    file.write_text(yaml.safe_dump(settings), "utf-8")
    return [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", file, SCRIPT]


@pytest.mark.slow
def test_two_machines_train_as_one_and_end_when_one_of_them_loses_its_process(tiny_model, data, tmp_path):
    port, out = free_port(), tmp_path / "out"
    flags = {**data, "checkpointing_steps": 5, "mixed_precision": "no"}
    argv = train_args(tiny_model, **flags, out=out, max_train_steps=100_000)
    launchers, logs = [], [tmp_path / f"machine-{rank}.txt" for rank in range(2)]
    try:
        for rank in range(2):
            with logs[rank].open("w") as log:
                launchers.append(
                    subprocess.Popen(
                        [*machine("multi_node.yaml", rank, port, tmp_path), *argv],
                        env=training_environment({"ACCELERATE_USE_CPU": "1"}),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + 240
        while not (out / "checkpoint-5").is_dir():
            running = time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers)
            assert running, "\n".join(log.read_text("utf-8") for log in logs)
            time.sleep(0.1)
        shutil.copytree(out / "checkpoint-5", tmp_path / "checkpoint-5")
        (trainer,) = [p for p in psutil.Process(launchers[1].pid).children() if str(SCRIPT) in p.cmdline()]
        trainer.kill()
        assert all(launcher.wait(timeout=60) != 0 for launcher in launchers)
    finally:
        for launcher in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()

    one = train_together(
        1,
        train_args(tiny_model, **{**flags, "train_batch_size": 2}, out=tmp_path / "one" / "out", max_train_steps=5),
        tmp_path / "one",
    )
    assert difference(tmp_path / "checkpoint-5", one.out) < 1e-4
    last = max(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": last + 2}
    weights = []
    for processes in (2, 1):
        folder = tmp_path / f"resumed by {processes}"
        shutil.copytree(out, folder / "out")
        result = train_together(
            processes,
            train_args(tiny_model, **{**flags, **resumed, "train_batch_size": 2 // processes}, out=folder / "out"),
            folder,
        )
        assert [len(notes["updates"]) for notes in result.notes] == [2] * processes
        weights.append(result.out)
    assert difference(*weights) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What processes must agree on
# ---------------------------------------------------------------------------------------------------------------------


def test_processes_draw_one_seed_when_none_is_given(tiny_model, data, tmp_path):
    result = train_together(2, train_args(tiny_model, **data, out=tmp_path / "out", seed=None), tmp_path)
    (line,) = [line for line in result.outputs[0].splitlines() if "--seed was not given" in line]
    assert f'"seed": {line.split()[-1]}' in (tmp_path / "out" / "run.json").read_text("utf-8")
    noises = [batch["noise"] for notes in result.notes for update in notes["updates"] for batch in update]
    again = train_together(
        1,
        train_args(tiny_model, **{**data, "train_batch_size": 2}, out=tmp_path / "one" / "out", seed=line.split()[-1]),
        tmp_path / "one",
    )
    expected = [batch["noise"] for update in again.notes[0]["updates"] for batch in update]

    def listed(batches):
        return sorted(tuple(noise.flatten().tolist()) for batch in batches for noise in batch)

    assert listed(noises) == listed(expected)


def test_a_cache_of_encodings_that_one_machine_lacks_is_no_hindrance(tiny_model, data, finished_run, tmp_path):
    flags = {**data, **RUNS["two"][2], "max_train_steps": 20}
    (tmp_path / "cache-0").mkdir()
    first = train_args(
        tiny_model,
        **{**flags, "train_batch_size": 4, "max_train_steps": 1},
        out=tmp_path / "first" / "out",
        encoding_cache_dir=tmp_path / "cache-0",
    )
    train_together(1, first, tmp_path / "first")

    def argv(rank):
        return train_args(tiny_model, **flags, out=tmp_path / "out", encoding_cache_dir=tmp_path / f"cache-{rank}")

    result = train_together(2, argv, tmp_path)
    assert difference(result.out, finished_run("two").out) < 1e-6


@pytest.mark.parametrize("what", ["checkpoint", "pictures"])
def test_machines_that_see_different_files_are_refused(tiny_model, data, finished_run, tmp_path, what):
    flags = {**data, **RUNS["two"][2]}
    shutil.copytree(finished_run("two").out / "checkpoint-10", tmp_path / "out-0" / "checkpoint-10")
    shutil.copytree(data["data"], tmp_path / "tiles-1")
    (tmp_path / "tiles-1" / "red.png").unlink()

    def argv(rank):
        own = {"out": tmp_path / "out"}
        if what == "checkpoint":
            own = {"out": tmp_path / f"out-{rank}", "resume_from_checkpoint": "latest"}
        elif rank == 1:
            own["data"] = tmp_path / "tiles-1"
        return train_args(tiny_model, **{**flags, **own})

    result = train_together(2, argv, tmp_path, check=False)
    assert result.exit_statuses == [2, 2]
    assert "processes" in result.outputs[0]
    assert "Traceback" not in "".join(result.outputs)


def test_an_fsdp_config_of_version_1_is_refused_in_one_line(tiny_model, data, tmp_path):
    env = {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}
    result = train_together(
        2, train_args(tiny_model, **data, out=tmp_path / "out"), tmp_path, fsdp=True, env=env, check=False
    )
    assert result.exit_statuses == [2, 2]
    assert "fsdp_version: 2" in result.outputs[0]
    assert "Traceback" not in "".join(result.outputs)


def quantized(folder, data, tiny_model, config, **flags):
    return train_args(
        tiny_model, **data | flags, out=folder / "out", bnb_quantization_config_path=f"configs/{config}.json"
    )


def test_fsdp_shards_a_4_bit_base_with_the_same_result(tiny_model, data, tmp_path):
    flags = {**CACHED, "max_train_steps": 6}
    one, two = tmp_path / "one", tmp_path / "two"
    lone = train_together(
        1, quantized(one, data, tiny_model, "nf4", **flags, **SIZES["4"]), one, change=bitsandbytes_on_cpu
    )
    shared = train_together(
        2, quantized(two, data, tiny_model, "nf4", **flags, **SIZES["2"]), two, fsdp=True, change=bitsandbytes_on_cpu
    )
    assert difference(shared.out, lone.out) < 1e-4
    whole = lone.notes[0]["bytes"]["transformer"]
    assert all(notes["bytes"]["transformer"] <= 0.6 * whole for notes in shared.notes)


def test_fsdp_shards_a_float8_base_with_the_same_result(tiny_model, data, tmp_path):
    """Up to float8's rounding: each micro-batch has a scale of its own, and there are two in place of one."""
    flags = {**CACHED, "max_train_steps": 6, "base_model_precision": "fp8"}
    one, two = tmp_path / "one", tmp_path / "two"
    lone = train_together(1, train_args(tiny_model, **data | flags | SIZES["4"], out=one / "out"), one)
    argv = train_args(tiny_model, **data | flags | SIZES["2"], out=two / "out")
    shared = train_together(2, argv, two, fsdp=True)
    assert difference(shared.out, lone.out) < 0.1
    whole = lone.notes[0]["bytes"]["transformer"]
    assert all(notes["bytes"]["transformer"] <= 0.6 * whole for notes in shared.notes)


def test_fsdp_with_an_8_bit_base_is_refused_in_one_line(tiny_model, data, tmp_path):
    argv = quantized(tmp_path, data, tiny_model, "int8")
    result = train_together(2, argv, tmp_path, fsdp=True, check=False, change=bitsandbytes_on_cpu)
    assert result.exit_statuses == [2, 2]
    assert "FSDP needs load_in_4bit" in result.outputs[0]
    assert "Traceback" not in "".join(result.outputs)


def test_fsdp_with_parameters_in_host_memory_is_refused_in_one_line(tiny_model, data, tmp_path):
    env = {"FSDP_OFFLOAD_PARAMS": "true"}
    result = train_together(
        2, train_args(tiny_model, **data, out=tmp_path / "out"), tmp_path, fsdp=True, env=env, check=False
    )
    assert result.exit_statuses == [2, 2]
    assert "fsdp_offload_params" in result.outputs[0]
    assert "Traceback" not in "".join(result.outputs)


def test_fsdp_text_encoder_without_fsdp_is_refused_in_one_line(tiny_model, data, tmp_path):
    argv = train_args(tiny_model, **data, out=tmp_path / "out", fsdp_text_encoder=True)
    result = train_together(2, argv, tmp_path, check=False)
    assert result.exit_statuses == [2, 2]
    assert "--fsdp_text_encoder needs" in result.outputs[0]
