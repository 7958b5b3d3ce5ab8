"""The training objective: how latents are made noisy, what the denoiser shall predict, and what its errors count."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_adapters.errors import RequestError, UnsupportedError

from .families import family_of
from .noise import LEVEL, NOISE, OFFSET, Numbers, normal, uniform

if TYPE_CHECKING:
    from ..recipes import Diffusion


class Noised(NamedTuple):
    """A batch as the denoiser is trained on it.

    Attributes:
        noisy: latents with noise (B, C, h, w) float32.
        timesteps: (B,) int64 of a noise schedule, float32 of flow matching.
        target: what the denoiser shall predict (B, C, h, w) float32.
        weight: of each image's loss (B,) float32.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


class Objective(ABC):
    """What `objective_of` returns; a subclass for noise schedules and one for flow matching.

    Attributes:
        prediction: "epsilon", "v_prediction", "sample" or "flow".
        density: how timesteps are drawn: "uniform", "logit_normal" or "shifted".
        scheduler_changes: what a scheduler must be told so that inference does what was trained; see `for_inference`.
    """

    def __init__(self, diffusion: Diffusion, prediction: str, density: str) -> None:
        self.diffusion, self.prediction, self.density = diffusion, prediction, density
        self.scheduler_changes: dict[str, Any] = {}

    def noised(self, latents: Tensor, numbers: Sequence[Numbers]) -> Noised:
        """Return latents with noise at drawn levels; all that is drawn follows from the numbers.

        Args:
            latents: (B, C, h, w), as `Family.sample` returns them.
            numbers: for each image, see `noise.Numbers`.
        """
        return self.noised_at(latents, self.levels(latents, numbers), numbers)

    def levels(self, latents: Tensor, numbers: Sequence[Numbers]) -> Tensor:
        """Return where between image (0) and noise (1) each image is put: (B,) float32 on the CPU.

        logit_normal: the sigmoid of a normal variable (arXiv:2403.03206, eq. 19).
        """
        if self.density == "uniform":
            return uniform(LEVEL, numbers)
        logits = self.diffusion.logit_mean + self.diffusion.logit_std * normal((), LEVEL, numbers)
        return torch.sigmoid(logits)

    def noised_at(self, latents: Tensor, levels: Tensor, numbers: Sequence[Numbers]) -> Noised:
        """Return latents with noise at given levels (B,) in [0, 1); the noise follows from the numbers."""
        latents = latents.float()
        noise = self._noise(latents.shape[1:], numbers).to(latents.device)
        return self._mix(latents, noise, levels)

    def for_inference(self, scheduler: Any) -> Any:
        """Return a scheduler that samples from what was trained: the given one, where nothing has to change; else one of
        its class, or a DDIMScheduler where its class can't be told so.
        """
        from diffusers import DDIMScheduler

        if not self.scheduler_changes:
            return scheduler
        takes = inspect.signature(type(scheduler).__init__).parameters
        cls = type(scheduler) if takes.keys() >= self.scheduler_changes.keys() else DDIMScheduler
        return cls.from_config(scheduler.config, **self.scheduler_changes)

    def _noise(self, shape: Sequence[int], numbers: Sequence[Numbers]) -> Tensor:
        """Return noise (B, C, h, w), with a share that is constant over each channel (crosslabs.org/blog/diffusion-with-
        offset-noise, 2023).
        """
        noise = normal(shape, NOISE, numbers)
        if self.diffusion.noise_offset:
            noise += self.diffusion.noise_offset * normal((shape[0], 1, 1), OFFSET, numbers)
        return noise

    @abstractmethod
    def _mix(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """Return latents with this noise at these levels (B,), and what goes with them."""

    @staticmethod
    def loss(prediction: Tensor, target: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return each image's loss (B,) float32: its mean squared error, times its weight.

        Args:
            prediction, target: (B, C, h, w), any floating dtype.
            weight: (B,).
            mask: (B, 1, H, W) in [0, 1], what the error counts where; averaged down to the latents' size. The mean is
                over all of the image, so that each pixel of the subject counts the same in a small and in a large one.
        """
        error = (prediction.float() - target.float()).square()
        if mask is not None:
            error = error * F.adaptive_avg_pool2d(mask.to(error), error.shape[-2:])
        return error.flatten(1).mean(1) * weight.to(error)


class ScheduleObjective(Objective):
    """Of models with a noise schedule: x = alpha image + sigma noise (arXiv:2006.11239, eq. 4). They predict epsilon, which
    is the noise (eq. 14), v = alpha noise - sigma image (arXiv:2202.00512, section 4) or the sample, which is the image.

    Attributes:
        schedule: a DDPMScheduler with the schedule that is trained on.
    """

    def __init__(self, diffusion: Diffusion, prediction: str, density: str, scheduler: Any) -> None:
        from diffusers import DDPMScheduler

        super().__init__(diffusion, prediction, density)
        if prediction != scheduler.config.prediction_type:
            self.scheduler_changes["prediction_type"] = prediction
        if diffusion.zero_terminal_snr:  # arXiv:2305.08891, algorithm 1, and section 3.3 for the spacing
            self.scheduler_changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        rescaled = {"rescale_betas_zero_snr": True} if diffusion.zero_terminal_snr else {}
        self.schedule = DDPMScheduler.from_config(scheduler.config, **rescaled)

    def _mix(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        count = self.schedule.config.num_train_timesteps
        timesteps = (levels * count).long().clamp(0, count - 1).to(latents.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        if self.prediction == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        else:
            target = latents if self.prediction == "sample" else noise
        return Noised(noisy, timesteps, target, self._weight(timesteps))

    def _weight(self, timesteps: Tensor) -> Tensor:
        """Return Min-SNR weights (B,) (arXiv:2303.09556, section 3.4): min(SNR, gamma), which is the weight of the error
        in the sample; over SNR for one in epsilon, over SNR + 1 for one in v.
        """
        from diffusers.training_utils import compute_snr

        if self.diffusion.min_snr is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.schedule, timesteps)
        over = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction]
        return snr.clamp(max=self.diffusion.min_snr) / over


class FlowObjective(Objective):
    """Of models of flow matching (arXiv:2210.02747) on straight paths (rectified flow, arXiv:2209.03003): x = (1 - t) image
    + t noise (arXiv:2403.03206, eq. 13), and the target is the path's derivative, noise - image.
    """

    def __init__(
        self, diffusion: Diffusion, density: str, steps: int, shift: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(diffusion, "flow", density)
        self.steps, self._shift = steps, shift

    def levels(self, latents: Tensor, numbers: Sequence[Numbers]) -> Tensor:
        """Return t of each image, (B,) float32 on the CPU; shifted: logit-normal, then moved as inference moves it."""
        drawn = super().levels(latents, numbers)
        return self._shift(drawn, latents) if self.density == "shifted" else drawn

    def _mix(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        levels = levels.to(latents.device)
        t = levels.view(-1, 1, 1, 1)
        noisy = (1 - t) * latents + t * noise
        return Noised(noisy, levels * self.steps, noise - latents, torch.ones_like(levels))


def objective_of(pipe: Any, diffusion: Diffusion) -> Objective:
    """Return the objective of a pipeline: what its scheduler says, changed by the recipe's section.

    Raises:
        RequestError: the section asks for what does not go together. UnsupportedError: a scheduler that is neither a noise
            schedule nor flow matching.
    """
    scheduler = pipe.scheduler
    flow = _is_flow(scheduler)
    said = "flow" if flow else scheduler.config.get("prediction_type", "epsilon")
    prediction = said if diffusion.prediction == "auto" else diffusion.prediction
    _check(diffusion, prediction, scheduler, flow)
    density = diffusion.timesteps
    if density == "auto":
        density = "logit_normal" if flow else "uniform"
    if not flow:
        return ScheduleObjective(diffusion, prediction, density, scheduler)
    return FlowObjective(diffusion, density, scheduler.config.num_train_timesteps, _shift_of(pipe, diffusion.shift))


def _is_flow(scheduler: Any) -> bool:
    name, config = type(scheduler).__name__, scheduler.config
    if (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        return True
    if getattr(scheduler, "alphas_cumprod", None) is None or "beta_schedule" not in config:
        raise UnsupportedError(
            f"A {name} has no noise schedule (betas) that could be trained on, and is not flow matching. Give the pipeline "
            "the scheduler that its model was trained with, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler."
        )
    return False


def _check(diffusion: Diffusion, prediction: str, scheduler: Any, flow: bool) -> None:
    """Raise for what does not go together; nothing that was asked for is passed over."""
    # Not what was written down: a run's recipe has every default in it.
    given = {name for name, f in type(diffusion).model_fields.items() if getattr(diffusion, name) != f.default}
    if flow != (prediction == "flow"):
        raise RequestError(
            f"diffusion.prediction={prediction} does not go with the pipeline's {type(scheduler).__name__}"
            f"{', which is flow matching' if flow else ', which has a noise schedule'}: leave it out, or give the pipeline "
            "the scheduler its model was trained with."
        )
    if flow and (diffusion.min_snr or diffusion.zero_terminal_snr):
        raise RequestError("diffusion.min_snr and zero_terminal_snr are of noise schedules, and this is flow matching.")
    if diffusion.timesteps == "shifted" and not flow:
        raise RequestError("diffusion.timesteps=shifted is for flow matching; here take uniform or logit_normal.")
    if diffusion.shift is not None and diffusion.timesteps != "shifted":
        raise RequestError("diffusion.shift has no effect without timesteps=shifted: give both or neither.")
    even = diffusion.timesteps == "uniform" or (diffusion.timesteps == "auto" and not flow)
    if even and given & {"logit_mean", "logit_std"}:
        raise RequestError("diffusion.logit_mean and logit_std have no effect on uniform timesteps: leave them out.")
    if (diffusion.zero_terminal_snr or scheduler.config.get("rescale_betas_zero_snr")) and prediction == "epsilon":
        raise RequestError(
            "Zero terminal SNR (diffusion.zero_terminal_snr, or the scheduler's rescale_betas_zero_snr) needs a model that "
            "predicts v or the sample: of pure noise, epsilon says nothing about the image (arXiv:2305.08891, section 3.2)."
        )


def _shift_of(pipe: Any, shift: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what moves t (B,) for latents (B, C, h, w) towards noise (arXiv:2403.03206, eq. 23).

    t' = a t / (1 + (a - 1) t). Without `shift`, a is the scheduler's own: a number, or one that grows with the image's
    tokens (Flux).
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    family, scheduler = family_of(pipe), pipe.scheduler
    config = scheduler.config
    if shift is None and not config.get("use_dynamic_shifting"):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
    if shift is not None:
        return lambda t, latents: shift * t / (1 + (shift - 1) * t)

    def by_size(t: Tensor, latents: Tensor) -> Tensor:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        usual = (256, 4096, 0.5, 1.15)  # what the pipelines take where the config says nothing
        sizes = (config.get(name, value) for name, value in zip(names, usual, strict=True))
        return scheduler.time_shift(calculate_shift(family.tokens(latents), *sizes), 1.0, t)

    return by_size
