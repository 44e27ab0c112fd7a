"""What the plan says about memory is what training then takes: weights, adapter, optimizer, activations."""

import dataclasses
import gc
import itertools
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import ZImageTransformer2DModel
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import train_dreambooth_lora_z_image as trainer
from patched_trainer import bitsandbytes_on_cpu
from test_compile import gradients, make_batch, make_run, prepare
from tiny import build_tiny_pipeline


@pytest.fixture(scope="module")
def narrow_model(tmp_path_factory):
    """The tiny pipeline with a transformer whose proportions are those of the real one, of 256 channels."""
    folder = build_tiny_pipeline(tmp_path_factory.mktemp("model") / "narrow")
    torch.manual_seed(0)
    ZImageTransformer2DModel(
        dim=256, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32
    ).save_pretrained(folder / "transformer")
    return folder


def count(run, size=(128, 128), held_out=False, **options):
    """What is counted for a run on one picture of that size, with a caption of 64 tokens."""
    return trainer.count_memory(make_plan(run, size, held_out), run, **options)


def make_plan(run, size=(128, 128), held_out=False):
    """The plan of a run on one picture of that size, with a caption of 64 tokens."""
    example = trainer.Example("instance", "a", Path("a.png"), "a", size, size, 1)
    examples = {"instance": [example]} | ({"class": []} if run.args.with_prior_preservation else {})
    examples |= {"held-out": [dataclasses.replace(example, kind="held-out")]} if held_out else {}
    return trainer.TrainingPlan(examples, dict.fromkeys(["a", "", "a class"], [0] * 64), run)


