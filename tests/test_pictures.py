"""Pictures as they are found: broken EXIF blocks, wide numbers, folders of other programs, masks."""

import io
import json
import shutil
import struct
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from running import fork_trainer
from tiny import load_all_examples, lora_tensors, train_args


def read(folder, **flags):
    """What the flags make of a folder: {kind: examples}. No prompt is given unless a flag does."""
    flags = {"instance_prompt": None, "resolution": 64, **flags}
    return load_all_examples(trainer.parse_args(train_args("model", folder, "out", **flags)))


def captions(folder, **flags):
    return {Path(example.name).name: example.caption for example in read(folder, **flags)["instance"]}


def refusal(*args, **flags):
    """The one line with which the flags are refused."""
    with pytest.raises(trainer.UserError) as error:
        read(*args, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def paint(path, color=(200, 30, 60), size=(16, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# EXIF blocks
# ---------------------------------------------------------------------------------------------------------------------

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SSHORT, SRATIONAL, FLOAT, DOUBLE = 1, 2, 3, 4, 5, 7, 8, 10, 11, 12
FAR = struct.pack("<I", 70_000)  # an offset outside every block here
ON_ITS_SIDE = (0x0112, SHORT, 1, b"\6\0\0\0")


def exif_block(*entries, entries_promised=None, next_folder=0, tail=b""):
    """A TIFF header, one folder of entries (tag, type, count, four bytes), then `tail`: after two, at byte 38."""
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", entries_promised or len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack("<HHI", tag, kind, count) + value
    return block + struct.pack("<I", next_folder) + tail


def big_endian_block():
    return b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, SHORT, 1, 6, 0) + bytes(4)


AT_TAIL = struct.pack("<I", 38)
TURNED = {  # blocks that say how to turn the picture, each with something odd
    "nothing odd": exif_block(ON_ITS_SIDE),
    "big endian": big_endian_block(),
    "a text that is a number": exif_block((0x010F, FLOAT, 1, b"\0\0\xc0\x7f"), ON_ITS_SIDE),
    "an entry before it out of range": exif_block((0x0110, SHORT, 3, FAR), ON_ITS_SIDE),
    "an entry after it out of range": exif_block(ON_ITS_SIDE, (0x011A, RATIONAL, 1, FAR)),
    "a denominator of 0": exif_block(ON_ITS_SIDE, (0x011A, RATIONAL, 1, AT_TAIL), tail=struct.pack("<II", 72, 0)),
    "0 / 0": exif_block(ON_ITS_SIDE, (0x011A, RATIONAL, 1, AT_TAIL), tail=bytes(8)),
    "a negative resolution": exif_block(ON_ITS_SIDE, (0x011A, SRATIONAL, 1, AT_TAIL), tail=struct.pack("<ii", -1, 1)),
    "four billion letters": exif_block((0x010E, ASCII, 2**32 - 1, AT_TAIL), ON_ITS_SIDE),
    "no letters": exif_block((0x010E, ASCII, 0, bytes(4)), ON_ITS_SIDE),
    "a type that does not exist": exif_block((0x010E, 99, 1, bytes(4)), ON_ITS_SIDE),
    "fewer entries than promised": exif_block(ON_ITS_SIDE, entries_promised=40),
    "a loop of folders": exif_block(ON_ITS_SIDE, next_folder=8),
    "a folder that is a text": exif_block(ON_ITS_SIDE, (0x8769, ASCII, 4, b"abc\0")),
    "a folder out of range": exif_block(ON_ITS_SIDE, (0x8769, LONG, 1, FAR)),
    "a folder before the block": exif_block(ON_ITS_SIDE, (0x8825, SSHORT, 1, b"\xfd\xff\0\0")),
    "a folder at no number": exif_block(ON_ITS_SIDE, (0x8825, FLOAT, 1, b"\0\0\xc0\x7f")),
    "turned twice": exif_block(ON_ITS_SIDE, (0x0112, SHORT, 1, b"\1\0\0\0")),
    "two turns in one": exif_block((0x0112, SHORT, 2, b"\6\0\6\0")),
    "a long number": exif_block((0x0112, LONG, 1, b"\6\0\0\0")),
    "a byte": exif_block((0x0112, BYTE, 1, b"\6\0\0\0")),
}
NOT_TURNED = {
    "a text": exif_block((0x0112, ASCII, 2, b"6\0\0\0")),
    "no number": exif_block((0x0112, FLOAT, 1, b"\0\0\xc0\x7f")),
    "0": exif_block((0x0112, SHORT, 1, bytes(4))),
    "9": exif_block((0x0112, SHORT, 1, b"\x09\0\0\0")),
    "65535": exif_block((0x0112, SHORT, 1, b"\xff\xff\0\0")),
    "only a header": b"II*\0",
    "noise": bytes(range(256)),
    "a folder far away": b"II*\0\xff\xff\xff\0",
}


def upright():
    """A picture [48, 32, 3] that shows how it is turned."""
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:16, :16], pixels[32:, 16:] = (255, 0, 0), (0, 255, 0)
    return pixels


def with_exif(block, kind):
    """The picture as it is stored by a camera that was held on its side, with that block."""
    image, file = Image.fromarray(np.ascontiguousarray(upright().swapaxes(0, 1)[::-1])), io.BytesIO()
    if kind == "JPEG":  # whose writer corrects the block
        image.save(file, kind, quality=100, subsampling=0)
        segment = b"Exif\0\0" + block
        return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + file.getvalue()[2:]
    image.save(file, kind, exif=block, lossless=True)
    return file.getvalue()


def test_a_picture_is_upright_that_says_so_in_xmp_alone(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored = Image.fromarray(np.ascontiguousarray(upright().swapaxes(0, 1)[::-1]))
    stored.save(tmp_path / "a.jpg", quality=100, subsampling=0, xmp=xmp)
    assert trainer.decode_image("a", tmp_path / "a.jpg").size == (32, 48)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the blocks
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", TURNED.values(), ids=TURNED)
def test_a_picture_is_upright_whatever_else_its_exif_block_says(block, kind, tmp_path):
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(with_exif(block, kind))
    (example,) = read(tmp_path, instance_prompt="x")["instance"]
    found = np.asarray(trainer.decode_image(example.name, example.source)).astype(int)
    assert example.size == found.shape[:2] == (48, 32)
    assert np.abs(found - upright()).max() <= 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", NOT_TURNED.values(), ids=NOT_TURNED)
def test_a_picture_whose_exif_block_says_nothing_stays_as_it_is(block, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(with_exif(block, "JPEG"))
    (example,) = read(tmp_path, instance_prompt="x")["instance"]
    assert example.size == trainer.decode_image(example.name, example.source).size[::-1] == (32, 48)


# ---------------------------------------------------------------------------------------------------------------------
# Wide numbers
# ---------------------------------------------------------------------------------------------------------------------

UNSIGNED, SIGNED, REAL = 1, 2, 3


def tiff(numbers, code, sample_format, black_is_zero=1, order="<"):
    """A TIFF of one row of grey pixels of that kind of number."""
    pixels = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
    bits, start = 8 * struct.calcsize(code), 8 + 2 + 12 * 9 + 4
    values = {256: len(numbers), 257: 1, 258: bits, 259: 1, 262: black_is_zero, 273: start, 277: 1, 279: len(pixels)}
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, LONG, 1, value) for tag, value in (values | {339: sample_format}).items()
    )
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, 9) + entries + bytes(4) + pixels


