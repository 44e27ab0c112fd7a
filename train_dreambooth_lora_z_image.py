#!/usr/bin/env python
# Copyright 2026 the authors of this project.
# Licensed under the Apache License, Version 2.0: see LICENSE.
"""Teach Z-Image a subject, a character or a style from a few pictures, as a LoRA.

    accelerate launch train_dreambooth_lora_z_image.py \\
        --pretrained_model_name_or_path Tongyi-MAI/Z-Image --instance_data_dir dog \\
        --instance_prompt "a photo of sks dog" --mixed_precision bf16 --gradient_checkpointing --cache_latents \\
        --max_train_steps 500 --output_dir trained-z-image-lora

With --dry_run it prints the plan and trains nothing, with --resume_from_checkpoint latest it goes on after a stop,
and @configs/character.args is a file of flags. The chapters follow the data, and nothing is used above its definition:

    picture file -> upright RGB -> bucket -> resized and cropped -> latents
    caption -> chat template -> Qwen3 hidden state -> prompt embedding
    (latents, noise, sigma) -> noisy latents -> velocity -> loss -> gradients of the LoRA -> LoRA file -> pipeline, Hub

Three rules hold everywhere. Models are loaded in stages, each freed before the next, so that peak memory is the
largest stage and not the sum. What is random about a sample is a function of the seed and of its number in the
run, so that a resumed run is the same run. The gradient of an update is the mean over its samples, however they are
split into micro-batches and processes. `main`, at the end, is the list of stages.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import types
import unicodedata
import warnings
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any, NoReturn, TypeVar


if "torchao" not in sys.modules:  # importing it warns of its parts for other GPUs and other versions
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)

import accelerate
import diffusers
import numpy as np
import psutil
import torch
import transformers
from accelerate import Accelerator, AutocastKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DynamoBackend, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline, training_utils
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.optimization import SchedulerType, get_scheduler
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict, set_peft_model_state_dict, set_requires_grad
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageChops, ImageCms, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm


logger = logging.getLogger("train_dreambooth_lora_z_image")
error_once = functools.cache(logger.error)  # for what could be said at every step

LORA_FILE = "pytorch_lora_weights.safetensors"
STATE_FILE = "training_state.pt"  # this, the LoRA in float32, and the manifest make a checkpoint
MANIFEST = "manifest.json"
RUN_FILE = "run.json"  # in the output folder: what the program made there, and whether the run is finished
METADATA = ("metadata.jsonl", "metadata.csv")  # captions of a folder's pictures; the first there is holds them
MASK_ENDING = "-masklabel.png"
PICTURE_FLAGS = {"instance": "instance_data_dir", "class": "class_data_dir", "held-out": "validation_data_dir"}
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # {EXIF's orientation: Image.Transpose that makes it upright}
ORIENTATION = re.compile(  # an entry of EXIF, in either order of bytes: tag, type, how many, value
    rb"(?s)\x12\x01[\x01\x03\x04]\0.{4}([\x01-\x08])\0|\x01\x12\0[\x01\x03\x04].{4}\0{0,3}([\x01-\x08])"
)
FOREIGN_FORMATS = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "PDF", "PALM"}  # Pillow alone cannot decode them
PICTURE_FORMATS = {end: kind for end, kind in Image.registered_extensions().items() if kind not in FOREIGN_FORMATS}
MAX_SIDE = 8192  # a picture of more pixels than its square is shrunk as it is read: memory, not detail, decides
VAE_FACTOR = 8  # pixels for each side of a latent
SIZE_MULTIPLE = 16  # that times the patch size 2
# Of a resolution: buckets of about its square of pixels, in the common shapes
bucket_ladder = functools.cache(functools.partial(training_utils.generate_aspect_ratio_buckets, divisibility=16))
PICTURES_VERIFIED = 1000  # so many are decoded before anything is loaded; those of a larger set when they are used
HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch.compile's language on a GPU; not for Windows
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OUT_OF_MEMORY = re.compile("(out of|not enough|can't allocate) memory|OutOfMemory|ALLOC_FAILED|MemoryError")
PATIENCE = 2.0  # seconds for which an update waits for its pictures after a stop signal
TOKEN_MULTIPLE = 32  # the transformer pads every caption to a multiple of this

T = TypeVar("T")
Size = tuple[int, int]  # (height, width) in pixels
State = dict[str, Tensor]  # tensors by name, as in a file
Checkpoint = types.SimpleNamespace  # its path and, by its manifest, step, seed, fingerprint, and ids of trackers' runs
Linear = dict[str, tuple[int, int]]  # {path of a linear layer: (inputs, outputs)}


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------

# What a system may lack. Windows: SIGHUP, opening a folder, renaming what a scanner holds. Network mounts: fsync.
# Macs: prctl. Without glibc: malloc_trim. Containers: a home folder, a user's name. `>&-`, pythonw: standard output.
WINDOWS, LINUX = sys.platform == "win32", sys.platform == "linux"
STOP_SIGNALS = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")]
LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "LOCAL_", "MASTER_", "RANK", "WORLD_SIZE", "PMI_", "MV2_", "OMP", "FORK_")
PROCESS_TIMEOUT = timedelta(hours=2)  # of processes that wait for one that draws
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}  # where there is none
NO_RENAMING = {errno.EXDEV, errno.EMFILE, *NO_FSYNC}  # of folders, in containers and on mounts of cloud storage
RENAMING_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds between tries
HALF_A_CHARACTER = re.compile(r"[\ud800-\udfff]")  # in JSON and command lines; it cannot be encoded


class UserError(ValueError):
    """A mistake that the user can correct. Its message is one line that names the flag or file and what to do."""


class TrainingError(RuntimeError):
    """Training or saving cannot go on. Its message is one line."""


HUB_ERRORS = {  # whose own messages are several lines, of addresses
    hub_errors.GatedRepoError: "it asks you to accept its terms, on its page of the Hub: do that, then hf auth login",
    hub_errors.RepositoryNotFoundError: "the Hub has none of that name, or a private one: check it, or hf auth login",
    hub_errors.RevisionNotFoundError: "the Hub has no such revision of it",
    hub_errors.LocalEntryNotFoundError: "no folder, not in the Hub's cache, and the Hub out of reach: hf download it",
}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    reasons = [reason for kind, reason in HUB_ERRORS.items() if isinstance(error, kind)]
    return (reasons or str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def user_errors(what: str, *types: type[Exception]) -> Iterator[None]:
    """Turns exceptions (of `types`) into a UserError that begins with `what`; the script's own only if named there."""
    types = types or (Exception,)
    try:
        yield
    except types as error:  # the libraries raise their own for each way in which a file can be wrong
        if isinstance(error, (UserError, TrainingError)) and type(error) not in types:
            raise
        raise UserError(f"{what}: {first_line(error)}") from None


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Anything but the LoRA may fail: a line says so, and the run goes on."""
    try:
        yield
    except Exception as error:  # of any library or tracker: whatever it is, it must not cost the training
        error_once(f"{what} failed ({first_line(error)}): the run goes on; make room, or leave out what asks for it")


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, stripped. Raises UserError."""
    with user_errors(f"{path} cannot be read as UTF-8", OSError, UnicodeError):
        return path.read_text(encoding="utf-8-sig").strip()


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """[(where it stands, row)] of a JSON Lines file, or of a CSV file with a header. Raises UserError."""
    text, rows = read_text(path), []
    if path.suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        with user_errors(f"{path} is not CSV", csv.Error):
            return [(f"{path}, line {table.line_num}", row) for row in table]
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with user_errors(f"{path}, line {number} is not JSON", ValueError, RecursionError):
                rows.append((f"{path}, line {number}", json.loads(line)))
    return rows


def clean_caption(caption: Any, where: str) -> str:
    """A caption from a data set: a string, or the first of a list of strings; nothing is ''. Raises UserError."""
    caption = caption[0] if isinstance(caption, (list, tuple)) and caption else caption
    if caption is not None and (not isinstance(caption, str) or HALF_A_CHARACTER.search(caption)):
        raise UserError(f"{where}: the caption {caption!r} is not a text, or holds half a character: correct it")
    return (caption or "").strip()


def comparable(name: str) -> str:
    """A file's name as names are compared: in NFC, as a Mac's é is two characters, and its endings in lower case."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    stem = re.sub("(?i)-masklabel$", "-masklabel", stem)
    return (comparable(stem) if suffix.lower() in (".txt", ".caption") else stem) + suffix.lower()


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, hidden files left out, by name; nothing where it is no folder. Raises UserError."""
    if not os.path.isdir(folder):  # unlike Path's, no error for a name that is too long
        return []
    with user_errors(f"{folder} cannot be read: check its permissions", OSError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, as a message lists them, and how many more there are."""
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


FILE_KINDS = {b"GGUF": "a GGUF file", b"PK\x03\x04": "a pickled checkpoint", b"\x80": "a pickled checkpoint",
              b"version": "a git-lfs pointer, not the weights", b"<": "a web page"}  # fmt: skip


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """{tensor: {"dtype", "shape", "data_offsets"}} of a file, and its "__metadata__". Raises UserError."""
    with user_errors(f"{path} cannot be read, give a safetensors file", OSError), open(path, "rb") as file:
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), 10**8))  # safetensors' own limit
    if not header.startswith(b"{"):
        kind = next((kind for magic, kind in FILE_KINDS.items() if start.startswith(magic)), "no safetensors file")
        raise UserError(f"{path} is {kind}: give a safetensors file")
    with user_errors(f"{path} is half a download, fetch it again", SafetensorError), safe_open(path, "pt"):
        return json.loads(header)


def digest_of(value: Any, size: int = 16) -> str:
    """A digest of bytes, or of anything else whose repr says all of it, in hexadecimal."""
    return hashlib.blake2b(value if isinstance(value, bytes) else repr(value).encode(), digest_size=size).hexdigest()


def seeded_generator(*parts: Any) -> torch.Generator:
    """A CPU generator whose seed, of 63 bits, is a function of `parts` alone."""
    return torch.Generator().manual_seed(int.from_bytes(bytes.fromhex(digest_of(parts, 8)), "little") >> 1)


def flush_to_disk(path: Path) -> None:
    """fsync of a file or folder, where the system and the file system know it."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        error_once("--output_dir has no fsync: what is saved there outlives a kill, but perhaps not a power cut")
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path, folders: bool = False) -> None:
    """Rename, again for some seconds where a scanner holds it; with `folders`, make and remove those around it too."""
    function = os.renames if folders else os.replace
    for pause in RENAMING_PAUSES:
        try:
            return function(source, target)
        except PermissionError:
            time.sleep(pause)
        except OSError as error:
            if error.errno not in NO_RENAMING or not source.is_dir():
                raise
            shutil.copytree(source, target)
            return shutil.rmtree(source)
    function(source, target)


@contextlib.contextmanager
def replacing(path: Path, mark: Any = "part") -> Iterator[Path]:
    """Yields another name for the body to write a file under, which then takes its place whole, or not at all."""
    part = path.with_name(f".{path.stem}.{mark}{path.suffix}")
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        with contextlib.suppress(OSError):  # some mounts have no permissions
            os.chmod(part, 0o666 & ~umask)  # safetensors makes its files private
        rename(part, path)
    finally:
        part.unlink(missing_ok=True)


class StopSignal(contextlib.ExitStack):
    """Notes the signals that end a run, for the step or picture at hand to be finished; `number` is 0 until then."""

    def __init__(self, list_kept: Callable[[], list[Path]]) -> None:
        super().__init__()
        self.list_kept, self.number, self.noted = list_kept, 0, 0.0
        for number in STOP_SIGNALS:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:  # as of nohup
                with contextlib.suppress(ValueError):  # not the main thread, as in some notebooks: no signals then
                    self.callback(signal.signal, number, signal.signal(number, self.note) or signal.SIG_DFL)

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal. Raises KeyboardInterrupt for a second Ctrl-C."""
        if not self.number:
            self.number, self.noted = number, time.monotonic()
            logger.warning(f"{signal.Signals(number).name}: finishing the step, then saving a checkpoint")
        elif number == signal.SIGINT and time.monotonic() - self.noted > 1:  # not the first, passed on by a launcher
            logger.warning(f"Ended amid a step; there is {listed(map(str, self.list_kept())) or 'no checkpoint'}")
            raise KeyboardInterrupt


class OutputFolder:
    """`--output_dir`. Its `run.json` lists {file: digest} of what is the program's own: all else is the user's."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError where `run.json` is something else."""
        self.path, self.file = Path(path), Path(path, RUN_FILE)
        self.record: dict[str, Any] = {"finished": False, "steps": 0, "files": {}}
        if os.path.lexists(self.file):
            with user_errors(f"{self.file} is not this program's: move it away, or take another --output_dir"):
                record = json.loads(read_text(self.file))
                self.record |= record | {"files": dict(record["files"])}

    def update(self, **facts: Any) -> None:
        """Write `run.json` with these facts changed."""
        self.record |= facts
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as part:
            part.write_text(json.dumps(self.record, indent=1))
            flush_to_disk(part)

    def owns(self, name: str) -> bool:
        """Whether that name is free, or its file as this program left it: with its digest, or listed without one."""
        path, digest = self.path / name, self.record["files"].get(name, "")
        return not os.path.lexists(path) or path.is_file() and digest in (None, digest_of(path.read_bytes()))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields another name to write the file under, which is listed first. Raises FileExistsError: the user's."""
        path = self.path / name
        if not self.owns(name):
            raise FileExistsError(f"{path} is not, or no longer, as this program made it: move it away")
        self.update(files=self.record["files"] | {name: None})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part
        self.update(files=self.record["files"] | {name: digest_of(path.read_bytes())})


