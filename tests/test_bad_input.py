"""Every bad input is answered: damaged pictures and captions, malformed command lines and JSON, incomplete models.

The answer is one line that names the culprit and exit status 2, before any weights are loaded; or training goes on as
documented. Never a traceback, much memory, or a touched input file.
"""

import contextlib
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from PIL import Image, ImageCms, PngImagePlugin

import train_dreambooth_lora_z_image as trainer
from running import GOES_ON, error_line, fork_trainer, launch, launch_script, run_here
from tiny import load_all_examples, train_args


LORA = "pytorch_lora_weights.safetensors"


def answer(*argv, env=None):
    """Runs the command line in this process until it would load weights."""
    return run_here(*argv, env=env, load_weights=False)


def snapshot(folder):
    """The bytes, times and rights of all files under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) for path in files}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def sound_pictures():
    """{file name: encoded picture} in every format and kind of pixel that occurs."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 52, 3), generator=generator, dtype=torch.uint8).numpy()
    rgb = Image.fromarray(pixels)
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    srgb[24:36] = bytes(12)  # the date of its making: the corpus is to be the same every time
    sixteen = Image.new("I;16", (52, 40), 40_000)
    pictures = {
        "photo.jpg": (rgb, "JPEG", {"exif": exif, "icc_profile": bytes(srgb)}),
        "progressive.jpeg": (rgb, "JPEG", {"progressive": True}),
        "print.jpg": (rgb.convert("CMYK"), "JPEG", {}),
        "plain.png": (rgb, "PNG", {"icc_profile": bytes(srgb)}),
        "alpha.png": (alpha, "PNG", {"exif": exif}),
        "palette.png": (rgb.quantize(16), "PNG", {"transparency": 3}),
        "sixteen.png": (sixteen, "PNG", {}),
        "line.png": (rgb.convert("1"), "PNG", {}),
        "lossy.webp": (alpha, "WEBP", {}),
        "moving.webp": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "moving.gif": (rgb.quantize(32), "GIF", {"save_all": True, "append_images": [rgb.quantize(8)]}),
        "bitmap.bmp": (rgb, "BMP", {}),
        "scan.tiff": (rgb.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"}),
        "float.tif": (rgb.convert("F"), "TIFF", {}),
        "photo.avif": (rgb, "AVIF", {}),
    }
    encoded = {}
    for name, (picture, kind, options) in pictures.items():
        buffer = io.BytesIO()
        with contextlib.suppress(KeyError):  # a Pillow that was built without AVIF
            picture.save(buffer, kind, **options)
            encoded[name] = buffer.getvalue()
    return encoded


def mutate(content, generator):
    """One of several ways in which a file is damaged."""
    changed = bytearray(content)
    kind = generator.choice(["cut", "bits", "bits", "header", "zeros", "noise", "twice", "removed"])
    start = generator.randrange(len(changed))
    length = generator.randrange(1, 40)
    if kind == "cut":
        del changed[start:]
    elif kind == "bits":
        for _ in range(generator.choice([1, 4, 30])):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    elif kind == "header":  # widths, offsets and lengths stand there
        for _ in range(3):
            changed[generator.randrange(min(120, len(changed)))] = generator.choice([0, 1, 127, 255])
    elif kind == "zeros":
        changed[start : start + length] = bytes(len(changed[start : start + length]))
    elif kind == "noise":
        changed[start : start + length] = generator.randbytes(length)
    elif kind == "twice":
        changed[start:start] = changed[start : start + length]
    else:
        del changed[start : start + length]
    return bytes(changed)


def png(width, height, rows=b"", *, bits=8, colour=2, chunks=()):
    """A PNG file whose header may promise more than its compressed `rows` hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    extra = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(size):
    """`size` zero bytes, compressed a piece at a time."""
    compressor, parts = zlib.compressobj(1), []
    for start in range(0, size, 1 << 24):
        parts.append(compressor.compress(bytes(min(1 << 24, size - start))))
    return b"".join([*parts, compressor.flush()])


def encode(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures():
    """{file name: content} of files that are wrong, or unusual, in ways that no mutation finds."""
    jpeg, small = sound_pictures()["photo.jpg"], Image.new("RGB", (8, 8), "teal")
    many_texts = PngImagePlugin.PngInfo()
    many_texts.add_text("Comment", "x" * 5_000_000, zip=True)
    return {
        "empty.jpg": b"",
        "one byte.png": b"\x89",
        "text.jpg": b"not a picture at all\n",
        "page.webp": b"<!DOCTYPE html><title>404</title>",
        "video.gif": b"\x00\x00\x00\x20ftypisom",
        "jpeg inside.png": jpeg,
        "png inside.jpg": png(2, 2, zeros(14)),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "one pixel.png": encode(Image.new("RGB", (1, 1)), "PNG"),
        "needle.png": encode(Image.new("RGB", (1, 5000)), "PNG"),
        "thread.png": encode(Image.new("RGB", (20_000, 3)), "PNG"),
        "panorama.jpg": encode(Image.new("RGB", (20_000, 64), "olive"), "JPEG"),
        "no width.png": png(0, 10, zeros(10)),
        "promises.png": png(50_000, 50_000, zeros(10)),
        "promises more.png": png(2**31 - 1, 2**31 - 1, zeros(10)),
        "bomb.png": png(20_000, 20_000, zeros(1_000_000)),
        "bomb.gif": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\x00\x00" + bytes(6) + b";",
        "bomb.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        "long text.png": encode(small, "PNG", pnginfo=many_texts),
        "profile bomb.png": png(2, 2, zeros(14), chunks=[(b"iCCP", b"x\0\0" + zeros(100_000_000))]),
        "bad profile.jpg": encode(small, "JPEG", icc_profile=b"x" * 200),
        "bad orientation.jpg": encode(small, "JPEG", exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40),
        "two lines\n.jpg": jpeg,
        "two lines\nbroken.jpg": jpeg[:200],
        "狗和猫.jpg": jpeg,
        "狗和猫 坏.jpg": jpeg[:200],
        "🐕.png": png(2, 2, zeros(14)),
        "🐕💥.png": png(2, 2, b"broken"),
        "right to left \u202egpj.jpg": jpeg[:300],
        "tab\tand\x1b[31mred.png": b"broken",
        "%s {name}.jpg": jpeg[:100],
    }


@functools.cache
def picture_corpus(seed):
    """At least 300 damaged or odd pictures as [(file name, content)]."""
    generator = random.Random(seed)
    corpus = list(odd_pictures().items())
    for name, content in sound_pictures().items():
        corpus += [(f"{number}-{name}", mutate(content, generator)) for number in range(20)]
    corpus += [
        (f"other-{number}{generator.choice(sorted(trainer.PICTURE_FORMATS))}", mutate(content, generator))
        for number, content in enumerate([*sound_pictures().values()] * 2)
    ]
    return corpus


def read_whole(folder):
    """What a folder of pictures becomes in training, by the trainer's own functions: [3, 64, 64] each."""
    examples = load_all_examples(trainer.parse_args(train_args("model", folder, "out")))
    pictures = []
    for example in examples["instance"]:
        try:
            image = trainer.load_picture(example)
        except trainer.UserError as error:
            raise AssertionError(f"passed the check before training, and failed in it: {error}") from None
        pictures.append(trainer.fit_to_bucket(image, example.bucket, (0.3, 0.7), flip=True))
    return pictures


def test_the_corpus_is_large_and_the_same_every_time():
    corpus = picture_corpus(seed=5)
    assert len(corpus) >= 300
    assert picture_corpus.__wrapped__(seed=5) == corpus


def test_sound_pictures_of_every_kind_are_read(tmp_path):
    for name, content in sound_pictures().items():
        (tmp_path / name).write_bytes(content)
    pictures = read_whole(tmp_path)
    assert len(pictures) == len(sound_pictures()) >= 14
    assert all(picture.shape == (3, 64, 64) for picture in pictures)


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about damaged metadata and large pictures
def test_every_damaged_picture_is_read_or_refused_by_name_and_left_alone(tmp_path):
    read, refused, wrong = 0, 0, []
    for number, (name, content) in enumerate(picture_corpus(seed=5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        before = snapshot(folder)
        try:
            for picture in read_whole(folder):
                assert picture.shape == (3, 64, 64) and picture.abs().max() <= 1
            read += 1
        except trainer.UserError as error:
            refused += 1
            if name not in str(error):
                wrong.append(f"{name!r}: not named in {str(error)!r}")
        except Exception as error:
            wrong.append(f"{name!r}: {type(error).__name__}: {error}")
        if snapshot(folder) != before:
            wrong.append(f"{name!r}: touched")
    assert wrong == []
    assert read > 50 and refused > 100


def maximum_memory(trainer):
    """Prints the most memory that the process has had, in MB, when the trainer ends."""
    run = trainer.run_command_line

    def run_and_print():
        status = run()
        print("MB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return status

    trainer.run_command_line = run_and_print


LARGE = {  # as large as Pillow lets pass, which is 178 million pixels: colour type, bits, bytes a pixel, chunks
    "RGBA": (6, 8, 4, ()),
    "16 bit": (0, 16, 2, ()),
    "palette": (3, 8, 1, [(b"PLTE", bytes(6)), (b"tRNS", b"\0")]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("colour", "bits", "size", "chunks"), LARGE.values(), ids=LARGE)
def test_a_picture_as_large_as_is_read_stays_under_2_gb(colour, bits, size, chunks, tiny_model, tmp_path):
    rows = zeros(13_000 * (13_000 * size + 1))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.png").write_bytes(png(13_000, 13_000, rows, bits=bits, colour=colour, chunks=chunks))
    argv = train_args(tiny_model, tmp_path / "photos", tmp_path / "out", max_train_steps=1)
    finished = fork_trainer(*argv, log=tmp_path / "log.txt", before=maximum_memory, check=False)
    assert "Traceback" not in finished.output and finished.returncode in (0, 2), str(finished)
    megabytes = int(re.search(r"^MB: (\d+)", finished.output, re.M)[1])
    assert 100 < megabytes < 2048


BOMBS = ["promises.png", "promises more.png", "bomb.png", "bomb.gif", "bomb.bmp", "profile bomb.png", "long text.png"]


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_in_little_memory(name, tiny_model, photos, tmp_path):
    (photos / name).write_bytes(odd_pictures()[name])
    argv = train_args(tiny_model, photos, tmp_path / "out")
    finished = fork_trainer(*argv, log=tmp_path / "log.txt", before=maximum_memory, check=False, timeout=60)
    assert finished.returncode in (0, 2) and "Traceback" not in finished.output, str(finished)
    assert finished.returncode == 0 or name in finished.output
    assert int(re.search(r"^MB: (\d+)", finished.output, re.M)[1]) < 1500


@pytest.mark.parametrize("number", random.Random(6).sample(range(300), 8))
def test_a_folder_with_one_picture_of_the_corpus_trains_or_is_refused(number, tiny_model, photos, tmp_path):
    name, content = picture_corpus(seed=5)[number]
    (photos / name).write_bytes(content)
    before = snapshot(photos)
    argv = train_args(tiny_model, photos, tmp_path / "out", max_train_steps=8, random_flip=True)
    finished = fork_trainer(*argv, log=tmp_path / "log.txt", check=False, timeout=60)
    if finished.returncode:
        error_line(finished, name)
    assert (tmp_path / "out" / LORA).is_file() == (finished.returncode == 0)
    assert snapshot(photos) == before


@pytest.mark.slow
def test_a_damaged_picture_ends_a_typed_command_with_one_line_and_status_2(tiny_model, photos, tmp_path):
    (photos / "cat.png").write_bytes((photos / "cat.png").read_bytes()[:3000])
    argv = train_args(tiny_model, photos, tmp_path / "out")
    finished = launch_script(*argv, check=False)
    error_line(finished, "cat.png")
    assert not (tmp_path / "out").exists()
    launched = launch(*argv, check=False)
    assert launched.returncode != 0
    assert "train_dreambooth_lora_z_image.py: error: " in launched.stderr


@pytest.mark.parametrize(
    "name", ["two\nlines.jpg", "red\x1b[31m.jpg", "back\rwards.jpg", "\u202egpj.jpg", "\udcff.jpg"]
)
def test_a_strange_file_name_makes_one_printable_line(name, tiny_model, photos, tmp_path):
    (photos / name).write_bytes(b"broken")
    finished = answer(*train_args(tiny_model, photos, tmp_path / "out"))
    assert error_line(finished).isprintable()


def skip_the_check(trainer):
    trainer.PICTURES_VERIFIED = 0


@pytest.mark.parametrize("threads", [0, 2])
def test_a_picture_that_goes_bad_during_training_ends_it_with_one_line(threads, tiny_model, photos, tmp_path):
    (photos / "cat.png").write_bytes((photos / "cat.png").read_bytes()[:3000])
    argv = train_args(tiny_model, photos, tmp_path / "out", max_train_steps=12, dataloader_num_workers=threads)
    finished = fork_trainer(*argv, log=tmp_path / "log.txt", before=skip_the_check, check=False)
    error_line(finished, "cat.png")


@pytest.mark.parametrize(
    ("variable", "value", "answers"),
    [
        ("USE_DEEPSPEED", "true", "configs/fsdp.yaml"),
        ("USE_MEGATRON_LM", "true", "configs/fsdp.yaml"),
        ("MIXED_PRECISION", "fp64", "or 'fp64'"),
        ("DYNAMO_BACKEND", "nothing", "the launcher's config or variables: 'NOTHING' is"),
    ],
)
def test_a_config_of_the_launcher_that_cannot_be_followed_is_refused(variable, value, answers, tiny_model, tmp_path):
    env = {f"ACCELERATE_{variable}": value}
    error_line(answer(*train_args(tiny_model, tmp_path, tmp_path / "out"), env=env), answers)


# ---------------------------------------------------------------------------------------------------------------------
# Folders, links, rights
# ---------------------------------------------------------------------------------------------------------------------


def test_links_to_pictures_are_followed_and_others_left_out(photos, tmp_path):
    outside = tmp_path / "outside.jpg"
    shutil.copy(photos / "coffee.jpg", outside)
    (photos / "link.jpg").symlink_to(outside)
    (photos / "broken.jpg").symlink_to(tmp_path / "nothing.jpg")
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    (photos / "one.jpg").symlink_to(photos / "other.jpg")
    (photos / "other.jpg").symlink_to(photos / "one.jpg")
    (photos / "folder.jpg").symlink_to(tmp_path)
    (photos / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(photos / "pipe.jpg")
    args = trainer.parse_args(train_args("model", photos, "out"))
    examples = load_all_examples(args)["instance"]
    assert len(examples) == 7 and str(photos / "link.jpg") in [example.name for example in examples]


@pytest.mark.parametrize("name", ["cat.txt", "metadata.jsonl"])
def test_a_link_in_the_place_of_a_caption_hangs_nothing(name, tiny_model, photos, tmp_path):
    (photos / name).symlink_to("/dev/zero")
    finished = answer(*train_args(tiny_model, photos, tmp_path / "out"))
    assert finished.returncode == GOES_ON


def test_a_loop_in_the_place_of_the_folder_is_refused(tiny_model, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    finished = answer(*train_args(tiny_model, tmp_path / "loop", tmp_path / "out"))
    error_line(finished, f"--instance_data_dir {tmp_path / 'loop'}")


def deny_reading(trainer):
    """A user without rights: what `chmod 000` means to anybody but root."""
    os.setegid(65_534)
    os.seteuid(65_534)


ROOT_USER = os.geteuid() == 0  # may read everything, and become another user for a moment
REACHABLE = all(folder.stat().st_mode & 0o001 for folder in (Path(sys.prefix), *Path(sys.prefix).parents))


@pytest.mark.skipif(ROOT_USER and not REACHABLE, reason="another user cannot import from this virtual environment")
@pytest.mark.parametrize("place", ["cat.png", "cat.txt", "metadata.jsonl", "."])
def test_what_may_not_be_read_is_named(place, tiny_model, shared_photos):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(shared_photos, folder / "photos")
        shutil.copytree(tiny_model, folder / "model")
        (folder / "photos" / place).exists() or (folder / "photos" / place).write_text("")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        (folder / "photos" / place).chmod(0)
        argv = train_args(folder / "model", folder / "photos", folder / "out")
        before = deny_reading if ROOT_USER else None
        finished = fork_trainer(*argv, log=folder / "log.txt", before=before, check=False)
        error_line(finished, folder / "photos" / place)
        (folder / "photos" / place).chmod(0o755)


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

ROW = '{"file_name": "cat.png", "text": "a cat"}\n'
BROKEN_METADATA = {
    "not JSON": b"cat.png, a cat",
    "cut": ROW.encode()[:20],
    "second line": ROW.encode() + b"{oops}",
    "a list": b'["cat.png", "a cat"]',
    "a text": b'"cat.png"',
    "a number": b"7",
    "null": b"null",
    "no file_name": b'{"file": "cat.png"}',
    "file_name a number": b'{"file_name": 3}',
    "file_name a list": b'{"file_name": ["cat.png"]}',
    "file_name null": b'{"file_name": null}',
    "file_name empty": b'{"file_name": ""}',
    "file_name a folder": b'{"file_name": "."}',
    "file_name missing": b'{"file_name": "nothing.png"}',
    "file_name outside": b'{"file_name": "../secret.png"}',
    "file_name far outside": b'{"file_name": "a/../../secret.png"}',
    "file_name absolute": b'{"file_name": "/etc/passwd"}',
    "file_name with a null": b'{"file_name": "cat\\u0000.png"}',
    "file_name with a surrogate": b'{"file_name": "\\ud800.png"}',
    "file_name too long": b'{"file_name": "' + b"x" * 5000 + b'.png"}',
    "file_name no picture": b'{"file_name": "metadata.jsonl"}',
    "caption a number": b'{"file_name": "cat.png", "text": 3}',
    "caption an object": b'{"file_name": "cat.png", "text": {"en": "a cat"}}',
    "caption a list of numbers": b'{"file_name": "cat.png", "text": [1, 2]}',
    "caption with a surrogate": b'{"file_name": "cat.png", "text": "a \\ud83d cat"}',
    "UTF-16": ROW.encode("utf-16"),
    "Latin-1": '{"file_name": "cat.png", "text": "für"}'.encode("latin-1"),
    "zero bytes": bytes(50),
    "deep": b"[" * 100_000,
    "a long number": b'{"file_name": "cat.png", "n": ' + b"9" * 10_000 + b"}",
}


BROKEN_CAPTIONS = {
    "Latin-1": "für".encode("latin-1"),
    "UTF-16": "a cat".encode("utf-16"),
    "GBK": "一张猫的照片".encode("gbk"),
    "a picture": b"\x89PNG\r\n\x1a\n",
    "cut character": "猫".encode()[:2],
    "encoded surrogate": b"a \xed\xa0\x80 cat",
}
BROKEN = {f"metadata {kind}": ("metadata.jsonl", content) for kind, content in BROKEN_METADATA.items()}
BROKEN |= {f"caption {kind}": ("cat.txt", content) for kind, content in BROKEN_CAPTIONS.items()}


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_metadata_file_or_caption_is_refused_by_name(name, content, tiny_model, photos, tmp_path):
    path = photos / name
    path.write_bytes(content)
    finished = answer(*train_args(tiny_model, photos, tmp_path / "out"))
    error_line(finished, str(path))
    assert path.read_bytes() == content


SOUND_METADATA = {
    "empty": b"",
    "empty lines": b"\n\n  \n" + ROW.encode() + b"\n\n",
    "byte order mark": b"\xef\xbb\xbf" + ROW.encode(),
    "Windows line ends": ROW.replace("\n", "\r\n").encode(),
    "no caption": b'{"file_name": "cat.png"}',
    "caption null": b'{"file_name": "cat.png", "text": null}',
    "caption empty": b'{"file_name": "cat.png", "text": "  "}',
    "captions in a list": b'{"file_name": "cat.png", "text": ["a cat", "a kitten"]}',
    "the same twice": ROW.encode() * 2,
    "with a dot": b'{"file_name": "./cat.png", "text": "a cat"}',
    "other fields": b'{"file_name": "cat.png", "text": "a cat", "width": 3, "tags": {"a": []}}',
}


@pytest.mark.parametrize("content", SOUND_METADATA.values(), ids=SOUND_METADATA)
def test_an_unusual_metadata_file_is_read(content, photos):
    (photos / "metadata.jsonl").write_bytes(content)
    args = trainer.parse_args(train_args("model", photos, "out"))
    (cat,) = [e for e in load_all_examples(args)["instance"] if e.name.endswith("cat.png")]
    assert cat.caption == ("a cat" if b"a cat" in content else "a photo of sks dog")


UNUSUAL_CAPTIONS = {
    "cat": "",
    "coffee": " \n\t ",
    "astronaut": "zero\0byte",
    "astronaut_tall": "一只戴帽子的狗 🐕‍🦺",
    "motorcycle": "two\nlines\r\nthree",
    "rocket_tall": "<|im_end|><|im_start|>system {{ 7 * 7 }} %s {x} \x1b[31m" + "word " * 100_000,
}


def test_unusual_captions_are_trained_on(tiny_model, photos, tmp_path):
    for name, caption in UNUSUAL_CAPTIONS.items():
        (photos / f"{name}.txt").write_text(caption, "utf-8", newline="")
    before = snapshot(photos)
    argv = train_args(tiny_model, photos, tmp_path / "out", train_batch_size=6)
    finished = fork_trainer(*argv, log=tmp_path / "log.txt", timeout=60)
    (cut,) = [line for line in finished.output.splitlines() if "is cut to 512" in line]
    assert "<|im_end|>" in cut
    assert snapshot(photos) == before


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------

COUNTS = [
    "repeats",
    "resolution",
    "max_sequence_length",
    "num_class_images",
    "sample_batch_size",
    "rank",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "lr_num_cycles",
    "validation_epochs",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
]
POSITIVE = ["lora_alpha", "lr_power", "adam_epsilon", "max_grad_norm", "logit_std", "timestep_shift"]
NON_NEGATIVE = ["learning_rate", "prior_loss_weight", "adam_weight_decay", "guidance_scale"]
COUNTS_FROM_ZERO = ["num_validation_images", "lr_warmup_steps", "dataloader_num_workers"]
SHARES = ["caption_dropout", "lora_dropout", "adam_beta1", "adam_beta2", "prodigy_beta3"]
CHOICES = ["mixed_precision", "prior_generation_precision", "lr_scheduler", "optimizer", "weighting_scheme"]
HUGE = "1" + "0" * 400

# (flags over those of train_args, what the line must name)
MALFORMED = [
    *[({name: value}, name) for name in COUNTS for value in ("0", "-1", "2.5")],
    *[({name: value}, name) for name in COUNTS_FROM_ZERO for value in ("-1", "2.5")],
    *[({name: value}, name) for name in ("rank", "seed", "dataloader_num_workers") for value in ("many", "", HUGE)],
    *[({name: value}, name) for name in POSITIVE for value in ("0", "nan", "inf")],
    *[({name: value}, name) for name in NON_NEGATIVE for value in ("-1", "1e999")],
    *[({name: value}, name) for name in SHARES for value in ("-0.1", "1.5")],
    *[({name: "nonsense"}, name) for name in CHOICES],
    *[({name: "maybe"}, name) for name in ("prodigy_decouple", "prodigy_safeguard_warmup")],
    ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler"),
    ({"lr_scheduler": "polynomial", "learning_rate": "1e-9"}, "lr_scheduler"),
    ({"optimizer": "prodigy", "learning_rate": 0}, "learning_rate"),
    ({"adam_beta1": "1"}, "adam_beta1"),
    ({"pretrained_model_name_or_path": None}, "pretrained_model_name_or_path"),
    ({"pretrained_model_name_or_path": "/nothing"}, "pretrained_model_name_or_path /nothing"),
    ({"pretrained_model_name_or_path": ""}, "pretrained_model_name_or_path"),
    ({"pretrained_model_name_or_path": "not a/hub/id"}, "pretrained_model_name_or_path not a/hub/id"),
    ({"instance_prompt": None}, "instance_prompt"),
    ({"instance_prompt": "a \udcff dog"}, "instance_prompt"),
    ({"validation_prompt": "a \udcff dog"}, "validation_prompt"),
    ({"instance_data_dir": None}, "instance_data_dir"),
    ({"instance_data_dir": "/nothing"}, "instance_data_dir /nothing"),
    ({"instance_data_dir": "/etc/passwd"}, "instance_data_dir /etc/passwd"),
    ({"instance_data_dir": "x" * 5000}, "instance_data_dir"),
    ({"instance_data_dir": ""}, "instance_data_dir"),
    ({"dataset_name": "photos"}, "dataset_name"),
    ({"dataset_config_name": "en"}, "dataset_config_name"),
    ({"caption_column": "text"}, "caption_column"),
    ({"validation_data_dir": "/nothing"}, "validation_data_dir /nothing"),
    ({"with_prior_preservation": True}, "class_data_dir"),
    ({"with_prior_preservation": True, "class_data_dir": "/etc/passwd", "class_prompt": "a dog"}, "class_data_dir"),
    *[
        ({"aspect_ratio_buckets": value}, "aspect_ratio_buckets")
        for value in ("64", "64x64", "64,64,64", "63,64", "0,64", "-64,64", ";", "64,64;big", "1e2,64")
    ],
    ({"resolution": "16384"}, "resolution"),
    ({"resolution": "1000000000"}, "resolution"),
    ({"aspect_ratio_buckets": "64,160000"}, "aspect_ratio_buckets"),
    ({"lora_layers": ""}, "lora_layers"),
    ({"lora_layers": ","}, "lora_layers"),
    ({"lora_layers": "to_q,to_x"}, "to_x"),
    ({"lora_layers": "layers.99.attention.to_q"}, "layers.99"),
    ({"lora_layers": "norm_q"}, "norm_q"),
    ({"report_to": ""}, "report_to"),
    ({"report_to": "tensorbord"}, "report_to tensorbord"),
    ({"report_to": "tensorboard,none"}, "report_to"),
    ({"attention_backend": "magic"}, "--attention_backend: invalid choice: 'magic'"),
    ({"enable_npu_flash_attention": True}, "enable_npu_flash_attention"),
    ({"fsdp_text_encoder": True}, "fsdp_text_encoder"),
    ({"do_fp8_training": True, "bnb_quantization_config_path": "x.json"}, "bnb_quantization_config_path"),
    ({"bnb_quantization_config_path": "/nothing.json"}, "bnb_quantization_config_path"),
    ({"base_adapter": "/nothing.safetensors"}, "base_adapter"),
    ({"base_adapter": "/nothing.safetensors:nan"}, "base_adapter"),
    ({"validation_model_path": "/nothing", "validation_prompt": "a dog"}, "validation_model_path"),
    ({"resume_from_checkpoint": "/nothing"}, "resume_from_checkpoint /nothing"),
    ({"resume_from_checkpoint": ""}, "resume_from_checkpoint"),
    ({"push_to_hub": True, "hub_model_id": "not a/hub/id"}, "hub_model_id"),
    ({"output_dir": "/etc/passwd"}, "output_dir '/etc/passwd'"),
    ({"output_dir": "/proc/nothing"}, "output_dir '/proc/nothing'"),
    ({"no_such_flag": "1"}, "no_such_flag"),
    ({"lora": "1"}, "--lora"),
    ({"center_crop": "yes"}, "center_crop"),
]


def test_there_are_at_least_100_malformed_command_lines():
    assert len(MALFORMED) >= 100


@pytest.mark.parametrize(("flags", "named"), MALFORMED, ids=lambda value: str(value)[:50].replace("/", "|"))
def test_a_malformed_command_line_is_refused_before_weights_are_loaded(
    flags, named, tiny_model, shared_photos, tmp_path
):
    finished = answer(*train_args(tiny_model, shared_photos, tmp_path / "out", **flags))
    error_line(finished, named)
    assert not (tmp_path / "out").exists()


ARGUMENT_FILES = {
    "missing": None,
    "a folder": "folder",
    "unbalanced quote": b'--instance_prompt="a dog',
    "not UTF-8": b"--instance_prompt=\xff\xfe",
    "names itself": b"@{path}",
    "unknown flag": b"--no_such_flag=1",
    "a value that is no number": b"--rank=many",
    "zero byte": b"--instance_data_dir=a\0b",
}


@pytest.mark.parametrize("content", ARGUMENT_FILES.values(), ids=ARGUMENT_FILES)
def test_a_malformed_argument_file_is_refused(content, tiny_model, shared_photos, tmp_path):
    path = tmp_path / "recipe.args"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.replace(b"{path}", str(path).encode()))
    argv = train_args(tiny_model, shared_photos, tmp_path / "out")
    finished = answer(*argv, f"@{path}")
    line = error_line(finished)
    assert any(name in line for name in (str(path), "--no_such_flag", "--rank", "--instance_data_dir", "a dog"))


QUANTIZATION = {
    "empty": b"",
    "not JSON": b"load_in_4bit: true",
    "cut": b'{"load_in_4bit": tr',
    "a list": b"[1]",
    "a number": b"4",
    "null": b"null",
    "not UTF-8": b'{"load_in_4bit": "\xff"}',
    "deep": b"[" * 100_000,
    "nothing chosen": b"{}",
    "both": b'{"load_in_4bit": true, "load_in_8bit": true}',
    "misspelt": b'{"load_in_4bits": true}',
    "misspelt beside": b'{"load_in_4bit": true, "bnb_4bit_quant_typ": "nf4"}',
    "no boolean": b'{"load_in_4bit": "yes"}',
    "unknown type": b'{"load_in_4bit": true, "bnb_4bit_quant_type": "nf5"}',
    "unknown storage": b'{"load_in_4bit": true, "bnb_4bit_quant_storage": "bfloat17"}',
    "type a number": b'{"load_in_4bit": true, "bnb_4bit_quant_type": 4}',
    "threshold a text": b'{"load_in_8bit": true, "llm_int8_threshold": "six"}',
    "modules a number": b'{"load_in_8bit": true, "llm_int8_skip_modules": 3}',
}


@pytest.mark.parametrize("content", QUANTIZATION.values(), ids=QUANTIZATION)
def test_a_malformed_quantization_file_is_refused_before_weights_are_loaded(
    content, tiny_model, shared_photos, tmp_path, monkeypatch
):
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):  # as on a machine that has a GPU
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    path = tmp_path / "quantization.json"
    path.write_bytes(content)
    flags = {"bnb_quantization_config_path": path}
    finished = answer(*train_args(tiny_model, shared_photos, tmp_path / "out", **flags))
    line = error_line(finished)
    assert "--bnb_quantization_config_path" in line and str(path) in line


@pytest.mark.slow
def test_a_malformed_command_typed_in_a_shell_ends_with_one_line_and_status_2(tiny_model, photos, tmp_path):
    argv = train_args(tiny_model, photos, tmp_path / "out", lora_layers="to_x")
    finished = launch_script(*argv, check=False)
    error_line(finished, "to_x")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

COMPONENTS = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]
CONFIGS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny pipeline that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(model, photos, tmp_path):
    """The line in which the model is refused, which happens before weights are loaded."""
    finished = answer(*train_args(model, photos, tmp_path / "out"))
    line = error_line(finished)
    assert str(model) in line
    assert not (tmp_path / "out").exists()
    return line


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_pipeline_without_a_component_is_refused(component, model, shared_photos, tmp_path):
    shutil.rmtree(model / component)
    assert component in refusal(model, shared_photos, tmp_path)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_that_is_an_empty_folder_is_refused(component, model, shared_photos, tmp_path):
    shutil.rmtree(model / component)
    (model / component).mkdir()
    assert component in refusal(model, shared_photos, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "", "null"], ids=["cut", "list", "empty", "null"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_with_a_broken_config_is_refused(content, component, model, shared_photos, tmp_path):
    (model / component / CONFIGS[component]).write_text(content)
    refusal(model, shared_photos, tmp_path)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_component_without_its_weights_is_refused(component, model, shared_photos, tmp_path):
    for path in (model / component).glob("*.safetensors"):
        path.unlink()
    assert component in refusal(model, shared_photos, tmp_path)


@pytest.mark.parametrize(
    ("component", "wrong"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}),
        ("vae", {"_class_name": "AutoencoderTiny"}),
        ("scheduler", {"_class_name": "DDIMScheduler"}),
        ("text_encoder", {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}),
        ("text_encoder", {"model_type": "no_such_type"}),
        ("text_encoder", {"hidden_size": 64}),
        ("vae", {"latent_channels": 4}),
    ],
)
def test_a_component_of_another_pipeline_is_refused(component, wrong, model, shared_photos, tmp_path):
    edit(model / component / CONFIGS[component], **wrong)
    refusal(model, shared_photos, tmp_path)


def test_another_pipeline_is_refused(model, shared_photos, tmp_path):
    edit(model / "model_index.json", _class_name="FluxPipeline")
    assert "FluxPipeline" in refusal(model, shared_photos, tmp_path)


def test_a_folder_without_an_index_is_refused(model, shared_photos, tmp_path):
    (model / "model_index.json").unlink()
    assert "model_index.json" in refusal(model, shared_photos, tmp_path)


def test_a_tokenizer_without_a_chat_template_is_refused(model, shared_photos, tmp_path):
    for path in (model / "tokenizer").glob("chat_template*"):
        path.unlink()
    config = json.loads((model / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))
    config.pop("chat_template", None)
    (model / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    assert "tokenizer" in refusal(model, shared_photos, tmp_path)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "not safetensors", "other names"])
def test_damaged_weights_end_the_run_with_one_line(damage, component, model, photos, tmp_path):
    (path,) = (model / component).glob("*.safetensors")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "not safetensors":
        path.write_bytes(b"<html>404</html>" * 100)
    else:
        from safetensors.torch import load_file, save_file

        save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    argv = train_args(model, photos, tmp_path / "out")
    finished = fork_trainer(*argv, log=tmp_path / "log.txt", check=False)
    error_line(finished, component)
