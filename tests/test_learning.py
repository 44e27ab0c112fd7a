"""A LoRA of the small trained model learns its subject, and a trainer with a fault would not pass for a right one.

The scores are explained in learning.py, the faults in patched_trainer.py. `python tests/learning.py` prints the scores
of all runs as a table; `-m slow` runs the tests that are left out by default.
"""

import statistics

import pytest
import torch

from learning import (
    ASSETS,
    PROMPTS,
    RUNS,
    before_a_board,
    board_share,
    drift,
    held_out_share,
    subject_score,
    train,
)
from tiny import events


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function from a label of RUNS to the output folder of that run, which is trained once."""
    torch.set_num_threads(1)
    outputs = {}

    def output(label):
        if label not in outputs:
            outputs[label] = train(tmp_path_factory.mktemp("run") / "out", **RUNS[label])
        return outputs[label]

    return output


# Of the base model's loss on the held-out photographs; what is left is mostly the noise, which nothing can predict.
HELD_OUT_SHARE = {"striped-ball": 0.58, "cross-toy": 0.7}


def has_learned(out, name):
    """Whether the subject is there in the pictures, and in the photographs that were held out."""
    return subject_score(out, name) > 0.3 and held_out_share(out, name) < HELD_OUT_SHARE[name]


@pytest.mark.parametrize("name", ["striped-ball", pytest.param("cross-toy", marks=pytest.mark.slow)])
def test_training_teaches_the_subject(trained, name):
    assert has_learned(trained(name), name)
    other = next(prompt for prompt in PROMPTS if prompt != name)
    assert subject_score(trained(name), other) < 0.35  # the score is of this subject, not of any change


SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("time t / 1000", "no VAE shift and scale")]


@pytest.mark.parametrize("fault", ["velocity not negated", *SLOW])
def test_a_fault_is_noticed(trained, fault):
    assert not has_learned(trained(f"fault: {fault}"), "striped-ball")


@pytest.mark.slow
def test_two_subjects_are_told_apart_by_their_captions(trained):
    assert all(has_learned(trained("both at once, by their captions"), name) for name in PROMPTS)


@pytest.mark.slow
def test_exchanged_captions_are_noticed(trained):
    assert not any(has_learned(trained("fault: captions exchanged"), name) for name in PROMPTS)


@pytest.mark.slow
def test_two_processes_learn_it_too(trained):
    assert has_learned(trained("two processes"), "striped-ball")


@pytest.mark.slow
def test_bf16_lora_weights_are_noticed_at_a_small_learning_rate(trained):
    right, fault = (
        1 - held_out_share(trained(label), "striped-ball")
        for label in ("learning rate 2e-5", "fault: bf16 LoRA, learning rate 2e-5")
    )
    assert right > 0.15 > fault


@pytest.mark.slow
@pytest.mark.parametrize("label", ["8-bit AdamW", "Prodigy", "base in 8 bits", "base in NF4"])
def test_every_optimizer_and_quantized_base_learns_it(trained, label):
    assert has_learned(trained(label), "striped-ball")


@pytest.mark.slow
def test_fp8_learns_it_nearly_as_well(trained):
    fp8, full = (subject_score(trained(label), "striped-ball") for label in ("FP8", "striped-ball"))
    assert fp8 >= 0.9 * full


@pytest.mark.slow
def test_prior_preservation_lowers_drift(trained):
    with_prior, without = trained("prior preservation"), trained("striped-ball")
    assert has_learned(with_prior, "striped-ball")
    assert drift(with_prior) < 0.9 * drift(without)


@pytest.mark.slow
def test_caption_dropout_trains_the_empty_prompt_and_keeps_guidance_working(trained):
    dropped, kept = trained("caption dropout 0.2"), trained("striped-ball")
    assert held_out_share(dropped, "striped-ball", prompt="") < 0.97 * held_out_share(kept, "striped-ball", prompt="")
    assert has_learned(dropped, "striped-ball")
    unguided, guided = (subject_score(dropped, "striped-ball", guidance) for guidance in (0.0, 1.0))
    assert guided > 0.9 * unguided


@pytest.mark.slow
def test_the_held_out_loss_shows_overfitting_where_the_training_loss_goes_on_falling(tmp_path):
    out = train(
        tmp_path / "out",
        "cross-toy",
        rank=16,
        lora_alpha=16,
        learning_rate=2e-3,
        lora_layers="to_k,to_q,to_v,to_out.0,feed_forward.w1,feed_forward.w2,feed_forward.w3",
        max_train_steps=480,
        validation_data_dir=ASSETS / "subjects" / "cross-toy-heldout",
        validation_epochs=15,
        save_best=True,
        report_to="tensorboard",
    )
    scalars = events(out).scalars
    held_out = {event.step: event.value for event in scalars["held_out_loss"]}
    best = min(held_out, key=held_out.get)
    assert 30 <= best <= 240
    assert held_out[best] < 0.7 * held_out[0]
    assert statistics.fmean(value for step, value in held_out.items() if step > 360) > 1.1 * held_out[best]
    losses = [event.value for event in scalars["loss"]]
    assert statistics.fmean(losses[-120:]) < 0.9 * statistics.fmean(losses[best - 60 : best + 60])
    assert held_out_share(out / "best", "cross-toy") < held_out_share(out, "cross-toy")


@pytest.mark.slow
def test_what_a_mask_leaves_out_is_not_learned(tmp_path):
    folder = before_a_board(tmp_path / "pictures", "striped-ball")
    masked, whole = (
        train(tmp_path / label / "out", "striped-ball", instance_data_dir=folder, **flags)
        for label, flags in (("masked", {"masked_loss": True, "unmasked_weight": 0}), ("whole", {}))
    )
    assert board_share(whole, "striped-ball") > 0.3  # the squares are learned as well as the ball
    assert board_share(masked, "striped-ball") < 0.1
    assert subject_score(masked, "striped-ball") > 0.3
