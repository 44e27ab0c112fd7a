"""What leaves the machine: the model card, the upload to the Hub, the trackers, the file for ComfyUI.

The Hub is a small HTTP server in this process that answers the calls of huggingface_hub's client. The client reads the
address at import, so the trainer runs in a process of its own: one, which does all the runs of this file in turn.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import re
import shlex
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType
from huggingface_hub import ModelCard
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from running import ROOT, fork_trainer, run
from tiny import events, lora_tensors, train_args


# Not written out: a tracker that stores the changes to the source would store them with it.
TOKEN, WRONG_TOKEN = (f"hf_The{kind}TokenOfThisTest" for kind in ("Right", "Wrong"))
HOSTILE = [
    'a "photo" of sks: dog\'s | `toy` # 1',
    "first\n---\nbase_model: someone/else\n",
    "--- \\ {x: [1, 2]} & *a !!python/name:os.system %",
    "🐶 一只sks狗的照片：在桶里",
    "'" * 3 + '"' * 3 + "```\n</details><script>",
    "null",
    "- 2026-01-01",
]


# The Hub


class Hub(ThreadingHTTPServer):
    """The Hub's calls for making a repository and uploading to it. `failures` says which repository fails, and how."""

    failures = {
        "someone/full": "the commit is over the quota",
        "someone/no-space": "no space for large files",
        "someone/cut-off": "the connection ends while a large file is sent",
    }

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.objects = {"someone/public": SimpleNamespace(private=False, files={})}, {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the server's."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, **body):
        content = json.dumps(body).encode()
        self.send_response(status)
        if "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def failure(self, repository, kind):
        return self.server.failures.get(repository) == kind

    def do_GET(self):
        repository = self.path.removeprefix("/api/models/")
        if repository in self.server.repositories:
            self.reply(200, id=repository, private=self.server.repositories[repository].private)
        else:
            self.reply(404, error="Repository not found")

    def do_PUT(self):
        if settings := re.fullmatch(r"/api/models/(.+/.+)/settings", self.path):
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.repositories[settings[1]].private = wanted["visibility"] == "private"
            self.reply(200)
            return
        repository, oid = re.fullmatch(r"/large/(.+/.+)/(\w+)", self.path).groups()
        if self.failure(repository, "the connection ends while a large file is sent"):
            self.rfile.read(100)
            self.connection.close()
            self.close_connection = True
            return
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.failure(repository, "no space for large files"):
            self.reply(507, error="Insufficient storage")
            return
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.reply(200)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, error="Invalid credentials in Authorization header")
            return
        for pattern, answer in {
            r"/api/repos/create": self.create_repository,
            r"/api/validate-yaml": self.validate_card,
            r"/api/models/(.+/.+)/preupload/main": self.say_how_to_upload,
            r"/(.+/.+)\.git/info/lfs/objects/batch": self.say_where_to_upload,
            r"/api/models/(.+/.+)/commit/main": self.commit,
        }.items():
            if match := re.fullmatch(pattern, self.path):
                answer(content, *match.groups())
                return
        self.reply(404, error=f"This Hub does not know {self.path}")

    def create_repository(self, content):
        wanted = json.loads(content)
        name = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
        exists = name in self.server.repositories
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repositories.setdefault(name, SimpleNamespace(private=private, files={}))
        error = {"error": "You already created this model repo"} if exists else {}
        self.reply(409 if exists else 200, url=f"{self.server.url}/{name}", name=name, **error)

    def validate_card(self, content):
        """As the Hub does: the front matter is YAML, and `base_model`, where it is given, lists models of the Hub."""
        card = json.loads(content)["content"]
        match = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
        try:
            base_model = yaml.safe_load(match.group(1)).get("base_model")
            valid = base_model is None or all(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) for name in base_model)
            errors = [] if valid else [f'"base_model" with value "{base_model}" is not valid. Use a model id.']
        except yaml.YAMLError as error:
            errors = [str(error)]
        self.reply(400 if errors else 200, errors=[{"message": message} for message in errors], warnings=[])

    def say_how_to_upload(self, content, repository):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
        ]
        self.reply(200, files=files)

    def say_where_to_upload(self, content, repository):
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/large/{repository}/{wanted['oid']}"}}}
            for wanted in json.loads(content)["objects"]
        ]
        self.reply(200, transfer="basic", objects=objects)

    def commit(self, content, repository):
        if self.failure(repository, "the commit is over the quota"):
            self.reply(403, error="Private repository storage limit reached, please upgrade your plan")
            return
        files = self.server.repositories[repository].files
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = hashlib.sha1(content).hexdigest()
        self.reply(200, success=True, commitOid=oid, commitUrl=f"{self.server.url}/{repository}/commit/{oid}")


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