def release_memory() -> None:
    """Return the memory of deleted models to the device and to the system: the C library keeps some of it."""
    training_utils.free_memory()
    with contextlib.suppress(AttributeError, TypeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def read_arguments(path: Path) -> list[str]:
    """The words of an `@file`, in which a word that begins with # begins a comment. Raises UserError."""
    words = []
    for line in read_text(path).splitlines():
        line = re.sub(r"""("(\\.|[^"\\])*"|'[^']*'|\\.)|(?<!\S)#.*""", r"\1", line)
        with user_errors(f"{path}: {line!r}", ValueError):  # an open quote
            words += shlex.split(line.replace("\\", r"\\") if WINDOWS else line)
    return words


def checked(kind: type, wanted: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a number of that kind for which `holds`, which is `wanted` in words."""

    def number(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text[:20]} is not {wanted}")
        return value

    return number


count = checked(int, "from 1 to 2^63", lambda n: 1 <= n < 2**63)
whole = checked(int, "from 0 to 2^63", lambda n: 0 <= n < 2**63)
positive = checked(float, "above 0", lambda x: 0 < x < math.inf)
non_negative = checked(float, "0 or more", lambda x: 0 <= x < math.inf)
finite = checked(float, "finite", math.isfinite)
fraction = checked(float, "from 0 to 1", lambda x: 0 <= x <= 1)
below_one = checked(float, "from 0 to below 1", lambda x: 0 <= x < 1)
of_16 = checked(int, "a multiple of 16, as in 1024,1024;832,1248", lambda n: n > 0 and n % SIZE_MULTIPLE == 0)


def fraction_or_word(text: str) -> float | str:
    """An argparse type: a number from 0 to 1, `true`, `false` or `auto`."""
    words = {"auto": "auto", "true": 1.0, "false": 0.0}
    return words[text.lower()] if text.lower() in words else fraction(text)


def resolutions(text: str) -> tuple[int, ...]:
    """An argparse type: one side in pixels, or several with commas between them."""
    return tuple(map(count, text.split(",")))


def bucket_list(text: str) -> list[Size]:
    """An argparse type: `"h,w;h,w"` in pixels, each a multiple of 16."""
    return [(of_16(h), of_16(w)) for h, w in (pair.split(",") for pair in text.strip("; ").split(";"))]


def build_parser() -> argparse.ArgumentParser:
    """The command line: every flag, by topic. One that changes the mathematics also stands in MATHEMATICS."""

    def error(message: str) -> NoReturn:
        raise UserError(message)

    def add(usage: str, text: str, **options: Any) -> None:
        """A flag of the group: "--name METAVAR" or "--name {a,b}" with help and options; with neither, a switch."""
        flag, _, metavar = usage.partition(" ")
        if metavar:
            choices = metavar[1:-1].lower().split(",") if metavar.startswith("{") else None
            options = {"metavar": metavar, "choices": choices} | options
        elif not options:
            options["action"] = "store_true"
        text += f" Default: {options['default']}." if options.get("default") not in (None, False) else ""
        group.add_argument(flag, help=text, **options)

    # fmt: off
    text = "Teach Z-Image a subject, a character or a style, as a LoRA. @FILE: a file of flags; # begins a comment."
    parser = argparse.ArgumentParser(prog="train_dreambooth_lora_z_image.py", description=text)
    parser.error = error
    parser.register("type", None, os.path.expanduser)  # of texts: shells do that in `--flag ~/x` alone

    group = parser.add_argument_group("Model and precision")
    add("--pretrained_model_name_or_path MODEL", "Z-Image: a local folder or a Hub id.", required=True)
    add("--transformer_path FILE", "Its transformer from one safetensors file, as ComfyUI and model sites give it.")
    add("--revision NAME", "Branch, tag or commit of the model on the Hub.")
    add("--variant NAME", "Variant of the weight files, for example fp16.")
    add("--cache_dir DIR", "Where models and data sets from the Hub are downloaded to.")
    add("--mixed_precision {no,fp16,bf16}", "Of frozen weights and products. Default: accelerate's config.")
    add("--do_fp8_training", "Hold the transformer in float8 and multiply in it (CUDA: compute capability 8.9).")
    add("--base_model_precision {int8,fp8,nf4}", "Hold the transformer in int8 (any GPU), fp8 or nf4.")
    add("--bnb_quantization_config_path JSON", "Hold it in bitsandbytes' 4 or 8 bits, as in configs/nf4.json.")
    add("--gradient_checkpointing FRACTION", "Recompute all blocks, or a fraction, or auto: as memory needs. Slower.",
        type=fraction_or_word, nargs="?", const=True, default=False)
    add("--offload", "Keep encoders and the inputs of recomputed blocks in host memory while they are not needed.")
    add("--allow_tf32", "Allow TF32 in float32 matrix products on Ampere and later.")
    add("--compile", "Compile the repeated transformer block with torch.compile.")
    add("--base_adapter PATH[:WEIGHT]", "A LoRA added to the base for training alone, as for a distilled model.")
    add("--attention_backend NAME", "Kernel, by diffusers' name.", choices=[b.value for b in AttentionBackendName])
    add("--enable_npu_flash_attention", "Use the NPU's flash attention (needs torch_npu).")
    add("--fsdp_text_encoder", "Shard the text encoder over the processes while it encodes.")

    group = parser.add_argument_group("Data")
    add("--instance_data_dir DIR", "Folder of pictures; captions in photo.txt, metadata.jsonl or metadata.csv.")
    add("--dataset_name NAME", "Instead of a folder: a data set on the Hub or on disk.")
    add("--dataset_config_name NAME", "Configuration of that data set.")
    add("--image_column NAME", "Its column of pictures.", default="image")
    add("--caption_column NAME", "Its column of captions, or the field of metadata.jsonl or .csv.")
    add("--instance_prompt PROMPT", 'Caption of every picture that has none, for example "a photo of sks dog".')
    add("--caption_prefix TEXT", "A trigger word, put before captions that do not begin with it.")
    add("--masked_loss", "Weigh the loss by the alpha channel or photo-masklabel.png: white is what matters.")
    add("--unmasked_weight W", "Of the rest of the picture, where what is white counts 1.", type=fraction, default=0.1)
    add("--repeats N", "How often each picture counts in an epoch.", type=count, default=1)
    add("--resolution PIXELS", "Side of pictures; 512,768 trains each at both.", type=resolutions, default="1024")
    add('--aspect_ratio_buckets "H,W;H,W"', "Sizes: each picture has the nearest in shape.", type=bucket_list)
    add("--use_aspect_ratio_buckets", "Compute such sizes from --resolution; a small picture is not enlarged.")
    add("--center_crop", "Crop the middle. Without it, a crop is drawn anew every epoch.")
    add("--random_flip", "Mirror half of the samples, drawn anew every epoch.")
    add("--max_sequence_length TOKENS", "Longer prompts are cut, with a warning.", type=count, default=512)
    add("--caption_dropout FRACTION", "Of samples trained on the empty prompt.", type=fraction, default=0.0)
    add("--cache_latents", "Encode all pictures once, then free the VAE. Crops are drawn once; both flips are kept.")
    add("--encoding_cache_dir DIR", "Keep latents and prompt embeddings there for the next run.")
    add("--dataloader_num_workers N", "Threads that read ahead, at least one.", type=whole, default=0)

    group = parser.add_argument_group("Prior preservation")
    add("--with_prior_preservation", "Train on pictures of the class too, against drift.")
    add("--class_data_dir DIR", "Folder of class pictures; missing ones are generated into it.")
    add("--class_prompt PROMPT", 'What they show, for example "a photo of a dog".')
    add("--num_class_images N", "How many there must be.", type=count, default=100)
    add("--prior_loss_weight W", "Weight of their loss.", type=non_negative, default=1.0)
    add("--sample_batch_size N", "Batch size of generating them.", type=count, default=4)
    add("--prior_generation_precision {no,fp32,fp16,bf16}", "Default: that of training.")

    group = parser.add_argument_group("LoRA")
    add("--init_lora PATH", "Start from this LoRA of any program's names: a file, a folder, or a Hub id.")
    add("--rank N", "Dimension of the LoRA matrices. Default: --init_lora's, or 4.", type=count)
    add("--lora_alpha A", "The update is scaled by alpha / rank. Default: --init_lora's, or 4.", type=positive)
    add("--lora_dropout P", "Dropout on the input of the LoRA.", type=below_one, default=0.0)
    add("--lora_layers NAMES", "By suffix or path. Default: --init_lora's, or to_k,to_q,to_v,to_out.0.")

    group = parser.add_argument_group("Optimization")
    add("--train_batch_size N", "Pictures at once in each process.", type=count, default=4)
    add("--gradient_accumulation_steps N", "Batches whose gradients make one update.", type=count, default=1)
    add("--num_train_epochs N", "Passes over the data.", type=count, default=1)
    add("--max_train_steps N", "Updates in all; overrides --num_train_epochs.", type=count)
    add("--learning_rate LR", "For Prodigy 1.0.", type=non_negative, default="1e-4")
    add("--scale_lr", "Multiply the learning rate by the total batch size.")
    schedulers = [scheduler.value for scheduler in SchedulerType if scheduler != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler NAME", "%(choices)s.", choices=schedulers, default="constant")
    add("--lr_warmup_steps N", "Updates of warm-up.", type=whole, default=500)
    add("--lr_num_cycles N", "Restarts of cosine_with_restarts.", type=count, default=1)
    add("--lr_power P", "Power of polynomial.", type=positive, default=1.0)
    add("--optimizer {AdamW,prodigy}", "Of the LoRA.", type=str.lower, default="AdamW")
    add("--use_8bit_adam", "Keep AdamW's state in 8 bits (bitsandbytes).")
    add("--adam_beta1 B", "Of AdamW and Prodigy.", type=below_one, default=0.9)
    add("--adam_beta2 B", "Of AdamW and Prodigy.", type=below_one, default=0.999)
    add("--adam_weight_decay W", "Weight decay of both.", type=non_negative, default="1e-4")
    add("--adam_epsilon E", "Added to the denominator in both.", type=positive, default="1e-8")
    add("--prodigy_beta3 B", "Of Prodigy's step size. Default: the root of beta2.", type=fraction)
    boolean = {"type": accelerate.utils.str_to_bool, "nargs": "?", "const": True, "default": True}
    add("--prodigy_decouple BOOL", "Decoupled weight decay, as in AdamW.", **boolean)
    add("--prodigy_use_bias_correction BOOL", "Adam's bias correction in Prodigy.", **boolean)
    add("--prodigy_safeguard_warmup BOOL", "Keep the warm-up out of Prodigy's estimate.", **boolean)
    add("--ema_decay D", "Validate and save weights averaged over some 1 / (1 - D) updates.", type=below_one)
    add("--max_grad_norm NORM", "Gradients are clipped to it.", type=positive, default=1.0)
    add("--weighting_scheme {none,sigma_sqrt,logit_normal,mode,cosmap}",
        "Density of timesteps, or weighting of the loss, by the SD3 paper; none: uniform.", default="none")
    add("--logit_mean M", "Of logit_normal; above 0: more noise.", type=finite, default=0.0)
    add("--logit_std S", "Of logit_normal: its standard deviation.", type=positive, default=1.0)
    add("--mode_scale S", "Of mode: how far it is from uniform.", type=finite, default=1.29)
    add("--timestep_shift S", "Of the training sigmas alone. Default: the scheduler's.", type=positive)
    add("--seed N", "Default: drawn once, logged and kept.", type=whole)

    group = parser.add_argument_group("Validation")
    add("--validation_prompt PROMPT", "Draw it while training. May be repeated, or name a text file of prompts, whose "
        "lines may end in --w WIDTH --h HEIGHT --s STEPS --l GUIDANCE --d SEED --n NEGATIVE.", action="append")
    add("--num_validation_images N", "For each prompt; 0: none.", type=whole, default=4)
    add("--final_validation_prompt PROMPT", "For the pictures after training. Default: the same.")
    add("--skip_final_inference", "Draw no pictures after training.")
    add("--validation_model_path MODEL", "Draw them on this Z-Image model or transformer file (Turbo), with the LoRA.")
    add("--validation_data_dir DIR", "Held-out pictures: their loss is logged beside the base model's.")
    add("--save_best", "Keep the LoRA of the lowest held-out loss in best/ as well.")
    add("--guidance_scale G", "Of all pictures that are drawn; 0 for Turbo.", type=non_negative, default=5.0)
    add("--validation_num_inference_steps N", "Denoising steps. Default: the pipeline's.", type=count)
    group = group.add_mutually_exclusive_group()
    add("--validation_epochs N", "Validate every N epochs.", type=count, default="50")  # not 50: that may be given
    add("--validation_steps N", "Validate every N updates instead.", type=count)

    group = parser.add_argument_group("Output")
    add("--output_dir DIR", "For the LoRA, checkpoints and pictures.", default="z-image-dreambooth-lora")
    add("--logging_dir DIR", "For tensorboard, inside --output_dir.", default="logs")
    add("--report_to TRACKER", "Where figures go: tensorboard, wandb, ..., all or none.", default="tensorboard")
    add("--checkpointing_steps N", "Save every N updates.", type=count, default=500)
    add("--checkpoints_total_limit N", "Keep only the newest N. Default: all.", type=count)
    add("--resume_from_checkpoint PATH", "A checkpoint folder, or latest.")
    add("--upcast_before_saving", "Save the LoRA in float32, not in the training precision.")
    add("--push_to_hub", "Upload the LoRA, its card and its pictures.")
    add("--hub_model_id ID", "Repository. Default: the name of --output_dir.")
    add("--hub_token TOKEN", "Default: the token of hf auth login.")
    add("--hub_private", "Make the repository private.")
    add("--plan_for GIB", "With --dry_run: count memory as for a CUDA card of that size, not here.", type=positive)
    add("--dry_run", "Read the data, print the plan, train nothing.")

    group = parser.add_argument_group("Accepted without effect")
    add("--text_encoder_lr LR", "The text encoder is frozen.", type=float)
    add("--adam_weight_decay_text_encoder W", "The text encoder is frozen.", type=float)
    add("--local_rank N", "The launcher's environment decides.", type=int)
    # fmt: on
    return parser


def round_size(side: float) -> int:
    """The multiple of 16 nearest to `side`, at least 16."""
    return max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE)


def assign_bucket(size: Size, buckets: list[Size] | None, resolution: int) -> Size:
    """The nearest in shape of `buckets`, or of those of `resolution` or the next below it that the picture fills."""
    height, width = size

    def distance(bucket: Size) -> tuple[float, int]:
        shape = abs(math.log(height / width) - math.log(bucket[0] / bucket[1]))
        return round(shape, 6), abs(height * width - bucket[0] * bucket[1])

    if buckets:
        return min(buckets, key=distance)
    largest = round_size(min(resolution, math.sqrt(height * width / 0.75)))  # all buckets of more are larger
    for side in range(largest, SIZE_MULTIPLE, -SIZE_MULTIPLE):
        bucket = min(bucket_ladder(side), key=distance)
        if bucket[0] <= height and bucket[1] <= width:
            return bucket
    return (SIZE_MULTIPLE, SIZE_MULTIPLE)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is drawn of a prompt, and how."""

    prompt: str
    width: int  # in pixels, here and below before they are rounded to 16
    height: int
    guidance: float
    steps: int
    seed: int | None = None  # of the first picture, those of the next follow; None: the run's
    negative_prompt: str = ""

    @property
    def size(self) -> Size:
        return round_size(self.height), round_size(self.width)


def drawing_of(prompt: str, args: argparse.Namespace, by_pipeline: bool = False, **options: Any) -> Drawing:
    """A prompt as `options`, then the flags say; `by_pipeline`: by its defaults, unless --guidance_scale is 0."""
    defaults = inspect.signature(ZImagePipeline.__call__).parameters
    steps, guidance = defaults["num_inference_steps"].default, defaults["guidance_scale"].default
    if not by_pipeline or args.guidance_scale == 0 and not args.validation_model_path:  # as for a distilled one
        steps, guidance = args.validation_num_inference_steps or steps, args.guidance_scale
    side = args.resolution[-1]
    return Drawing(prompt, **{"width": side, "height": side, "steps": steps, "guidance": guidance, **options})


def read_drawing(line: str, where: str, args: argparse.Namespace) -> Drawing:
    """A line of a file of prompts, with its options: `a dog --w 768 --d 7 --n blurry`. Raises UserError."""
    prompt, *words = re.split(r"(?:^|\s+)--(?=[^\s-])", line.strip())
    fields = {"w": "width", "h": "height", "s": "steps", "l": "guidance", "d": "seed", "n": "negative_prompt"}
    kinds, options = {"l": non_negative, "d": whole, "n": str}, {}
    for name, *value in (word.split(maxsplit=1) for word in words):
        with user_errors(f"{where}: --{name} is none of --{' --'.join(fields)}, or its value is wrong"):
            options[fields[name]] = kinds.get(name, count)(*value)
    return drawing_of(prompt, args, **options)


def read_prompts(args: argparse.Namespace) -> list[Drawing]:
    """What `--validation_prompt` means, files read line by line. Raises UserError."""
    drawings = []
    for prompt in args.validation_prompt or []:
        where = f"--validation_prompt {prompt}"
        if os.path.isfile(prompt):  # unlike Path's, no error for a prompt that is too long for a name
            lines = enumerate(read_text(Path(prompt)).splitlines(), 1)
            found = [read_drawing(line, f"{where}, line {n}", args) for n, line in lines if line.strip()]
        else:
            found = [drawing_of(prompt, args)] if prompt and not prompt.endswith(".txt") else []
        if not found:
            raise UserError(f"{where} is an empty file, or none: check it")
        drawings += found
    return drawings


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line (default: `sys.argv[1:]`), checked, prompts as Drawings. Raises UserError."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        words += read_arguments(Path(os.path.expanduser(word[1:]))) if word.startswith("@") else [word]
    args = build_parser().parse_args(words)
    texts = ("instance_prompt", "caption_prefix", "class_prompt", "validation_prompt", "final_validation_prompt")
    for flag in [name for name, value in vars(args).items() if value == "" and name not in texts]:
        raise UserError(f"--{flag} is empty, as of a variable that is not set: give it, or leave it out")
    for flag in texts:
        if HALF_A_CHARACTER.search("".join(getattr(args, flag) or "")):
            raise UserError(f"--{flag} is not UTF-8")
    if args.learning_rate <= 1e-7 and (args.lr_scheduler == "polynomial" or args.optimizer == "prodigy"):
        raise UserError("--learning_rate: give more than 1e-7 for --lr_scheduler polynomial, --optimizer prodigy")
    if len(args.resolution) > 1 and args.aspect_ratio_buckets:
        raise UserError("--aspect_ratio_buckets lists all sizes: give one --resolution, that of drawn pictures")
    if len({*map(round_size, args.resolution)}) < len(args.resolution):
        raise UserError("--resolution: two of its sizes are the same, in multiples of 16: leave one out")
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        raise UserError("give exactly one of --instance_data_dir and --dataset_name")
    float8 = "fp8" if args.do_fp8_training else None
    if len({float8, args.base_model_precision, args.bnb_quantization_config_path} - {None}) > 1:
        raise UserError("--do_fp8_training, --base_model_precision, --bnb_quantization_config_path: choose one")
    args.base_model_precision = float8 or args.base_model_precision
    needs = {"plan_for": ["dry_run"], "save_best": ["validation_data_dir"], "dataset_config_name": ["dataset_name"]}
    needs["with_prior_preservation"] = ["class_data_dir", "class_prompt"]
    for flag, needed in needs.items():
        if getattr(args, flag) and not all(getattr(args, name) for name in needed):
            raise UserError(f"--{flag} needs --{' and --'.join(needed)}: give that too, or leave it out")
    args.hub_model_id = args.hub_model_id or Path(args.output_dir).resolve().name
    if args.push_to_hub:
        with user_errors("--hub_model_id (default: the name of --output_dir)", hub_errors.HFValidationError):
            validate_repo_id(args.hub_model_id)
    prompts, draws = read_prompts(args), args.num_validation_images > 0  # now: a file may change meanwhile
    last = [drawing_of(args.final_validation_prompt, args)] if args.final_validation_prompt else prompts
    args.validation_prompt = prompts if draws else []
    args.final_validation_prompt = last if draws and not args.skip_final_inference else []
    return args


def ineffective_flags(args: argparse.Namespace) -> list[str]:
    """Lines about flags that were given and change nothing, or something else than they may seem to."""
    prodigy, noise = args.optimizer == "prodigy", "more" if args.logit_mean > 0 else "less"
    no_class = not args.with_prior_preservation and (args.class_data_dir or args.class_prompt)
    idle_warmup = args.lr_scheduler == "constant" and args.lr_warmup_steps not in (0, 500)
    unused = ("text_encoder_lr", "adam_weight_decay_text_encoder", "local_rank")
    lines = {f"--{flag} has no effect: see --help": getattr(args, flag) is not None for flag in unused} | {
        "--use_8bit_adam has no effect: Prodigy keeps its state in float32": prodigy and args.use_8bit_adam,
        "--learning_rate is low for Prodigy, which finds its own: 1.0 is usual": prodigy and args.learning_rate <= 0.1,
        "--class_data_dir and --class_prompt have no effect without --with_prior_preservation": no_class,
        "--unmasked_weight has no effect without --masked_loss": args.unmasked_weight != 0.1 and not args.masked_loss,
        "--lr_warmup_steps has no effect with constant: take constant_with_warmup": idle_warmup,
        f"--logit_mean means {noise} noise, as in the paper; some trainers flip it": args.logit_mean,
    }
    sides = [*args.resolution, *(side for d in args.validation_prompt for side in (d.width, d.height))]
    lines |= {f"{n} (of --resolution or a prompt's --w, --h) is rounded to {round_size(n)}": n % 16 for n in sides}
    return [line for line, holds in lines.items() if holds]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and captions
# ---------------------------------------------------------------------------------------------------------------------


Source = Path | Callable[[], bytes]  # a picture's file, or a function that returns its bytes
Caption = tuple[str, Path | str]  # a text, and where it comes from: a file, or a flag
# Of a picture: its name, itself, its own captions, the words in its folder's name, its mask, how often it counts
Found = tuple[str, Source, list[Caption], str, Path | None, int]
Examples = dict[str, list["Example"]]  # by kind


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to train on, or to measure the loss on."""

    kind: str  # "instance", "class" or "held-out"
    name: str  # what messages call it
    source: Source
    caption: str
    size: Size  # of the upright picture
    bucket: Size  # of the picture as it is trained
    repeats: int  # how often it counts in an epoch
    origin: Path | str = ""  # of the caption
    mask: Path | str | None = None  # of --masked_loss: a file, or the picture's "alpha" channel


def read_bytes(source: Source) -> bytes:
    """The encoded picture of an example."""
    return source.read_bytes() if isinstance(source, Path) else source()


@contextlib.contextmanager
def open_picture(name: str, source: Source) -> Iterator[tuple[Image.Image, int]]:
    """An open Pillow picture, not yet decoded, and how it is stored, from 1 (upright) to 8. Raises UserError."""
    formats = {*PICTURE_FORMATS.values()} - {"MPO"}  # which is read as a JPEG; no other program sees the bytes
    with user_errors(f"{name} cannot be read as a picture, replace or remove it"):
        file = source if isinstance(source, Path) else io.BytesIO(source())
        with Image.open(file, formats=sorted(formats)) as image:
            orientation, entry = 1, ORIENTATION.search(image.info.get("exif", b""))  # by its bytes: many are broken
            with contextlib.suppress(Exception):  # what cannot be read, of XMP for example, says nothing
                orientation = entry[entry.lastindex][0] if entry else image.getexif().get(0x0112)
            yield image, orientation if orientation in TURNS and image.format != "TIFF" else 1  # turned by Pillow


def scale_wide_numbers(image: Image.Image, file_format: str, tags: Mapping[int, Any]) -> Image.Image:
    """A grey picture of 16 or 32 bits, or of floats, in 8: white is the smallest usual white that no pixel exceeds."""
    values = np.asarray(image)
    if image.mode == "I" and file_format == "TIFF" and tags.get(339, (1,)) == (1,):  # 32 bits without a sign
        values = values.view(np.uint32)
    finite = values[np.isfinite(values)]
    black = finite.min(initial=0).item()  # with negative values, those between minimum and maximum are shown
    high = finite.max(initial=black).item()
    of_16_bits = image.mode.startswith("I;16") or image.mode == "I" and file_format in ("PNG", "PPM")
    whites = [65535] if of_16_bits else [1] * (image.mode == "F") + [255, 65535, 2**31 - 1, 2**32 - 1]
    white = high if black < 0 else min((white for white in whites if white >= high), default=high)
    grey = np.nan_to_num((values.astype(np.float32) - black) * (255 / ((white - black) or 1)))
    image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    return ImageOps.invert(image) if tags.get(262) == 0 else image


def decode_image(name: str, source: Source, side: int = MAX_SIDE) -> Image.Image:
    """A picture as a person would see it: first frame, upright, sRGB; RGBA if transparent, on white all the same."""
    with open_picture(name, source) as (image, orientation):
        turn, profile = TURNS.get(orientation), image.info.get("icc_profile")
        file_format, tags = image.format, dict(image.tag_v2) if image.format == "TIFF" else {}
        image.draft("RGB", (side, side))  # a JPEG of more than `side`² pixels is decoded smaller, others are shrunk
        if (step := math.ceil(math.sqrt(image.width * image.height) / side)) > 1:
            image = image.resize([math.ceil(length / step) for length in image.size], Image.Resampling.NEAREST)
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I") or image.mode == "F":
            image = scale_wide_numbers(image, file_format, tags)
        if image.mode == "P" or image.has_transparency_data:
            image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        if profile and image.mode in ("RGB", "RGBA", "CMYK", "L"):
            with contextlib.suppress(Exception):  # a broken profile is as good as none
                own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                image = ImageCms.profileToProfile(image, own, srgb, outputMode="RGBA" if "A" in image.mode else "RGB")
        if image.mode != "RGBA":
            return image.convert("RGB")
        on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        on_white.putalpha(image.getchannel("A"))
        return on_white


def load_picture(example: Example, side: int = MAX_SIDE) -> Image.Image:
    """An example's picture in RGB; with the mask of its loss, where it has one, in RGBA. Raises UserError."""
    if example.mask is None:
        return decode_image(example.name, example.source, side).convert("RGB")
    image = decode_image(example.name, example.source)
    if isinstance(example.mask, Path):
        mask = decode_image(str(example.mask), example.mask).convert("RGBA")  # what is transparent does not matter
        image.putalpha(ImageChops.multiply(mask.convert("L"), mask.getchannel("A")).resize(image.size))
    elif image.mode == "RGB":
        image.putalpha(255)
    if image.getextrema()[3][1] == 0:
        raise UserError(f"--masked_loss: the mask of {example.name} is black everywhere: make white what matters")
    return image


def fit_to_bucket(image: Image.Image, bucket: Size, crop: Sequence[float], flip: bool) -> Tensor:
    """Scale a picture to cover `bucket`, cut it there, and mirror it if `flip`. Returns [3, H, W] in [-1, 1].

    `crop` = (vertical, horizontal) in [0, 1] says where in the surplus to cut. Of RGBA, [4, H, W] with the mask.
    """
    layers = [(image.convert("RGB"), Image.Resampling.LANCZOS)]
    if image.mode == "RGBA":
        layers.append((image.getchannel("A"), Image.Resampling.BOX))
    fitted = [ImageOps.fit(layer, bucket[::-1], method, centering=crop[::-1]) for layer, method in layers]
    pixels = torch.from_numpy(np.dstack(fitted)).permute(2, 0, 1).float() / 127.5 - 1
    assert pixels.shape[1:] == bucket
    return pixels.flip(2) if flip else pixels


def read_metadata(folder: Path, column: str | None, files: Callable[[Path], dict[str, Path]]) -> dict[Path, Caption]:
    """{picture: (its caption or '', the file of it)} by the folder's METADATA file, if any. Raises UserError."""
    metadata = next((folder / name for name in METADATA if os.path.isfile(folder / name)), None)
    captions, known, fields = {}, set(), [column] if column else ["text", "caption", "prompt", "description"]
    for where, row in read_rows(metadata) if metadata else []:
        name = row.get("file_name") if isinstance(row, dict) and None not in row else None  # None: cells too many
        path = folder
        for part in PurePosixPath(name).parts if isinstance(name, str) else ():
            path = path and files(path).get(comparable(part))
        if not path or not os.path.isfile(path) or comparable(path.name).endswith(MASK_ENDING):
            wrong = '"file_name" is missing, or outside the folder, or no picture there, or a text lacks quotes'
            raise UserError(f"{where}: {wrong}: {row!r:.200}")
        texts = (clean_caption(row.get(field), f"{where}, {name!r}") for field in fields)
        captions[path] = next(filter(None, texts), ""), metadata
        known |= row.keys() - {"file_name"}
    if metadata and column and column not in known:
        raise UserError(f"--caption_column {column}: {metadata} has only {', '.join(sorted(known)) or 'no fields'}")
    return captions


def find_in_folder(kind: str, args: argparse.Namespace) -> Iterator[Found]:
    """The pictures of a folder, and of those inside named `10_words`, by name, with captions. Raises UserError."""
    folder = Path(getattr(args, PICTURE_FLAGS[kind]))
    if kind == "class" and not folder.exists():
        return  # they will be drawn
    if not os.path.isdir(folder):
        raise UserError(f"--{PICTURE_FLAGS[kind]} {str(folder)[:500]} is not a folder: check the path")
    files = functools.cache(lambda place: {comparable(path.name): path for path in list_folder(place)})
    captions = read_metadata(folder, None if kind == "class" else args.caption_column, files)
    if kind == "instance" and args.caption_column and not captions:
        raise UserError(f"--caption_column needs {folder / METADATA[0]}: make it, or leave the flag out")
    repeated = {path: re.fullmatch("0*([1-9][0-9]{0,3})_(.*)", path.name) for path in list_folder(folder)}
    places = {folder: (1, "")} | {path: (int(name[1]), name[2]) for path, name in repeated.items() if name}
    pictures = dict.fromkeys(captions, (1, ""))
    for place, how in places.items():
        for path in list_folder(place):
            name = comparable(path.name)
            if name.endswith((*PICTURE_FORMATS,)) and not name.endswith(MASK_ENDING) and os.path.isfile(path):
                pictures[path] = how
    for path, (repeats, words) in sorted(pictures.items()):
        beside = files(path.parent)
        sidecars = map(beside.get, map(comparable, (path.stem + ".txt", path.stem + ".caption", path.name + ".txt")))
        own = [captions.get(path, ("", "")), *((read_text(f), f) for f in sidecars if f and os.path.isfile(f))]
        yield str(path), path, own, words.strip(), beside.get(comparable(path.stem + MASK_ENDING)), repeats


def find_in_dataset(args: argparse.Namespace) -> Iterator[Found]:
    """The pictures of `--dataset_name`, which stay encoded until they are needed. Raises UserError."""
    dataset, column = args.dataset_name, args.image_column
    with user_errors("--dataset_name needs the datasets library, pip install datasets", ImportError):
        import datasets
        import fsspec  # a requirement of that one
    with user_errors(f"--dataset_name {dataset} cannot be loaded"):
        if any(os.path.isfile(Path(dataset, name)) for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(dataset)
        else:
            data = datasets.load_dataset(dataset, args.dataset_config_name, cache_dir=args.cache_dir)
    if isinstance(data, dict):
        data = data["train"] if "train" in data else next(iter(data.values()))
    columns = f"--image_column {column}, --caption_column {args.caption_column}"
    with user_errors(f"{columns}: {dataset} has only {', '.join(data.column_names)}"):
        data.features[column]  # KeyError where there is none: cast_column would make one
        data = data.with_format(None).cast_column(column, datasets.Image(decode=False))
        pictures = data.select_columns([column])  # no other column of pictures is decoded
        paths = pictures.flatten()[f"{column}.path"]
        captions = data[args.caption_column] if args.caption_column else [None] * len(data)

    def read(index: int) -> bytes:
        picture = pictures[index][column]
        if picture["bytes"] is not None:
            return picture["bytes"]
        with fsspec.open(picture["path"]) as file:  # a path may lead into a zip
            return file.read()

    for index, (caption, path) in enumerate(zip(captions, paths, strict=True)):
        file = PurePosixPath((path or "").split("::")[0]).name
        name = f"{dataset}[{index}]" + (f" ({file})" if file else "")
        if not comparable(file).endswith(MASK_ENDING):
            own = [(clean_caption(caption, name), f"the column {args.caption_column}")]
            yield name, functools.partial(read, index), own, "", None, 1


def load_examples(kind: str, args: argparse.Namespace) -> list[Example]:
    """The instance, class or held-out pictures of the flags, from their headers alone. Raises UserError."""
    flag = "dataset_name" if kind == "instance" and args.dataset_name else PICTURE_FLAGS[kind]
    prompt_flag = "--class_prompt" if kind == "class" else "--instance_prompt"
    prompt, prefix, pictures = getattr(args, prompt_flag[2:]), args.caption_prefix or "", []
    found = find_in_dataset(args) if flag == "dataset_name" else find_in_folder(kind, args)
    for name, source, own, words, mask, repeats in found:
        captions = [*own, (prompt, prompt_flag), (clean_caption(words, name), "the names of folders")]
        text, origin = next(filter(operator.itemgetter(0), captions), ("", prompt_flag))
        if kind != "class" and prefix and not re.match(re.escape(prefix.strip()) + r"(?![A-Za-z0-9])", text):
            text = prefix + " " * (prefix[-1].isascii() and not prefix[-1].isspace()) + text
        with open_picture(name, source) as (image, orientation):
            size = image.size if orientation >= 5 else image.size[::-1]
        repeats = repeats * args.repeats if kind == "instance" else 1
        mask = (mask or "alpha") if args.masked_loss and kind != "held-out" else None
        pictures.append(Example(kind, name, source, text, size, size, repeats, origin, mask))
        if len(pictures) <= PICTURES_VERIFIED:
            load_picture(pictures[-1], side=64)  # in which a JPEG is decoded faster
    if not pictures and kind != "class":
        formats = ", ".join(sorted(PICTURE_FORMATS)) + "; convert HEIC to one of them"
        raise UserError(f"--{flag} {getattr(args, flag)} holds no pictures ({formats}): put some there")
    bare = [picture.name for picture in pictures if picture.origin == prompt_flag]
    if bare and prompt is None:
        raise UserError(f"{prompt_flag} is needed by pictures without a caption of their own: {listed(bare)}")
    examples, smallest = [], round_size(min(args.resolution))
    for side in sorted(map(round_size, args.resolution)):
        ladder = bucket_ladder(side) if side > smallest else None  # a picture is enlarged nowhere, or for the smallest
        buckets = args.aspect_ratio_buckets or (ladder if args.use_aspect_ratio_buckets else [(side, side)])
        placed = [dataclasses.replace(p, bucket=assign_bucket(p.size, buckets, side)) for p in pictures]
        fitting = [e for e in placed if side == smallest or e.bucket[0] <= e.size[0] and e.bucket[1] <= e.size[1]]
        if left_out := len(placed) - len(fitting):
            logger.info(f"--resolution {side}: {left_out} {kind} pictures are smaller and left out there")
        examples += fitting
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineInfo:
    """Where the pipeline is, what its configuration files say, and what tells its weights from others."""

    name: str  # as given: a folder, or an id on the Hub
    path: str  # the folder on this machine
    variant: str | None
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    text_config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    scheduler: FlowMatchEulerDiscreteScheduler
    identity: dict[str, str | None]  # {component: digest of its content}; None where it is not downloaded
    transformer_file: Path | None = None  # in place of the folder's transformer

    def latent_shape(self, bucket: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that size."""
        return (self.transformer_config["in_channels"], bucket[0] // VAE_FACTOR, bucket[1] // VAE_FACTOR)

    def load(self, cls: type[T], subfolder: str, **kwargs: Any) -> T:
        """A component with its weights, in `dtype`. Raises UserError."""
        kwargs |= {"subfolder": subfolder, "variant": self.variant, "output_loading_info": True}
        with user_errors(f"{self.name}: its {subfolder} cannot be loaded", OSError, ValueError, SafetensorError):
            component, loaded = cls.from_pretrained(self.path, **kwargs)
            if loaded["missing_keys"]:  # diffusers leaves them out, transformers fills them with random numbers
                raise ValueError("its file lacks some of the weights")
            return component


def component_identity(path: str, component: str, variant: str | None, file: Path | None = None) -> str | None:
    """A digest of what a component computes, wherever it came from, with `file` in the place of its own weights."""
    folder, digest = Path(path, component), hashlib.blake2b(digest_size=16)
    files = [file] if file else sorted(folder.glob("*.safetensors"))
    for file in files:
        header, size = safetensors_header(file), file.stat().st_size
        digest.update(repr((header, size)).encode())
        with open(file, "rb") as weights:
            for place in range(16):
                weights.seek(max(0, size - 2**16) * place // 15)  # evenly spaced
                digest.update(weights.read(2**16))
    config = json.loads((folder / "config.json").read_bytes())  # which also says where it comes from
    settings = [item for item in config.items() if not item[0].endswith(("name_or_path", "_version"))]
    digest.update(repr((sorted(settings), variant)).encode())
    return digest.hexdigest() if files else None


def read_pipeline_info(args: argparse.Namespace, accelerator: Accelerator) -> PipelineInfo:
    """Download the pipeline if it is on the Hub, and read the configuration of its components. Raises UserError."""
    name, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    flag = f"--pretrained_model_name_or_path {name}"
    incomplete = f"{flag} is not a complete Z-Image pipeline: its"
    local = Path(name).is_dir()
    # One process of a machine downloads for all; weights are not needed for the plan.
    with user_errors(f"{incomplete} model_index.json"), accelerator.local_main_process_first():
        small = ["*.json", "*/*.json", "tokenizer/*"]
        path = name if local else snapshot_download(name, **where, allow_patterns=small)
        if not local and not args.dry_run:
            where |= {"transformer": None} if args.transformer_path else {}
            path = str(DiffusionPipeline.download(name, **where, variant=args.variant))
    classes, configs = (ZImagePipeline, ZImageTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler), {}
    for part, cls in zip(("", "transformer", "vae", "scheduler"), classes, strict=True):
        with user_errors(f"{incomplete} {part or 'model_index.json'}"):
            configs[part] = cls.load_config(path, subfolder=part)
            if configs[part]["_class_name"] != cls.__name__:
                raise ValueError(f"it is of a {configs[part]['_class_name']}, not a {cls.__name__}")
    with user_errors(f"{incomplete} text_encoder or tokenizer"):
        text_config = transformers.AutoConfig.from_pretrained(path, subfolder="text_encoder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        if not tokenizer.chat_template:
            raise ValueError("there is no chat template")
    transformer, vae, text_type = configs["transformer"], configs["vae"], text_config.model_type
    fits = text_type.startswith("qwen") and text_config.hidden_size == transformer["cap_feat_dim"]
    if not fits or vae["latent_channels"] != transformer["in_channels"] or len(vae["block_out_channels"]) != 4:
        raise UserError(f"{flag}: its text_encoder (a {text_type}), vae and transformer do not fit together")
    file = Path(args.transformer_path) if args.transformer_path else None
    files = {"transformer": file, "vae": None, "text_encoder": None}
    identity = {part: component_identity(path, part, args.variant, own) for part, own in files.items()}
    if (lacking := [part for part, digest in identity.items() if digest is None]) and local:
        raise UserError(f"{flag}: its {lacking[0]} has no weights")
    drawn = [drawing.size for drawing in args.validation_prompt]
    sides = itertools.chain(map(round_size, args.resolution), *(args.aspect_ratio_buckets or []), *drawn)
    if max(sides) > (most := SIZE_MULTIPLE * min(transformer["axes_lens"][1:])):  # positions of rotary embeddings
        raise UserError(f"--resolution, --aspect_ratio_buckets, --validation_prompt: at most {most} pixels a side")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(configs["scheduler"])
    if scheduler.config.use_dynamic_shifting and args.timestep_shift is None:
        raise UserError(f"{flag}: its scheduler's shift depends on the picture: give --timestep_shift for training")
    return PipelineInfo(name, path, args.variant, transformer, vae, text_config, tokenizer, scheduler, identity, file)


@dataclasses.dataclass(frozen=True, eq=False)
class LoraSettings:
    """What the LoRA is, by the flags or by the file of `--init_lora`."""

    rank: int
    alpha: float
    targets: dict[str, dict[str, int]]  # {name in --lora_layers: {module path: its inputs + outputs}}
    initial: State | None = None  # the matrices that it starts from, under their names in PEFT
    initial_digest: str | None = None  # of the file that they come from
    base: State | None = None  # the matrices of `--base_adapter`, with its weight

    @property
    def modules(self) -> list[str]:
        """The paths of the modules that get a LoRA."""
        return sorted({path for paths in self.targets.values() for path in paths})


@dataclasses.dataclass(frozen=True)
class Run:
    """What is decided once and holds for the whole run."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: PipelineInfo
    seed: int
    weight_dtype: torch.dtype  # of the frozen weights and the products
    lora: LoraSettings
    fraction: float | None = None  # of recomputed blocks, where `--gradient_checkpointing auto` has chosen it

    @property
    def sharded(self) -> bool:
        """Whether the frozen weights are spread over the processes, so that all must take part in every pass."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def compiled(self) -> bool:
        """Whether the transformer's blocks are compiled, for a flag or for the accelerate config's section."""
        # Without, the many small operations of float8 make it slower than bf16.
        float8 = self.args.base_model_precision == "fp8" and self.accelerator.device.type == "cuda" and HAS_TRITON
        return self.args.compile or float8 or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    @property
    def checkpointed_fraction(self) -> float:
        """Fraction of the blocks that keep only their inputs, by the flag or by the config's FSDP section."""
        by_config = self.sharded and self.accelerator.state.fsdp_plugin.activation_checkpointing
        return float(self.args.gradient_checkpointing or by_config) if self.fraction is None else self.fraction

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Type of the text encoder: float16 overflows in Qwen3."""
        return torch.bfloat16 if self.weight_dtype == torch.float16 else self.weight_dtype

    @property
    def saving_dtype(self) -> torch.dtype:
        """Type of the LoRA files, apart from checkpoints."""
        return torch.float32 if self.args.upcast_before_saving else self.weight_dtype

    def own_part(self, items: list[T]) -> list[T]:
        """This process's part of a list of work."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]


def validation_pipeline(run: Run) -> PipelineInfo:
    """The pipeline that draws: that in training, or with `--validation_model_path`'s parts. Raises UserError."""
    name = run.args.validation_model_path
    if name is None:
        return run.pipeline
    if Path(name).is_file() or name.endswith(".safetensors"):
        return dataclasses.replace(run.pipeline, transformer_file=Path(name))
    with user_errors(f"--validation_model_path {name}"), run.accelerator.local_main_process_first():
        patterns = ["scheduler/*", "transformer/*.json" if run.args.dry_run else "transformer/*"]
        where = {"cache_dir": run.args.cache_dir, "allow_patterns": patterns}
        path = name if Path(name).is_dir() else snapshot_download(name, **where)
        config = ZImageTransformer2DModel.load_config(path, subfolder="transformer")
        if any(config.get(size) != run.pipeline.transformer_config[size] for size in ("dim", "n_layers", "n_heads")):
            raise ValueError("its transformer has another size, so that the LoRA does not fit")
        parts = {"scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")}
        return dataclasses.replace(run.pipeline, name=name, path=path, variant=None, transformer_file=None, **parts)


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The processes and the precision, as the flags and the launcher's configuration say. Raises UserError."""
    for name in [name for name, value in os.environ.items() if not value and name.startswith(LAUNCHER_PREFIXES)]:
        del os.environ[name]  # accelerate would read a number from the empty text
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # accelerate would divide the losses by it
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or transformers would load nothing in some processes
    accelerate.state.AcceleratorState._reset_state()  # of an earlier run in this notebook
    error_once.cache_clear()
    is_set = accelerate.utils.parse_flag_from_env
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher_precision not in DTYPES or is_set("ACCELERATE_USE_DEEPSPEED") or is_set("ACCELERATE_USE_MEGATRON_LM"):
        instead = "take bf16 and --do_fp8_training, or configs/fsdp.yaml"
        raise UserError(f"the accelerate config asks for DeepSpeed, Megatron or {launcher_precision!r}: {instead}")
    float8 = args.base_model_precision == "fp8" and launcher_precision == "no"
    precision = args.mixed_precision or ("bf16" if float8 else None)  # float8 products give bf16 in any case
    gpu = torch.accelerator.current_accelerator()
    if gpu and gpu.type != "mps" and "LOCAL_RANK" in os.environ and not is_set("ACCELERATE_USE_CPU"):
        with user_errors("the processes cannot be joined"):
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
            backend = torch.distributed.get_default_backend_for_device(gpu.type)
            torch.distributed.init_process_group(f"{gpu.type}:{backend},cpu:gloo", timeout=PROCESS_TIMEOUT)
    trackers = [name.strip() for name in args.report_to.split(",")] if args.report_to != "none" else []
    for name in {*trackers} - {"all", *map(str, get_available_trackers())}:
        raise UserError(f"--report_to {name} is unknown (pip install {name}), take {', '.join(LOGGER_TYPE_TO_CLASS)}")
    with user_errors(f"--mixed_precision {precision or launcher_precision}, or the launcher's config or variables"):
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=trackers or None,
            # A LoRA weight is used once in a pass: its cast need not be kept until the end of it.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
        )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError("the launcher started several processes, and there is no device for each: start one")
    return accelerator


def start_run(args: argparse.Namespace) -> Accelerator:
    """Set up the processes and logging, and check what this machine can do. Raises UserError."""
    accelerator = make_accelerator(args)
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if LINUX and "ACCELERATE_DYNAMO_USE_FULLGRAPH" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # at the death of `accelerate launch`, which does not pass it on
    # The script's lines from the main process, the libraries' only where something is wrong
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast at every product in 8 bits
    # Of int8 layers, --base_adapter, an update that is skipped, rotary embeddings
    warnings.filterwarnings("ignore", ".*(get_apply_tensor_sub|`peft_config` at|`lr_scheduler.step|complex operators)")
    if args.enable_npu_flash_attention and not accelerate.utils.is_npu_available():
        raise UserError("--enable_npu_flash_attention needs torch_npu and an NPU: leave the flag out")
    if precision == "fp16" and device == "cpu":
        raise UserError("--mixed_precision fp16: the CPU has no fp16 training; take bf16, or no")
    if precision == "fp16":
        logger.warning("--mixed_precision fp16: this model's activations come near its largest number; prefer bf16")
    if precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning(f"--mixed_precision bf16: {torch.cuda.get_device_name()} emulates it, up to 8 times slower")
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise UserError("the accelerate config's fsdp_config: set fsdp_version: 2 and fsdp_offload_params: false")
    elif args.fsdp_text_encoder:
        raise UserError("--fsdp_text_encoder needs an accelerate config with distributed_type: FSDP")
    if args.attention_backend:
        with user_errors(f"--attention_backend {args.attention_backend}", RuntimeError, ImportError):
            _check_attention_backend_requirements(AttentionBackendName(args.attention_backend))
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for line in ineffective_flags(args):
        logger.warning(line)
    return accelerator


def with_progress(
    items: Iterable[T], what: str, accelerator: Accelerator, total: int = 0, done: int = 0, shown: dict | None = None
) -> Iterator[T]:
    """Goes through `items` with a bar at a terminal, else with a line now and then; what is `shown` may change."""
    total, started, hidden = total or len(items), time.monotonic(), None if accelerator.is_main_process else True
    next_line = started + 2
    with tqdm(desc=what, total=total, initial=done, leave=False, disable=hidden) as bar:  # None: by the terminal
        for number, item in enumerate(items, done + 1):
            yield item
            bar.set_postfix(shown, refresh=False)
            bar.update()
            now = time.monotonic()
            if bar.disable and (now > next_line or shown and number in (done + 1, total)):
                next_line, pace = now + 10, (now - started) / (number - done)
                left = pace * (total - number) / 60
                logger.info(f"{what} {number}/{total}: {pace:.2f} s each, {left:.0f} min left {bar.postfix}")


# ---------------------------------------------------------------------------------------------------------------------
# Frozen encoders
# ---------------------------------------------------------------------------------------------------------------------


def cached_encoding(run: Run, key: tuple, compute: Callable[[], Tensor], together: bool = False) -> Tensor:
    """What `compute` returns, a function of `key` alone: from `--encoding_cache_dir`, or made and kept there."""
    folder, tensor = run.args.encoding_cache_dir, None
    file = folder and Path(folder, f"{digest_of(key)}.safetensors")
    if file and file.is_file():
        with optional(f"Reading {file} of --encoding_cache_dir, which is damaged and made anew,"):
            tensor = load_file(file)["encoding"]
    if together:  # one process looks for all: another run may be adding to the folder
        tensor = broadcast_object_list([tensor])[0]
    if tensor is None:
        tensor = compute()
        if file:
            with optional(f"Writing to --encoding_cache_dir {folder}"):
                os.makedirs(folder, exist_ok=True)
                with replacing(file, os.getpid()) as part:  # other runs that use the folder never see half a file
                    save_file({"encoding": tensor.contiguous()}, part)
    return tensor


def tokenize(examples: Examples, run: Run) -> dict[str, list[int]]:
    """{prompt: its tokens, as they are encoded} of captions, the empty prompt and what is drawn; warns of cut ones."""
    args, tokenizer, tokens = run.args, run.pipeline.tokenizer, {}
    drawings = args.validation_prompt + args.final_validation_prompt
    prompts = {"", args.class_prompt or "", *(example.caption for kind in examples for example in examples[kind])}
    positions = run.pipeline.transformer_config["axes_lens"][0]  # of the rotary embedding: the picture takes some too
    limit = min(args.max_sequence_length, (positions - 2) // TOKEN_MULTIPLE * TOKEN_MULTIPLE)
    for prompt in sorted(prompts.union(*((drawing.prompt, drawing.negative_prompt) for drawing in drawings))):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True).input_ids
        tokens[prompt] = ids[:limit]
        if len(ids) > limit:
            cut = f"a prompt of {len(ids)} tokens is cut to {limit}: {prompt[:60]!r}..."
            logger.warning(f"--max_sequence_length: {cut} ends at ...{tokenizer.decode(ids[:limit])[-40:]!r}")
    return tokens


def shard(modules: Iterable[torch.nn.Module], accelerator: Accelerator, ignored: Collection[Tensor] = ()) -> None:
    """Spread modules, inner ones first, over the processes by accelerate's config; `ignored` parameters stay whole."""
    reshard, mesh = accelerator.state.fsdp_plugin.reshard_after_forward, accelerator.torch_device_mesh
    mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None
    for parameter in ignored:
        parameter.data = parameter.data.to(accelerator.device)
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(ignored))


def load_text_encoder(run: Run) -> Callable[..., tuple[list[Tensor], Any]]:
    """`ZImagePipeline.encode_prompt` with the text encoder on the device, or spread as the flags say."""
    qwen3 = run.pipeline.load(transformers.AutoModel, "text_encoder", dtype=run.encoder_dtype)
    if run.args.fsdp_text_encoder:
        qwen3.rotary_emb.to(run.accelerator.device)
        # Its parts, not the whole: transformers records hidden states by the model's class, which FSDP replaces.
        shard((qwen3.embed_tokens, *qwen3.layers, qwen3.norm), run.accelerator)
    elif run.args.offload:
        accelerate.cpu_offload(qwen3, run.accelerator.device)  # each layer visits the device by itself
    else:
        qwen3.to(run.accelerator.device)
    return ZImagePipeline(None, None, qwen3, run.pipeline.tokenizer, None).encode_prompt


@torch.no_grad()
def encode_prompts(tokens: dict[str, list[int]], run: Run) -> dict[str, Tensor]:
    """{prompt: embedding [L, D] on the CPU}, each encoded by one process unless the encoder is sharded."""
    together, encoder, encoded = run.args.fsdp_text_encoder, functools.cache(lambda: load_text_encoder(run)), []

    def encode(prompt: str) -> Tensor:  # at its own length: padding is masked, and would only cost time
        embeds, _ = encoder()(prompt, run.accelerator.device, False, max_sequence_length=len(tokens[prompt]))
        return embeds[0].to("cpu", copy=True)

    own = list(tokens) if together else run.own_part(list(tokens))
    for prompt in with_progress(own, "prompts encoded", run.accelerator):
        key = ("prompt", run.pipeline.identity["text_encoder"], str(run.encoder_dtype), tokens[prompt])
        encoded.append((prompt, cached_encoding(run, key, functools.partial(encode, prompt), together)))
    embeds = dict(encoded if together else gather_object(encoded))
    width = run.pipeline.transformer_config["cap_feat_dim"]
    assert all(embed.shape == (len(tokens[prompt]), width) for prompt, embed in embeds.items())
    return embeds


def load_vae(run: Run) -> AutoencoderKL:
    """The frozen VAE, in float32: it loses detail in half precision. With `--offload` it waits in host memory."""
    vae = run.pipeline.load(AutoencoderKL, "vae", dtype=torch.float32).requires_grad_(False)
    return vae.to("cpu" if run.args.offload else run.accelerator.device)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor, run: Run) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w], shifted and scaled as `ZImagePipeline` undoes it.

    Of pictures with a mask, [B, 4, H, W], [B, C + 1, h, w]: the mask's mean over each latent, in [0, 1], comes last.
    """
    pixels, masks = pixels.to(run.accelerator.device).split([3, pixels.shape[1] - 3], dim=1)
    with training_utils.offload_models(vae, device=run.accelerator.device, offload=run.args.offload):
        latents = torch.cat([vae.encode(one).latent_dist.mode() for one in pixels.split(1)])  # 4 GB each at 1024 px
    assert latents.shape == (len(pixels), *run.pipeline.latent_shape(pixels.shape[2:]))
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    if not masks.shape[1]:
        return latents
    return torch.cat([latents, torch.nn.functional.avg_pool2d(masks / 2 + 0.5, VAE_FACTOR)], dim=1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: the libraries of CUDA raise RuntimeErrors of their own for it."""
    return isinstance(error, (MemoryError, RuntimeError)) and bool(OUT_OF_MEMORY.search(f"{type(error)} {error}"))


