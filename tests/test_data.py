"""Pictures, captions and sizes: what is read from a folder or a data set, and how it looks to the model."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import train_dreambooth_lora_z_image as trainer
from running import fork_trainer
from tiny import load_all_examples, lora_tensors, train_args


def save_picture(path, size=(8, 8), color=(200, 30, 60)):
    """A picture of one colour; the folder is made as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def read_examples(folder=None, **flags):
    """The instance pictures that these flags give. Their prompt is "the instance prompt"."""
    args = train_args("model", folder, "out", instance_prompt="the instance prompt", **flags)
    return load_all_examples(trainer.parse_args(args))["instance"]


def captions(folder=None, **flags):
    return {Path(example.name).name: example.caption for example in read_examples(folder, **flags)}


def decoded(path):
    """The picture in a file as the trainer sees it, [H, W, 3] in 0..255."""
    return np.asarray(trainer.decode_image(str(path), path).convert("RGB")).astype(int)


def assert_mistake(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert not [word for word in map(str, words) if word not in message], message


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def png(size, depth, color_type, pixels, *chunks):
    """The bytes of a PNG file of any kind; `pixels` are its rows, without filter."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    stride = len(pixels) // size[1]
    rows = b"".join(b"\0" + pixels[i : i + stride] for i in range(0, len(pixels), stride))
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    """The bytes of a picture in a format of Pillow's."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def palette_picture():
    """Two pixels: colours 0 and 1 of a palette."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return image


def picture_of(mode, *pixels):
    """A picture of one row."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def animation(kind, **options):
    frames = [Image.new("RGB", (2, 1), color) for color in ("red", "lime", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def big_endian(*values):
    return struct.pack(f">{len(values)}H", *values)


RED, LIME, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [255, 255, 255], [0, 0, 0]
RGBA = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]
ON_WHITE = [RED, WHITE, [204, 204, 204]]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("rgb.png", encoded(picture_of("RGB", (1, 2, 3), (4, 5, 6)), "PNG"), [[1, 2, 3], [4, 5, 6]]),
        ("rgba.png", encoded(picture_of("RGBA", *RGBA), "PNG"), ON_WHITE),
        ("rgba.webp", encoded(picture_of("RGBA", *RGBA), "WEBP", lossless=True, exact=True), ON_WHITE),
        ("rgba.tif", encoded(picture_of("RGBA", *RGBA), "TIFF"), ON_WHITE),
        ("palette.png", encoded(palette_picture(), "PNG"), [[10, 20, 30], [40, 50, 60]]),
        ("palette_clear.png", encoded(palette_picture(), "PNG", transparency=1), [[10, 20, 30], WHITE]),
        ("palette_clear.gif", encoded(palette_picture(), "GIF", transparency=1), [[10, 20, 30], WHITE]),
        (
            "palette_alpha.png",
            encoded(palette_picture(), "PNG", transparency=bytes([255, 51])),
            [[10, 20, 30], [212, 214, 216]],
        ),
        (
            "rgb_clear.png",
            encoded(picture_of("RGB", (255, 0, 0), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            ON_WHITE[:2],
        ),
        ("grey.png", encoded(picture_of("L", 0, 77, 255), "PNG"), [BLACK, [77] * 3, WHITE]),
        ("grey_alpha.png", encoded(picture_of("LA", (0, 255), (0, 0), (0, 51)), "PNG"), [BLACK, WHITE, [204] * 3]),
        ("one_bit.png", encoded(picture_of("1", 0, 255), "PNG"), [BLACK, WHITE]),
        ("one_bit.tif", encoded(picture_of("1", 0, 255), "TIFF"), [BLACK, WHITE]),
        ("grey_16.png", png((4, 1), 16, 0, big_endian(0, 257, 32896, 65535)), [BLACK, [1] * 3, [128] * 3, WHITE]),
        ("grey_16.tif", encoded(picture_of("I;16", 0, 257, 32896, 65535), "TIFF"), [BLACK, [1] * 3, [128] * 3, WHITE]),
        ("rgb_16.png", png((2, 1), 16, 2, big_endian(0, 32896, 65535, 2570, 257, 0)), [[0, 128, 255], [10, 1, 0]]),
        ("rgba_16.png", png((2, 1), 16, 6, big_endian(65535, 0, 0, 65535, 65535, 0, 0, 0)), [RED, WHITE]),
        ("grey_alpha_16.png", png((2, 1), 16, 4, big_endian(0, 65535, 0, 0)), [BLACK, WHITE]),
        ("animation.gif", animation("GIF"), [RED, RED]),
        ("animation.webp", animation("WEBP", lossless=True), [RED, RED]),
        ("animation.png", animation("PNG"), [RED, RED]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_picture_decodes_as_a_person_would_see_it(name, data, expected, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert np.abs(decoded(tmp_path / name) - [expected]).max() <= 1


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGB", (200, 30, 60), (200, 30, 60)),
        ("L", 77, (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_jpeg_decodes_as_a_person_would_see_it(mode, color, expected, tmp_path):
    path = tmp_path / "picture.jpg"
    Image.new(mode, (16, 16), color).save(path, quality=95)
    assert np.abs(decoded(path) - expected).max() <= 3


def swapped_profile():
    """An RGB colour profile like sRGB's with red and green changed about, gamma 2.2."""

    def xyz(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(2.2 * 256))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.3851, 0.7169, 0.0971),  # sRGB's green
        b"gXYZ": xyz(0.4361, 0.2225, 0.0139),  # sRGB's red
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": gamma,
        b"gTRC": gamma,
        b"bTRC": gamma,
    }
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4x4s12s12x4s28x3i48x", start + len(body), b"\2\x10\0\0", b"mntrRGB XYZ ", b"acsp", 63190, 65536, 54061
    )
    return header + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profile_is_followed(mode, suffix, tmp_path):
    if (mode, suffix) in [("RGBA", "jpg"), ("P", "jpg"), ("P", "webp")]:
        pytest.skip(f"no {suffix} file is of mode {mode}")
    path = tmp_path / f"picture.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    Image.new("RGB", (16, 16), "red").convert(mode).save(path, icc_profile=swapped_profile(), **options)
    assert np.abs(decoded(path) - LIME).max() <= 3


def test_colour_profile_leaves_transparency_alone(tmp_path):
    path = tmp_path / "picture.png"
    picture_of("RGBA", *RGBA).save(path, icc_profile=swapped_profile())
    assert np.abs(decoded(path) - [[LIME, WHITE, [204, 204, 204]]]).max() <= 1


def test_broken_colour_profile_is_as_good_as_none(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (1, 1), "red").save(path, icc_profile=b"nonsense")
    assert decoded(path).tolist() == [[RED]]


# The EXIF standard: which side of the upright picture the first row and the first column in the file are.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
    0: lambda upright: upright,  # no such orientation
    9: lambda upright: upright,  # nor such
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_followed(orientation, suffix, tmp_path):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16], upright[16:, 32:] = RED, LIME
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif, **options)
    assert np.abs(decoded(path) - upright).max() <= 3
    (example,) = read_examples(tmp_path)
    assert example.size == (32, 48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0, 0.3, 0.7])
def test_truncated_picture_is_named(kind, share, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(trainer.UserError) as error:
        decoded(path)
    assert_mistake(error, path)


@pytest.mark.parametrize("read", [lambda path: read_examples(path.parent), decoded])
@pytest.mark.parametrize(
    "data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"]
)
def test_file_that_is_no_picture_is_named(data, read, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    with pytest.raises(trainer.UserError) as error:
        read(path)
    assert_mistake(error, path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damaged_avif_is_named_or_read():
    data = encoded(Image.new("RGB", (8, 8), "red"), "AVIF")
    refused = set()
    for position in range(len(data)):
        damaged = data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
        try:
            trainer.decode_image(f"byte {position}", lambda damaged=damaged: damaged)
        except trainer.UserError as error:
            assert f"byte {position} cannot be read" in str(error)
            refused.add(position)
    assert refused


# ---------------------------------------------------------------------------------------------------------------------
# Folders and captions
# ---------------------------------------------------------------------------------------------------------------------


def add_what_a_download_leaves(folder):
    """What `snapshot_download`, a file manager and a person put beside the pictures."""
    download = folder / ".cache" / "huggingface" / "download"
    download.mkdir(parents=True)
    (download / "cat.png.metadata").write_text("0123456789abcdef")
    (download / "cat.png.lock").touch()
    (folder / ".cache" / "huggingface" / ".gitignore").write_text("*")
    save_picture(folder / ".cache" / "thumbnail.png")
    (folder / ".gitattributes").write_text("*.png filter=lfs\n")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "._cat.png").write_bytes(b"\0\5\x16\7 no picture")
    (folder / "README.md").write_text("# Dogs\n")
    (folder / "LICENSE.txt").write_text("free")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
    save_picture(folder / "drafts" / "draft.png")
    (folder / "cat.txt").write_text("一只猫，看着镜头", encoding="utf-8")


def test_folder_as_downloaded_trains(tiny_model, photos, tmp_path):
    add_what_a_download_leaves(photos)
    finished = fork_trainer(*train_args(tiny_model, photos, tmp_path / "out"))
    assert "6 instance pictures" in finished.output
    assert all(tensor.any() for name, tensor in lora_tensors(tmp_path / "out").items() if ".lora_B." in name)


def test_only_the_pictures_of_a_folder_are_read(photos):
    names = sorted(path.name for path in photos.iterdir())
    add_what_a_download_leaves(photos)
    assert sorted(captions(photos)) == names


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".webp", ".bmp", ".gif", ".tif", ".tiff"])
def test_picture_is_known_by_its_suffix_in_any_letter_case(suffix, tmp_path):
    save_picture(tmp_path / "dog" / f"photo{suffix}")
    assert list(captions(tmp_path / "dog")) == [f"photo{suffix}"]


def test_pictures_are_in_the_order_of_their_names_with_their_upright_size(tmp_path):
    for name, size in [("b.png", (30, 20)), ("c.png", (10, 50)), ("a.png", (40, 40))]:
        save_picture(tmp_path / "dog" / name, size)
    examples = read_examples(tmp_path / "dog")
    assert [(Path(example.name).name, example.size) for example in examples] == [
        ("a.png", (40, 40)),
        ("b.png", (20, 30)),
        ("c.png", (50, 10)),
    ]


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"a dog in a bucket", "a dog in a bucket"),
        (b"  a dog in a bucket\r\n", "a dog in a bucket"),
        ("一只sks狗在桶里的照片".encode(), "一只sks狗在桶里的照片"),
        ("\ufeff一只sks狗".encode(), "一只sks狗"),
    ],
    ids=["English", "line end", "Chinese", "byte order mark"],
)
def test_sidecar_is_the_caption_of_its_picture_alone(data, caption, tmp_path):
    save_picture(tmp_path / "dog" / "a.png")
    save_picture(tmp_path / "dog" / "b.png")
    (tmp_path / "dog" / "a.txt").write_bytes(data)
    assert captions(tmp_path / "dog") == {"a.png": caption, "b.png": "the instance prompt"}


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_sidecar_in_another_encoding_is_named(encoding, tmp_path):
    save_picture(tmp_path / "dog" / "a.png")
    (tmp_path / "dog" / "a.txt").write_text("一只狗", encoding=encoding)
    with pytest.raises(trainer.UserError) as error:
        captions(tmp_path / "dog")
    assert_mistake(error, tmp_path / "dog" / "a.txt", "UTF-8")


