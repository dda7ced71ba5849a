"""The noise loss: the mean square error of the prediction, epsilon or v as the base's scheduler says."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fastory.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")


class Denoising:
    """Noise of the base's schedule, and the prediction that is wanted for it."""

    def __init__(self, scheduler_config: object) -> None:
        """scheduler_config: of the base. Raises InputError for a kind of prediction that is not trained here."""
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.prediction = self.scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise InputError(f"the base predicts {self.prediction!r}; wanted one of {', '.join(PREDICTIONS)}")

    def alphas_cumprod(self, like: Tensor, timesteps: Tensor) -> Tensor:
        """a^2 of the steps (R,), in the type and on the device of `like`."""
        return self.scheduler.alphas_cumprod.to(like)[timesteps]

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = a x0 + s n of latents and noise (R, c, h, w) at the steps (R,)."""
        made: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return made

    def wanted(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction (R, c, h, w) that is right: the noise, or v = a n - s x0."""
        if self.prediction == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def picture_errors(self, errors: Tensor, timesteps: Tensor) -> Tensor:
        """Errors of a prediction (R, c, h, w) as errors of the latents that it amounts to."""
        alphas = self.alphas_cumprod(errors, timesteps).view(-1, 1, 1, 1)
        noise = (1 - alphas).sqrt()
        return -errors * (noise if self.prediction == "v_prediction" else noise / alphas.sqrt())


def mean_square(errors: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """The loss of errors (R, c, h, w). weight: of the rows (R, 1, 1, 1), or of all."""
    return torch.mean(weight * errors.square())