@torch.no_grad()
def decode_latents(latents: list[Tensor], run: Run) -> list[Image.Image]:
    """Pictures of latents [C, h, w], the inverse of `encode_images`; the VAE is loaded for as long as it takes."""
    vae, pictures = load_vae(run).to(run.accelerator.device), []
    while len(pictures) < len(latents):
        one = latents[len(pictures)].to(vae.device)[None] / vae.config.scaling_factor + vae.config.shift_factor
        try:
            pictures += diffusers.image_processor.VaeImageProcessor().postprocess(vae.decode(one).sample)
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or vae.use_tiling:
                raise
        logger.warning("Decoding a whole picture takes more memory than is free: it is decoded in tiles")
        vae.enable_tiling()
        release_memory()  # outside of the handler, where the error no longer holds tensors
    return pictures


def draw_crop(example: Example, args: argparse.Namespace, *draw: Any) -> tuple[float, float]:
    """Where to cut a picture, (vertical, horizontal) in [0, 1]: the middle, or a function of `draw`."""
    if args.center_crop or example.kind == "held-out":
        return (0.5, 0.5)
    return tuple(torch.rand(2, generator=seeded_generator("crop", *draw)).tolist())


def cache_latents(examples: list[Example], run: Run) -> dict[tuple[Example, bool], Tensor]:
    """{(example, flip): latents [C, h, w] on the CPU, with a mask [C + 1, h, w]}, each encoded by one process."""
    args, vae, encoded = run.args, functools.cache(lambda: load_vae(run)), []

    def encode(example: Example, crop: tuple[float, float], flip: bool) -> Tensor:
        pixels = fit_to_bucket(load_picture(example), example.bucket, crop, flip)
        return encode_images(vae(), pixels[None], run)[0].cpu()

    for number, example in with_progress(run.own_part(list(enumerate(examples))), "pictures encoded", run.accelerator):
        content = digest_of(read_bytes(example.source), 64)
        crop = draw_crop(example, args, content)  # not by the run's seed: so the next run can use the latents
        mask = digest_of(example.mask.read_bytes()) if isinstance(example.mask, Path) else example.mask
        key = ("latents", run.pipeline.identity["vae"], content, example.bucket, crop, mask)
        for flip in {False, args.random_flip and example.kind != "held-out"}:
            latents = cached_encoding(run, (*key, flip), functools.partial(encode, example, crop, flip))
            assert latents.shape[1:] == run.pipeline.latent_shape(example.bucket)[1:]
            encoded.append((number, flip, latents))
    return {(examples[number], flip): latents for number, flip, latents in gather_object(encoded)}