@pytest.fixture
def two_dogs(tmp_path):
    """A folder of the pictures a.png and b.png."""
    for name in ("a.png", "b.png"):
        save_picture(tmp_path / "dog" / name)
    return tmp_path / "dog"


def write_metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_metadata_gives_captions_by_its_field_text(two_dogs):
    write_metadata(two_dogs, {"file_name": "b.png", "text": "一只狗", "mood": "glad"})
    assert captions(two_dogs) == {"a.png": "the instance prompt", "b.png": "一只狗"}


def test_caption_column_names_the_field_of_metadata(two_dogs):
    rows = [{"file_name": f"{name}.png", "text": "no", "zh": f"狗{name}"} for name in "ab"]
    write_metadata(two_dogs, *rows)
    assert captions(two_dogs, caption_column="zh") == {"a.png": "狗a", "b.png": "狗b"}


def test_caption_column_that_metadata_lacks_comes_with_the_fields_there_are(two_dogs):
    write_metadata(two_dogs, {"file_name": "a.png", "text": "a dog", "mood": "glad"})
    with pytest.raises(trainer.UserError) as error:
        captions(two_dogs, caption_column="title")
    assert_mistake(error, "--caption_column", "title", "text", "mood")


def test_metadata_reaches_into_subfolders(two_dogs):
    save_picture(two_dogs / "more" / "c.png")
    save_picture(two_dogs / "more" / "unlisted.png")
    write_metadata(two_dogs, {"file_name": "more/c.png", "text": "deep"})
    assert captions(two_dogs) == {
        "a.png": "the instance prompt",
        "b.png": "the instance prompt",
        "c.png": "deep",
    }


