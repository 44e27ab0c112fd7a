"""The objective is that of rectified flow, in the conventions of `ZImagePipeline`: sign, time, shift and scale."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image

import train_dreambooth_lora_z_image as trainer
from test_compile import make_run


SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


def shifted(levels, shift):
    """The noise levels that a scheduler of that shift makes of even ones."""
    return shift * levels / (1 + (shift - 1) * levels)


@pytest.fixture
def scheduler():
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    pipeline = ZImagePipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def run(tiny_model):
    return make_run(tiny_model)


@pytest.fixture
def pixels(photos):
    """A photograph as the trainer hands it to the VAE, [1, 3, 32, 48]."""
    image = trainer.decode_image("coffee", photos / "coffee.jpg")
    return trainer.fit_to_bucket(image, (32, 48), crop=(0.5, 0.5), flip=False)[None]


def exact_field(latents):
    """A transformer's forward whose velocity leads straight to these latents [C, h, w], whatever the prompt.

    On the line from noise to x_0 the velocity is (x_sigma - x_0) / sigma. The model is given 1 - sigma, and gives the
    negated velocity.
    """

    def forward(x, t, cap_feats, return_dict=True, **unused):
        assert not return_dict
        assert len(x) == len(t) == len(cap_feats)
        return ([-(noisy - latents[:, None]) / (1 - time) for noisy, time in zip(x, t, strict=True)],)

    return forward


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_pipeline_reproduces_the_picture_whose_velocity_field_the_trainer_encodes(
    pipeline, pixels, run, guidance_scale, monkeypatch
):
    latents = trainer.encode_images(pipeline.vae, pixels, run)
    monkeypatch.setattr(pipeline.transformer, "forward", exact_field(latents[0]))
    decoded = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, **kwargs: decoded.append(z) or decode(z, **kwargs))
    image = pipeline("a prompt", 32, 48, 9, guidance_scale=guidance_scale, output_type="np").images[0]
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode()
        picture = decode(expected).sample[0].permute(1, 2, 0) / 2 + 0.5
    torch.testing.assert_close(decoded[0], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(image, picture.clamp(0, 1).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("source", ["pixels", "latents"])
def test_loss_is_zero_on_the_exact_velocity_field(pipeline, scheduler, pixels, run, source):
    latents = trainer.encode_images(pipeline.vae, pixels, run)
    sigmas = trainer.training_sigmas(scheduler)[::10]
    number = len(sigmas)
    noise = torch.randn(number, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    picture = {source: (pixels if source == "pixels" else latents).expand(number, -1, -1, -1)}
    batch = trainer.MicroBatch(noise, sigmas, torch.ones(number), [torch.zeros(1, 32)] * number, **picture)
    loss = trainer.training_loss(exact_field(latents[0]), pipeline.vae, batch, "none", run)
    assert loss.item() / number < 1e-7
    loss_of_another = trainer.training_loss(exact_field(latents[0] + 0.1), pipeline.vae, batch, "none", run)
    assert loss_of_another.item() / number > 1e-2


def test_velocity_is_what_the_scheduler_steps_along(pipeline, scheduler):
    """One step of the scheduler from sigma to the next takes x_sigma along the line from noise to data."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 16, 4, 4, generator=generator)
    scheduler.set_timesteps(8)
    for timestep, sigma, following in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:]):
        noisy = (1 - sigma) * latents + sigma * noise
        prompt_embeds = [torch.zeros(1, 32)]
        velocity = trainer.predict_velocity(
            exact_field(latents[0]), noisy, sigma[None], prompt_embeds, dtype=torch.float32
        )
        assert trainer.flow_matching_loss(velocity, latents, noise, sigma[None], "none").item() < 1e-7
        stepped = scheduler.step(velocity, timestep, noisy).prev_sample
        torch.testing.assert_close(stepped, (1 - following) * latents + following * noise, rtol=0, atol=1e-4)