# ---------------------------------------------------------------------------------------------------------------------
# Transformer
# ---------------------------------------------------------------------------------------------------------------------


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
       "bnb_4bit_quant_storage": "bfloat16",
       "llm_int8_skip_modules": ["all_x_embedder", "cap_embedder", "t_embedder", "all_final_layer"]}  # fmt: skip


def quantization_config(run: Run) -> diffusers.BitsAndBytesConfig | None:
    """diffusers' settings for bitsandbytes, NF4 or from the JSON file, or None. Raises UserError."""
    path = run.args.bnb_quantization_config_path
    if not path and run.args.base_model_precision != "nf4":
        return None
    what = f"--bnb_quantization_config_path {path}" if path else "--base_model_precision nf4"
    with user_errors(what, UserError, Exception):
        settings = json.loads(read_text(Path(path))) if path else NF4
        if unknown := settings.keys() - inspect.signature(diffusers.BitsAndBytesConfig.__init__).parameters:
            raise UserError(f"unknown: {', '.join(sorted(unknown))}")
        config = diffusers.BitsAndBytesConfig(**settings | {"bnb_4bit_compute_dtype": run.weight_dtype})
        if not config.is_quantizable() or config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise UserError("set load_in_8bit to true, or load_in_4bit with bnb_4bit_quant_type nf4 or fp4")
        if run.sharded and not (config.load_in_4bit and config.bnb_4bit_quant_storage.is_floating_point):
            raise UserError("FSDP needs load_in_4bit and a floating bnb_4bit_quant_storage: see configs/nf4.json")
        if not run.args.plan_for:
            diffusers.quantizers.DiffusersAutoQuantizer.from_config(config).validate_environment()
        return config


def check_precision(run: Run) -> None:
    """Whether the frozen weights can be held as the flags say, on this device. Raises UserError."""
    precision, device = run.args.base_model_precision, run.accelerator.device
    torchao = importlib.util.find_spec("torchao")
    if accelerate.utils.compare_versions("torchao", "<", "0.16") if torchao else precision in ("fp8", "int8"):
        raise UserError("torchao is missing, or too old for PEFT in any case: pip install 'torchao>=0.16'")
    if precision == "int8" and run.sharded:
        raise UserError("--base_model_precision int8 cannot be sharded by FSDP: take fp8 or nf4")
    if precision == "fp8" and device.type != "cpu":
        nvidia = device.type == "cuda" and not torch.version.hip  # ROCm calls itself cuda
        capability = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
        instead = "take --base_model_precision int8 or nf4"
        if capability < (8, 9):
            found = ".".join(map(str, capability)) if nvidia else f"AMD, Intel or Apple ({device.type})"
            raise UserError(f"--do_fp8_training needs an NVIDIA GPU of compute capability 8.9, not {found}: {instead}")
        if run.compiled:
            logger.info("float8 compiles the transformer's blocks: the first steps take longer")
        else:
            logger.warning(f"float8 without Triton is slower than bf16: install it, or {instead}")
    quantization_config(run)


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer without bias, its weight quantized once, by torchao's float8 products in both passes."""

    # One scale for each tensor: one for each token is no more exact (cosine of the gradient to bf16 0.998), and slower
    compute_dtype = torch.float32  # PEFT makes adapters in this type

    def __init__(self, linear: torch.nn.Linear, device: torch.device) -> None:
        from torchao.float8 import float8_scaling_utils, float8_training_tensor

        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, config = linear.weight.detach().to(device), float8_training_tensor.LinearMMConfig()
        weight = float8_scaling_utils.hp_tensor_to_float8_dynamic(weight, torch.float8_e4m3fn, config)
        self.weight = torch.nn.Parameter(weight._data.view(torch.uint8), requires_grad=False)  # all can send bytes
        self.register_buffer("scale", weight._scale)

    def forward(self, x: Tensor) -> Tensor:
        from torchao.float8.float8_scaling_utils import NoopFwToFloat8BwDynamic, hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole, LinearMMConfig

        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        float8, config = torch.float8_e4m3fn, LinearMMConfig()
        weight = Float8TrainingTensor(self.weight.view(float8), self.scale, x.dtype, config, GemmInputRole.WEIGHT)
        product = hp_tensor_to_float8_dynamic(x.flatten(0, -2), float8, config) @ weight.t()
        return NoopFwToFloat8BwDynamic.apply(product, config, float8).unflatten(0, x.shape[:-1])  # its gradient too


def quantize(transformer: ZImageTransformer2DModel, precision: str, device: torch.device) -> None:
    """Hold attention and feed-forward layers, 98% of the products, in "fp8" or "int8", one after the other."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for name in [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and m.bias is None]:
        layer = transformer.get_submodule(name)
        if precision == "int8":
            quantize_(layer, Int8WeightOnlyConfig(version=2, set_inductor_config=False), device=device)
        elif layer.in_features % 16 or layer.out_features % 16:
            error_once("Layers whose sizes are not multiples of 16 are not held in float8")
        else:
            transformer.set_submodule(name, Float8Linear(layer, device))


def transformer_blocks(transformer: ZImageTransformer2DModel) -> list[torch.nn.Module]:
    """All transformer blocks, in the order in which they run."""
    return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]


def checkpoint_blocks(transformer: ZImageTransformer2DModel, run: Run) -> None:
    """Have a fraction of the blocks, spread over the depth, keep only their inputs until the backward pass."""
    fraction = run.checkpointed_fraction
    for number, block in enumerate(transformer_blocks(transformer)):
        block.recomputed = int((number + 1) * fraction) > int(number * fraction)
    # Reentrant ones build no graph in the forward pass, which is faster; FSDP's hooks want that graph.
    options = {"use_reentrant": not run.sharded, "preserve_rng_state": run.args.lora_dropout > 0}

    def run_block(block: torch.nn.Module, hidden_states: Tensor, *inputs: Any) -> Tensor:
        learns = hidden_states.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
        if not block.recomputed or not learns:  # the backward pass ends at the first block that has a LoRA
            return block(hidden_states, *inputs)
        hidden_states.requires_grad_()  # those of the first block too, or it would have no backward pass
        on_host = torch.autograd.graph.save_on_cpu(pin_memory=hidden_states.is_cuda)
        offload = run.args.offload and run.accelerator.device != torch.device("cpu")  # which is the host
        with on_host if offload else contextlib.nullcontext():
            return torch.utils.checkpoint.checkpoint(block, hidden_states, *inputs, **options)

    transformer.enable_gradient_checkpointing(run_block)


FORMATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "float8_e4m3fn", "float8_e5m2"}
SCALES = ("scale_weight", "weight_scale")  # of float8 weights, in ComfyUI's older and newer form
NO_WEIGHTS = (*SCALES, "scale_input", "input_scale", "comfy_quant", "scaled_fp8", "norm_final.weight")
KINDS = {"lokr_": "a LoKr", "hada_": "a LoHa", "dora_scale": "a DoRA", "magnitude_vector": "a DoRA", "lora": "a LoRA",
         "control_": "a ControlNet", "double_blocks.": "FLUX", "input_blocks.": "Stable Diffusion",
         "self_attn.": "a text encoder", "decoder.": "a VAE", "": "of another model"}  # fmt: skip


def read_transformer_file(pipeline: PipelineInfo, dtype: torch.dtype | None = None) -> State:
    """The weights in `transformer_file` by diffusers' names, in `dtype`, or on the meta device. Raises UserError."""
    path, header, state = pipeline.transformer_file, safetensors_header(pipeline.transformer_file), {}
    metadata = header.pop("__metadata__", {})
    first = "noise_refiner.0.attention_norm1.weight"
    prefix = next((name.removesuffix(first) for name in header if f".{name}".endswith(f".{first}")), None)
    if prefix is None:
        kind = next(kind for part, kind in KINDS.items() if part in " ".join(header))
        raise UserError(f"{path} is {kind}, not a Z-Image transformer: it holds {min(header, default='nothing')}")
    names = [name for name in header if name.startswith(prefix) and not name.endswith(NO_WEIGHTS)]
    with user_errors(f"{path}: what it says of its formats is not JSON", ValueError), safe_open(path, "pt") as file:
        # ComfyUI notes a quantized layer's format as JSON: in the metadata, or as the bytes of a tensor.
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        notes = [json.loads(bytes(file.get_tensor(n).tolist())) for n in header if n.endswith(".comfy_quant")]
        formats = {note.get("format") for note in (*layers.values(), *notes)} | {header[n]["dtype"] for n in names}
        if other := ", ".join(map(str, formats - FORMATS)):
            raise UserError(f"{path} stores weights as {other}: give a bf16, fp16 or fp8 file")
        for name in names:
            weight = file.get_tensor(name) if dtype else torch.empty(header[name]["shape"], device="meta")
            for scale in {name.removesuffix("weight") + end for end in SCALES} & header.keys():
                if math.prod(header[scale]["shape"]) not in (1, len(weight)):
                    raise UserError(f"{path} has scales for blocks of {name}: give one with a scale for each row")
                if dtype:
                    weight = weight.float() * file.get_tensor(scale).float().reshape(-1, 1)
            state[name.removeprefix(prefix)] = weight.to(dtype)
    if "x_embedder.weight" in state:  # the original model's names, perhaps with q, k and v in one
        state = convert_z_image_transformer_checkpoint_to_diffusers(state)
    with torch.device("meta"):
        expected = ZImageTransformer2DModel.from_config(pipeline.transformer_config).state_dict()
    for name in sorted({*expected, *state}):
        found, wanted = (list(tensors[name].shape) if name in tensors else "absent" for tensors in (state, expected))
        if found != wanted:
            raise UserError(f"{path} is of another model or size: {name} is {found}, not {wanted}")
    if dtype is None and any(not name.startswith(prefix) for name in header.keys() - {"scaled_fp8"}):
        logger.info(f"{path} holds more than the transformer: that alone is taken")
    return state


def load_transformer(run: Run, precision: str | None = None) -> ZImageTransformer2DModel:
    """The frozen transformer on the device, held as the flags say or in `precision`. Raises UserError."""
    args, device, pipeline = run.args, run.accelerator.device, run.pipeline
    dtype, quantization = (DTYPES[precision], None) if precision else (run.weight_dtype, quantization_config(run))
    options = {"quantization_config": quantization}
    if pipeline.transformer_file is None:
        options |= {"dtype": dtype, "device_map": quantization and {"": device}}
        transformer = pipeline.load(ZImageTransformer2DModel, "transformer", **options)
    else:
        options |= {"config": pipeline.path, "subfolder": "transformer", "device": quantization and device}
        state = read_transformer_file(pipeline, dtype)
        transformer = ZImageTransformer2DModel.from_single_file(state, torch_dtype=dtype, **options)
    if not precision and args.base_model_precision in ("fp8", "int8"):
        quantize(transformer, args.base_model_precision, device)
    transformer.requires_grad_(False)
    if not quantization and not run.sharded:  # which takes it to the device in parts
        transformer.to(device)
    if args.attention_backend or args.enable_npu_flash_attention:
        transformer.set_attention_backend(args.attention_backend or "_native_npu")
    if run.checkpointed_fraction:
        checkpoint_blocks(transformer, run)
    return transformer


# ---------------------------------------------------------------------------------------------------------------------
# LoRA and its files
# ---------------------------------------------------------------------------------------------------------------------


def linear_layers(config: dict[str, Any]) -> Linear:
    """All linear layers of a transformer."""
    with torch.device("meta"):
        modules = ZImageTransformer2DModel.from_config(config).named_modules()
    return {name: (m.in_features, m.out_features) for name, m in modules if isinstance(m, torch.nn.Linear)}


OTHER_NAMES = {  # that --lora_layers takes: {name, or its end: what it means here}
    "all-linear": ("layers", "noise_refiner", "context_refiner"),
    "ff.net.0.proj": ("feed_forward.w1", "feed_forward.w3"),
    "ff.net.2": ("feed_forward.w2",),
}


def resolve_lora_layers(names: str, linear: Linear) -> dict[str, dict[str, int]]:
    """The layers that `--lora_layers` means: a dot that no number follows can stand for more. Raises UserError."""
    targets = {}
    for name in map(str.strip, names.strip(", ").split(",")):
        meant = [name]
        for other, ours in OTHER_NAMES.items():
            if f".{name}".endswith(f".{other}"):
                meant = [name.removesuffix(other) + layer for layer in ours]
        pattern = "|".join(re.sub(r"\\\.(?!\d)", r"\\.(?:.+\\.)?", re.escape(one)) for one in meant)
        found = re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")
        targets[name] = {path: sum(sizes) for path, sizes in linear.items() if found.search(path)}
        if not targets[name]:
            known = sorted({".".join(path.split(".")[-n:]) for path in linear for n in (1, 2)} | set(linear))
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or ["to_q", "to_out.0", "feed_forward.w1"]
            raise UserError(f"--lora_layers: {name!r} matches no linear layer: did you mean {', '.join(near)}?")
    return targets


def find_lora_file(path: str, cache_dir: str | None) -> Path:
    """The file that is given by its path, its folder's, or `OWNER/NAME` or `OWNER/NAME/FILE` on the Hub."""
    parts = path.split("/", 2)
    if not os.path.exists(path):
        if len(parts) == 1 or parts[0] in ("", ".", ".."):
            raise UserError("there is no such file")
        wanted = parts[2:] or ["*.safetensors"]
        root = snapshot_download("/".join(parts[:2]), allow_patterns=wanted, cache_dir=cache_dir)
        path = os.path.join(root, *parts[2:])
    files = sorted(Path(path).rglob("*.safetensors")) if os.path.isdir(path) else [Path(path)]
    files = [file for file in files if file == Path(path, LORA_FILE)] or files
    if len(files) != 1:
        raise UserError(f"name one of its files: {listed(map(str, files)) or 'it has no safetensors file'}")
    return files[0]


def read_lora(path: Path, linear: Linear) -> tuple[State, float | None]:
    """A LoRA of diffusers, ComfyUI or kohya: float32 matrices by PEFT's names, and alpha. Raises UserError."""
    header, tensors = safetensors_header(path), {name: tensor.float() for name, tensor in load_file(path).items()}
    if any(".lora_down." in name for name in tensors):  # OneTrainer's and bare names, as diffusers knows them
        prefix = re.compile(r"^(?:transformer\.|(?=layers\.|\w+_refiner\.))")
        tensors = {prefix.sub("diffusion_model.", name): tensor for name, tensor in tensors.items()}
    kind = next(kind for part, kind in KINDS.items() if part in " ".join(tensors))
    if kind != "a LoRA":
        raise UserError(f"{path} is {kind}, not a LoRA: it holds {min(tensors, default='nothing')}")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} is broken: its {broken[0]} has infinite numbers, or NaN")
    saved = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))  # diffusers' own
    alphas = {t.item() for n, t in tensors.items() if n.endswith(".alpha")} or {saved.get("transformer.lora_alpha")}
    if saved.get("transformer.alpha_pattern") or saved.get("transformer.use_rslora"):
        raise UserError(f"{path} has several alphas, or rank-stabilised ones: give one that has one alpha")
    if len(alphas) == 1:  # diffusers folds those of single modules into the matrices
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    state = {name.removeprefix("transformer."): t for name, t in ZImagePipeline.lora_state_dict(tensors).items()}
    for module in sorted({name.rpartition(".lora_")[0] for name in state}):
        down, up = (state.get(f"{module}.lora_{side}.weight", torch.empty(0, 0)) for side in "AB")
        shape, wanted = (*down.shape[1:], *up.shape[:1]), linear.get(module, "in this one")
        if shape != wanted or down.shape[:1] != up.shape[1:]:
            raise UserError(f"{path} is a LoRA of another model: its {module} is {shape}, not {wanted}")
    return state, alphas.pop() if len(alphas) == 1 else None


def read_base_adapter(args: argparse.Namespace, linear: Linear) -> State:
    """The matrices of `--base_adapter`, times alpha / rank and its weight. Raises UserError."""
    path, weight = re.fullmatch(r"(.*?)(?::([-+.\de]+))?", args.base_adapter).groups("1")
    with user_errors(f"--base_adapter {args.base_adapter}", UserError, Exception):
        state, alpha = read_lora(find_lora_file(path, args.cache_dir), linear)
        for name in [name for name in state if ".lora_A." in name]:
            rank = len(state[name])
            state[name.replace("lora_A", "lora_B")] *= float(weight) * (alpha or rank) / rank
    return state