def test_metadata_may_hold_blank_lines_and_a_byte_order_mark(two_dogs):
    write_metadata(
        two_dogs, '\ufeff{"file_name": "a.png", "text": "a dog"}', "", '{"file_name": "b.png", "text": "b"}'
    )
    assert captions(two_dogs) == {"a.png": "a dog", "b.png": "b"}


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\\n"], ids=["U+2028", "U+0085", "escaped"])
def test_line_separator_inside_a_caption_does_not_end_the_line_of_metadata(separator, two_dogs):
    write_metadata(two_dogs, f'{{"file_name": "a.png", "text": "one{separator}two"}}')
    assert captions(two_dogs)["a.png"] == json.loads(f'"one{separator}two"')


@pytest.mark.parametrize(
    "line", ["{", "a dog", "[]", "3", '{"text": "a dog"}', '{"file_name": 3}', '{"file_name": null}']
)
def test_broken_line_of_metadata_is_named_by_its_number(line, two_dogs):
    write_metadata(two_dogs, {"file_name": "a.png", "text": "a dog"}, "", line)
    with pytest.raises(trainer.UserError) as error:
        captions(two_dogs)
    assert_mistake(error, two_dogs / "metadata.jsonl", "line 3")


@pytest.mark.parametrize("name", ["../a.png", "more/../../a.png", "/etc/a.png"])
def test_metadata_cannot_point_outside_the_folder(name, two_dogs):
    save_picture(two_dogs.parent / "a.png")
    write_metadata(two_dogs, {"file_name": name, "text": "a dog"})
    with pytest.raises(trainer.UserError) as error:
        captions(two_dogs)
    assert_mistake(error, two_dogs / "metadata.jsonl", name, "outside")