# The runs. The client waits between attempts at a connection that fails: not here.
RUNS = """
import contextlib, io, json, sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import train_dreambooth_lora_z_image as trainer

runs, results = (Path(path) for path in sys.argv[1:])
finished = {}
for name, (argv, endpoint) in json.loads(runs.read_text()).items():
    huggingface_hub.constants.ENDPOINT = endpoint or huggingface_hub.constants.ENDPOINT
    sys.argv = [trainer.__file__, *argv]
    stdout, stderr = io.StringIO(), io.StringIO()
    retries = mock.patch("huggingface_hub.utils._http.time.sleep") if name == "cut-off" else contextlib.nullcontext()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), retries:
        try:
            status = trainer.run_command_line()
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    finished[name] = {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    results.write_text(json.dumps(finished))
"""


@pytest.fixture(scope="module")
def runs(hub, tiny_model, shared_photos, tmp_path_factory):
    """{name: a finished run, with its folder `out`}."""
    base = tmp_path_factory.mktemp("runs")
    pushing = {"push_to_hub": True, "max_train_steps": 1}
    flags = {
        "pushed": {
            **pushing,
            "hub_private": True,
            "hub_model_id": "someone/private-dog",
            "hub_token": TOKEN,
            "report_to": "tensorboard",
            "rank": 8,
            "lora_alpha": 16,
            "learning_rate": 0.01,
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "encoding_cache_dir": base / "pushed" / "cache",
            "instance_prompt": HOSTILE[0],
            "validation_prompt": HOSTILE[1],
            "num_validation_images": 2,
            "validation_num_inference_steps": 1,
            "skip_final_inference": None,
        },
        "private-dog": {**pushing},  # the name of its folder is that of the repository, which exists by now
        "public-before": {**pushing, "hub_model_id": "someone/public", "hub_private": True},
        "wrong-token": {**pushing, "hub_token": WRONG_TOKEN},
        "no-network": {**pushing, "hub_model_id": "someone/unreachable"},
        "full": {**pushing, "hub_model_id": "someone/full", "hub_private": True, "output_dir": base / "it's full"},
        "no-space": {**pushing},
        "cut-off": {**pushing},
    }
    argv = {name: train_args(tiny_model, shared_photos, base / name, **flags[name]) for name in flags}
    for file in ("notes.txt", "my-photo.png", "earlier-run-1/README.md", "earlier-run-1/samples/old.png"):
        (base / "pushed" / file).parent.mkdir(parents=True, exist_ok=True)
        (base / "pushed" / file).write_text("not for the Hub")
    unreachable = "http://127.0.0.1:9"  # the discard port, which nothing listens on
    order = {name: (argv[name], None) for name in flags if name != "no-network"}
    order["no-network"] = (argv["no-network"], unreachable)
    (base / "runs.json").write_text(json.dumps(order))
    environment = {**client_environment(hub, base), "ACCELERATE_USE_CPU": "1"}
    run([sys.executable, "-c", RUNS, base / "runs.json", base / "results.json"], environment, timeout=600)
    finished = json.loads((base / "results.json").read_text())
    outs = {name: Path(flags[name].get("output_dir", base / name)) for name in flags}
    return {name: SimpleNamespace(out=outs[name], base=base, **result) for name, result in finished.items()}