def read_lora_settings(args: argparse.Namespace, transformer_config: dict[str, Any]) -> LoraSettings:
    """What the LoRA is: as the flags say, where they are silent as the file of `--init_lora`. Raises UserError."""
    linear = linear_layers(transformer_config)
    targets = resolve_lora_layers("to_k,to_q,to_v,to_out.0" if args.lora_layers is None else args.lora_layers, linear)
    base = read_base_adapter(args, linear) if args.base_adapter else None
    if args.init_lora is None:
        return LoraSettings(args.rank or 4, args.lora_alpha or 4, targets, base=base)
    with user_errors(f"--init_lora {args.init_lora}", UserError, Exception):
        file = find_lora_file(args.init_lora, args.cache_dir)
        state, own = read_lora(file, linear)
        modules = [name.removesuffix(".lora_A.weight") for name in state if ".lora_A." in name]
        ranks = sorted({len(state[f"{module}.lora_A.weight"]) for module in modules})
        if ranks != [args.rank or ranks[0]]:
            given = f"--rank {args.rank}" if args.rank else "one for all"
            raise UserError(f"it has rank {', '.join(map(str, ranks))}, not {given}: leave --rank out, or resize it")
        alpha = args.lora_alpha or own or ranks[0]
        for module in modules:
            state[f"{module}.lora_B.weight"] *= (own or ranks[0]) / alpha
        if args.lora_layers is None:
            targets = {}
            for module in modules:  # by their ends, as a person would name them
                targets.setdefault(re.search(r"[^.]+(\.\d+)?$", module)[0], {})[module] = sum(linear[module])
        lora = LoraSettings(ranks[0], alpha, targets, state, digest_of(file.read_bytes()), base)
        if set(lora.modules) != set(modules):
            raise UserError(f"it is on {len(modules)} layers, not the {len(lora.modules)} of --lora_layers: omit that")
        return lora


def add_lora(transformer: ZImageTransformer2DModel, run: Run) -> list[torch.nn.Parameter]:
    """Add the adapter in float32: that of `--init_lora`, or A gaussian and B zero. Returns its parameters."""
    lora, options = run.lora, {"lora_dropout": run.args.lora_dropout, "init_lora_weights": "gaussian"}
    torch.manual_seed(run.seed)
    transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.modules, **options))
    if lora.initial:
        set_peft_model_state_dict(transformer, lora.initial)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:  # to the device now, where optimizer states follow them: FSDP moves its own later
        parameter.data = parameter.data.to(run.accelerator.device, torch.float32)
    if lora.base:  # it becomes a second one
        transformer.load_lora_adapter(dict(lora.base), adapter_name="base", prefix=None)
        transformer.set_adapters(["default", "base"])
        set_requires_grad(transformer, "base", False)  # PEFT makes every active adapter trainable
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # or PEFT would cast its input to float32, and autocast back
    return parameters


def save_lora(transformer: ZImageTransformer2DModel, file: Path, dtype: torch.dtype) -> State:
    """Write the LoRA as `ZImagePipeline.load_lora_weights` reads it. Returns its tensors, by the model's names."""
    config = transformer.peft_config["default"]
    lora = {name: tensor.to("cpu", dtype) for name, tensor in get_peft_model_state_dict(transformer).items()}
    # What every version of PEFT knows; dropout is of training alone: diffusers would go on dropping when it draws.
    about = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0}
    about["target_modules"] = sorted(config.target_modules)
    ZImagePipeline.save_lora_weights(file.parent, lora, weight_name=file.name, transformer_lora_adapter_metadata=about)
    return lora


def comfyui_file(output_dir: str, suffix: str = "") -> str:
    """The name of the file for ComfyUI: that of the output folder, since it stands among others there."""
    name = os.fsencode(Path(output_dir).resolve().name)[:200].decode(errors="ignore")  # file systems allow 255 bytes
    return f"comfyui/{name or 'lora'}{suffix}.safetensors"


def save_for_comfyui(transformer: ZImageTransformer2DModel, suffix: str, run: Run) -> Path:
    """Write the LoRA for ComfyUI, with what model managers show of it and nothing private. Returns the file."""
    args, side, date = run.args, round_size(run.args.resolution[-1]), time.strftime("%Y-%m-%d", time.gmtime())
    alpha, title = torch.tensor(float(run.lora.alpha)), Path(args.output_dir).resolve().name + suffix
    state = {name: t.to("cpu", run.saving_dtype) for name, t in get_peft_model_state_dict(transformer).items()}
    state |= {name.replace("lora_A.weight", "alpha"): alpha.clone() for name in state if ".lora_A." in name}
    about = {"sai_model_spec": "1.0.0", "architecture": "z-image/lora", "implementation": "diffusers"}
    about |= {"title": title, "resolution": f"{side}x{side}", "date": date}
    about |= {"trigger_phrase": args.instance_prompt} if args.push_to_hub and args.instance_prompt else {}
    metadata = {"format": "pt"} | {f"modelspec.{name}": value for name, value in about.items()}
    name = comfyui_file(args.output_dir, suffix)
    with OutputFolder(args.output_dir).writing(name) as part:
        save_file({f"diffusion_model.{name}": tensor for name, tensor in state.items()}, part, metadata)
    return Path(args.output_dir, name)


def check_file(file: Path, state: State, run: Run) -> None:
    """Whether a LoRA file holds what is in memory. Raises TrainingError."""
    found, alpha = read_lora(file, linear_layers(run.pipeline.transformer_config))
    same = found.keys() == state.keys() and all(torch.equal(found[name], state[name].float()) for name in state)
    if not same or not math.isclose(alpha, run.lora.alpha, rel_tol=1e-6):
        raise TrainingError(f"{file} does not read back as it was written")


def save_result(transformer: ZImageTransformer2DModel, run: Run, name: str = LORA_FILE, suffix: str = "") -> None:
    """Write the LoRA, also for ComfyUI if that works, and read both again to compare. Raises TrainingError."""
    output = OutputFolder(run.args.output_dir)
    try:
        with output.writing(name) as part:
            state = save_lora(transformer, part, run.saving_dtype)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{output.path}: the LoRA could not be saved ({first_line(error)})") from None
    check_file(output.path / name, state, run)
    logger.info(f"The LoRA is in {output.path / name}")
    with optional("The file for ComfyUI"):
        file = save_for_comfyui(transformer, suffix, run)
        check_file(file, state, run)
        logger.info(f"For ComfyUI it is in {file}")


# ---------------------------------------------------------------------------------------------------------------------
# Objective and samples
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MicroBatch:
    """B samples that go through the transformer at once. Either latents or the pixels to encode are there."""

    noise: Tensor  # [B, C, h, w]
    sigmas: Tensor  # [B], noise level in (0, 1]
    weights: Tensor  # [B], of each sample's loss in the update
    prompt_embeds: list[Tensor]  # B of [L, D]
    latents: Tensor | None = None  # [B, C, h, w]; with masks [B, C + 1, h, w]
    pixels: Tensor | None = None  # [B, 3, H, W] in [-1, 1]; with masks [B, 4, H, W]

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch on the device; CUDA need not wait for it, if it is in pinned memory."""
        return MicroBatch(**accelerate.utils.send_to_device(vars(self), device, device.type == "cuda"))


def training_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, shift: float | None = None) -> Tensor:
    """The scheduler's noise levels, ascending in (0, 1], [1000]; with `shift`, that shift in place of its own."""
    if shift is not None:
        scheduler = scheduler.from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)
    return scheduler.sigmas.flip(0)