def test_metadata_that_names_a_missing_picture_is_a_mistake(two_dogs):
    write_metadata(two_dogs, {"file_name": "c.png", "text": "a dog"})
    with pytest.raises(trainer.UserError) as error:
        captions(two_dogs)
    assert_mistake(error, two_dogs / "metadata.jsonl", "c.png")


@pytest.mark.parametrize("caption", [3, {"en": "a dog"}, True])
def test_caption_that_is_no_text_is_named(caption, two_dogs):
    write_metadata(two_dogs, {"file_name": "a.png", "text": caption})
    with pytest.raises(trainer.UserError) as error:
        captions(two_dogs)
    assert_mistake(error, two_dogs / "metadata.jsonl", "a.png")


@pytest.mark.parametrize("row", [{"text": ""}, {"text": "  "}, {"text": None}, {}])
def test_picture_without_a_caption_in_metadata_has_the_instance_prompt(row, two_dogs):
    write_metadata(two_dogs, {"file_name": "a.png", **row}, {"file_name": "b.png", "text": "b"})
    assert captions(two_dogs) == {"a.png": "the instance prompt", "b.png": "b"}


@pytest.fixture
def dataset_flags(two_dogs, tmp_path):
    """The flags that read the two dogs as a data set, with captions in its columns text and zh."""
    for name, color in (("a.png", "red"), ("b.png", "lime")):
        save_picture(two_dogs / name, (12, 8), color)
    write_metadata(
        two_dogs, *({"file_name": f"{name}.png", "text": f"dog {name}", "zh": f"狗{name}"} for name in "ab")
    )
    return {"dataset_name": two_dogs, "cache_dir": tmp_path / "cache"}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("text", ["dog a", "dog b"]),
        ("zh", ["狗a", "狗b"]),
        (None, ["the instance prompt"] * 2),
    ],
)
def test_caption_column_names_the_captions_of_a_data_set(column, expected, dataset_flags):
    examples = read_examples(**dataset_flags, caption_column=column)
    assert [example.caption for example in examples] == expected