def client_environment(hub, folder):
    """Where huggingface_hub's client finds the Hub and the token, and nothing of this machine's own settings."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
    }


# --push_to_hub


def test_push_to_hub_uploads_the_lora_its_card_its_pictures_and_the_comfyui_file_alone(runs, hub):
    assert runs["pushed"].status == 0, runs["pushed"]
    out, files = runs["pushed"].out, hub.repositories["someone/private-dog"].files
    expected = {"pytorch_lora_weights.safetensors", "README.md", "comfyui/pushed.safetensors"}
    expected |= {path.relative_to(out).as_posix() for path in (out / "samples").glob("*.png")}
    assert expected <= set(files) <= expected | {"comfyui/private-dog.safetensors"}
    assert "samples/contact-sheet.png" in files and (out / "checkpoint-1").is_dir() and (out / "logs").is_dir()
    assert files["samples/contact-sheet.png"] == (out / "samples" / "contact-sheet.png").read_bytes()


def test_hub_private_makes_a_private_repository(runs, hub):
    assert hub.repositories["someone/private-dog"].private
    assert not hub.repositories["someone/cut-off"].private


def test_without_hub_model_id_the_folder_names_the_repository_and_one_that_exists_is_updated(runs, hub):
    assert runs["private-dog"].status == 0, runs["private-dog"]
    assert runs["public-before"].status == 0 and hub.repositories["someone/public"].private
    files = hub.repositories["someone/private-dog"].files
    lora = (runs["private-dog"].out / "pytorch_lora_weights.safetensors").read_bytes()
    assert files["pytorch_lora_weights.safetensors"] == lora
    assert loaded_lora(files["README.md"].decode()) == "someone/private-dog"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong-token", "401"),
        ("no-network", "Connection refused"),
        ("full", "storage limit reached"),
        ("no-space", "507"),
        ("cut-off", ""),
    ],
)
def test_an_upload_that_fails_is_one_line_with_a_command_to_push_later(runs, name, reason):
    finished = runs[name]
    assert finished.status == 1, finished
    errors = [line for line in finished.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0] == finished.stderr.splitlines()[-1], finished.stderr
    assert reason in errors[0] and "Traceback" not in finished.stderr
    assert lora_tensors(finished.out) and (finished.out / "README.md").is_file()
    command = shlex.split(push_command(errors[0]))
    repository = {"no-network": "someone/unreachable", "wrong-token": "wrong-token"}.get(name, f"someone/{name}")
    assert command[2] in (repository, repository.removeprefix("someone/"))
    assert Path(command[3]) == finished.out
    assert ("--private" in command) == (name == "full")


def push_command(line):
    """The command in an error's line."""
    return re.search(r"hf upload .*", line).group()


def test_the_command_to_push_later_uploads_the_same(runs, hub, monkeypatch):
    line = runs["full"].stderr.splitlines()[-1]
    command = shlex.split(push_command(line))
    monkeypatch.setattr(hub, "failures", {})
    run([Path(sys.executable).with_name("hf"), *command[1:]], client_environment(hub, runs["full"].base))
    assert set(hub.repositories["someone/full"].files) == {
        "pytorch_lora_weights.safetensors",
        "README.md",
        "comfyui/it's full.safetensors",
    }


def test_a_repository_name_that_the_hub_forbids_is_named_at_once():
    for name in ("a/b/c", "someone/white space", "--x"):
        with pytest.raises(trainer.UserError, match="--hub_model_id"):
            trainer.parse_args([*required_flags(), "--push_to_hub", f"--hub_model_id={name}"])


def test_the_token_appears_nowhere(runs, hub):
    texts = [text.encode() for finished in runs.values() for text in (finished.stdout, finished.stderr)]
    texts += [content for repository in hub.repositories.values() for content in repository.files.values()]
    base = runs["pushed"].base
    texts += [path.read_bytes() for path in base.rglob("*") if path.is_file() and path.name != "runs.json"]
    assert len(texts) > 50
    assert not any(token.encode() in text for text in texts for token in (TOKEN, WRONG_TOKEN))


# The card


LORA = trainer.LoraSettings(4, 4, {"to_q": {}})