def test_times_and_samples_reach_the_model_as_from_the_pipeline(pipeline, monkeypatch):
    """The same noise, level and prompt: the arguments of the trainer's call are those of the pipeline's first."""
    calls = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer,
        "forward",
        lambda x, t, feats, **kw: calls.append((x, t, feats)) or forward(x, t, feats, **kw),
    )
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(["a prompt", "另一个"], do_classifier_free_guidance=False)
        noise = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
        pipeline(
            prompt_embeds=embeds, height=32, width=48, num_inference_steps=3, guidance_scale=0.0, latents=noise,
            output_type="latent",
        )  # fmt: skip
        first = pipeline.scheduler.sigmas[:1].expand(2)
        trainer.predict_velocity(pipeline.transformer, noise, first, embeds, torch.float32)
    for ours, theirs in zip(calls[-1], calls[0], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loss_is_the_weighted_mean_square_of_the_velocity_error(scheme, scheduler):
    generator = torch.Generator().manual_seed(0)
    velocity, latents, noise = torch.randn(3, 5, 16, 4, 6, generator=generator)
    sigmas = trainer.training_sigmas(scheduler)[[0, 3, 250, 700, 999]]
    losses = trainer.flow_matching_loss(velocity, latents, noise, sigmas, scheme)

    velocity, latents, noise, s = (tensor.double().numpy() for tensor in (velocity, latents, noise, sigmas))
    weights = {"sigma_sqrt": s**-2, "cosmap": 2 / (math.pi * (1 - 2 * s + 2 * s**2))}.get(scheme, np.ones(5))
    expected = weights * ((velocity - (noise - latents)) ** 2).mean(axis=(1, 2, 3))
    assert losses.shape == (5,)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_pixels_are_scaled_as_the_pipelines_image_processor_scales_them(pipeline, tmp_path):
    values = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(values).save(tmp_path / "picture.png")
    image = trainer.decode_image("picture", tmp_path / "picture.png")
    ours = trainer.fit_to_bucket(image, (32, 32), crop=(0.0, 0.0), flip=False)
    torch.testing.assert_close(ours, pipeline.image_processor.preprocess(Image.fromarray(values))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels
# ---------------------------------------------------------------------------------------------------------------------


def test_training_sigmas_are_the_schedulers_own(scheduler):
    sigmas = trainer.training_sigmas(scheduler)
    np.testing.assert_allclose(sigmas.numpy(), shifted(np.arange(1, 1001) / 1000, 6.0), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_timestep_shift_takes_the_place_of_the_schedulers(scheduler, shift):
    before = scheduler.sigmas.clone()
    sigmas = trainer.training_sigmas(scheduler, shift)
    np.testing.assert_allclose(sigmas.numpy(), shifted(np.arange(1, 1001) / 1000, shift), rtol=1e-5)
    assert torch.equal(scheduler.sigmas, before)
    assert scheduler.shift == 6.0


def draws(scheme, number=4000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29):
    """Noise levels as training draws them, before the shift."""
    args = SimpleNamespace(weighting_scheme=scheme, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale)
    even = torch.arange(1, 1001) / 1000
    generator = torch.Generator().manual_seed(0)
    return torch.stack([trainer.sample_sigma(even, args, generator) for _ in range(number)]).double().numpy()


def normal_quantile(q):
    return math.sqrt(2) * torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64)).item()


QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9]


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_schemes_that_weigh_the_loss_draw_evenly(scheme):
    np.testing.assert_allclose(np.quantile(draws(scheme), QUANTILES), QUANTILES, atol=0.03)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.5)])
def test_logit_normal_has_its_quantiles_and_a_positive_mean_gives_more_noise(mean, std):
    expected = [1 / (1 + math.exp(-(mean + std * normal_quantile(q)))) for q in QUANTILES]
    found = draws("logit_normal", logit_mean=mean, logit_std=std)
    np.testing.assert_allclose(np.quantile(found, QUANTILES), expected, atol=0.03)
    assert np.sign(round(found.mean() - 0.5, 1)) == np.sign(mean)


def test_mode_has_the_density_of_the_paper():
    """Its inverse distribution: f(u) = 1 - u - s (cos(pi u / 2)^2 - 1 + u), u even."""
    u = np.linspace(0, 1, 10001)
    expected = np.quantile(1 - u - 1.29 * (np.cos(math.pi * u / 2) ** 2 - 1 + u), QUANTILES)
    np.testing.assert_allclose(np.quantile(draws("mode"), QUANTILES), expected, atol=0.03)


def test_every_noise_level_can_be_drawn_and_no_other():
    found = draws("none", number=10000)
    levels = {float(level) for level in (torch.arange(1, 1001) / 1000).double()}
    assert set(found) <= levels
    assert len(set(found)) > 990