@pytest.mark.parametrize(
    ("numbers", "code", "kind", "expected"),
    [
        ([0, 0.5, 1], "f", REAL, [0, 128, 255]),
        ([0, 0.25, 0.5], "f", REAL, [0, 64, 128]),
        ([0, 100, 200], "f", REAL, [0, 100, 200]),
        ([0, 257, 65535], "f", REAL, [0, 1, 255]),
        ([0, 2**30, 2**31], "f", REAL, [0, 64, 128]),  # of 2³² - 1
        ([0, 5e29, 1e30], "f", REAL, [0, 128, 255]),
        ([-1, 0, 1], "f", REAL, [0, 128, 255]),
        ([float("nan"), 0.5, float("inf")], "f", REAL, [0, 128, 255]),
        ([0, 1, 200], "h", SIGNED, [0, 1, 200]),
        ([0, 256, 32767], "h", SIGNED, [0, 1, 127]),
        ([-100, 0, 100], "h", SIGNED, [0, 128, 255]),
        ([0, 1, 255], "i", SIGNED, [0, 1, 255]),
        ([0, 256, 65535], "i", SIGNED, [0, 1, 255]),
        ([0, 65536, 2**31 - 1], "i", SIGNED, [0, 0, 255]),
        ([-7, -7, -7], "i", SIGNED, [0, 0, 0]),
        ([0, 1, 255], "I", UNSIGNED, [0, 1, 255]),
        ([0, 2**31, 2**32 - 1], "I", UNSIGNED, [0, 128, 255]),
        ([0, 1, 255], "H", UNSIGNED, [0, 0, 1]),  # 16 bits without a sign are a camera's: white is 65535
        ([0, 0, 0], "i", SIGNED, [0, 0, 0]),
    ],
)
def test_wide_numbers_are_read_between_black_and_the_white_that_they_fit(numbers, code, kind, expected):
    data = tiff(numbers, code, kind)
    found = np.asarray(trainer.decode_image("scan.tif", lambda: data)).astype(int)
    assert np.abs(found - np.array(expected)[None, :, None]).max() <= 1