def test_pictures_of_a_data_set_are_decoded_like_files(dataset_flags):
    examples = read_examples(**dataset_flags)
    assert [example.size for example in examples] == [(8, 12)] * 2
    pictures = [np.asarray(trainer.decode_image(example.name, example.source)) for example in examples]
    assert [picture.shape for picture in pictures] == [(8, 12, 3)] * 2
    assert [picture[0, 0].tolist() for picture in pictures] == [RED, LIME]


@pytest.mark.parametrize("flag", ["image_column", "caption_column"])
def test_missing_column_of_a_data_set_comes_with_the_columns_there_are(flag, dataset_flags):
    with pytest.raises(trainer.UserError) as error:
        read_examples(**dataset_flags, **{flag: "title"})
    assert_mistake(error, f"--{flag}", "title", "image", "text", "zh")


def test_image_column_that_holds_no_pictures_is_a_mistake(two_dogs, tmp_path):
    write_metadata(two_dogs, *({"file_name": f"{name}.png", "age": 3} for name in "ab"))
    with pytest.raises(trainer.UserError) as error:
        read_examples(dataset_name=two_dogs, cache_dir=tmp_path / "cache", image_column="age")
    assert_mistake(error, "--image_column", "age")


def test_data_set_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(trainer.UserError) as error:
        read_examples(dataset_name=tmp_path / "no-dogs", cache_dir=tmp_path / "cache")
    assert_mistake(error, "--dataset_name", tmp_path / "no-dogs")


def test_corrupt_picture_of_a_data_set_is_named(dataset_flags):
    (dataset_flags["dataset_name"] / "b.png").write_bytes(b"not a picture")
    with pytest.raises(trainer.UserError) as error:
        read_examples(**dataset_flags)
    assert_mistake(error, "[1]")


def test_row_of_a_data_set_without_a_picture_is_named(dataset_flags, tmp_path):
    import datasets

    picture = {"bytes": (dataset_flags["dataset_name"] / "a.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_list([{"image": picture}, {"image": None}])
    (tmp_path / "rows").mkdir()
    rows.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "rows" / "train.parquet")
    with pytest.raises(trainer.UserError) as error:
        read_examples(dataset_name=tmp_path / "rows", cache_dir=tmp_path / "cache")
    assert_mistake(error, "[1]")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------

LISTED = (
    "672,1568;688,1504;720,1456;752,1392;800,1328;832,1248;880,1184;944,1104;1024,1024;1104,944;1184,880;1248,832;"
    "1328,800;1392,752;1456,720;1504,688;1568,672"
)


def test_buckets_are_read_as_height_and_width():
    buckets = trainer.bucket_list(LISTED)
    assert len(buckets) == 17
    assert (buckets[0], buckets[8], buckets[-1]) == ((672, 1568), (1024, 1024), (1568, 672))


@pytest.mark.parametrize("text", ["64,96;96,64", "64,96;96,64;", " 64, 96 ; 96 ,64 "])
def test_space_and_a_last_semicolon_in_buckets_do_not_matter(text):
    assert trainer.bucket_list(text) == [(64, 96), (96, 64)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("64", "64"),
        ("64,64;64x96", "64x96"),
        ("64,64,64", "64,64,64"),
        ("64,a", "64,a"),
        ("64.0,64", "64.0,64"),
        ("1000,1024", "1000"),
        ("0,64", "0"),
        ("-64,64", "-64"),
        (";", ";"),
        ("", ""),
    ],
)
def test_broken_buckets_are_shown(text, part):
    with pytest.raises(trainer.UserError) as error:
        trainer.parse_args(train_args("model", "data", "out", aspect_ratio_buckets=text))
    assert_mistake(error, "--aspect_ratio_buckets", part)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((300, 300), (1024, 1024)),
        ((4000, 3000), (1184, 880)),
        ((3000, 4000), (880, 1184)),
        ((1080, 1920), (752, 1392)),
        ((2000, 3000), (832, 1248)),
        ((1, 5000), (672, 1568)),
        ((5000, 1), (1568, 672)),
    ],
)
def test_picture_goes_to_the_listed_bucket_nearest_in_shape(size, bucket):
    assert trainer.assign_bucket(size, trainer.bucket_list(LISTED), 1024) == bucket