def sample_sigma(sigmas: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """One of `sigmas`, drawn with the density of `--weighting_scheme` (SD3 paper, section 3.1): more u, more noise."""
    density = training_utils.compute_density_for_timestep_sampling
    u = density(args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale, generator=generator)
    return sigmas[(u * len(sigmas)).long().clamp(0, len(sigmas) - 1)][0]


def predict_velocity(
    transformer: torch.nn.Module, latents: Tensor, sigmas: Tensor, prompt_embeds: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """The model's velocity d x_sigma / d sigma, [B, C, h, w] float32: its calling convention lives here alone.

    latents [B, C, h, w]; sigmas [B]; prompt_embeds: B of [L, D]. The model takes lists, a frame axis and time that
    runs from noise (0) to data (1), and returns the negated velocity, as in `ZImagePipeline.__call__`.
    """
    assert latents.ndim == 4 and sigmas.shape == (len(latents),) and len(prompt_embeds) == len(latents)
    assert all(embed.ndim == 2 for embed in prompt_embeds)
    frames, times = list(latents.to(dtype).unsqueeze(2)), (1000 - sigmas * 1000) / 1000
    output = transformer(frames, times, [embed.to(dtype) for embed in prompt_embeds], return_dict=False)[0]
    velocity = -torch.stack(output).squeeze(2).float()
    assert velocity.shape == latents.shape
    return velocity


def flow_matching_loss(
    velocity: Tensor, latents: Tensor, noise: Tensor, sigmas: Tensor, scheme: str, mask: Tensor | None = None
) -> Tensor:
    """Per-sample loss [B]: squared error to the velocity noise - latents, weighted by sigma and mask, in float32.

    Rectified flow: x_sigma = (1 - sigma) x_0 + sigma eps, so d x_sigma / d sigma = eps - x_0. The weights of a mask
    [B, 1, h, w] count relative to their mean; where they are 0 everywhere, in a crop of the picture, so is the loss.
    """
    errors = (velocity - (noise - latents)).square()
    if mask is not None:
        errors = mask / mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-6) * errors
    losses = training_utils.compute_loss_weighting_for_sd3(scheme, sigmas) * errors.flatten(1).mean(1)
    assert losses.shape == (len(latents),) and losses.dtype == torch.float32
    return losses


def training_loss(
    transformer: ZImageTransformer2DModel, vae: AutoencoderKL | None, batch: MicroBatch, scheme: str, run: Run
) -> Tensor:
    """The micro-batch's weighted sum of losses, a scalar: summed over an update, it is the objective."""
    noise, sigmas = batch.noise, batch.sigmas
    latents = encode_images(vae, batch.pixels, run) if batch.latents is None else batch.latents
    latents, masks = latents.split([noise.shape[1], latents.shape[1] - noise.shape[1]], dim=1)
    assert latents.shape == noise.shape and batch.weights.shape == sigmas.shape == (len(latents),)
    level = sigmas[:, None, None, None]
    noisy_latents = (1 - level) * latents + level * noise
    with run.accelerator.autocast():
        velocity = predict_velocity(transformer, noisy_latents, sigmas, batch.prompt_embeds, run.weight_dtype)
    outside = run.args.unmasked_weight
    mask = outside + (1 - outside) * masks if masks.shape[1] else None
    losses = flow_matching_loss(velocity, latents, noise, sigmas, scheme, mask)
    return (batch.weights * losses).sum()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example's turn in training."""

    example: Example
    number: int  # in the run; with the seed, it decides everything random about the sample
    prompt: str
    flip: bool
    weight: float = 0.0  # of its loss in the update


class TrainingPlan:
    """How long the run is and, as a function of the seed and the data alone, which samples make each update.

    The permutations of the epochs, one after the other, are one stream of instance samples. Update `step`, from 0,
    takes the next `total_batch_size` of them; only the last update of a run set by epochs can be smaller. With prior
    preservation as many class samples join them, the class images taking turns.
    """

    def __init__(self, examples: Examples, tokens: dict[str, list[int]], run: Run) -> None:
        self.examples, self.tokens, self.run, args = examples, tokens, run, run.args
        self.slots = [example for example in examples["instance"] for _ in range(example.repeats)]
        present = {example.name for example in examples.get("class", [])}
        self.missing_class_images = max(0, args.num_class_images - len(present)) if "class" in examples else 0
        self.samples_per_epoch = len(self.slots)
        processes = run.accelerator.num_processes
        self.total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * processes
        whole_updates = (args.max_train_steps or 0) * self.total_batch_size
        self.samples = whole_updates or args.num_train_epochs * self.samples_per_epoch
        self.max_train_steps = math.ceil(self.samples / self.total_batch_size)
        self.learning_rate = args.learning_rate * (self.total_batch_size if args.scale_lr else 1)
        self.order_epoch = functools.lru_cache(maxsize=2)(self.order_epoch)
        self.micro_batches = functools.lru_cache(maxsize=256)(self.micro_batches)

    def samples_seen(self, step: int) -> int:
        """The number of instance samples in the first `step` updates."""
        return min(step * self.total_batch_size, self.samples)

    def validates(self, step: int) -> bool:
        """Whether the model is validated after `step` updates: before the first, and as often as the flags say."""
        if self.run.args.validation_steps:
            return step % self.run.args.validation_steps == 0
        every = self.run.args.validation_epochs * self.samples_per_epoch
        return step == 0 or self.samples_seen(step) // every > self.samples_seen(step - 1) // every

    def draw(self, example: Example, number: int) -> Sample:
        """The sample of that number: whether its picture is mirrored, and whether its caption is dropped."""
        args, flip, dropout = self.run.args, 1.0, 1.0
        if args.random_flip or args.caption_dropout:
            generator = seeded_generator(self.run.seed, "draw", example.kind, number)
            flip, dropout = torch.rand(2, generator=generator).tolist()
        prompt = "" if dropout < args.caption_dropout else example.caption
        return Sample(example, number, prompt, args.random_flip and flip < 0.5)

    def key(self, sample: Sample) -> tuple[int, int, int]:
        """What must be equal within a micro-batch: the size and, so that attention needs no mask, the tokens."""
        return (*sample.example.bucket, math.ceil(len(self.tokens[sample.prompt]) / TOKEN_MULTIPLE))

    def order_epoch(self, epoch: int) -> list[Sample]:
        """The samples of an epoch, in the order in which the updates take them.

        Updates that lie wholly inside the epoch are rearranged among themselves, so that most have samples of one
        size and length; one that lies in two epochs stays as drawn, and no update needs any epoch but its own.
        """
        length, size = self.samples_per_epoch, self.total_batch_size
        generator = seeded_generator(self.run.seed, "order", epoch)
        slots = torch.randperm(length, generator=generator).tolist()
        drawn = [self.draw(self.slots[slot], epoch * length + place) for place, slot in enumerate(slots)]
        first = min(-epoch * length % size, length)  # where the first update begins that lies inside
        updates = (length - first) // size
        end = first + updates * size
        alike, inside = sorted(drawn[first:end], key=self.key), []
        for update in torch.randperm(updates, generator=generator).tolist():
            inside += alike[update * size : (update + 1) * size]
        return drawn[:first] + inside + drawn[end:]

    def update(self, step: int) -> list[Sample]:
        """All samples of update `step` (from 0), weighted so that the sum of their losses is the objective."""
        first, end = self.samples_seen(step), self.samples_seen(step + 1)
        assert 0 < end - first <= self.total_batch_size
        weight, samples, classes = 1 / (end - first), [], self.examples.get("class")
        for position in range(first, end):
            epoch, place = divmod(position, self.samples_per_epoch)
            sample = self.order_epoch(epoch)[place]
            samples.append(dataclasses.replace(sample, weight=weight))
            if classes:
                prior = self.draw(classes[sample.number % len(classes)], sample.number)
                samples.append(dataclasses.replace(prior, weight=weight * self.run.args.prior_loss_weight))
        return sorted(samples, key=self.key)

    def micro_batches(self, step: int) -> list[list[Sample]]:
        """This process's part of an update, as lists of at most `train_batch_size` samples of one key."""
        samples, processes = self.update(step), self.run.accelerator.num_processes
        size, parts = self.run.args.train_batch_size, []
        for process in range(processes):
            first, end = (len(samples) * p // processes for p in (process, process + 1))
            alike = [list(group) for _, group in itertools.groupby(samples[first:end], self.key)]
            parts.append([group[i : i + size] for group in alike for i in range(0, len(group), size)])
        own = parts[self.run.accelerator.process_index]
        if self.run.sharded:  # every process must run as many forward passes as the others
            own += [[dataclasses.replace(samples[0], weight=0.0)]] * (max(map(len, parts)) - len(own))
        return own


@dataclasses.dataclass
class TrainingData:
    """What training needs of samples: latents or pixels, noise, sigmas, prompt embeddings."""

    plan: TrainingPlan
    prompt_embeds: dict[str, Tensor]  # {prompt: [L, D]}
    sigmas: Tensor  # [1000], ascending
    run: Run
    latents: dict[tuple[Example, bool], Tensor] = dataclasses.field(default_factory=dict)  # by flip, where cached
    vae: AutoencoderKL | None = None  # where latents are not cached

    def load(self, samples: list[Sample]) -> MicroBatch:
        """The micro-batch of samples of one size, in host memory from which CUDA can copy while it computes."""
        args, seed, shape = self.run.args, self.run.seed, self.run.pipeline.latent_shape(samples[0].example.bucket)
        generators = [seeded_generator(seed, "objective", s.example.kind, s.number) for s in samples]
        batch = MicroBatch(
            sigmas=torch.stack([sample_sigma(self.sigmas, args, generator) for generator in generators]),
            noise=torch.stack([torch.randn(shape, generator=generator) for generator in generators]),
            weights=torch.tensor([sample.weight for sample in samples]),
            prompt_embeds=[self.prompt_embeds[sample.prompt] for sample in samples],
        )
        if args.cache_latents:
            batch.latents = torch.stack([self.latents[sample.example, sample.flip] for sample in samples])
        else:
            crops = [draw_crop(s.example, args, seed, s.example.kind, s.number) for s in samples]
            pictures = [(load_picture(s.example), s.example.bucket, c, s.flip) for s, c in zip(samples, crops)]
            batch.pixels = torch.stack([fit_to_bucket(*picture) for picture in pictures])
        if self.run.accelerator.device.type != "cuda":
            return batch
        return MicroBatch(**accelerate.utils.recursively_apply(Tensor.pin_memory, vars(batch)))

    def read_ahead(self, jobs: Iterator[list[Sample]], stopping: Callable[[], bool]) -> Iterator[MicroBatch | None]:
        """The micro-batches of `jobs` on the device, in their order; threads read them while it works.

        At most two more than there are threads are held. None ends them where pictures take longer than PATIENCE
        though the run is `stopping()`. A daemon thread reads each: one that is stuck holds up nothing.
        """
        device, threads = self.run.accelerator.device, max(1, self.run.args.dataloader_num_workers)
        at_work, ahead, following = threading.Semaphore(threads), deque(), None

        def read(future: concurrent.futures.Future, samples: list[Sample]) -> None:
            try:
                with at_work:
                    future.set_result(self.load(samples))
            except BaseException as error:  # of any kind: the loop would wait for ever for what never comes
                future.set_exception(error)

        try:
            while True:
                for samples in itertools.islice(jobs, threads + 2 - len(ahead)):
                    ahead.append(concurrent.futures.Future())
                    threading.Thread(target=read, args=(ahead[-1], samples), daemon=True).start()
                if not ahead:
                    return
                future, waited = ahead.popleft(), 0.0
                while not future.done() and waited < PATIENCE:
                    concurrent.futures.wait([future], timeout=0.1)
                    waited += 0.1 * (stopping() and not self.run.sharded)  # whose processes compute together
                if not future.done():
                    yield None
                batch = following or future.result().to(device)
                ready = ahead and ahead[0].done() and not ahead[0].exception()
                following = ahead[0].result().to(device) if ready else None  # it need not wait for this one's loss
                yield batch
        finally:  # a thread amid a picture may finish it, within a second: Python ends badly under it
            concurrent.futures.wait(ahead, timeout=1)

    def read(self, first_update: int, stopping: Callable[[], bool]) -> Iterator[tuple[int, Iterator]]:
        """(step, its micro-batches in this process), from update `first_update` (from 0) to the end of the run."""
        steps = range(first_update, self.plan.max_train_steps)
        jobs = itertools.chain.from_iterable(map(self.plan.micro_batches, steps))
        with contextlib.closing(self.read_ahead(jobs, stopping)) as batches:
            for step in steps:
                yield step + 1, itertools.islice(batches, len(self.plan.micro_batches(step)))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def build_optimizer(parameters: list[Parameter], args: argparse.Namespace, learning_rate: float) -> Optimizer:
    """AdamW, 8-bit AdamW or Prodigy. Raises UserError where its library is missing."""
    options = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    options |= {"weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    needed = "--optimizer prodigy needs pip install prodigyopt, --use_8bit_adam needs pip install bitsandbytes"
    with user_errors(needed, ImportError):
        if args.optimizer == "prodigy":
            options |= {"beta3": args.prodigy_beta3, "safeguard_warmup": args.prodigy_safeguard_warmup}
            options |= {"decouple": args.prodigy_decouple, "use_bias_correction": args.prodigy_use_bias_correction}
            return importlib.import_module("prodigyopt").Prodigy(parameters, **options)
        if args.use_8bit_adam:
            return importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=parameters[0].device.type in ("cpu", "cuda"))


@dataclasses.dataclass
class TrainingState:
    """All that changes while training, and all that a resumed run needs of the one that was stopped."""

    transformer: ZImageTransformer2DModel
    parameters: list[Parameter]  # of its LoRA, float32
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    scaler: torch.amp.GradScaler  # accelerate's of fp16, else one that does nothing
    step: int = 0  # updates that are done
    held_out: list[list] = dataclasses.field(default_factory=list)  # [[held-out loss, step], ...]
    ema_decay: float | None = None
    average: list[Tensor] = dataclasses.field(default_factory=list)  # of the parameters, with zeros before the start

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The LoRA with the moving average of its weights, where `--ema_decay` asks for that; afterwards as before."""
        with contextlib.ExitStack() as restored:
            for parameter, average in zip(self.parameters, self.average) if self.step else ():
                restored.callback(setattr, parameter, "data", parameter.data)
                parameter.data = average / (1 - self.ema_decay**self.step)  # as if the zeros were not there
            yield

    def save(self, folder: Path) -> None:
        """Write the LoRA in float32 and `training_state.pt`: tensors and plain values, by names of torch's own."""
        with replacing(folder / LORA_FILE) as part:
            save_lora(self.transformer, part, torch.float32)
        state = {"step": self.step, "held_out": self.held_out, "average": self.average}
        state["optimizer"] = accelerate.utils.recursively_apply(Tensor.cpu, self.optimizer.state_dict())
        state["scaler"] = self.scaler.state_dict()
        content = io.BytesIO()  # torch would not say that a disk is full
        torch.save(state, content)
        (folder / STATE_FILE).write_bytes(content.getbuffer())

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Raises UserError where it does not fit, or holds anything but plain data."""
        lora = {name.removeprefix("transformer."): t for name, t in load_file(folder / LORA_FILE).items()}
        with user_errors(f"{folder}: its LoRA does not fit this model"):
            set_peft_model_state_dict(self.transformer, lora)
        with user_errors(f"{folder / STATE_FILE} is not a training state of tensors and plain values"):
            saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            self.step = self.lr_scheduler.last_epoch = saved["step"]
            self.held_out[:] = saved["held_out"]
            for average, value in zip(self.average, saved["average"], strict=True):
                average.copy_(value)
        rate = self.lr_scheduler.base_lrs[0] * self.lr_scheduler.lr_lambdas[0](self.step)  # the command line's
        self.optimizer.param_groups[0]["lr"] = rate


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named `checkpoint-N` that have a manifest, newest first: any other is the user's."""
    numbered = [m.parent for m in Path(output_dir).glob(f"checkpoint-*/{MANIFEST}") if m.parent.name[11:].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name[11:]), reverse=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's own files, the manifest last: what is left after a kill can still be told and removed."""
    for name in (STATE_FILE, LORA_FILE, MANIFEST):
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # of files of the user's in it
        path.rmdir()


def save_checkpoint(state: TrainingState, fingerprint: dict[str, Any], run: Run) -> None:
    """Write `checkpoint-{step}`, whole or not at all, then remove the oldest; where it fails, training goes on."""
    output_dir = Path(run.args.output_dir)
    final, part = output_dir / f"checkpoint-{state.step}", output_dir / f".checkpoint-{state.step}-{os.getpid()}.part"
    try:
        part.mkdir(parents=True, exist_ok=True)
        state.save(part)
        manifest = {"step": state.step, "seed": run.seed, "fingerprint": fingerprint}
        manifest["files"] = {path.name: digest_of(path.read_bytes()) for path in sorted(part.iterdir())}
        manifest["trackers"] = {t.name: t.run.id for t in run.accelerator.trackers if t.name == "wandb"}
        (part / MANIFEST).write_text(json.dumps({"digest": digest_of(json.dumps(manifest))} | manifest, indent=1))
        for path in [*part.iterdir(), part]:
            flush_to_disk(path)
        if final in list_checkpoints(output_dir):
            remove_checkpoint(final)
        with optional("The file for ComfyUI"), state.averaged():
            save_for_comfyui(state.transformer, f"-{state.step:06d}", run)
        rename(part, final)  # fails where it holds files of the user's
        flush_to_disk(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        logger.error(f"{final} could not be saved ({first_line(error)}): training goes on; make room or allow writing")
        return
    logger.info(f"Saved {final}")
    others = [path for path in list_checkpoints(output_dir) if path != final]
    for path in others[(run.args.checkpoints_total_limit or sys.maxsize) - 1 :]:
        with optional(f"Removing {path}"):
            remove_checkpoint(path)
            name = comfyui_file(run.args.output_dir, f"-{int(path.name[11:]):06d}")
            if OutputFolder(output_dir).owns(name):
                (output_dir / name).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint. Raises UserError that says what is wrong with it."""
    with user_errors(f"{path} is not a complete checkpoint of this trainer"):
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("digest") != digest_of(json.dumps(manifest)):
            raise UserError(f"{path} is damaged: {MANIFEST} is not what was saved")
        if STATE_FILE not in manifest["files"]:
            raise UserError(f"{path} is a checkpoint of an earlier version of this trainer, which had no {STATE_FILE}")
        for name, digest in manifest["files"].items():
            if digest_of((path / name).read_bytes()) != digest:
                raise UserError(f"{path} is damaged: {name} is not what was saved")
        return Checkpoint(path=path, **manifest)


def find_checkpoint(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` means, or None where `latest` finds none. Raises UserError."""
    requested, latest = args.resume_from_checkpoint, f"--resume_from_checkpoint latest: the run in {args.output_dir}"
    if requested is None:
        return None
    if requested != "latest":
        with user_errors(f"--resume_from_checkpoint {requested}", UserError):
            return read_checkpoint(Path(requested) if Path(requested).is_dir() else Path(args.output_dir, requested))
    for path in list_checkpoints(args.output_dir):
        try:
            return read_checkpoint(path)
        except UserError as error:
            logger.warning(f"Passed over: {error}")
    if OutputFolder(args.output_dir).record["finished"]:
        go_on = f"give another --output_dir and, to train its LoRA on, --init_lora {args.output_dir}"
        raise UserError(f"{latest} is finished and left no checkpoint, as --checkpointing_steps would: {go_on}")
    logger.warning(f"{latest} has no complete checkpoint; starting anew")
    return None


def load_training_state(plan: TrainingPlan, checkpoint: Checkpoint | None, run: Run) -> TrainingState:
    """The transformer with its LoRA, the optimizer and its schedule, as they are at the start or in the checkpoint."""
    args, warmup, transformer = run.args, run.args.lr_warmup_steps, load_transformer(run)
    parameters = add_lora(transformer, run)
    optimizer = build_optimizer(parameters, args, plan.learning_rate)
    schedule = {"num_warmup_steps": warmup, "num_training_steps": max(plan.max_train_steps, warmup + 1)}
    schedule |= {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **schedule)
    scaler = run.accelerator.scaler or torch.amp.GradScaler(enabled=False)
    state = TrainingState(transformer, parameters, optimizer, lr_scheduler, scaler, ema_decay=args.ema_decay)
    state.average = [torch.zeros_like(p.data) for p in parameters] if args.ema_decay else []
    if checkpoint:
        state.load(checkpoint.path)
    if run.compiled:  # the repeated block, not the model: that takes half a minute, and hardly any speed is lost
        # All blocks share one code object, whose variants (refiners, masks, sizes) are more than the default limit.
        torch._dynamo.config.recompile_limit = 64
        transformer.compile_repeated_blocks(fullgraph=True)
    if run.sharded:
        adapters = [parameter for name, parameter in transformer.named_parameters() if ".lora_" in name]
        shard((*transformer_blocks(transformer), transformer), run.accelerator, ignored=adapters)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and validation
# ---------------------------------------------------------------------------------------------------------------------


class OnePromptAtATime(torch.nn.Module):
    """A transformer that takes the lists of `ZImagePipeline` one by one: without padding, so without a mask."""

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.in_channels, self.dtype, self.device = transformer.in_channels, transformer.dtype, transformer.device

    def forward(self, latents: list[Tensor], times: Tensor, embeds: list[Tensor], **options: Any) -> list:
        each = zip(latents, times.split(1), embeds, strict=True)
        return [[self.transformer([x], time, [embed], **options)[0][0] for x, time, embed in each]]


def draw_latents(
    transformer: ZImageTransformer2DModel, drawing: Drawing, seeds: list[int], embeds: dict[str, Tensor], run: Run
) -> list[Tensor]:
    """Latents [C, h, w] on the CPU of pictures of a prompt, from the noise of each seed, the same on every device."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(run.pipeline.scheduler.config)  # the pipeline changes it
    pipeline = ZImagePipeline(scheduler, None, None, None, OnePromptAtATime(transformer))
    pipeline.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": drawing.prompt, "negative_prompt_embeds": drawing.negative_prompt}
    device, noise = run.accelerator.device, [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {name: [embeds[text].to(device, transformer.dtype)] * len(seeds) for name, text in prompts.items()}
    options |= {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    with run.accelerator.autocast() if transformer.dtype == run.weight_dtype else contextlib.nullcontext():
        latents = pipeline(None, *drawing.size, generator=noise, output_type="latent", **options).images
    assert latents.shape == (len(seeds), *run.pipeline.latent_shape(drawing.size))
    return list(latents.float().cpu())


def generate_class_images(missing: int, prompt_embeds: dict[str, Tensor], run: Run) -> None:
    """Draw `missing` pictures of `--class_prompt` into the class folder, each by one of the processes."""
    args, size = run.args, run.args.sample_batch_size
    transformer = load_transformer(run, args.prior_generation_precision).to(run.accelerator.device)
    files = [Path(args.class_data_dir, f"class-{number:05d}.png") for number in range(args.num_class_images)]
    free = [number for number, file in enumerate(files) if not file.exists()]
    run.accelerator.wait_for_everyone()  # every process has looked before any picture is added
    own, drawing = run.own_part(free[:missing]), drawing_of(args.class_prompt, args, by_pipeline=True)
    for first in with_progress(range(0, len(own), size), "batches of class pictures", run.accelerator):
        numbers = own[first : first + size]
        seeds = [seeded_generator(run.seed, "class image", number).initial_seed() for number in numbers]
        latents = draw_latents(transformer, drawing, seeds, prompt_embeds, run)
        with training_utils.offload_models(transformer, device="cpu"):  # while the VAE is on the device
            images = decode_latents(latents, run)
        for number, image in zip(numbers, images, strict=True):
            with replacing(files[number]) as part:
                image.save(part)
    run.accelerator.wait_for_everyone()


@contextlib.contextmanager
def eval_mode(transformer: ZImageTransformer2DModel, *left_out: str) -> Iterator[None]:
    """The transformer as it will be used: in eval mode, without some adapters, at least `--base_adapter`."""
    with contextlib.ExitStack() as restored, torch.no_grad():
        for module in transformer.modules():
            for adapter in ("base", *left_out) if isinstance(module, LoraLayer) else ():
                module.set_scale(adapter, 0)  # it passes over an adapter that it lacks
                restored.callback(module.set_scale, adapter, 1)
        restored.callback(transformer.train)
        transformer.eval()
        yield


def with_same_lora(transformer: ZImageTransformer2DModel, run: Run) -> ZImageTransformer2DModel:
    """The transformer of `run.pipeline`, for pictures, with the LoRA of the one in training."""
    drawing = load_transformer(run).to(run.accelerator.device)  # where FSDP does not take it
    with torch.random.fork_rng(devices=[]):  # an adapter begins with random weights
        drawing.add_adapter(LoraConfig(**transformer.peft_config["default"].to_dict()))
    set_peft_model_state_dict(drawing, get_peft_model_state_dict(transformer))
    return drawing.eval()


def save_pictures(
    images: list[Image.Image], drawings: list[Drawing], kind: str, step: int, held_out: float | None, run: Run
) -> list[dict[str, Any]]:
    """Save pictures, note them in `run.json` for the page, and send them to the trackers; returns the card's."""
    output, number_of_each, gallery = OutputFolder(run.args.output_dir), run.args.num_validation_images, []
    shown = dict(output.record.get("pictures", {}))
    for n, (image, drawing) in enumerate(zip(images, drawings, strict=True)):
        prompt, number = divmod(n, number_of_each)
        name = f"{kind}-{step:06d}-prompt-{prompt}-image-{number}"
        with output.writing(f"samples/thumbnails/{name}.jpg") as part:
            ImageOps.contain(image, (256, 256)).save(part, quality=90)
        with output.writing(f"samples/{name}.png") as part:
            image.save(part)
        shown[name] = {"order": [step, prompt, number], "held_out": held_out, "drawing": vars(drawing)}
        gallery.append({"text": drawing.prompt, "output": {"url": f"samples/{name}.png"}})
        if number == 0:
            picture = np.hstack(images[n : n + number_of_each])
            for tracker in run.accelerator.trackers:
                options = {"dataformats": "HWC"} if tracker.name == "tensorboard" else {}
                value = [picture] if tracker.name in ("wandb", "swanlab") else picture
                with optional("--report_to"):
                    if hasattr(tracker, "log_images"):  # not all of accelerate's have it
                        tracker.log_images({f"validation/prompt-{prompt}": value}, step=step, **options)
    output.update(pictures=shown)
    return gallery


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1, minimum-scale=1">$refresh
<title>$title</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
  h1, body > p { position: sticky; left: 8px; max-width: calc(100vw - 16px); overflow-wrap: anywhere; }
  th, td { padding: 4px; text-align: start; vertical-align: top; font-weight: normal; }
  th { position: sticky; left: 0; background: Canvas; }
  tr:first-child th { left: auto; top: 0; z-index: 1; }
  th p { margin: 0; max-height: 7em; overflow: auto; overflow-wrap: anywhere; }
  td div { display: grid; grid: auto / repeat(auto-fit, minmax(90px, 1fr)); gap: 4px; width: min(256px, 60vw); }
  img { display: block; width: 100%; }
</style>
<h1>$title</h1>
<p>$status <a href="#newest">Newest pictures</a></p>
<table>
$rows</table>
<p id="newest"></p>
""")


def write_gallery(output: OutputFolder, last_step: int, status: str, running: bool) -> None:
    """Write `index.html` and, of the last 20 validations, `contact-sheet.png`: steps down, prompts across."""
    pictures, cells, firsts = output.record.get("pictures", {}), defaultdict(str), {}
    for name, picture in sorted(pictures.items(), key=lambda item: item[1]["order"]):
        step, held_out, drawing = picture["order"][0], picture["held_out"], Drawing(**picture["drawing"])
        if step > last_step or not (output.path / f"samples/{name}.png").is_file():
            continue
        row = f"step&nbsp;{step}" + ("" if held_out is None else f"<br>held-out loss&nbsp;{held_out:.4f}")
        settings = f"{drawing.size[1]} x {drawing.size[0]}, guidance {drawing.guidance:g}, {drawing.steps} steps"
        settings += f", not: {drawing.negative_prompt}" if drawing.negative_prompt else ""
        column = f'<p dir="auto">{escape(drawing.prompt)}</p><small>{escape(settings)}</small>'
        image = f'<img src="thumbnails/{name}.jpg" alt=""><small>seed {drawing.seed}</small>'
        cells[row, column] += f'<a href="{name}.png">{image}</a>'
        if name.startswith("step"):  # by --validation_prompt
            firsts.setdefault((row, column), name)
    columns = dict.fromkeys(column for _, column in cells)
    rows = "<tr><th></th>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>\n"
    for row in dict.fromkeys(row for row, _ in cells):
        rows += f"<tr><th>{row}</th>" + "".join(f"<td><div>{cells[row, c]}</div></td>" for c in columns) + "</tr>\n"
    refresh = '<meta http-equiv="refresh" content="30">' if running else ""
    page = PAGE.substitute(title=escape(output.path.absolute().name), status=status, refresh=refresh, rows=rows)
    with output.writing("samples/index.html") as part:
        part.write_text(page, encoding="utf-8")
    if firsts:
        steps, prompts = (list(dict.fromkeys(keys)) for keys in zip(*firsts, strict=True))
        grid, steps, blank = [], steps[-20:], Image.new("RGB", (256, 256), "white")
        for key in itertools.product(steps, prompts):
            image = Image.open(output.path / f"samples/thumbnails/{firsts[key]}.jpg") if key in firsts else blank
            grid.append(ImageOps.pad(image, blank.size, color="white"))
        with output.writing("samples/contact-sheet.png") as part:
            diffusers.utils.make_image_grid(grid, len(steps), len(prompts)).save(part)


def held_out_loss(transformer: ZImageTransformer2DModel, data: TrainingData, run: Run) -> float:
    """The mean loss on the held-out pictures, over fixed noise and, together, an even cover of the schedule."""
    examples, losses, levels = data.plan.examples["held-out"], [], 12
    jobs = [(k, j) for k in range(len(examples)) for j in range(levels)]
    for k, j in jobs if run.sharded else run.own_part(jobs):
        level = (j + (k + 0.5) / len(examples)) / levels  # in stratum j, shifted by k
        sigmas = data.sigmas[int(level * len(data.sigmas))][None]
        latents = data.latents[examples[k], False][None]
        noise = torch.randn(latents.shape, generator=seeded_generator(run.seed, "held out", k, j))
        embeds = [data.prompt_embeds[examples[k].caption]]
        batch = MicroBatch(noise, sigmas, torch.ones(1), embeds, latents).to(run.accelerator.device)
        losses.append(training_loss(transformer, None, batch, "none", run).item())
    return statistics.fmean(gather_object(losses))


class Validation:
    """Draws pictures and measures the held-out loss of the model as it stands, and keeps the best."""

    def __init__(self, state: TrainingState, data: TrainingData, stop: StopSignal, drawing_run: Run, run: Run) -> None:
        self.state, self.data, self.stop, self.drawing_run, self.run = state, data, stop, drawing_run, run
        if "held-out" in data.plan.examples:
            with eval_mode(state.transformer, "default"):
                self.base = held_out_loss(state.transformer, data, run)  # of the untrained model

    def draw(self, drawings: list[Drawing]) -> list[Image.Image]:
        """Draw pictures, and leave the training as it is; none where one cannot be drawn, or on a stop."""
        run, transformer, embeds = self.run, self.state.transformer, self.data.prompt_embeds
        jobs, drawn, images, other = range(len(drawings)), {}, [], bool(run.args.validation_model_path)
        at_once = 1 if run.sharded else run.accelerator.num_processes
        with eval_mode(transformer), training_utils.offload_models(transformer, device="cpu", offload=other):
            model = None if other else transformer
            for first in with_progress(jobs[::at_once], "pictures drawn", run.accelerator):
                if any(gather_object([self.stop.number > 0])):  # all processes stop here, between two pictures
                    break
                turn = jobs[first : first + at_once]
                for n in turn if run.sharded else run.own_part(turn):
                    with optional("Drawing a picture"):
                        model = model or with_same_lora(transformer, self.drawing_run)
                        (drawn[n],) = draw_latents(model, drawings[n], [drawings[n].seed], embeds, self.drawing_run)
            del model
            release_memory()  # before the VAE comes, and the transformer again: layers of bitsandbytes are in cycles
            with optional("Decoding the pictures"):
                images = decode_latents(list(drawn.values()), run)
        release_memory()
        pictures = dict(gather_object(list(zip(drawn, images, strict=False))))
        return [pictures[n] for n in jobs] if len(pictures) == len(jobs) else []

    def __call__(self, final: bool = False) -> list[dict[str, Any]]:
        """Validate the model as it stands; returns what the card shows of the pictures, on the main process."""
        run, args, state, loss, gallery = self.run, self.run.args, self.state, None, []
        prompts = args.final_validation_prompt if final else args.validation_prompt
        numbers = range(args.num_validation_images)
        seeds = [run.seed if drawing.seed is None else drawing.seed for drawing in prompts]
        drawings = [dataclasses.replace(d, seed=s + n) for d, s in zip(prompts, seeds, strict=True) for n in numbers]
        if args.ema_decay:
            logger.info(f"step {state.step}: the weights that are validated are averaged, see --ema_decay")
        with state.averaged():
            if "held-out" in self.data.plan.examples:
                with eval_mode(state.transformer):
                    loss = held_out_loss(state.transformer, self.data, run)
                with optional("--report_to"):
                    run.accelerator.log({"held_out_loss": loss, "held_out_loss_base": self.base}, step=state.step)
                state.held_out.append([loss, state.step])
                lowest, best = min(state.held_out)
                others = f"base model {self.base:.4f}; lowest {lowest:.4f}, at step {best}"
                logger.info(f"step {state.step}: held-out loss {loss:.4f} ({others})")
                if args.save_best and run.accelerator.is_main_process and best == state.step:
                    with optional("best/"):
                        save_result(state.transformer, run, f"best/{LORA_FILE}", "-best")
            images = self.draw(drawings) if drawings else []
        if images and run.accelerator.is_main_process:
            kind = "step" if prompts == args.validation_prompt else "final"  # of --final_validation_prompt
            with optional("Saving the pictures"):
                gallery = save_pictures(images, drawings, kind, state.step, loss, run)
        self.write_page()
        return gallery

    def write_page(self, end: str = "") -> None:
        """Bring `samples/index.html` up to date, on the main process; `end` says how the run has ended, if it has."""
        args, step, now = self.run.args, self.state.step, time.strftime("%Y-%m-%d %H:%M:%S %z")
        if self.run.accelerator.is_main_process and (args.validation_prompt or args.final_validation_prompt):
            status = f"{end or 'Written'} {now}, step {step} of {self.data.plan.max_train_steps}."
            status += "" if end else " Nothing says that the run has ended: if that was long ago, it may have stopped."
            with optional("samples/index.html"):
                write_gallery(OutputFolder(args.output_dir), step, status, running=not end)


# ---------------------------------------------------------------------------------------------------------------------
# Counted memory
# ---------------------------------------------------------------------------------------------------------------------


# The run's device, among fake tensors, which have shapes and no numbers: another name of the CPU, that is the host
COUNTED = torch.device("cpu:0")


class MemoryCounter(FakeTensorMode):
    """Makes all tensors fake, and counts the bytes of those on COUNTED, rounded up as CUDA's allocator does."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter.set_tensor_memo = lambda *_: None  # its weak references are in Module.to's way
        self.live = self.peak = self.depth = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # a number is asked for
            return 1.0 if args[0].dtype.is_floating_point else 1
        self.depth += 1
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.depth -= 1
        for tensor in tree_leaves(result) if not self.depth else ():  # not of what an operation is made of
            if isinstance(tensor, FakeTensor) and tensor.fake_device == COUNTED:
                storage = tensor.untyped_storage()
                address, size = storage._cdata, -(-storage.nbytes() // 512) * 512
                if address not in self.storages:  # each counts once, until nothing refers to it
                    self.storages.add(address)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.forget, address, size)
        return result

    def forget(self, address: int, size: int) -> None:
        self.storages.remove(address)
        self.live -= size


def compute_ends(blocks: Sequence[torch.nn.Module]) -> None:
    """Have only the first and the last block of each kind compute: between them memory grows or shrinks evenly."""
    kinds, computing, kept = {}, set(), {}

    def run_block(block: torch.nn.Module, forward: Callable, x: Tensor, *inputs: Any, **more: Any) -> Tensor:
        if not kinds:  # now that they are quantized and have their LoRA
            for other in blocks:
                tensors = [(name, p.shape, p.dtype, p.requires_grad) for name, p in other.named_parameters()]
                kinds[other] = (getattr(other, "recomputed", None), *tensors)
            computing.update({kinds[b]: b for b in blocks[::-1]}.values(), {kinds[b]: b for b in blocks}.values())
        key = (kinds[block], x.shape, x.requires_grad, torch.is_grad_enabled())
        if block in computing or key not in kept:
            computing.add(block)  # in the backward pass too
            counter = _get_current_dispatch_mode()
            before = counter.live
            output = forward(x, *inputs, **more)
            kept[key] = max(0, counter.live - before - output.nbytes)
            return output
        ballast = x.new_empty(kept[key], dtype=torch.uint8)
        scale = sum((p.sum() for p in block.parameters() if p.requires_grad), x.new_ones(()))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, x, ballast), operator.itemgetter(0)):
            return x * scale  # for whose backward pass the ballast is kept

    for block in blocks:
        block.forward = functools.partial(run_block, block, block.forward)


def quantize_as_on_gpu(weights: dict[torch.nn.Module, Parameter]) -> None:
    """What bitsandbytes makes of layers as they move to a GPU; `weights`, on the meta device, have the settings."""
    import bitsandbytes as bnb

    for layer, weight in weights.items():
        data = torch.empty(weight.shape, dtype=weight.dtype, device=COUNTED)
        if isinstance(layer, bnb.nn.Linear4bit):
            names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            data, state = bnb.functional.quantize_4bit(data, **{name: getattr(weight, name) for name in names})
            layer.quant_state, more = state, {"quant_state": state, "bnb_quantized": True}
        else:
            data, scales, _ = bnb.functional.int8_vectorwise_quant(data.half())
            layer.state.threshold, more = 0.0, {"CB": data, "SCB": scales}  # as if there were no outliers
        layer.weight = Parameter(data, requires_grad=False)
        vars(layer.weight).update(vars(weight) | more)
    bnb.functional.name2qmap.clear()  # tables that it keeps for all to come: these are fake


class FakePipeline(PipelineInfo):
    """A pipeline whose components have shapes and no numbers; they wait on the host, but those that are quantized."""

    def load(self, cls: type[T], subfolder: str, dtype: torch.dtype, **kwargs: Any) -> T:
        configs = {"text_encoder": self.text_config, "transformer": self.transformer_config, "vae": self.vae_config}
        config = kwargs.get("quantization_config")
        with _disable_current_modes(), torch.device("meta"):
            module = cls.from_config(configs[subfolder])
            if config:
                quantizer = diffusers.quantizers.DiffusersAutoQuantizer.from_config(config)
                quantizer.preprocess_model(module, device_map=None, keep_in_fp32_modules=[])
            torch.nn.Module.to(module, dtype)
            layers = [layer for layer in module.modules() if hasattr(layer, "quant_state") or hasattr(layer, "state")]
            quantized = {layer: layer._parameters.pop("weight") for layer in layers}
        device = COUNTED if config else "cpu"
        module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        if config:
            quantize_as_on_gpu(quantized)
        compute_ends(transformer_blocks(module) if subfolder == "transformer" else getattr(module, "layers", []))
        return module.eval()


def counted_run(run: Run) -> Run:
    """The run as it can be counted: one process, on COUNTED, without weights, its blocks as they are written."""
    args = argparse.Namespace(**vars(run.args))
    args.attention_backend, args.enable_npu_flash_attention = None, False
    args.offload = args.offload and bool(args.plan_for or run.accelerator.device.type != "cpu")
    autocast = functools.partial(torch.autocast, "cpu", run.weight_dtype, run.weight_dtype != torch.float32, False)
    accelerator = types.SimpleNamespace(device=COUNTED, distributed_type=DistributedType.NO, autocast=autocast)
    pipeline = FakePipeline(**vars(run.pipeline) | {"transformer_file": None})
    changes = {"args": args, "accelerator": accelerator, "pipeline": pipeline, "fraction": run.checkpointed_fraction}
    return dataclasses.replace(run, **changes)


def fake_batch(size: int, bucket: Size, tokens: int, run: Run, encoded: bool = True) -> MicroBatch:
    """A micro-batch of `size` samples, of latents or of pixels."""
    noise = torch.empty(size, *run.pipeline.latent_shape(bucket), device=COUNTED)
    numbers = torch.empty(size, device=COUNTED)
    embeds = [torch.empty(tokens, run.pipeline.transformer_config["cap_feat_dim"], device=COUNTED)] * size
    pixels = None if encoded else torch.empty(size, 3, *bucket, device=COUNTED)
    return MicroBatch(noise, numbers, numbers, embeds, noise if encoded else None, pixels)


@torch.no_grad()
def encode_once(tokens: int, run: Run) -> None:
    """Encode a prompt of so many tokens; with `--offload` each layer visits the device by itself."""

    def move(layer: torch.nn.Module, inputs: Any, *output: Any) -> None:
        layer.to("cpu" if output else COUNTED)

    encoder = run.pipeline.load(transformers.AutoModel, "text_encoder", run.encoder_dtype)
    for layer in [module for module in encoder.modules() if not list(module.children())] if run.args.offload else []:
        layer.register_forward_pre_hook(move)
        layer.register_forward_hook(move)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=COUNTED)
    encoder.to("cpu" if run.args.offload else COUNTED)
    encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)


