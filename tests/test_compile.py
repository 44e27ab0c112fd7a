"""Compiled blocks compute what the plain ones do, and are compiled once for each size."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import train_dreambooth_lora_z_image as trainer
from running import ROOT, launch
from tiny import build_tiny_pipeline, events, train_args


BUCKETS = [(64, 64), (48, 80), (80, 48), (32, 32)]  # height, width


@pytest.fixture(scope="module")
def one_layer_model(tmp_path_factory):
    """The tiny pipeline with one transformer layer: one block of each kind, since compiling takes long."""
    from diffusers import ZImageTransformer2DModel

    folder = build_tiny_pipeline(tmp_path_factory.mktemp("model") / "one-layer")
    config = {**ZImageTransformer2DModel.load_config(folder, subfolder="transformer"), "n_layers": 1}
    torch.manual_seed(0)
    ZImageTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """Every test compiles anew, and what it sets of Dynamo ends with it."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture
def backend(monkeypatch, request):
    """The backend that blocks are compiled with, of `indirect` parametrization."""
    compile_module = torch.nn.Module.compile

    def compile_with(module, **options):
        compile_module(module, **options, backend=request.param)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    return request.param


def make_run(model, precision="no", pictures="unused", **flags):
    """What the trainer's functions need to know of a run on the CPU."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    args = trainer.parse_args(train_args(model, pictures, "unused", **flags))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=autocast,
        distributed_type=DistributedType.NO,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        local_main_process_first=contextlib.nullcontext,
        scaler=None,
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    )
    pipeline = trainer.read_pipeline_info(args, accelerator)
    lora = trainer.read_lora_settings(args, pipeline.transformer_config)
    return trainer.Run(args, accelerator, pipeline, seed=0, weight_dtype=dtype, lora=lora)


def prepare(run, compiled=False):
    """The transformer as the trainer prepares it, and its LoRA's parameters, B random so that A has a gradient too."""
    run.args.compile = compiled
    state = trainer.load_training_state(SimpleNamespace(learning_rate=1.0, max_train_steps=1), None, run)
    generator = torch.Generator().manual_seed(1)
    for parameter in state.parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return state.transformer.train(), state.parameters


def make_batch(run, bucket, tokens, seed=0, batch_size=1):
    """A micro-batch of random latents of a bucket, with random embeddings of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, *run.pipeline.latent_shape(bucket))
    width = run.pipeline.transformer_config["cap_feat_dim"]
    return trainer.MicroBatch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        sigmas=torch.rand(batch_size, generator=generator),
        weights=torch.full((batch_size,), 1 / batch_size),
        prompt_embeds=[torch.randn(tokens, width, generator=generator) for _ in range(batch_size)],
    )


def gradients(transformer, parameters, batch, run):
    """(loss, gradient of all LoRA parameters as one vector) of a micro-batch."""
    loss = trainer.training_loss(transformer, None, batch, "none", run)
    loss.backward()
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    return loss.item(), flat


def assert_compiled_as_plain(run, tolerance):
    """Losses and gradients of all buckets are those of the plain model, and something was compiled."""
    batches = [make_batch(run, bucket, tokens=20 + 40 * (i % 2), seed=i) for i, bucket in enumerate(BUCKETS)]
    plain = [gradients(*prepare(run), batch, run) for batch in batches]
    transformer, parameters = prepare(run, compiled=True)
    for batch, (loss, gradient) in zip(batches, plain, strict=True):
        compiled_loss, compiled_gradient = gradients(transformer, parameters, batch, run)
        assert compiled_loss == pytest.approx(loss, rel=0.1 * tolerance)
        assert (compiled_gradient - gradient).norm() < tolerance * gradient.norm()
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


WAYS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "fp8": {"do_fp8_training": True},
    "fp8-checkpointing": {"do_fp8_training": True, "gradient_checkpointing": True},
    "int8": {"base_model_precision": "int8"},
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_blocks_have_the_same_losses_and_gradients(way, backend, one_layer_model):
    # Where Inductor rounds another way, a number can fall to the next float8, up to an eighth away.
    tolerance = 0.03 if "fp8" in way and backend == "inductor" else 1e-4
    assert_compiled_as_plain(make_run(one_layer_model, **WAYS[way]), tolerance)


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way == "plain" else pytest.mark.slow) for way in WAYS])
def test_nothing_is_compiled_again_once_each_size_was_seen(way, backend, tiny_model):
    run = make_run(tiny_model, **WAYS[way])
    plain = prepare(run)
    transformer, parameters = prepare(run, compiled=True)
    sizes = [(bucket, tokens) for bucket in BUCKETS for tokens in (20, 50, 90)]
    for bucket, tokens in sizes:
        batch = make_batch(run, bucket, tokens)
        loss = gradients(transformer, parameters, batch, run)[0]
        assert loss == pytest.approx(gradients(*plain, batch, run)[0], rel=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 12
    for bucket, tokens in reversed(sizes):
        gradients(transformer, parameters, make_batch(run, bucket, tokens, seed=1), run)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
def test_graph_break_inside_a_block_is_an_error(backend, one_layer_model, monkeypatch):
    silu = torch.nn.functional.silu

    def breaking(x, **options):
        torch._dynamo.graph_break()
        return silu(x, **options)

    monkeypatch.setattr(torch.nn.functional, "silu", breaking)
    run = make_run(one_layer_model)
    transformer, parameters = prepare(run, compiled=True)
    with pytest.raises(Unsupported):
        gradients(transformer, parameters, make_batch(run, BUCKETS[0], 20), run)


LOGGED = {"max_train_steps": 3, "report_to": "tensorboard", "resolution": 32, "cache_latents": True, "rank": 2}


@pytest.fixture
def launched_losses(one_layer_model, photos, tmp_path):
    """Trains by `accelerate launch`, in a folder of that name; gives the losses and the libraries of Inductor."""

    def launched_losses(name, launcher_flags=None, **flags):
        arguments = train_args(one_layer_model, photos, tmp_path / name, **LOGGED, **flags)
        inductor = tmp_path / f"{name}-inductor"
        keywords = {"launcher_flags": launcher_flags} if launcher_flags else {}
        launch(*arguments, env={"TORCHINDUCTOR_CACHE_DIR": str(inductor)}, timeout=600, **keywords)
        losses = [event.value for event in events(tmp_path / name).scalars["loss"]]
        return losses, list(inductor.rglob("*.so"))

    return launched_losses


@pytest.mark.slow
def test_compile_flag_trains_with_the_same_losses(launched_losses):
    plain, nothing = launched_losses("plain")
    compiled, libraries = launched_losses("compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert libraries and not nothing


@pytest.mark.slow
def test_compile_section_of_an_accelerate_config_does_the_same(launched_losses, tmp_path):
    config = (ROOT / "configs" / "compile.yaml").read_text("utf-8")
    config = config.replace("use_cpu: false", "use_cpu: true").replace(
        "mixed_precision: bf16", "mixed_precision: 'no'"
    )
    (tmp_path / "compile.yaml").write_text(config, encoding="utf-8")
    plain, _ = launched_losses("plain")
    compiled, libraries = launched_losses("compiled", launcher_flags=[f"--config_file={tmp_path / 'compile.yaml'}"])
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert libraries