def allocated_peak(function):
    """The most bytes that a call has allocated at once, on top of what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            events.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    _, first_total, first_size = min(events)
    return max(total for _, total, _ in events) - (first_total - first_size)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_training_takes_the_memory_that_is_counted(precision, checkpointing, narrow_model):
    run = make_run(narrow_model, precision, gradient_checkpointing=checkpointing, cache_latents=True)
    transformer, parameters = prepare(run)
    optimizer = trainer.build_optimizer(parameters, run.args, 1e-4)
    batch = make_batch(run, (128, 128), tokens=60)
    gradients(transformer, parameters, batch, run)  # what torch sets up once
    peak = allocated_peak(lambda: trainer.training_loss(transformer, None, batch, "none", run).backward())
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    kept = sum(tensor.nbytes for tensor in itertools.chain(transformer.parameters(), state))
    assert count(run)["training"] == pytest.approx(kept + peak, rel=0.05)


@pytest.mark.parametrize(
    ("fraction", "lora_layers"),
    [(0.0, "to_q,to_out.0"), (0.4, "layers.3,layers.4"), (1.0, "layers.1,t_embedder.mlp.0")],
)
def test_blocks_between_the_ends_are_counted_as_if_they_computed(fraction, lora_layers, tmp_path, monkeypatch):
    folder = build_tiny_pipeline(tmp_path / "deep")
    ZImageTransformer2DModel(
        dim=64, n_layers=6, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 12, 12]
    ).save_pretrained(folder / "transformer")
    run = make_run(folder, "bf16", cache_latents=True, lora_layers=lora_layers)
    run = dataclasses.replace(run, fraction=fraction)
    shortened = count(run, training_alone=True)
    monkeypatch.setattr(trainer, "compute_ends", lambda blocks: None)
    assert shortened == pytest.approx(count(run, training_alone=True), rel=1e-3)


def weights_of(module):
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def counted_weights(run):
    """The bytes of the frozen transformer, as they are counted."""
    with trainer.MemoryCounter() as counter:
        transformer = trainer.load_transformer(trainer.counted_run(run))
        assert transformer.device == trainer.COUNTED
        return counter.live


@pytest.mark.parametrize("precision", [None, "int8", "fp8", "nf4"])
def test_weights_take_the_memory_that_is_counted(precision, narrow_model, monkeypatch):
    # diffusers asks for a GPU, bitsandbytes does not
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: device_map)
    run = make_run(narrow_model, "bf16", base_model_precision=precision)
    weights = 0
    for tensor in weights_of(trainer.load_transformer(run)):
        parts = (
            [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            if hasattr(tensor, "__tensor_flatten__")
            else [tensor]
        )
        weights += sum(part.nbytes for part in parts)
        if state := getattr(tensor, "quant_state", None):
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    assert counted_weights(run) == pytest.approx(weights, rel=0.03)


def test_offloaded_text_encoder_visits_the_device_a_layer_at_a_time(tiny_model, monkeypatch):
    load, linear = trainer.PipelineInfo.load, torch.nn.functional.linear
    encoder, most = [], [0]

    def remember(*args, **options):
        component = load(*args, **options)
        encoder[:] = [component]  # the text encoder comes last
        return component

    def count_weights(*args):
        here = sum(parameter.numel() for parameter in encoder[0].parameters() if not parameter.is_meta)
        most[0] = max(most[0], here)
        return linear(*args)

    monkeypatch.setattr(trainer.PipelineInfo, "load", remember)
    monkeypatch.setattr(torch.nn.functional, "linear", count_weights)
    embeds, weights = [], []
    for flags in ({}, {"offload": True}):
        run = make_run(tiny_model, **flags)
        most[0] = 0
        embeds.append(trainer.encode_prompts({"a dog": [0] * 13}, run)["a dog"])
        weights.append(most[0])
    assert torch.equal(*embeds)
    assert 0 < weights[1] < weights[0] / 2
    with_offload, without = (
        count(make_run(tiny_model, plan_for=1, dry_run=True, offload=offload))["text encoder"]
        for offload in (True, False)
    )
    assert with_offload < 0.7 * without


@pytest.mark.parametrize(
    ("flag", "recomputed"), [(False, []), (True, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (0.5, [1, 3]), (0.25, [3])]
)
def test_the_flag_has_a_fraction_of_the_blocks_recomputed(flag, recomputed, tiny_model):
    run = make_run(tiny_model, gradient_checkpointing=flag)
    transformer, parameters = prepare(run)
    blocks, passes = trainer.transformer_blocks(transformer), Counter()
    for number, block in enumerate(blocks):
        block.feed_forward.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    gradients(transformer, parameters, make_batch(run, (64, 64), tokens=5), run)
    assert [number for number in range(len(blocks)) if passes[number] == 2] == recomputed


@pytest.mark.parametrize("reentrant", [False, True])
def test_inputs_of_recomputed_blocks_can_wait_on_the_host(reentrant, tiny_model, monkeypatch):
    """With the gradients of blocks that keep everything; what waits is what each starts from, not what is inside."""
    run = make_run(tiny_model)
    batch, width = make_batch(run, (64, 64), tokens=5), run.pipeline.transformer_config["dim"]
    save_on_cpu, waiting, results = torch.autograd.graph.save_on_cpu, [], []

    def recorded(**options):
        hooks = save_on_cpu(**options)
        to_host = hooks.pack_hook
        hooks.pack_hook = lambda tensor: waiting.append(tuple(tensor.shape)) or to_host(tensor)
        return hooks

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", recorded)
    for on_host in (None, False, True):
        transformer, parameters = prepare(run)
        if on_host is not None:
            run.args.offload, gpu = on_host, SimpleNamespace(device=torch.device("cuda"))
            ways = {"checkpointed_fraction": 1.0, "sharded": not reentrant, "args": run.args, "accelerator": gpu}
            trainer.checkpoint_blocks(transformer, SimpleNamespace(**ways))
        results.append(gradients(transformer, parameters, batch, run))
        assert bool(waiting) is bool(on_host)
    assert len({loss for loss, _ in results}) == 1
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][1], results[2][1])
    tokens = [shape[1] for shape in waiting if len(shape) == 3 and shape[2] == width]
    assert sorted(tokens) == [32, 32, 64, 64]  # of the picture, the caption, and both in two layers


def test_the_vae_takes_pictures_one_at_a_time(tiny_model, monkeypatch):
    run = make_run(tiny_model)
    vae, batches = trainer.load_vae(run), []
    for name in ("encode", "decode"):
        whole = getattr(vae, name)
        setattr(vae, name, lambda x, whole=whole, **options: batches.append(len(x)) or whole(x, **options))
    pixels = torch.rand(3, 3, 64, 48) * 2 - 1
    latents = trainer.encode_images(vae, pixels, run)
    assert latents.shape == (3, *run.pipeline.latent_shape((64, 48)))
    monkeypatch.setattr(trainer, "load_vae", lambda run: vae)
    assert [picture.size for picture in trainer.decode_latents(list(latents), run)] == [(48, 64)] * 3
    assert batches == [1] * 6


def sharded_run(model, **flags):
    """A run of four processes over which an accelerate config with activation checkpointing shards the model."""
    run = make_run(model, **flags)
    run.accelerator.distributed_type, run.accelerator.num_processes = DistributedType.FSDP, 4
    run.accelerator.state.fsdp_plugin = SimpleNamespace(activation_checkpointing=True)
    return run


def test_a_sharded_process_has_its_part_of_the_weights(narrow_model):
    whole, shared = make_run(narrow_model, gradient_checkpointing=True), sharded_run(narrow_model)
    plans = [count(run)["training"] for run in (whole, shared)]
    weights = counted_weights(whole)
    gathered = 2 * weights / 5  # two of five blocks
    assert plans[0] - plans[1] == pytest.approx(weights * 3 / 4 - gathered, rel=0.01)


def test_every_stage_of_the_run_is_counted(tiny_model):
    assert list(count(make_run(tiny_model, cache_latents=True), (64, 64))) == ["text encoder", "VAE", "training"]
    flags = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a class"}
    run = make_run(tiny_model, cache_latents=True, validation_prompt="a", num_class_images=1, **flags)
    counted = count(run, (64, 64), held_out=True)
    assert {*counted} == {"text encoder", "VAE", "class pictures", "training", "held out", "pictures"}
    assert counted["pictures"] > counted["VAE"]


def test_another_validation_model_takes_the_place_of_the_one_in_training(narrow_model):
    pictures = [
        count(make_run(narrow_model, validation_prompt="a", **flags), (64, 64))["pictures"]
        for flags in ({"cache_latents": True}, {"cache_latents": True, "validation_model_path": narrow_model})
    ]
    assert pictures[1] == pytest.approx(pictures[0], rel=0.05)


def test_memory_is_counted_where_another_mode_is_active_and_leaves_no_trace(tiny_model):
    run, state = make_run(tiny_model, cache_latents=True), torch.get_rng_state()
    plain = count(run)
    with FakeTensorMode():
        assert count(run) == plain
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_quantized_after_its_memory_was_counted(tiny_model, monkeypatch):
    bitsandbytes_on_cpu(monkeypatch.setattr)
    run = make_run(tiny_model, "bf16", cache_latents=True, base_model_precision="nf4")
    bitsandbytes.functional.name2qmap.clear()  # as in a new process
    count(run)
    layers = [m for m in trainer.load_transformer(run).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {type(layer.weight.quant_state.absmax) for layer in layers} == {torch.Tensor}


def test_auto_recomputes_as_few_blocks_as_fit(narrow_model, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "gather_object", lambda items: items)
    caplog.set_level("INFO", trainer.logger.name)
    run = make_run(narrow_model, gradient_checkpointing="auto", cache_latents=True)

    def counted(fraction):
        other = dataclasses.replace(run, fraction=fraction)
        return count(other, training_alone=True)["training"]

    for wanted in (0.0, 0.4, 1.0):
        room = counted(wanted + 0.001 * (wanted == 0.4)) + 1
        monkeypatch.setattr(trainer, "room_for_tensors", lambda run, room=room: room)
        assert trainer.choose_fraction(make_plan(run), run) == pytest.approx(wanted, abs=0.01)
        assert f"{round(5 * wanted)} of 5 blocks" in caplog.messages[-1]


def test_what_does_not_fit_is_said_with_flags_that_would(narrow_model, monkeypatch, caplog):
    run = make_run(narrow_model, "bf16", cache_latents=True, dry_run=True)
    counted = count(run)
    recomputed = count(dataclasses.replace(run, fraction=1.0))["training"]
    monkeypatch.setattr(trainer, "room_for_tensors", lambda run: 1.01 * recomputed)
    trainer.plan_memory(make_plan(run), run)
    (line,) = [message for message in caplog.messages if message.startswith("Memory: ")]
    assert line.startswith(f"Memory: training needs {counted['training'] / 2**30:.1f} GiB")
    assert "These would fit: " in line and "--gradient_checkpointing (" in line and "--cache_latents" not in line


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "cublas"])
def test_a_stage_that_runs_out_of_memory_says_what_was_planned_and_what_would_fit(error, tiny_model, monkeypatch):
    run = make_run(tiny_model, cache_latents=True)
    monkeypatch.setattr(trainer, "count_memory", lambda *_: {"training": 2.0**29})
    line = (
        r"^out of memory in training: 3.0 GiB were planned, [\d.]+ were free .*fit: --gradient_checkpointing \(0.5 GiB"
    )
    with (
        pytest.raises(trainer.TrainingError, match=line),
        trainer.out_of_memory_said("training", {"training": 3 * 2**30}, make_plan(run), run),
    ):
        raise error


def test_a_stage_leaves_no_model_behind_that_is_in_a_cycle(tiny_model):
    gc.disable()
    try:
        with trainer.out_of_memory_said("VAE", {}, None, make_run(tiny_model)):
            model = torch.nn.Linear(1, 1)
            model.weight.module, model = model, weakref.ref(model)  # as in layers of bitsandbytes
            assert model() is not None
        assert model() is None
    finally:
        gc.enable()


def test_another_error_in_a_stage_stays_what_it_is(tiny_model):
    with (
        pytest.raises(RuntimeError, match="^shapes$"),
        trainer.out_of_memory_said("VAE", {}, None, make_run(tiny_model)),
    ):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "cublas"])
def test_a_picture_that_does_not_fit_is_decoded_in_tiles_once(error, tiny_model, monkeypatch, caplog):
    run, decode, tiled = make_run(tiny_model), trainer.AutoencoderKL.decode, []

    def fail_whole(vae, latents, **options):
        tiled.append(vae.use_tiling)
        if not vae.use_tiling:
            raise error
        return decode(vae, latents, **options)

    monkeypatch.setattr(trainer.AutoencoderKL, "decode", fail_whole)
    latents = [torch.zeros(run.pipeline.latent_shape((64, 48)))] * 2
    assert [picture.size for picture in trainer.decode_latents(latents, run)] == [(48, 64)] * 2
    assert tiled == [False, True, True]
    assert sum("decoded in tiles" in message for message in caplog.messages) == 1


def test_free_memory_is_that_of_the_device_whichever_it_is(tiny_model, monkeypatch):
    run = make_run(tiny_model)
    run.accelerator.device = torch.device("xpu", 0)
    module = SimpleNamespace(mem_get_info=lambda device: (5e9, 9e9), memory_reserved=lambda device: 1e9)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert trainer.room_for_tensors(run) == pytest.approx(6e9 / 1.08)


def test_a_plan_for_a_card_that_is_not_here_is_a_dry_run(tiny_model):
    with pytest.raises(trainer.UserError, match="--dry_run"):
        make_run(tiny_model, plan_for=8)
    rooms = [trainer.room_for_tensors(make_run(tiny_model, plan_for=size, dry_run=True)) for size in (8, 24)]
    assert rooms[1] - rooms[0] == pytest.approx(16 * trainer.GIB / trainer.FRAGMENTATION)
