"""What a checkpoint holds: the LoRA in float32, one file of tensors and plain values, and the manifest."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_dreambooth_lora_z_image as trainer
from test_compile import make_run
from tiny import train_args


OPTIMIZERS = {"AdamW": {}, "8-bit AdamW": {"use_8bit_adam": True}, "Prodigy": {"optimizer": "prodigy"}}


def make_state(model, **flags):
    """A training state of the tiny model on the CPU, at step 0."""
    run = make_run(model, **{"lr_scheduler": "cosine", "lr_warmup_steps": 2} | flags)
    plan = SimpleNamespace(learning_rate=run.args.learning_rate, max_train_steps=10)
    return trainer.load_training_state(plan, None, run)


def take_steps(state, last):
    """Updates up to step `last`, by gradients that are a function of the step."""
    while state.step < last:
        generator = torch.Generator().manual_seed(state.step)
        for parameter in state.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.lr_scheduler.step()
        state.step += 1


@pytest.mark.parametrize("flags", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_that_was_saved_and_loaded_goes_on_to_the_same_bits(flags, tiny_model, tmp_path):
    whole, first = make_state(tiny_model, **flags), make_state(tiny_model, **flags)
    take_steps(whole, 6)
    take_steps(first, 3)
    first.held_out.append([0.5, 3])
    first.save(tmp_path)
    second = make_state(tiny_model, **flags)
    second.load(tmp_path)
    assert (second.step, second.held_out) == (3, [[0.5, 3]])
    take_steps(second, 6)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters, second.parameters, strict=True))
    assert [group["lr"] for group in second.optimizer.param_groups] == whole.lr_scheduler.get_last_lr()


def test_learning_rates_of_a_resumed_run_are_those_of_its_command_line(tiny_model, tmp_path):
    first = make_state(tiny_model, learning_rate=1e-3)
    take_steps(first, 3)
    first.save(tmp_path)
    second = make_state(tiny_model, learning_rate=1e-2)
    second.load(tmp_path)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(10 * first.optimizer.param_groups[0]["lr"])


def test_a_training_state_that_holds_anything_but_plain_values_is_refused_in_one_line(tiny_model, tmp_path):
    state = make_state(tiny_model)
    state.save(tmp_path)
    torch.save(
        {"step": 3, "held_out": [], "optimizer": Path("somewhere"), "scaler": None}, tmp_path / "training_state.pt"
    )
    with pytest.raises(trainer.UserError, match="training_state.pt is not a training state of tensors") as caught:
        state.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_reads_a_training_state_but_as_plain_values(tiny_model, tmp_path, monkeypatch):
    state, asked = make_state(tiny_model), []
    state.save(tmp_path)
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options) or load(*args, **options))
    state.load(tmp_path)
    assert [options["weights_only"] for options in asked] == [True]


def test_a_checkpoint_of_the_form_before_is_refused_by_what_it_is(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    files = {name: [0, ""] for name in ("optimizer.safetensors", "pytorch_lora_weights.safetensors")}
    manifest = {"step": 3, "seed": 0, "optimizer": {}, "files": files}
    content = {"digest": trainer.digest_of(json.dumps(manifest)), **manifest}
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    args = trainer.parse_args(train_args("model", "pictures", tmp_path, resume_from_checkpoint=folder))
    with pytest.raises(trainer.UserError, match="is a checkpoint of an earlier version of this trainer"):
        trainer.find_checkpoint(args)
