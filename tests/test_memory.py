"""What the plan says about memory is what training then takes: weights, adapter, optimizer, activations."""

import itertools

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch.profiler import ProfilerActivity, profile

import train_dreambooth_lora_z_image as trainer
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
def test_training_takes_the_memory_that_the_plan_expects(precision, checkpointing, narrow_model):
    run = make_run(narrow_model, precision, gradient_checkpointing=checkpointing, cache_latents=True)
    transformer, parameters = prepare(run)
    optimizer = trainer.build_optimizer(parameters, run.args, 1e-4)
    batch = make_batch(run, (128, 128), tokens=60)
    gradients(transformer, parameters, batch, run)  # what torch sets up once
    peak = allocated_peak(lambda: trainer.training_loss(transformer, None, batch, "none", run).backward())
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    kept = sum(tensor.nbytes for tensor in itertools.chain(transformer.parameters(), state))

    targets = trainer.resolve_lora_layers(run.args.lora_layers, run.model.transformer_config)
    expected = trainer.expected_memory({"instance": [(128, 128)]}, targets, run)["training"]
    assert expected * 2**30 == pytest.approx(kept + peak, rel=0.1)


def test_float8_weights_take_the_memory_that_the_plan_expects(narrow_model):
    run = make_run(narrow_model, "bf16", do_fp8_training=True, gradient_checkpointing=True, cache_latents=True)
    weights = sum(parameter.nbytes for parameter in trainer.load_transformer(run).parameters())
    # The smallest LoRA takes next to nothing, and activations of 65 tokens are as the test above found.
    expected = trainer.expected_memory({"instance": [(16, 16)]}, {"to_q": {"layers.0.attention.to_q": 1}}, run)
    activations = 65 * 256 * (63 + 2 * 4 + 20)
    assert expected["training"] * 2**30 - activations == pytest.approx(weights, rel=0.05)