def required_flags(model="Tongyi-MAI/Z-Image", prompt="a photo of sks dog"):
    return [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", f"--instance_prompt={prompt}"]


def write_card(out, *flags, prompt="a photo of sks dog", pictures=0, model="Tongyi-MAI/Z-Image"):
    """The text of the card of a run with these flags that drew so many pictures."""
    args = trainer.parse_args([*required_flags(model, prompt), f"--output_dir={out}", *flags])
    gallery = [{"text": prompt, "output": {"url": f"samples/{number}.png"}} for number in range(pictures)]
    trainer.write_model_card(args.hub_model_id, gallery, SimpleNamespace(args=args, lora=LORA))
    return (out / "README.md").read_text(encoding="utf-8")


def front_matter(card):
    """The card's data, read as the Hub reads it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))


def code(card):
    """The card's Python program."""
    return re.search(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE).group(1)


def loaded_lora(card):
    """What the card's program gives to `load_lora_weights`."""
    return next(
        node.args[0].value
        for node in ast.walk(ast.parse(code(card)))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load_lora_weights"
    )


def flags_of(card):
    """{flag: value} that the card says."""
    return json.loads(re.search(r"^```json\n(.*?)^```", card, re.DOTALL | re.MULTILINE).group(1))


@pytest.mark.parametrize("prompt", HOSTILE)
def test_the_card_is_valid_for_any_prompt(prompt, tmp_path):
    card = write_card(tmp_path, f"--validation_prompt={prompt}", prompt=prompt, pictures=4)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.instance_prompt == front_matter(card)["instance_prompt"] == prompt
    assert [entry["text"] for entry in front_matter(card)["widget"]] == [prompt] * 4
    assert front_matter(card)["base_model"] == ["Tongyi-MAI/Z-Image"]
    ast.parse(code(card))
    assert {"instance_prompt", "validation_prompt", "rank"} <= set(flags_of(card))
    assert card.count("\n---\n") == 1  # where the front matter ends
    assert len(re.findall(r"^```", card, re.MULTILINE)) == 4


def test_the_card_names_base_model_licence_library_and_trigger_words(tmp_path):
    card = write_card(tmp_path)
    data = front_matter(card)
    assert data["base_model"] == ["Tongyi-MAI/Z-Image"]
    assert data["license"] == "apache-2.0" and data["library_name"] == "diffusers"
    assert {"text-to-image", "lora", "z-image"} <= set(data["tags"])
    assert "`a photo of sks dog`" in card and "ComfyUI" in card
    assert "`blue|red sks`" in write_card(tmp_path, prompt="blue|red sks")
    assert "https://huggingface.co/Tongyi-MAI/Z-Image" in card


def test_the_card_says_in_what_the_base_was_held_if_it_was_quantized(tmp_path):
    assert flags_of(write_card(tmp_path, "--do_fp8_training"))["base_model_precision"] == "fp8"
    flags = flags_of(write_card(tmp_path, "--bnb_quantization_config_path=configs/nf4.json"))
    assert flags["bnb_quantization_config_path"] == "configs/nf4.json"


def test_a_local_base_model_is_no_base_model_on_the_hub_and_no_link(tmp_path):
    card = write_card(tmp_path, model=tmp_path)
    assert "base_model" not in front_matter(card)
    assert "https://huggingface.co//" not in card


def test_the_gallery_shows_the_final_pictures_which_are_uploaded(runs, hub):
    files = hub.repositories["someone/private-dog"].files
    card = (runs["pushed"].out / "README.md").read_text(encoding="utf-8")
    entries = front_matter(card)["widget"]
    assert [entry["text"] for entry in entries] == [HOSTILE[1]] * 2
    assert len({entry["output"]["url"] for entry in entries}) == 2
    for entry in entries:
        assert (runs["pushed"].out / entry["output"]["url"]).is_file() and entry["output"]["url"] in files
        assert "000002" in entry["output"]["url"]


def test_a_card_without_pictures_has_no_gallery(tmp_path):
    card = write_card(tmp_path)
    assert "widget" not in front_matter(card) and "<Gallery />" not in card


def test_the_card_has_the_flags_of_the_run_zeros_too_and_no_token(tmp_path):
    flags = ["--guidance_scale=0", "--seed=0", f"--hub_token={TOKEN}", "--report_to=none", "--cache_latents"]
    card = write_card(tmp_path, *flags)
    flags = flags_of(card)
    assert flags["guidance_scale"] == flags["seed"] == 0 and flags["cache_latents"] is True
    assert "hub_token" not in flags and TOKEN not in card
    assert "do_fp8_training" not in flags and "max_train_steps" not in flags


def test_the_cards_flags_are_as_they_were_typed_without_folders_of_this_machine(tmp_path):
    card = write_card(tmp_path, "--resolution=512,768", "--validation_prompt=a dog --x", "--cache_dir=~/hub")
    flags = flags_of(card)
    assert flags["resolution"] == "512,768" and flags["validation_prompt"] == "a dog --x"
    assert str(tmp_path) not in card and "cache_dir" not in flags


def test_a_local_model_is_named_without_its_folder(tmp_path):
    (tmp_path / "models" / "Z-Image").mkdir(parents=True)
    card = write_card(tmp_path, model=tmp_path / "models" / "Z-Image")
    assert "A LoRA for `Z-Image`" in card and str(tmp_path) not in card


def test_the_cards_program_loads_the_uploaded_lora(tmp_path, runs):
    assert loaded_lora(write_card(tmp_path, "--hub_model_id=someone/dog")) == "someone/dog"
    assert loaded_lora((runs["pushed"].out / "README.md").read_text(encoding="utf-8")) == "someone/private-dog"


# Trackers


def trackers(report_to):
    """The names of the trackers that accelerate is given."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = trainer.parse_args(train_args("model", "pictures", "out", report_to=report_to))
    return [str(tracker) for tracker in trainer.make_accelerator(args).log_with]


@pytest.mark.parametrize("name", LOGGER_TYPE_TO_CLASS)
def test_every_tracker_of_accelerates_is_taken_or_asked_for(name):
    try:
        assert trackers(name) == [name]
    except trainer.UserError as error:
        assert f"pip install {name}" in str(error)


def test_an_unknown_tracker_is_named_with_those_that_there_are():
    with pytest.raises(trainer.UserError, match="--report_to nothing is unknown .*wandb"):
        trackers("tensorboard,nothing")
    assert trackers("none") == []
    assert trackers("tensorboard, wandb") == ["tensorboard", "wandb"]


def installed_trackers():
    """The names of the trackers that accelerate finds here."""
    return {str(getattr(tracker, "value", tracker)) for tracker in trainer.get_available_trackers()}


# Where each tracker keeps what it is sent while it is offline, below the folder in which the run was started.
TRACKER_FILES = {
    "aim": "out/logs/.aim",
    "clearml": "clearml",
    "comet_ml": "comet",
    "dvclive": "dvclive",
    "mlflow": "ml*",
    "swanlab": "swanlog",
    "tensorboard": "out/logs/dreambooth-z-image-lora",
    "trackio": "trackio",
    "wandb": "wandb",
}


PICTURE_TRACKERS = ("aim", "clearml", "swanlab", "tensorboard", "wandb")


def run_with_trackers(report_to, model, photos, folder):
    """A run in `folder`, none of whose trackers reaches the network."""
    environment = {
        "HOME": str(folder / "home"),
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "CLEARML_OFFLINE_MODE": "1",
        "CLEARML_CACHE_DIR": str(folder / "clearml"),
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    flags = {
        "report_to": report_to,
        "hub_token": None if report_to == "swanlab" else TOKEN,  # which is refused there
        "validation_prompt": 'a "dog": 一只/sks狗\'?*',
        "num_validation_images": 2,
        "validation_num_inference_steps": 1,
        "skip_final_inference": None,
    }
    (folder / "home").mkdir()
    fork_trainer(*train_args(model, photos, folder / "out", **flags), env=environment, cwd=folder)


def contents(paths):
    """The bytes of the files at these paths and below, those inside archives too."""
    files = [file for path in paths for file in [path, *path.rglob("*")] if file.is_file()]
    for file in files:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                yield from map(archive.read, archive.namelist())
        yield file.read_bytes()


def pictures(content):
    """Every PNG and JPEG picture in these bytes, whatever is around them."""
    for match in re.finditer(rb"\x89PNG\r\n|\xff\xd8\xff", content):
        with contextlib.suppress(OSError, SyntaxError):
            yield np.asarray(Image.open(io.BytesIO(content[match.start() :])).convert("RGB"), dtype=float)


@pytest.mark.parametrize("tracker", sorted(set(LOGGER_TYPE_TO_CLASS) - {"tensorboard"}))
def test_trackers_get_the_metrics_and_the_pictures_and_no_token(tracker, tiny_model, shared_photos, tmp_path):
    if tracker not in installed_trackers():
        pytest.skip(f"{tracker} is not installed")
    everything = {"tensorboard", tracker} == installed_trackers()  # three and more wrap each other's output
    run_with_trackers("all" if everything else tracker, tiny_model, shared_photos, tmp_path)
    for name in installed_trackers() if everything else {tracker}:
        found = list(contents(tmp_path.glob(TRACKER_FILES[name])))
        for metric in (b"loss", b"lr", b"grad_norm", b"epoch"):
            assert any(metric in content for content in found)
        for step in (0, 2) if name in PICTURE_TRACKERS else ():
            files = sorted((tmp_path / "out" / "samples").glob(f"step-{step:06d}-*"))
            sent = np.hstack([np.asarray(Image.open(file), dtype=float) for file in files])
            seen = [picture for content in found for picture in pictures(content) if picture.shape == sent.shape]
            alike = [np.corrcoef(picture.ravel(), sent.ravel())[0, 1] for picture in seen]
            assert max(alike) > 0.8  # and not 1, since one of them keeps JPEGs
    assert not any(TOKEN.encode() in content for content in contents([tmp_path]))


@pytest.mark.skipif("clearml" not in installed_trackers(), reason="clearml is not installed")
def test_clearml_that_was_imported_first_does_not_store_the_token(tiny_model, shared_photos, tmp_path):
    """As in a notebook: from its import on, it notes what every argument parser reads."""
    code = (
        "import sys, clearml, train_dreambooth_lora_z_image as trainer\ntrainer.main(trainer.parse_args(sys.argv[1:]))"
    )
    flags = train_args(tiny_model, shared_photos, tmp_path / "out", report_to="clearml", hub_token=TOKEN)
    environment = {
        "ACCELERATE_USE_CPU": "1",
        "CLEARML_OFFLINE_MODE": "1",
        "CLEARML_CACHE_DIR": str(tmp_path / "clearml"),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    run([sys.executable, "-c", code, *flags], environment, cwd=tmp_path)
    found = list(contents([tmp_path / "clearml"]))
    assert any(b"grad_norm" in content for content in found)
    assert not any(TOKEN.encode() in content for content in found)


def test_the_token_is_refused_beside_a_tracker_that_would_store_it():
    args = trainer.parse_args([*required_flags(), "--report_to=swanlab", f"--hub_token={TOKEN}"])
    with pytest.raises(trainer.UserError, match="hf auth login") as error:
        accelerator = SimpleNamespace(log_with=[LoggerType.SWANLAB])
        trainer.start_trackers(None, SimpleNamespace(args=args, accelerator=accelerator, lora=LORA))
    assert TOKEN not in str(error.value)


def test_a_tracker_that_cannot_start_is_one_line_before_any_model_is_loaded(
    tiny_model, shared_photos, tmp_path, monkeypatch
):
    def no_account(*args, **kwargs):
        raise RuntimeError("no account\nand more about it")

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(trainer.Accelerator, "init_trackers", no_account)
    monkeypatch.setattr(trainer, "encode_prompts", lambda *args: pytest.fail("the text encoder was used"))
    with pytest.raises(trainer.UserError, match="--report_to tensorboard cannot start: no account$"):
        trainer.main(trainer.parse_args(train_args(tiny_model, shared_photos, tmp_path, report_to="tensorboard")))


def test_tensorboard_gets_the_metrics_of_every_step(runs):
    scalars = events(runs["pushed"].out).scalars
    for name in ("loss", "lr", "grad_norm", "epoch"):
        assert [event.step for event in scalars[name]] == [1, 2]


# The file for ComfyUI


def test_the_comfyui_file_has_the_effect_of_the_diffusers_file_with_alpha_apart_from_rank(runs, tiny_model):
    from diffusers import ZImagePipeline

    out = runs["pushed"].out
    generator = torch.Generator().manual_seed(0)
    latents, sigmas = torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([0.5])
    prompt_embeds = [torch.randn(20, 32, generator=generator)]
    velocities = []
    for lora in (None, out, out / "comfyui" / "pushed.safetensors"):
        pipeline = ZImagePipeline.from_pretrained(tiny_model, text_encoder=None, tokenizer=None, vae=None)
        if lora:
            pipeline.load_lora_weights(lora)
        with torch.no_grad():
            velocity = trainer.predict_velocity(pipeline.transformer, latents, sigmas, prompt_embeds, torch.float32)
        velocities.append(velocity)
    torch.testing.assert_close(velocities[2], velocities[1], rtol=1e-4, atol=1e-5)
    assert (velocities[1] - velocities[0]).abs().max() > 1e-3


def test_the_comfyui_file_follows_its_formula(runs, tiny_model):
    """ComfyUI adds alpha / rank * up @ down to the layer that the key names."""
    from diffusers import ZImagePipeline

    out = runs["pushed"].out
    comfyui = lora_tensors(out / "comfyui" / "pushed.safetensors")
    pipeline = ZImagePipeline.from_pretrained(tiny_model, text_encoder=None, tokenizer=None, vae=None)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(out)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    layers = [key.removesuffix(".alpha") for key in comfyui if key.endswith(".alpha")]
    assert len(layers) * 3 == len(comfyui) and len(layers) > 10
    for layer in layers:
        down, up, alpha = (comfyui[f"{layer}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        assert alpha == 16 and len(down) == 8
        name = layer.removeprefix("diffusion_model.") + ".weight"
        torch.testing.assert_close(after[name] - before[name], alpha / len(down) * up @ down, rtol=1e-3, atol=1e-6)
