"""What the plan says about memory is what training then takes: weights, adapter, optimizer, activations."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import ZImageTransformer2DModel
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from torch.profiler import ProfilerActivity, profile

import train_dreambooth_lora_z_image as trainer
from running import ROOT
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


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """What Python and its libraries take by themselves, in bytes: the plan adds it on the CPU. No gaps in the heap."""
    monkeypatch.setattr(trainer, "HEAP_GAPS", (0, 0))
    taken = SimpleNamespace(rss=2**28)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: taken)
    return taken.rss


def pictures_of(bucket):
    """One picture to train on, of that size."""
    return {"instance": [trainer.Example("instance", "a dog", Path("dog.png"), "a dog", bucket, bucket, 1)]}


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
def test_training_takes_the_memory_that_the_plan_expects(precision, checkpointing, narrow_model, libraries):
    run = make_run(narrow_model, precision, gradient_checkpointing=checkpointing, cache_latents=True)
    transformer, parameters = prepare(run)
    optimizer = trainer.build_optimizer(parameters, run.args, 1e-4)
    batch = make_batch(run, (128, 128), tokens=60)
    gradients(transformer, parameters, batch, run)  # what torch sets up once
    peak = allocated_peak(lambda: trainer.training_loss(transformer, None, batch, "none", run).backward())
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    kept = sum(tensor.nbytes for tensor in itertools.chain(transformer.parameters(), state))

    expected = trainer.expected_memory(pictures_of((128, 128)), run)["training"]
    assert expected * 2**30 - libraries == pytest.approx(kept + peak, rel=0.1)


SMALLEST = {"cache_latents": True, "lora_layers": "layers.0.attention.to_q", "rank": 1}


def test_float8_weights_take_the_memory_that_the_plan_expects(narrow_model, libraries):
    run = make_run(narrow_model, "bf16", do_fp8_training=True, gradient_checkpointing=True, **SMALLEST)
    weights = sum(parameter.nbytes for parameter in trainer.load_transformer(run).parameters())
    # The smallest LoRA takes next to nothing, and activations of 65 tokens are as the test above found.
    expected = trainer.expected_memory(pictures_of((16, 16)), run)
    activations = 65 * 256 * (63 + 2 * 4 + 20)
    assert expected["training"] * 2**30 - activations - libraries == pytest.approx(weights, rel=0.05)


def test_nf4_weights_take_the_memory_that_the_plan_expects(narrow_model, monkeypatch, libraries):
    # diffusers asks for a GPU, bitsandbytes does not
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: device_map)
    nf4 = ROOT / "configs" / "nf4.json"
    run = make_run(narrow_model, "bf16", bnb_quantization_config_path=nf4, gradient_checkpointing=True, **SMALLEST)

    transformer = trainer.load_transformer(run)
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    for parameter in transformer.parameters():
        if state := getattr(parameter, "quant_state", None):
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    expected = trainer.expected_memory(pictures_of((16, 16)), run)
    activations = 65 * 256 * (63 + 2 * 4 + 20)
    assert expected["training"] * 2**30 - activations - libraries == pytest.approx(weights, rel=0.05)


def test_offloaded_text_encoder_visits_the_device_a_layer_at_a_time(tiny_model, monkeypatch):
    load, linear = trainer.load_text_pipeline, torch.nn.functional.linear
    encoder, most = [], [0]

    def remember(*args):
        pipeline = load(*args)
        encoder[:] = [pipeline.text_encoder]
        return pipeline

    def count_weights(*args):
        here = sum(parameter.numel() for parameter in encoder[0].parameters() if not parameter.is_meta)
        most[0] = max(most[0], here)
        return linear(*args)

    monkeypatch.setattr(trainer, "load_text_pipeline", remember)
    monkeypatch.setattr(torch.nn.functional, "linear", count_weights)
    embeds, weights = [], []
    for flags in ({}, {"offload": True}):
        run = make_run(tiny_model, **flags)
        most[0] = 0
        embeds.append(trainer.encode_prompts(["a photo of sks dog"], run)["a photo of sks dog"])
        weights.append(most[0])
    assert torch.equal(*embeds)
    sizes = trainer.count_parameters(run.pipeline)
    assert weights[0] == sizes["text encoder"]
    assert 0 < weights[1] <= sizes["text layer"] < sizes["text encoder"] / 2


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
    for recompute in ({}, {"on_host": False}, {"on_host": True}):
        transformer, parameters = prepare(run)
        if recompute:
            trainer.checkpoint_blocks(transformer, 1.0, reentrant, **recompute)
        results.append(gradients(transformer, parameters, batch, run))
        assert bool(waiting) is recompute.get("on_host", False)
    assert len({loss for loss, _ in results}) == 1
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][1], results[2][1])
    tokens = [shape[1] for shape in waiting if len(shape) == 3 and shape[2] == width]
    assert sorted(tokens) == [32, 32, 64, 64]  # of the picture, the caption, and both in two layers


def test_the_vae_takes_pictures_one_at_a_time(tiny_model):
    run = make_run(tiny_model)
    vae, batches = trainer.load_vae(run), []
    for name in ("encode", "decode"):
        whole = getattr(vae, name)
        setattr(vae, name, lambda x, whole=whole, **options: batches.append(len(x)) or whole(x, **options))
    pixels = torch.rand(3, 3, 64, 48) * 2 - 1
    latents = trainer.encode_images(vae, pixels, run)
    assert latents.shape == (3, *run.pipeline.latent_shape((64, 48)))
    assert trainer.decode_latents(vae, latents, run).shape == pixels.shape
    assert batches == [1] * 6


def sharded_run(model, **flags):
    """A run of four processes over which an accelerate config with activation checkpointing shards the model."""
    run = make_run(model, **flags)
    run.accelerator.distributed_type, run.accelerator.num_processes = DistributedType.FSDP, 4
    run.accelerator.state.fsdp_plugin = SimpleNamespace(activation_checkpointing=True)
    return run


def test_the_plan_counts_what_a_sharded_process_has(narrow_model):
    whole, shared = make_run(narrow_model, gradient_checkpointing=True), sharded_run(narrow_model)
    plans = [trainer.expected_memory(pictures_of((64, 64)), run)["training"] for run in (whole, shared)]
    weights = 4 * trainer.count_parameters(whole.pipeline)["transformer"]
    assert (plans[0] - plans[1]) * 2**30 == pytest.approx(weights * 3 / 4)


def test_the_plan_counts_pictures_that_are_drawn(narrow_model):
    stages = []
    for flags in ({}, {"validation_prompt": "a dog"}, {"final_validation_prompt": "a dog"}):
        run = make_run(narrow_model, **{"skip_final_inference": False, **flags})
        stages.append(trainer.expected_memory(pictures_of((64, 64)), run))
    assert ["pictures" in plan for plan in stages] == [False, True, True]
    assert stages[1]["pictures"] > stages[1]["VAE"]