def test_a_portable_float_map_is_read_as_other_floats(tmp_path):
    numbers = struct.pack("<3f", 0, 0.5, 1)
    (tmp_path / "ramp.pfm").write_bytes(b"Pf\n3 1\n-1.0\n" + numbers)
    found = np.asarray(trainer.decode_image("ramp", tmp_path / "ramp.pfm"))[0, :, 0]
    assert np.abs(found.astype(int) - [0, 128, 255]).max() <= 1


@pytest.mark.parametrize(("numbers", "code", "kind"), [([0, 32768, 65535], "H", UNSIGNED), ([0, 0.5, 1], "f", REAL)])
def test_a_negative_is_shown_as_a_positive(numbers, code, kind):
    data = tiff(numbers, code, kind, black_is_zero=0)
    found = np.asarray(trainer.decode_image("scan.tif", lambda: data)).astype(int)
    assert np.abs(found - np.array([255, 128, 0])[None, :, None]).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Folders of other programs
# ---------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_caption_is_read(tmp_path):
    for name in "abcde":
        paint(tmp_path / f"{name}.jpg")
    rows = [("a.jpg", "text", "one"), ("b.jpg", "caption", "two"), ("c.jpg", "description", "three")]
    lines = [json.dumps({"file_name": name, field: text}) for name, field, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "d.TXT").write_text("four")
    (tmp_path / "e.caption").write_text("five")
    assert list(captions(tmp_path).values()) == ["one", "two", "three", "four", "five"]


CAPTION_FILES = ["metadata.jsonl", "a.txt", "a.caption", "a.jpg.txt"]


@pytest.mark.parametrize("first", range(len(CAPTION_FILES)))
def test_of_several_captions_the_first_kind_is_taken(first, tmp_path):
    paint(tmp_path / "a.jpg")
    for name in CAPTION_FILES[first:]:
        row = json.dumps({"file_name": "a.jpg", "text": name})
        (tmp_path / name).write_text(row if name == "metadata.jsonl" else name)
    assert captions(tmp_path, instance_prompt="the prompt") == {"a.jpg": CAPTION_FILES[first]}


@pytest.mark.parametrize("picture", ["a.jpg", "a.JPG"])
@pytest.mark.parametrize("name", ["a.txt", "a.Txt", "a.CAPTION", "a.jpg.txt", "a.JPG.TXT", "a.jpg.TXT"])
def test_the_suffix_of_a_caption_may_be_of_any_letter_case(picture, name, tmp_path):
    paint(tmp_path / picture)
    (tmp_path / name).write_text("a dog")
    assert captions(tmp_path) == {picture: "a dog"}