@torch.no_grad()
def draw_once(transformer: ZImageTransformer2DModel, size: Size, tokens: int, stays: bool, run: Run) -> None:
    """One step of drawing a picture, and its decoding, for which the transformer `stays` on the device or does not."""
    batch = fake_batch(1, size, tokens, run)
    with run.accelerator.autocast():
        predict_velocity(transformer, batch.noise, batch.sigmas, batch.prompt_embeds, run.weight_dtype)
    if not stays:
        transformer.to("cpu")
    load_vae(run).to(COUNTED).decode(batch.noise)


def largest_micro_batch(plan: TrainingPlan, run: Run) -> tuple[int, Size, int, bool]:
    """Its samples, size and tokens, in the run's first 100 updates; and whether an update has several."""
    examples = plan.examples
    if plan.missing_class_images and not examples["class"]:
        own = {"kind": "class", "caption": run.args.class_prompt, "bucket": drawing_of("", run.args).size}
        examples = examples | {"class": [dataclasses.replace(examples["instance"][0], **own)]}
    plan = TrainingPlan(examples, plan.tokens, run)
    updates = [[(1, *plan.key(plan.update(0)[0]))]]  # also where this process has no sample
    for step in range(min(plan.max_train_steps, 100)):
        updates.append([(len(batch), *plan.key(batch[0])) for batch in plan.micro_batches(step)])
    sizes = {n * (h * w / SIZE_MULTIPLE**2 + t * TOKEN_MULTIPLE): (n, h, w, t) for n, h, w, t in sum(updates, [])}
    number, height, width, tokens = sizes[max(sizes)]
    return number, (height, width), tokens * TOKEN_MULTIPLE, max(map(len, updates)) > 1


def encoding_stages(plan: TrainingPlan, run: Run, fake: Run, counter: MemoryCounter) -> Iterator[str]:
    """A prompt and a picture of each stage whose models are gone when training begins; yields its name at its end."""
    args, examples, prompt = fake.args, plan.examples, max(map(len, plan.tokens.values()))
    encode_once(prompt, fake)
    counter.peak /= run.accelerator.num_processes if args.fsdp_text_encoder else 1
    yield "text encoder"
    class_sizes = [drawing_of("", args).size] if plan.missing_class_images else []
    sizes = [e.bucket for kind in examples for e in examples[kind] if args.cache_latents or kind == "held-out"]
    if sizes := sizes + (class_sizes if args.cache_latents else []):
        encode_images(load_vae(fake), torch.empty(1, 3, *max(sizes, key=math.prod), device=COUNTED), fake)
        yield "VAE"
    for size in class_sizes:
        draw_once(load_transformer(fake, args.prior_generation_precision), size, prompt, False, fake)
        yield "class pictures"


def training_stages(plan: TrainingPlan, run: Run, fake: Run, counter: MemoryCounter) -> Iterator[str]:
    """An update, with one micro-batch, and a picture of each of the other stages; yields its name at its end."""
    args = fake.args
    with _disable_current_modes():  # its order is drawn in real numbers
        number, bucket, tokens, accumulates = largest_micro_batch(plan, run)
    held_out = [e.bucket for e in plan.examples.get("held-out", [])]
    drawn = [drawing.size for drawing in args.validation_prompt + args.final_validation_prompt]
    transformer = load_transformer(fake)
    if run.sharded:  # FSDP gathers a block while the one before it computes
        share = 1 / run.accelerator.num_processes + 2 / len(transformer_blocks(transformer))
        counter.live = counter.peak = int(counter.live * min(1, share))
    parameters = add_lora(transformer, fake)
    for layer in transformer.modules():
        if isinstance(layer, torch.nn.Dropout):  # whose masks are of bytes on a GPU, and of numbers on the CPU
            layer.forward = lambda x, layer=layer: torch.native_dropout(x, layer.p, layer.training)[0]
    optimizer = build_optimizer(parameters, args, args.learning_rate)
    vae = None if args.cache_latents else load_vae(fake)
    average = [torch.zeros_like(parameter) for parameter in parameters] if args.ema_decay else []  # noqa: F841
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not accumulates:
        optimizer.zero_grad()
    batch = fake_batch(number, bucket, tokens, fake, encoded=args.cache_latents)
    training_loss(transformer.train(), vae, batch, args.weighting_scheme, fake).backward()
    optimizer.zero_grad()
    del batch
    yield "training"
    if held_out:
        with eval_mode(transformer):
            training_loss(transformer, None, fake_batch(1, max(held_out, key=math.prod), tokens, fake), "none", fake)
        yield "held out"
    if drawn:
        size, prompt = max(drawn, key=math.prod), max(map(len, plan.tokens.values()))
        other = bool(args.validation_model_path)
        with eval_mode(transformer), training_utils.offload_models(transformer, device="cpu", offload=other):
            drawing = with_same_lora(transformer, fake) if other else transformer
            draw_once(drawing, size, prompt, drawing is transformer, fake)
        yield "pictures"


def count_memory(plan: TrainingPlan, run: Run, training_alone: bool = False) -> dict[str, float]:
    """{stage: highest number of bytes of its tensors on the device}, each stage's models being freed before the next.

    Of one step and of one picture of the real modules, so that every flag is in it. Workspaces of libraries are not,
    nor is what the allocator cannot use for want of a piece that is large enough. Modes and random states stay.
    """
    fake, counted = counted_run(run), {}
    with torch.random.fork_rng(devices=[]), _disable_current_modes(), MemoryCounter() as counter:
        before = [] if training_alone else encoding_stages(plan, run, fake, counter)
        for stage in itertools.chain(before, training_stages(plan, run, fake, counter)):
            release_memory()
            counted[stage], counter.peak = counter.peak, counter.live
            if training_alone:
                break
    return counted


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


GIB = 2**30
CONTEXT = 0.8e9  # bytes that CUDA's context and libraries take of a card
FRAGMENTATION = 1.08  # what the allocator takes for each byte of tensors
LESS_MEMORY = [(name, True) for name in ("cache_latents", "gradient_checkpointing", "use_8bit_adam", "offload")]
LESS_MEMORY += [("base_model_precision", "int8"), ("base_model_precision", "nf4")]


def room_for_tensors(run: Run) -> float:
    """Bytes that tensors can have of the device's free memory, or of the card that `--plan_for` speaks of."""
    device = run.accelerator.device
    if run.args.plan_for:
        free = run.args.plan_for * GIB - CONTEXT
    elif device.type not in ("cpu", "mps"):  # which take of the host's
        module = torch.get_device_module(device)
        free = module.mem_get_info(device)[0] + module.memory_reserved(device)
    else:
        free = psutil.virtual_memory().available
    return free / FRAGMENTATION


def suggest_flags(plan: TrainingPlan, run: Run) -> str:
    """Log what the run would take with flags that save memory; returns those that would fit, as a sentence."""
    args, room, fitting = run.args, room_for_tensors(run), []
    given = vars(args) | {"gradient_checkpointing": run.checkpointed_fraction >= 1}
    useless = {"use_8bit_adam": args.optimizer != "adamw", "base_model_precision": args.bnb_quantization_config_path}
    alone = [{name: value} for name, value in LESS_MEMORY if given[name] != value and not useless.get(name)]
    if args.train_batch_size > 1:  # in updates of as many pictures
        steps = args.train_batch_size * args.gradient_accumulation_steps
        alone.append({"train_batch_size": 1, "gradient_accumulation_steps": steps})
    together = list(itertools.accumulate(alone, operator.or_))[1:]
    for changes in itertools.chain(alone, (several for several in together if not fitting)):
        flags = " ".join(f"--{name}" + f" {value}" * (value is not True) for name, value in changes.items())
        flags += " without --do_fp8_training" * (args.do_fp8_training and "base_model_precision" in changes)
        other = argparse.Namespace(**vars(args) | changes)
        fraction = changes.get("gradient_checkpointing", run.fraction)
        with contextlib.suppress(Exception):  # where the flag cannot be had here, as its library is missing
            size = max(count_memory(plan, dataclasses.replace(run, args=other, fraction=fraction)).values())
            logger.info(f"  with {flags}: {size / GIB:.2f} at most in all")
            fitting += [f"{flags} ({size / GIB:.1f} GiB)"] if size <= room else []
    return f"These would fit: {', '.join(fitting)}" if fitting else "No flags would do: lower --resolution"


def choose_fraction(plan: TrainingPlan, run: Run) -> float:
    """The smallest fraction of recomputed blocks whose training fits: what `--gradient_checkpointing auto` means."""
    blocks = run.pipeline.transformer_config["n_layers"] + 2 * run.pipeline.transformer_config["n_refiner_layers"]
    room = room_for_tensors(run)

    def count(number: int) -> float:
        other = dataclasses.replace(run, fraction=(number + 0.01) / blocks)
        return count_memory(plan, other, training_alone=True)["training"]

    number, most = 0, count(0)
    if most > room:  # memory is linear in the number of blocks, but for the last
        number = min(blocks, math.ceil(blocks * (most - room) / max(1, most - count(blocks))))
        while number < blocks and count(number) > room:
            number += 1
    number = max(gather_object([number]))  # the same in all processes
    logger.info(f"--gradient_checkpointing auto: {number} of {blocks} blocks are recomputed")
    return (number + 0.01) / blocks


@contextlib.contextmanager
def out_of_memory_said(stage: str, counted: dict[str, float], plan: TrainingPlan, run: Run) -> Iterator[None]:
    """Raises TrainingError where a stage runs out of memory: what was planned and free, and what flags would fit."""
    room, device, cause = room_for_tensors(run), run.accelerator.device, ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = first_line(error)
    release_memory()  # of the stage; outside of the handler, where the error no longer holds tensors
    if not cause:
        return
    text = f"{counted[stage] / GIB:.1f} GiB were planned, " if stage in counted else ""
    text += f"{room / GIB:.1f} were free for tensors when it began"
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info(device)
        others = total - left - torch.cuda.memory_reserved(device)
        text += f", other processes and the context hold {others / GIB:.1f}"
    raise TrainingError(f"out of memory in {stage}: {text} ({cause}). {suggest_flags(plan, run)}")


def plan_memory(plan: TrainingPlan, run: Run) -> tuple[Run, dict[str, float]]:
    """Say what memory each stage takes; returns that and the run, with what `--gradient_checkpointing auto` chose."""
    counted, automatic = {}, run.args.gradient_checkpointing == "auto"
    if automatic:
        run = dataclasses.replace(run, fraction=choose_fraction(plan, run))
    if run.args.dry_run or automatic or run.accelerator.device.type != "cpu":
        counted, room = count_memory(plan, run), room_for_tensors(run)
        at_most = {"training": " at most"} if run.compiled else {}
        sizes = [f"{stage}{at_most.get(stage, '')} {size / GIB:.2f}" for stage, size in counted.items()]
        logger.info(f"Expected peak memory, GiB: {', '.join(sizes)}")
        stage = max(counted, key=counted.get)
        suggestion = suggest_flags(plan, run) if run.args.dry_run or counted[stage] > room else ""
        if counted[stage] > room:
            needs = f"{stage} needs {counted[stage] / GIB:.1f} GiB"
            logger.warning(f"Memory: {needs}, tensors can have {room / GIB:.1f} of what is free. {suggestion}")
    return run, counted


def loggable(run: Run) -> dict[str, int | float | str]:
    """The flags that are set, as trackers and the card may show them: numbers and texts, no token, no private path."""
    lora = {"rank": run.lora.rank, "lora_alpha": run.lora.alpha, "lora_layers": ",".join(run.lora.targets)}
    flags = vars(run.args) | lora | {"hub_token": None, "resolution": ",".join(map(str, run.args.resolution))}
    flags |= {n: "; ".join(d.prompt for d in flags[n]) for n in ("validation_prompt", "final_validation_prompt")}
    flags = {name: value if isinstance(value, (int, float)) else str(value) for name, value in flags.items()}
    return {n: v for n, v in flags.items() if str(v) not in ("None", "False", "") and not os.path.isabs(str(v))}


def start_trackers(checkpoint: Checkpoint | None, run: Run) -> None:
    """Start the trackers of `--report_to`, or go on with the checkpoint's; none sees the token. Raises UserError."""
    args, accelerator = run.args, run.accelerator
    if args.hub_token:  # some store the command line, and one asks the kernel for it
        sys.argv = [text.replace(args.hub_token, "***") for text in sys.argv]
        if "swanlab" in map(str, accelerator.log_with):
            raise UserError("--report_to swanlab would store --hub_token: use hf auth login in place of that flag")
    settings: dict[str, Any] = {"clearml": {"auto_connect_arg_parser": False}}  # which would store the token
    if checkpoint:
        settings["tensorboard"] = {"purge_step": checkpoint.step + 1}  # or steps would stand there twice
        settings |= {name: {"id": run_id, "resume": "allow"} for name, run_id in checkpoint.trackers.items()}
    with user_errors(f"--logging_dir {args.logging_dir}, --report_to {args.report_to} cannot start"):
        accelerator.init_trackers("dreambooth-z-image-lora", config=loggable(run), init_kwargs=settings)


def describe_pictures(kind: str, examples: list[Example], folder: str | None) -> Iterator[str]:
    """How many pictures and captions came from where, what was left out, and what becomes of them, as lines."""
    pictures = {e.name: e for e in examples}.values()  # each once, of its sizes
    yield f"{len(pictures)} {kind} pictures:"
    places = Counter((e.source.parent, e.repeats) for e in pictures if isinstance(e.source, Path))
    for (place, times), n in places.items():
        yield f"  {n} in {place}" + f", counted {times} times" * (times > 1)
    origins = Counter(e.origin if isinstance(e.origin, str) else f"{e.origin.suffix.lower()} files" for e in pictures)
    yield from (f"  {n} captions from {origin}" for origin, n in origins.items())
    if folder:
        files = {path for e in pictures for path in (e.source, e.origin, e.mask) if isinstance(path, Path)}
        used = files.union(*(file.parents for file in files))
        listings = [list_folder(place) for place in sorted({Path(folder), *(place for place, _ in places)})]
        if left_out := [str(path.relative_to(folder)) for paths in listings for path in paths if path not in used]:
            yield f"  left out: {listed(left_out, 20)}"
    ratios = defaultdict(list)
    for e in examples:
        ratios[e.bucket].append(sorted((e.bucket[0] / e.size[0], e.bucket[1] / e.size[1])))
    for (height, width), pairs in sorted(ratios.items()):
        enlarged = sum(larger > 1 for _, larger in pairs)  # the larger covers the bucket
        cut = statistics.fmean(1 - smaller / larger for smaller, larger in pairs)
        yield f"  {len(pairs)} at height {height}, width {width}: {enlarged} enlarged, {cut:.0%} cut off on average"


def describe_plan(plan: TrainingPlan, run: Run) -> Iterator[str]:
    """What the run will do, as lines: pictures, steps, LoRA."""
    args, examples = run.args, plan.examples
    for kind in examples:
        yield from describe_pictures(kind, examples[kind], getattr(args, PICTURE_FLAGS[kind]))
    if plan.missing_class_images:
        yield f"{plan.missing_class_images} class pictures are missing and will be generated"
    epochs = f"{plan.samples / plan.samples_per_epoch:.1f} epochs of {plan.samples_per_epoch} samples"
    yield f"{plan.max_train_steps} steps of {plan.total_batch_size} pictures: {epochs}"
    for name, paths in run.lora.targets.items():
        yield f"LoRA on {name}: {len(paths)} modules, {run.lora.rank * sum(paths.values()):,} parameters"
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= plan.max_train_steps:
        yield f"--lr_warmup_steps {args.lr_warmup_steps}: the run ends before its rate is reached; give less"


# Flags that decide the mathematics of a run, by themselves.
MATHEMATICS = [
    "ema_decay", "repeats", "masked_loss", "unmasked_weight", "center_crop", "random_flip", "max_sequence_length",
    "caption_dropout", "cache_latents", "with_prior_preservation", "prior_loss_weight", "class_prompt", "lora_dropout",
    "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "optimizer", "use_8bit_adam", "adam_beta1",
    "adam_beta2", "adam_weight_decay", "adam_epsilon", "prodigy_beta3", "prodigy_decouple",
    "prodigy_use_bias_correction", "prodigy_safeguard_warmup", "max_grad_norm", "weighting_scheme", "logit_mean",
    "logit_std", "mode_scale", "timestep_shift", "base_model_precision", "base_adapter",
]  # fmt: skip


