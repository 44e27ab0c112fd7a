"""What a step does not do: run backward further than the LoRA goes, wait for the device, mask attention."""

from collections import Counter

import pytest
import torch

import train_dreambooth_lora_z_image as trainer
from test_compile import gradients, make_batch, make_run, prepare


LAST = "layers.1.attention.to_q"  # of the tiny model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_ends_at_the_first_block_that_has_a_lora(checkpointing, tiny_model):
    run = make_run(tiny_model, lora_layers=LAST, gradient_checkpointing=checkpointing)
    transformer, parameters = prepare(run)
    passes = Counter()
    for number, block in enumerate(trainer.transformer_blocks(transformer)):
        block.feed_forward.register_forward_hook(
            lambda module, inputs, output, number=number: passes.update([number, (number, output.requires_grad)])
        )
    loss, gradient = gradients(transformer, parameters, make_batch(run, (64, 64), tokens=5), run)
    assert gradient.any()
    assert [passes[number] for number in range(4)] == [1, 1, 1, 2 if checkpointing else 1]
    assert [passes[number, True] > 0 for number in range(4)] == [False, False, False, True]


def test_a_recomputed_block_has_the_gradient_of_one_that_keeps_everything(tiny_model):
    found = []
    for flags in ({}, {"gradient_checkpointing": True}):
        run = make_run(tiny_model, lora_layers=LAST, **flags)
        found.append(gradients(*prepare(run), make_batch(run, (64, 64), tokens=5), run))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def make_state(run):
    transformer, parameters = prepare(run)
    optimizer = trainer.build_optimizer(parameters, run.args, 1e-4)
    lr_scheduler, scaler = trainer.get_scheduler("constant", optimizer), torch.amp.GradScaler(enabled=False)
    run.accelerator.backward = torch.Tensor.backward
    run.accelerator.unscale_gradients = lambda optimizer: None
    return trainer.TrainingState(transformer, parameters, optimizer, lr_scheduler, scaler)


def do_update(state, run, number_of_batches=2):
    batches = [make_batch(run, (64, 64), tokens=5, seed=seed) for seed in range(number_of_batches)]
    loss = trainer.accumulate_gradients(state, None, batches, run)
    return trainer.apply_gradients(state, loss, False, run)


WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}, {"lora_dropout": 0.1}])
def test_an_update_waits_for_the_device_once(flags, tiny_model, monkeypatch):
    run = make_run(tiny_model, **flags)
    state, waits = make_state(run), Counter()
    do_update(state, run)  # the optimizer's state is made
    for name in WAITS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, n=name, o=original: waits.update([n]) or o(self, *args)
        )
    do_update(state, run)
    assert state.step == 2 and waits == {"tolist": 1}


def test_a_lora_without_gradient_is_an_error_that_names_the_attention_backend(tiny_model, monkeypatch):
    """As with kernels that have no backward pass, and whose output hangs together with nothing."""
    run = make_run(tiny_model, attention_backend="native")
    state, attention = make_state(run), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: attention(*args, **options).detach(),
    )
    with pytest.raises(trainer.TrainingError, match="attention backend native"):
        do_update(state, run)
    assert trainer.accumulate_gradients(state, None, [], run) == 0  # a process that has no sample is none


def test_prompts_of_different_lengths_are_drawn_without_a_mask_and_as_with_one(tiny_model):
    run = make_run(tiny_model, resolution=64)
    transformer = prepare(run)[0].eval()
    masks = []
    for block in trainer.transformer_blocks(transformer):
        block.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1]))
    generator, width = torch.Generator().manual_seed(0), run.pipeline.transformer_config["cap_feat_dim"]
    latents = list(torch.randn(2, 16, 1, 8, 8, generator=generator).unbind(0))
    embeds = [torch.randn(tokens, width, generator=generator) for tokens in (5, 70)]
    times = torch.tensor([0.3, 0.3])
    with torch.no_grad():
        padded = transformer(latents, times, embeds, return_dict=False)[0]
        assert any(mask is not None for mask in masks)
        masks.clear()
        one_by_one = trainer.OnePromptAtATime(transformer)(latents, times, embeds, return_dict=False)[0]
    assert masks and all(mask is None for mask in masks)
    for one, other in zip(one_by_one, padded, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