def test_of_buckets_of_one_shape_the_nearest_in_area_is_taken():
    buckets = [(256, 256), (512, 512), (1024, 1024)]
    assert [trainer.assign_bucket((side, side), buckets, 1024) for side in (200, 500, 3000)] == buckets


@pytest.mark.parametrize("resolution", [256, 500, 1024])
def test_computed_bucket_never_enlarges_and_keeps_to_the_resolution(resolution):
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(np.log(16), np.log(3000), (300, 2))).astype(int).tolist()
    for height, width in [*sizes, (16, 16), (17, 5000), (5000, 31), (31, 33), (resolution, resolution)]:
        bucket = trainer.assign_bucket((height, width), None, resolution)
        assert bucket[0] % 16 == bucket[1] % 16 == 0
        assert bucket[0] <= height and bucket[1] <= width, (height, width, bucket)
        assert bucket[0] * bucket[1] <= 1.1 * resolution**2, (height, width, bucket)


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9, 1, 1.2, 1.33, 1.5, 1.78, 2])
def test_computed_bucket_of_a_large_picture_has_nearly_its_shape_and_the_full_area(ratio):
    height, width = trainer.assign_bucket((round(4000 * ratio), 4000), None, 1024)
    assert abs(np.log(height / width) - np.log(ratio)) < np.log(1.15)
    assert height * width == pytest.approx(1024**2, rel=0.06)


def gradient(height, width):
    """A picture whose every pixel tells its row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, (3 * rows + 5 * columns) % 256], axis=-1).astype(np.uint8)


def fitted(pixels, bucket, crop, flip=False):
    """The picture that the model is given, [H, W, 3] in 0..255."""
    tensor = trainer.fit_to_bucket(Image.fromarray(pixels), bucket, crop, flip)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, *bucket))
    return ((tensor.permute(1, 2, 0) + 1) * 127.5).numpy()


@pytest.mark.parametrize(
    ("size", "crop", "top", "left"),
    [
        ((32, 32), (0.5, 0.5), 0, 0),
        ((48, 32), (0.5, 0.5), 8, 0),
        ((32, 48), (0.5, 0.5), 0, 8),
        ((48, 32), (0.0, 0.7), 0, 0),
        ((48, 32), (1.0, 0.3), 16, 0),
        ((48, 32), (0.25, 0.0), 4, 0),
        ((32, 48), (0.6, 0.0), 0, 0),
        ((32, 48), (0.2, 1.0), 0, 16),
        ((32, 48), (1.0, 0.75), 0, 12),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_are_exact(size, crop, top, left, flip):
    pixels = gradient(*size)
    expected = pixels[top : top + 32, left : left + 32]
    found = fitted(pixels, (32, 32), crop, flip)
    assert np.abs(found - (expected[:, ::-1] if flip else expected)).max() < 1e-3


@pytest.mark.parametrize(("size", "factor"), [((128, 192), 0.5), ((32, 48), 2.0), ((96, 144), 2 / 3)])
def test_scaled_picture_is_the_same_part_of_the_scene(size, factor):
    found = fitted(gradient(*size), (64, 64), (0.5, 0.5))
    rows, columns = (np.mgrid[:64, :64] + 0.5) / factor - 0.5
    left = (size[1] - 64 / factor) / 2
    inside = slice(8, -8)  # at its edges a scaled picture is not a straight line
    assert np.abs(found[..., 0] - rows)[inside, inside].max() <= 1
    assert np.abs(found[..., 1] - columns - left)[inside, inside].max() <= 1


def test_white_and_black_become_1_and_minus_1():
    image = Image.fromarray(np.array([[[255, 255, 255]], [[0, 0, 0]]], np.uint8)).resize(
        (16, 32), Image.Resampling.NEAREST
    )
    tensor = trainer.fit_to_bucket(image, (32, 16), (0.5, 0.5), False)
    assert (tensor[:, 0].unique().tolist(), tensor[:, -1].unique().tolist()) == ([1.0], [-1.0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured as Linux does")
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_picture_of_extreme_shape_takes_little_memory(size):
    def memory(name):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024

    image = Image.new("RGB", size)
    Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
    before = memory("VmRSS")
    trainer.fit_to_bucket(image, (256, 256), (0.5, 0.5), False)
    assert memory("VmHWM") - before < 64 * 2**20