def test_each_line_of_metadata_has_its_own_field_unless_one_is_named(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.jpg")
    rows = [{"file_name": "a.jpg", "prompt": "one", "zh": "一"}, {"file_name": "b.jpg", "text": "", "caption": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path) == {"a.jpg": "one", "b.jpg": "two"}
    assert captions(tmp_path, caption_column="zh", instance_prompt="x") == {"a.jpg": "一", "b.jpg": "x"}


def test_metadata_csv_is_read_as_the_data_sets_library_writes_it(tmp_path):
    paint(tmp_path / "a.jpg")
    paint(tmp_path / "more" / "b.jpg")
    text = '\ufefffile_name,text\r\na.jpg,"a dog, ""running"""\r\nmore/b.jpg,"two\nlines"\r\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    assert captions(tmp_path) == {"a.jpg": 'a dog, "running"', "b.jpg": "two\nlines"}
    (tmp_path / "metadata.csv").write_text('file_name, text\na.jpg, "one, two"\n', encoding="utf-8")  # by hand
    assert captions(tmp_path, instance_prompt="x")["a.jpg"] == "one, two"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,text\na.jpg,a dog, running\n", ["line 2", "quotes"]),
        ("name,text\na.jpg,a dog\n", ["line 2", "file_name"]),
        ("file_name;text\na.jpg;a dog\n", ["line 2", "file_name"]),
        ('file_name,text\na.jpg,"a dog\n', ["not CSV"]),
        ("file_name,text\na.jpg,x\n\nc.jpg,a dog\n", ["c.jpg"]),
        ("file_name,text\n../a.jpg,a dog\n", ["line 2", "outside"]),
    ],
)
def test_a_broken_metadata_csv_is_named(text, words, tmp_path):
    paint(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_text(text)
    message = refusal(tmp_path, instance_prompt="x")
    assert all(word in message for word in [str(tmp_path / "metadata.csv"), *words]), message


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_whichever_way_their_accents_are_stored(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for name in ("é.jpg", "ü.jpg", "Café/å.jpg"):
        paint(tmp_path / unicodedata.normalize(form, name))
    (tmp_path / unicodedata.normalize(other, "é.txt")).write_text("one")
    rows = [("ü.jpg", "two"), ("Café/å.jpg", "three")]
    lines = [json.dumps({"file_name": unicodedata.normalize(other, name), "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert sorted(captions(tmp_path).values()) == ["one", "three", "two"]


def test_folders_with_a_number_count_as_often_and_name_what_they_show(tmp_path):
    for name in (
        "3_sks cat/0.jpg",
        "3_sks cat/1.jpg",
        "10_red_ball/0.jpg",
        "beside.jpg",
        "drafts/0.jpg",
        "0_no/0.jpg",
    ):
        paint(tmp_path / name)
    (tmp_path / "3_sks cat" / "1.txt").write_text("a cat asleep")
    (tmp_path / "beside.txt").write_text("both")
    examples = read(tmp_path, repeats=2)["instance"]
    found = {str(example.source.relative_to(tmp_path)): (example.caption, example.repeats) for example in examples}
    assert found == {
        "3_sks cat/0.jpg": ("sks cat", 6),
        "3_sks cat/1.jpg": ("a cat asleep", 6),
        "10_red_ball/0.jpg": ("red_ball", 20),
        "beside.jpg": ("both", 2),
    }


def test_the_instance_prompt_goes_before_the_words_of_a_folder(tmp_path):
    paint(tmp_path / "3_sks cat" / "0.jpg")
    assert captions(tmp_path, instance_prompt="a photo") == {"0.jpg": "a photo"}


def test_pictures_without_a_caption_are_named_where_there_is_no_prompt(tmp_path):
    for name in "abc":
        paint(tmp_path / f"{name}.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    message = refusal(tmp_path)
    assert "--instance_prompt" in message and "b.jpg" in message and "c.jpg" in message and "a.jpg" not in message
    assert captions(tmp_path, instance_prompt="x") == {"a.jpg": "a dog", "b.jpg": "x", "c.jpg": "x"}


@pytest.mark.parametrize(
    ("prefix", "caption", "expected"),
    [
        ("sks dog, ", "in a bucket", "sks dog, in a bucket"),
        ("sks", "in a bucket", "sks in a bucket"),
        ("sks ", "sks in a bucket", "sks in a bucket"),
        ("一只狗，", "在桶里", "一只狗，在桶里"),
        ("一只狗", "一只狗在桶里", "一只狗在桶里"),
        ("cat", "cathedral at dusk", "cat cathedral at dusk"),
        ("cat", "cat, at dusk", "cat, at dusk"),
    ],
)
def test_a_prefix_comes_before_every_caption_that_does_not_begin_with_it(prefix, caption, expected, tmp_path):
    paint(tmp_path / "dog" / "a.jpg")
    paint(tmp_path / "class" / "b.jpg")
    (tmp_path / "dog" / "a.txt").write_text(caption, encoding="utf-8")
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    examples = read(tmp_path / "dog", caption_prefix=prefix, validation_data_dir=tmp_path / "dog", **flags)
    assert [example.caption for example in examples["instance"]] == [expected]
    assert [example.caption for example in examples["held-out"]] == [expected]
    assert [example.caption for example in examples["class"]] == ["a dog"]


@pytest.mark.parametrize("suffix", [".jpe", ".mpo", ".apng", ".jp2", ".tga", ".ppm", ".ico", ".JP2"])
def test_what_pillow_decodes_by_itself_is_a_picture(suffix, tmp_path):
    paint(tmp_path / f"a{suffix}")
    (example,) = read(tmp_path, instance_prompt="x")["instance"]
    assert (
        np.abs(np.asarray(trainer.decode_image(example.name, example.source)).astype(int) - (200, 30, 60)).max() <= 3
    )


@pytest.mark.parametrize("suffix", [".eps", ".ps", ".wmf", ".emf", ".mpg", ".h5", ".grib", ".bufr", ".pdf"])
def test_what_needs_another_program_is_no_picture_by_whatever_name(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    paint(tmp_path / "b.jpg")
    assert list(captions(tmp_path, instance_prompt="x")) == ["b.jpg"]
    shutil.copy(tmp_path / f"a{suffix}", tmp_path / "b.jpg")
    assert "b.jpg" in refusal(tmp_path, instance_prompt="x")


def test_the_plan_says_where_pictures_and_captions_came_from_and_what_was_left_out(tmp_path):
    for name in ("a.jpg", "b.jpg", "3_sks cat/0.jpg", "drafts/0.jpg", "a-masklabel.png"):
        paint(tmp_path / name)
    (tmp_path / "a.txt").write_text("a dog")
    for name in ("c.txt", "iphone.heic", ".hidden.jpg", "3_sks cat/x.caption"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    args = trainer.parse_args(train_args("model", tmp_path, "out", instance_prompt="x"))
    lines = list(trainer.describe_pictures("instance", load_all_examples(args)["instance"], str(tmp_path)))
    assert lines[:5] == [
        "3 instance pictures:",
        f"  1 in {tmp_path / '3_sks cat'}, counted 3 times",
        f"  2 in {tmp_path}",
        "  2 captions from --instance_prompt",
        "  1 captions from .txt files",
    ]
    names = {"c.txt", "iphone.heic", "drafts", "a-masklabel.png", "gone.jpg", "folder.jpg", "3_sks cat/x.caption"}
    assert {*lines[5].removeprefix("  left out: ").split(", ")} == names


@pytest.fixture
def dogs(tmp_path):
    """Two pictures and their captions, as the data sets library reads a folder of them."""
    for name, color in (("a", "red"), ("b", "lime")):
        paint(tmp_path / "dogs" / f"{name}.png", color, (12, 8))
    rows = [json.dumps({"file_name": f"{name}.png", "text": f"dog {name}"}) for name in "ab"]
    (tmp_path / "dogs" / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path / "dogs"


def dataset_pictures(name, cache, **flags):
    examples = read(None, dataset_name=name, cache_dir=cache, caption_column="text", **flags)["instance"]
    return {
        example.caption: trainer.decode_image(example.name, example.source).getpixel((0, 0)) for example in examples
    }


@pytest.mark.parametrize("splits", [False, True])
def test_a_data_set_that_was_saved_to_disk_is_read(splits, dogs, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(dogs), cache_dir=str(tmp_path / "cache"))
    (loaded if splits else loaded["train"]).save_to_disk(str(tmp_path / "saved"))
    shutil.rmtree(dogs)
    found = dataset_pictures(tmp_path / "saved", tmp_path / "cache")
    assert found == {"dog a": (255, 0, 0), "dog b": (0, 255, 0)}


@pytest.mark.parametrize("form", ["pandas", "arrow", "torch"])
def test_a_data_set_of_another_format_with_a_damaged_second_picture_is_read(form, dogs, tmp_path):
    import datasets

    data = datasets.load_dataset(str(dogs), cache_dir=str(tmp_path / "cache"))["train"]
    damaged = [{"bytes": b"no picture", "path": None}] * len(data)
    data = data.add_column("other", damaged).cast_column("other", datasets.Image())
    data.with_format(form, columns=["image"]).save_to_disk(str(tmp_path / "saved"))
    found = dataset_pictures(tmp_path / "saved", tmp_path / "cache")
    assert found == {"dog a": (255, 0, 0), "dog b": (0, 255, 0)}


def test_a_folder_with_a_zip_of_pictures_is_a_data_set(dogs, tmp_path):
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "dogs.zip", "w") as file:
        for path in dogs.iterdir():
            file.write(path, path.name)
    found = dataset_pictures(tmp_path / "zipped", tmp_path / "cache")
    assert found == {"dog a": (255, 0, 0), "dog b": (0, 255, 0)}


def test_a_bad_picture_of_a_data_set_is_named_by_its_row_and_its_file(dogs, tmp_path):
    (dogs / "b.png").write_bytes(b"not a picture")
    message = refusal(None, dataset_name=dogs, cache_dir=tmp_path / "cache", instance_prompt="x")
    assert "[1]" in message and "b.png" in message


# ---------------------------------------------------------------------------------------------------------------------
# Folders that must differ
# ---------------------------------------------------------------------------------------------------------------------


def check(folder, **flags):
    """Whether the folders go together; the line that says why not."""
    args = trainer.parse_args(train_args("model", folder, flags.pop("output_dir", "out"), **flags))
    try:
        trainer.check_folders(load_all_examples(args), args)
    except trainer.UserError as error:
        return str(error)


@pytest.mark.parametrize("way", ["itself", "relative", "link", "a folder inside", "a data set"])
def test_the_class_folder_cannot_hold_instance_pictures(way, dogs, tmp_path, monkeypatch):
    paint(dogs / "3_dogs" / "c.png")
    (tmp_path / "link").symlink_to(dogs)
    monkeypatch.chdir(tmp_path)
    other = {"relative": "link/../dogs/.", "link": tmp_path / "link", "a folder inside": dogs / "3_dogs"}.get(
        way, dogs
    )
    data = {"dataset_name": dogs, "cache_dir": tmp_path / "cache"} if way == "a data set" else {}
    flags = {"with_prior_preservation": True, "class_data_dir": other, "class_prompt": "a dog"}
    message = check(None if data else dogs, **flags, **data)
    assert "--class_data_dir" in message and "instance" in message
    assert check(None if data else dogs, **(flags | {"class_data_dir": tmp_path / "class"}), **data) is None


@pytest.mark.parametrize("flag", ["output_dir", "encoding_cache_dir"])
@pytest.mark.parametrize("kind", ["instance", "class", "held-out"])
def test_nothing_is_written_into_a_folder_of_pictures(kind, flag, tmp_path):
    for name, color in (("instance", "red"), ("class", "lime"), ("held-out", "blue")):
        paint(tmp_path / name / "a.png", color)
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    flags["validation_data_dir"] = tmp_path / "held-out"
    assert check(tmp_path / "instance", **flags) is None
    message = check(tmp_path / "instance", **flags, **{flag: tmp_path / kind})
    assert f"--{flag}" in message and kind in message


def test_held_out_pictures_that_are_trained_on_are_named_and_save_best_refuses_them(tmp_path, caplog):
    for name, color in (("a", "red"), ("b", "lime")):
        paint(tmp_path / "dog" / f"{name}.png", color)
    shutil.copy(paint(tmp_path / "held-out" / "c.png", "blue"), tmp_path / "held-out" / "d.png")
    flags = {"validation_data_dir": tmp_path / "held-out"}
    assert check(tmp_path / "dog", save_best=True, **flags) is None and not caplog.messages
    shutil.copy(tmp_path / "dog" / "a.png", tmp_path / "held-out" / "copy.png")
    assert check(tmp_path / "dog", **flags) is None
    assert "copy.png" in caplog.text and "c.png" not in caplog.text
    message = check(tmp_path / "dog", save_best=True, **flags)
    assert "--save_best" in message and "copy.png" in message


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def half_masked(path, size=(48, 32)):
    """A picture whose left half is opaque, the rest transparent."""
    image = Image.new("RGBA", size, (200, 30, 60, 0))
    image.paste((200, 30, 60, 255), (0, 0, size[0] // 2, size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def masked_examples(folder, **flags):
    return read(folder, masked_loss=True, instance_prompt="x", **flags)["instance"]


@pytest.mark.parametrize("unmasked", [0, 0.1, 0.5, 1])
def test_what_a_mask_leaves_out_moves_the_weights_by_a_fraction_of_the_rest(unmasked):
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, :, :, :1], masks[1, :, :3] = 1, 1
    weights = unmasked + (1 - unmasked) * masks
    velocity = torch.zeros(2, 16, 4, 4, requires_grad=True)
    losses = trainer.flow_matching_loss(
        velocity, torch.ones(2, 16, 4, 4), torch.zeros(2, 16, 4, 4), torch.full((2,), 0.5), "none", weights
    )
    losses.sum().backward()
    for gradient, mask in zip(velocity.grad.abs(), masks.expand(2, 16, 4, 4), strict=True):
        assert torch.allclose(gradient[mask == 0], unmasked * gradient[mask == 1].max())
        assert gradient[mask == 1].min() == gradient[mask == 1].max() > 0


def test_a_crop_in_which_nothing_weighs_anything_teaches_nothing_and_an_even_mask_what_none_does():
    velocity, latents, noise = torch.randn(3, 1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = (torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.3), None)
    losses = [trainer.flow_matching_loss(velocity, latents, noise, torch.ones(1), "none", mask) for mask in masks]
    assert losses[0].item() == 0 and losses[1].item() == pytest.approx(losses[2].item())


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("crop", "inside"), [(0.0, 24), (0.5, 16), (1.0, 8)])
def test_a_mask_is_cropped_and_flipped_with_its_picture(crop, inside, flip, tmp_path):
    half_masked(tmp_path / "a.png")
    (example,) = masked_examples(tmp_path)
    pixels = trainer.fit_to_bucket(trainer.load_picture(example), (32, 32), (0.5, crop), flip)
    expected = torch.full((32, 32), -1.0)
    expected[:, :inside] = 1
    assert pixels.shape == (4, 32, 32)
    assert torch.equal(pixels[3], expected.flip(1) if flip else expected)


def test_a_mask_becomes_the_mean_over_each_latent(tiny_model):
    from test_compile import make_run

    run = make_run(tiny_model)
    vae, pixels = trainer.load_vae(run), torch.zeros(1, 4, 32, 32)
    pixels[:, 3] = -1
    pixels[:, 3, :4, 16:] = 1
    latents = trainer.encode_images(vae, pixels, run)
    expected = torch.zeros(4, 4)
    expected[0, 2:] = 0.5
    assert torch.equal(latents[0, 16], expected)
    assert torch.equal(latents[:, :16], trainer.encode_images(vae, pixels[:, :3], run))


@pytest.mark.parametrize("name", ["a-masklabel.png", "a-masklabel.PNG", "a-MASKLABEL.PNG"])
def test_a_mask_may_be_a_file_of_another_size(name, tmp_path):
    paint(tmp_path / "a.jpg", size=(64, 64))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / name)
    (example,) = masked_examples(tmp_path)
    alpha = np.asarray(trainer.load_picture(example).getchannel("A"))
    assert (alpha[:, :28] > 250).all() and (alpha[:, 36:] < 5).all()


def test_what_is_transparent_in_a_mask_does_not_matter(tmp_path):
    paint(tmp_path / "a.jpg", size=(64, 64))
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    mask.save(tmp_path / "a-masklabel.png")
    (example,) = masked_examples(tmp_path)
    alpha = np.asarray(trainer.load_picture(example).getchannel("A"))
    assert (alpha[:, :32] == 255).all() and (alpha[:, 32:] == 0).all()


def test_pictures_without_a_mask_weigh_1_everywhere(tmp_path):
    paint(tmp_path / "a.jpg")
    (example,) = masked_examples(tmp_path)
    pixels = trainer.fit_to_bucket(trainer.load_picture(example), (16, 16), (0.5, 0.5), False)
    assert pixels[3].unique().tolist() == [1.0]


def test_the_colours_of_a_masked_picture_are_those_without_the_flag(tmp_path):
    path = half_masked(tmp_path / "a.png")
    (example,) = masked_examples(tmp_path)
    assert trainer.load_picture(example).tobytes() == trainer.decode_image("a", path).tobytes()


@pytest.mark.parametrize("masked_loss", [False, True])
def test_a_mask_is_never_a_training_picture(masked_loss, tmp_path):
    paint(tmp_path / "a.jpg")
    for name in ("a-masklabel.png", "b-masklabel.png"):
        paint(tmp_path / name, 255, mode="L")
    assert list(captions(tmp_path, masked_loss=masked_loss, instance_prompt="x")) == ["a.jpg"]
    flags = {"dataset_name": tmp_path, "cache_dir": tmp_path / "cache", "masked_loss": masked_loss}
    (example,) = read(None, instance_prompt="x", **flags)["instance"]
    assert "a.jpg" in example.name


@pytest.mark.parametrize("way", ["file", "alpha"])
def test_a_mask_that_leaves_nothing_is_named(way, tmp_path):
    if way == "file":
        paint(tmp_path / "a.png")
        paint(tmp_path / "a-masklabel.png", 0, mode="L")
    else:
        paint(tmp_path / "a.png", (1, 2, 3, 0), mode="RGBA")
    with pytest.raises(trainer.UserError) as error:
        trainer.load_picture(masked_examples(tmp_path)[0])
    assert "--masked_loss" in str(error.value) and "a.png" in str(error.value)


def test_class_pictures_have_masks_of_their_own_and_held_out_pictures_none(tmp_path):
    half_masked(tmp_path / "dog" / "a.png")
    paint(tmp_path / "class" / "b.jpg")
    paint(tmp_path / "class" / "b-masklabel.png", 255, mode="L")
    half_masked(tmp_path / "held-out" / "c.png", (16, 16))
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    flags["validation_data_dir"] = tmp_path / "held-out"
    examples = read(tmp_path / "dog", masked_loss=True, instance_prompt="x", **flags)
    modes = {kind: trainer.load_picture(example).mode for kind, (example,) in examples.items()}
    assert modes == {"instance": "RGBA", "class": "RGBA", "held-out": "RGB"}
    assert examples["class"][0].mask == tmp_path / "class" / "b-masklabel.png"


def test_a_changed_mask_is_not_taken_from_the_cache_and_is_another_run(tiny_model, tmp_path):
    from test_compile import make_run

    paint(tmp_path / "dog" / "a.png", size=(32, 32))
    found, fingerprints = [], []
    for value in (255, 100, 255):
        mask = Image.new("L", (32, 32), 255)
        mask.paste(value, (0, 0, 16, 32))
        mask.save(tmp_path / "dog" / "a-masklabel.png")
        run = make_run(tiny_model, pictures=tmp_path / "dog", masked_loss=True, encoding_cache_dir=tmp_path / "cache")
        run.accelerator.mixed_precision = "no"
        examples = load_all_examples(run.args)
        (latents,) = trainer.cache_latents(examples["instance"], run).values()
        found.append(latents)
        plan = trainer.TrainingPlan(examples, trainer.tokenize(examples, run), run)
        fingerprints.append(trainer.make_fingerprint(plan, run)["masks"])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_masks_weigh_alike_whether_latents_are_cached_or_not(tiny_model, tmp_path):
    for name in ("a.png", "b.png"):
        half_masked(tmp_path / "dog" / name)
    results = []
    for number, flags in enumerate([{}, {"cache_latents": True}, {"unmasked_weight": 1}]):
        flags = {"masked_loss": True, "center_crop": True, "max_train_steps": 3, "upcast_before_saving": True, **flags}
        fork_trainer(*train_args(tiny_model, tmp_path / "dog", tmp_path / str(number), **flags))
        results.append(lora_tensors(tmp_path / str(number)))
    plain, cached, unweighted = results
    assert all(torch.allclose(plain[name], cached[name], atol=1e-5) for name in plain)
    assert any(not torch.allclose(plain[name], unweighted[name], atol=1e-4) for name in plain)