def make_fingerprint(plan: TrainingPlan, run: Run) -> dict[str, Any]:
    """What decides the mathematics of a run, by name: flags, and digests of the data, the LoRA and the model."""
    args, examples, quantized_by = run.args, plan.examples, run.args.bnb_quantization_config_path
    instances, classes = examples["instance"], {e.name for e in examples.get("class", [])}
    masks = [e.mask.read_bytes() for kind in examples for e in examples[kind] if isinstance(e.mask, Path)]
    captions = [plan.tokens[e.caption] for e in instances]
    pictures = [(Path(e.name).name, e.size, e.repeats) for e in instances]
    file_sizes = [e.source.stat().st_size for e in instances if isinstance(e.source, Path)]
    fingerprint = {name: getattr(args, name) for name in MATHEMATICS}
    fingerprint |= {component: digest for component, digest in run.pipeline.identity.items() if digest}
    return fingerprint | {
        "seed": run.seed,
        "bnb_quantization_config_path": quantized_by and json.loads(read_text(Path(quantized_by))),
        "learning_rate": plan.learning_rate,
        "max_train_steps": plan.max_train_steps,
        "samples in all": plan.samples,
        "mixed_precision": run.accelerator.mixed_precision,
        "total batch size": plan.total_batch_size,
        "pictures": digest_of((pictures, file_sizes)),
        "captions (of files, instance_prompt or caption_prefix)": digest_of(captions),
        "masks": digest_of(masks),
        "training sizes (resolution or aspect_ratio_buckets)": digest_of([e.bucket for e in instances]),
        "number of class images": len(classes) + plan.missing_class_images,
        "lora_layers": digest_of(run.lora.modules),
        "rank": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "init_lora": run.lora.initial_digest,
    }


# Flags that a resumed run may change, with a warning; any other change of the mathematics stops it.
MAY_CHANGE = {"learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "max_train_steps",
              "samples in all", "max_grad_norm", "mixed_precision"}  # fmt: skip


def check_fingerprint(checkpoint: Checkpoint | None, current: dict[str, Any]) -> None:
    """Say what differs from the run that is resumed. Raises UserError where it is another run, or processes differ."""
    seen = digest_of((Path(__file__).read_bytes(), current, checkpoint and checkpoint.step))
    if len({*gather_object([seen])}) > 1:
        raise UserError("the processes differ in pictures, settings, checkpoint or script: start all with the same")
    saved = checkpoint.fingerprint if checkpoint else current
    changes = {n: f"{n} was {saved.get(n)}, is {value}" for n, value in current.items() if saved.get(n) != value}
    if serious := "; ".join(text for name, text in changes.items() if name not in MAY_CHANGE):
        raise UserError(f"--resume_from_checkpoint {checkpoint.path}: take its settings or start anew. {serious}")
    for text in changes.values():
        logger.warning(f"Resuming with a change: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# The output folder and the Hub
# ---------------------------------------------------------------------------------------------------------------------


def check_folders(examples: Examples, args: argparse.Namespace) -> None:
    """Raises UserError where the run would write into a folder that it reads, or choose by what it trains on."""
    for kind, kind_examples in examples.items():
        read = {getattr(args, PICTURE_FLAGS[kind]) or args.dataset_name}
        read |= {e.source.parent for e in kind_examples if isinstance(e.source, Path)}
        for flag in ("output_dir", "encoding_cache_dir", "class_data_dir"):
            written = os.path.realpath(getattr(args, flag) or os.devnull)
            if flag != PICTURE_FLAGS[kind] and written in map(os.path.realpath, read):
                raise UserError(f"--{flag} {written} holds {kind} pictures, and is written to: choose another folder")
    held_out = {digest_of(read_bytes(e.source)): e.name for e in examples.get("held-out", [])}
    others = [e for kind in examples for e in examples[kind] if kind != "held-out" and held_out]
    if trained := {held_out.get(digest_of(read_bytes(e.source))) for e in others} - {None}:
        text = f"these pictures of --validation_data_dir are trained on: {listed(sorted(trained))}"
        if args.save_best:
            raise UserError(f"--save_best: {text}; remove them")
        logger.warning(f"The held-out loss means little, {text}")


def prepare_output(args: argparse.Namespace, checkpoint: Checkpoint | None, draws_class_images: bool) -> None:
    """Make the folders that the run writes into, and clear what earlier runs left in the way. Raises UserError."""
    folders = {"output_dir": args.output_dir, "encoding_cache_dir": args.encoding_cache_dir}
    folders["class_data_dir"] = args.class_data_dir if draws_class_images else None
    for flag, folder in [(flag, folder) for flag, folder in folders.items() if folder]:
        # What could fail hours later: a file by its longest name, which is renamed, and read by mmap
        with user_errors(f"--{flag} {str(folder)[:500]!r} cannot be written", OSError, SafetensorError, ValueError):
            str(folder).encode()  # JSON and the card could not name another
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder, ignore_cleanup_errors=True) as probe:
                path = Path(probe, f".checkpoint-{2**31}.part", comfyui_file(args.output_dir))
                path.parent.mkdir(parents=True)
                with replacing(path) as part:
                    save_file({"probe": torch.zeros(2**14)}, part)
                load_file(path)
    output = OutputFolder(args.output_dir)
    if not output.owns(LORA_FILE):
        raise UserError(f"--output_dir {output.path} holds a {LORA_FILE} that is not this program's: move it away")
    for path in output.path.glob(".checkpoint-*.part"):  # of a process that was killed while it saved
        shutil.rmtree(path, ignore_errors=True)
    # What an earlier run left moves away, or what this one has left behind it, so that the two neither mix nor clash
    folder = next(path for n in itertools.count(1) if not (path := output.path / f"earlier-run-{n}").exists())
    if checkpoint:
        for path in list_checkpoints(output.path):
            if int(path.name[11:]) > checkpoint.step:
                rename(path, folder / path.name, folders=True)
                logger.warning(f"{path.name} is of a run that went on: moved to {folder}")
        return output.update(finished=False)
    left = [*filter(output.owns, output.record["files"]), *(path.name for path in list_checkpoints(output.path))]
    if not left:
        return
    logs, own_log = (output.path / args.logging_dir).resolve(), re.compile(r"events\.out\.tfevents\..*|hparams\.yml")
    inside = output.path.resolve() in logs.parents  # elsewhere, they can be those of other runs too
    if inside and all(own_log.fullmatch(path.name) for path in logs.rglob("*") if not path.is_dir()):
        left.append(logs.relative_to(output.path.resolve()))
    for name in [*left, RUN_FILE]:
        if (output.path / name).exists():
            rename(output.path / name, folder / name, folders=True)
    logger.warning(f"{output.path} held an earlier run: moved to {folder}. To continue one: --resume_from_checkpoint")


def write_model_card(repository: str, gallery: list[dict[str, Any]], run: Run) -> str:
    """Write the card for the Hub; returns its name, `model_card.md` where there is a README.md of the user's."""
    args, output, base = run.args, OutputFolder(run.args.output_dir), run.args.pretrained_model_name_or_path
    trigger = args.instance_prompt or (args.caption_prefix or "").strip(" ,")
    prompts = [drawing.prompt for drawing in args.final_validation_prompt] + [trigger or "a photo"]
    on_hub = [name for name in (base, args.validation_model_path) if name and not os.path.exists(name)]
    base = base if base in on_hub else Path(base).name  # the folder is nobody's business
    tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "z-image", "template:sd-lora"]
    about = {"library_name": "diffusers", "license": "apache-2.0", "base_model": on_hub or None, "tags": tags}
    data = ModelCardData(**about, instance_prompt=trigger or None, widget=gallery or None)
    own = drawing_of("", args, by_pipeline=True)
    (height, width), steps, guidance = own.size, own.steps, own.guidance
    text = f"""---
{data.to_yaml()}
---

# {repository}

{"<Gallery />" if gallery else ""}

A LoRA for {f"[{base}](https://huggingface.co/{base})" if base in on_hub else f"`{base}`"}, trained with DreamBooth.
{f"Trigger words: `{' '.join(trigger.split())}`" if trigger else "Trained on captions, without trigger words."}

```python
import torch
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained({base!r}, torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights({repository!r})
image = pipe({prompts[0]!r}, {height=}, {width=}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

For ComfyUI, put the file in `comfyui/` into its folder `models/loras` and load it with the node `LoraLoaderModelOnly`.
The LoRA was trained with these flags:

```json
{json.dumps(loggable(run), indent=1, ensure_ascii=False)}
```
"""
    name = "README.md" if output.owns("README.md") else "model_card.md"
    with output.writing(name) as part:
        part.write_text(text, encoding="utf-8")
    return name


def publish(gallery: list[dict[str, Any]], validation: Validation, run: Run) -> None:
    """What follows when the LoRA is saved and the last pictures are drawn. Raises TrainingError of an upload."""
    args, plan, repository, card = run.args, validation.data.plan, run.args.hub_model_id, "README.md"
    with optional("The model card"):
        write_model_card(repository, gallery, run)
    with optional(RUN_FILE):
        OutputFolder(args.output_dir).update(finished=True, steps=plan.max_train_steps, seed=run.seed)
    shown = drawing_of(plan.examples["instance"][0].caption, args, by_pipeline=bool(args.validation_model_path))
    size = "height={}, width={}".format(*shown.size)
    logger.info(
        "To use the LoRA, after `import torch` and `from diffusers import ZImagePipeline`:\n"
        f"  pipe = ZImagePipeline.from_pretrained({run.pipeline.name!r}, torch_dtype={run.encoder_dtype})\n"
        f"  pipe.to({run.accelerator.device.type!r}).load_lora_weights({args.output_dir!r})\n"
        f"  pipe({shown.prompt!r}, {size}, num_inference_steps={shown.steps}, guidance_scale={shown.guidance})"
        ".images[0].save('picture.png')"
    )
    if not args.push_to_hub:
        return
    patterns = [LORA_FILE, glob.escape(comfyui_file(args.output_dir)), "samples/*.png"]  # these, and nothing else
    try:
        api = HfApi(token=args.hub_token)
        repository = api.create_repo(repository, private=args.hub_private or None, exist_ok=True).repo_id
        if args.hub_private and api.repo_exists(repository):  # perhaps from before, and public
            api.update_repo_settings(repository, private=True)
        card = write_model_card(repository, gallery, run)  # its owner is known now
        output = OutputFolder(args.output_dir)
        paths = (path for pattern in patterns for path in output.path.glob(pattern))
        names = [path.relative_to(output.path).as_posix() for path in paths]
        adding = [CommitOperationAdd(name, output.path / name) for name in names if output.owns(name)]
        adding.append(CommitOperationAdd("README.md", output.path / card))
        api.create_commit(repository, adding, commit_message="LoRA for Z-Image")
    except Exception as error:  # the client raises its own, those of the network and of the Hub
        cause = isinstance(error, RuntimeError) and error.__cause__ or error  # uploading threads wrap theirs
        reason = " ".join(str(cause).split())
        flags = ["--private"] * bool(args.hub_private) + [f"--include={name}" for name in (*patterns, card)]
        later = shlex.join(["hf", "upload", repository, args.output_dir, ".", *flags])
        raise TrainingError(f"--push_to_hub: {reason}. The LoRA is saved: {args.output_dir}. Later: {later}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def accumulate_gradients(state: TrainingState, vae: AutoencoderKL | None, batches: Iterable, run: Run) -> Tensor:
    """Add up the gradients of an update's micro-batches; returns the sum of their losses, NaN if one does not come."""
    accelerator, loss = run.accelerator, torch.zeros((), device=run.accelerator.device)
    state.scaler.scale(loss)  # it needs to have seen something, also where this process has no sample
    for number, batch in enumerate(batches):
        if batch is None:
            return torch.full_like(loss, math.nan)
        if run.args.lora_dropout:  # the one thing that draws from torch's own state: set it, for resuming
            draw = (run.seed, "dropout", state.step + 1, number, accelerator.process_index)
            torch.manual_seed(seeded_generator(*draw).initial_seed())
        micro_loss = training_loss(state.transformer, vae, batch, run.args.weighting_scheme, run)
        accelerator.backward(micro_loss)
        loss += micro_loss.detach()
        if any(parameter.grad is None for parameter in state.parameters):  # a backend can lack a backward pass
            backend = run.args.attention_backend or os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
            raise TrainingError(f"the attention backend {backend} gives no gradients: take --attention_backend native")
    return loss


def apply_gradients(state: TrainingState, loss: Tensor, stopping: bool, run: Run) -> tuple[float, bool, float]:
    """Add up gradients and loss over the processes, clip, and step the optimizer where all is finite.

    Returns the loss, whether to stop, as any process may ask, and the gradients' norm; amid an update nothing changes.
    Each process holds the whole LoRA: one exchange is enough, where a wrapped model averages after each backward pass.
    """
    assert loss.ndim == 0
    for parameter in state.parameters:
        if parameter.grad is None:  # this process had no sample in the update
            parameter.grad = torch.zeros_like(parameter)
    sums = torch.stack([loss, torch.full_like(loss, float(not stopping))])
    if run.accelerator.num_processes > 1:
        tensors = [*(parameter.grad for parameter in state.parameters), sums]
        flat = torch.nn.utils.parameters_to_vector(tensors)
        torch.nn.utils.vector_to_parameters(run.accelerator.reduce(flat, reduction="sum"), tensors)
    run.accelerator.unscale_gradients(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, run.args.max_grad_norm)
    loss, going_on, norm = torch.cat([sums, norm[None]]).tolist()  # the update's one wait for the device
    stopping = going_on < run.accelerator.num_processes
    if stopping and not math.isfinite(loss):
        return loss, True, norm
    if math.isfinite(loss + norm):
        state.scaler.step(state.optimizer)
    else:
        logger.warning(f"Step {state.step + 1} is skipped: its loss is {loss}, its gradient norm {norm}")
    state.scaler.update()
    state.lr_scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema_decay:
        torch._foreach_lerp_(state.average, [p.detach() for p in state.parameters], 1 - state.ema_decay)
    state.step += 1
    return loss, stopping, norm


def train(state: TrainingState, validation: Validation, fingerprint: dict[str, Any], run: Run) -> bool:
    """The loop, with logs, checkpoints and validation, from where `state` stands; returns whether it was finished."""
    accelerator, plan, stop = run.accelerator, validation.data.plan, validation.stop
    last, skipped_in_a_row, shown = plan.max_train_steps, 0, {}
    state.transformer.train()
    with contextlib.closing(validation.data.read(state.step, lambda: stop.number > 0)) as updates:
        for step, batches in with_progress(updates, "step", accelerator, last, state.step, shown):
            loss = accumulate_gradients(state, validation.data.vae, batches, run)
            loss, stopping, norm = apply_gradients(state, loss, stop.number > 0, run)
            if state.step == step:  # not where its pictures did not come: a resumed run takes it again
                skipped_in_a_row = 0 if math.isfinite(loss + norm) else skipped_in_a_row + 1
                group = state.optimizer.param_groups[0]  # Prodigy moves the weights by its estimate d times the rate
                metrics = {"loss": loss, "lr": group["lr"] * group.get("d", 1.0), "grad_norm": norm}
                metrics["epoch"] = plan.samples_seen(step) / plan.samples_per_epoch
                if accelerator.device.type == "cuda":
                    metrics["memory_gib"] = torch.cuda.max_memory_reserved() / GIB
                    if WINDOWS and metrics["memory_gib"] * GIB > torch.cuda.mem_get_info()[1]:
                        error_once("The card is full, and Windows goes on in slow host memory: see --dry_run's flags")
                with optional("--report_to"):
                    accelerator.log(metrics, step=step)
                if math.isfinite(loss):
                    before = shown.get("loss", loss)
                    shown |= metrics | {"loss": before + 0.05 * (loss - before)}  # smoothed over some twenty updates
            if skipped_in_a_row == 10:
                raise TrainingError("ten steps in a row had no finite gradient: lower --learning_rate, or take bf16")
            if stopping or step % run.args.checkpointing_steps == 0:
                if accelerator.is_main_process:
                    save_checkpoint(state, fingerprint, run)
                accelerator.wait_for_everyone()
            if stopping:
                stop.number = stop.number or signal.SIGTERM  # another process was asked to stop
                return False
            if plan.validates(step) and step < last:
                validation()
    return True


def main(args: argparse.Namespace) -> None:
    """Train as `args` (of `parse_args`) says. Raises UserError for what the user can correct."""
    accelerator = start_run(args)
    checkpoint = find_checkpoint(args)
    new_seed = broadcast_object_list([random.SystemRandom().randrange(2**32)])[0]  # all must take part
    seed = next(seed for seed in (args.seed, checkpoint and checkpoint.seed, new_seed) if seed is not None)
    if args.seed is None and not checkpoint:
        logger.info(f"--seed was not given: drew {new_seed}")
    pipeline = read_pipeline_info(args, accelerator)
    lora = read_lora_settings(args, pipeline.transformer_config)
    run = Run(args, accelerator, pipeline, seed, DTYPES[accelerator.mixed_precision], lora)

    # What is needed later, for mistakes in it to end the run before anything is loaded
    check_precision(run)
    build_optimizer([torch.nn.Parameter(torch.zeros(1))], args, args.learning_rate)
    drawing_pipeline = validation_pipeline(run)
    for used in {info for info in (pipeline, drawing_pipeline) if info.transformer_file}:
        read_transformer_file(used)

    # The plan: pictures, captions, sizes, steps, memory, and whether the checkpoint belongs to it
    kinds = {"instance": True, "class": args.with_prior_preservation, "held-out": args.validation_data_dir}
    examples = {kind: load_examples(kind, args) for kind in kinds if kinds[kind]}
    check_folders(examples, args)
    plan = TrainingPlan(examples, tokenize(examples, run), run)
    logger.info("\n".join(describe_plan(plan, run)))
    run, counted = plan_memory(plan, run)
    watched = functools.partial(out_of_memory_said, counted=counted, plan=plan, run=run)
    fingerprint = make_fingerprint(plan, run)
    check_fingerprint(checkpoint, fingerprint)
    earlier = OutputFolder(args.output_dir).record
    own = checkpoint if checkpoint and checkpoint.path.resolve().parent == Path(args.output_dir).resolve() else None
    if own and earlier["finished"] and earlier["steps"] >= plan.max_train_steps:
        logger.info(f"{args.output_dir} holds a finished run, which is left alone. To go on, raise --max_train_steps")
        return
    if args.dry_run:
        if Path(sys.argv[0]).name == Path(__file__).name:  # not in a notebook
            left_out, values = re.compile("--(dr|pl|hub_t)"), re.compile("--(pl|hub_t)[^=]*")  # by beginnings of flags
            pairs = itertools.pairwise(["", *sys.argv])
            command = shlex.join(w for last, w in pairs if not left_out.match(w) and not values.fullmatch(last))
            logger.info(f"To train, with the launcher's flags that you gave: accelerate launch {command}")
        return
    if accelerator.is_main_process:
        prepare_output(args, own, plan.missing_class_images > 0)
    accelerator.wait_for_everyone()
    start_trackers(own, run)

    # Frozen encoders: every prompt once and, with --cache_latents, every picture
    with watched("text encoder"):
        prompt_embeds = encode_prompts(plan.tokens, run)
    if plan.missing_class_images:
        with watched("class pictures"):
            generate_class_images(plan.missing_class_images, prompt_embeds, run)
        examples["class"] = load_examples("class", args)
    data = TrainingData(plan, prompt_embeds, training_sigmas(run.pipeline.scheduler, args.timestep_shift), run)
    cached = [e for kind in examples for e in examples[kind] if args.cache_latents or kind == "held-out"]
    with watched("VAE"):
        data.latents = cache_latents(cached, run)
    data.vae = None if args.cache_latents else load_vae(run)

    # Training, and the result: once the LoRA is saved, nothing that follows may end the run as a failure
    gallery = []
    with watched("training"), StopSignal(functools.partial(list_checkpoints, args.output_dir)) as stop:
        state = load_training_state(plan, checkpoint, run)
        validation = Validation(state, data, stop, dataclasses.replace(run, pipeline=drawing_pipeline), run)
        validation.write_page()
        if args.validation_prompt or args.final_validation_prompt:
            logger.info(f"The pictures are shown in {Path(args.output_dir, 'samples', 'index.html')}")
        if plan.validates(state.step) and state.step < plan.max_train_steps:
            validation()  # also of a resumed run: a checkpoint is saved before the validation of its step
        try:
            finished = train(state, validation, fingerprint, run)
            if finished and accelerator.is_main_process:
                with state.averaged():
                    save_result(state.transformer, run)
        except (UserError, TrainingError) as error:
            if accelerator.is_main_process or isinstance(error, UserError):  # one process alone reads a picture
                save_checkpoint(state, fingerprint, run)
            raise
        if finished:
            accelerator.wait_for_everyone()
            with optional("The last validation"):
                gallery = validation(final=True)
    kept = list_checkpoints(args.output_dir)
    go_on = "To go on: the same command with --resume_from_checkpoint latest." if kept else "There is no checkpoint."
    end = "The run ended" if finished else f"Stopped. {go_on}"
    validation.write_page(end)
    with optional("--report_to"):
        accelerator.end_training()
    if not finished:
        logger.warning(end)
    elif accelerator.is_main_process:
        publish(gallery, validation, run)
    if stop.number:
        sys.exit(128 + stop.number)


def run_command_line() -> int:
    """The entry of the command line: an error that the user can correct becomes one line and an exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: or the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    logging.raiseExceptions = False  # of a standard error that is full or closed
    threading.excepthook = lambda thread: error_once(f"--report_to failed ({first_line(thread.exc_value)})")
    try:
        main(parse_args())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # each that is expected becomes a line
        status, text = 2 if isinstance(error, UserError) else 1, first_line(error)
        if isinstance(error, (UserError, TrainingError)):
            text = str(error)
        elif is_out_of_memory(error):  # outside of the stages that say what was planned
            text += " Less memory: --gradient_checkpointing, --cache_latents, see --dry_run"
        elif isinstance(error, torch.distributed.DistError) or isinstance(error, RuntimeError) and "gloo" in text:
            text = f"another process has ended, and says why ({text})"
        elif not isinstance(error, (OSError, SafetensorError)):  # of a disk that is full, a folder that is read-only
            raise
    if os.environ.get("WORLD_SIZE", "1") != "1":
        text = f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}: {text}"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a file's name can hold line ends
    with contextlib.suppress(OSError, ValueError):  # standard error may be full or closed
        print(f"train_dreambooth_lora_z_image.py: error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run_command_line())
