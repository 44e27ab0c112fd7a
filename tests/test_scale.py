"""Ten thousand pictures are planned from their headers, with few open files; they take no memory while training."""

import io
import json
import resource
import time
from unittest import mock

import pytest
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from test_training import in_own_process, warm_process  # noqa: F401 (a fixture)
from tiny import load_all_examples, train_args


MANY = 10_000

pytestmark = pytest.mark.usefixtures("warm_process")


def save_jpegs(folder, number):
    """JPEG files of 400 different sizes, no two the same."""
    folder.mkdir()
    encoded = []
    for size in ((40 + 8 * i, 40 + 8 * j) for i in range(20) for j in range(20)):
        buffer = io.BytesIO()
        Image.new("RGB", size, (size[0], size[1], 90)).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    for index in range(number):  # what follows the end of a JPEG is not read
        (folder / f"{index:05d}.jpg").write_bytes(encoded[index % len(encoded)] + b"%05d" % index)
    return folder


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory):
    return save_jpegs(tmp_path_factory.mktemp("many") / "pictures", MANY)


def planned(arguments):
    """Runs the trainer in a process that may open 64 files; gives its processor seconds, and how many it decoded."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    started = time.process_time()
    with (
        mock.patch.object(trainer, "decode_image", wraps=trainer.decode_image) as decode,
        mock.patch.object(trainer, "count_memory", return_value={"training": 0.0}),
    ):
        trainer.main(trainer.parse_args(arguments))
    return time.process_time() - started, decode.call_count


def trained(arguments):
    """Trains in a process that may open 64 files; gives its peak resident memory at the end of the last update."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    trainer.main(trainer.parse_args(arguments))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "flags",
    [
        {"aspect_ratio_buckets": "64,64;48,80;80,48"},
        {"use_aspect_ratio_buckets": True, "resolution": 1024},  # larger than all: every size looks for its own
    ],
    ids=["listed-buckets", "computed-buckets"],
)
def test_ten_thousand_pictures_are_planned_from_their_headers(flags, tiny_model, many_pictures, tmp_path):
    arguments = train_args(tiny_model, many_pictures, tmp_path / "out", dry_run=True, **flags)
    seconds, decoded = in_own_process(planned, arguments)
    assert seconds < 30
    assert decoded == trainer.PICTURES_VERIFIED  # the first thousand, for damage


def test_ten_thousand_lines_of_metadata_are_read_in_a_moment(many_pictures):
    lines = [json.dumps({"file_name": f"{index:05d}.jpg", "text": f"picture {index}"}) for index in range(MANY)]
    metadata = many_pictures / "metadata.jsonl"
    metadata.write_text("\n".join(lines), encoding="utf-8")
    started = time.process_time()
    try:
        examples = load_all_examples(trainer.parse_args(train_args("model", many_pictures, "out")))["instance"]
    finally:
        metadata.unlink()
    assert [example.caption for example in examples] == [f"picture {index}" for index in range(MANY)]
    assert time.process_time() - started < 15


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(tiny_model, many_pictures, tmp_path):
    few = save_jpegs(tmp_path / "few", 100)
    peaks = []
    for number, folder in enumerate((few, many_pictures)):
        flags = {"max_train_steps": 100, "train_batch_size": 4, "resolution": 96}
        peaks.append(in_own_process(trained, train_args(tiny_model, folder, tmp_path / str(number), **flags)))
    # As float tensors, the 400 pictures that are trained on take 44 MB, all of them 1.1 GB.
    assert peaks[1] - peaks[0] < 40e6
