"""The recipe of the task dreambooth, as pydantic models. Importing this imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lora_adapters.recipes.sections import (
    AboveZero,
    AdapterSection,
    DataSection,
    ModelSection,
    NotNegative,
    Positive,
    Probability,
    Recipe,
    Section,
    Share,
    TrainingSection,
)

Pixels = Annotated[int, Field(ge=8, le=8192)]
#: Where computed tensors are kept: nowhere, in memory, or in files that a later run finds again.
Cache = Literal["memory", "disk"] | None


class PipelineModel(ModelSection):
    """The base pipeline."""

    name: str
    """A folder in diffusers' layout, a single file (the form that UIs load), or a name on the Hub."""
    quantization: str | dict[str, str | dict[str, str]] | None = None
    """"nf4" for the denoiser and the text encoders, or a mapping of components to one ({unet: nf4}) or to a mapping of
    roles. Convolutions too; the VAE stays dense."""
    trust_remote_code: Literal[False] = False
    """diffusers' pipelines bring no code."""
    variant: str | None = None
    """Files of a folder or Hub model to take, such as "fp16"."""
    config: str | None = None
    """For a single file: a folder with the pipeline's configs, where there is no network."""


class PipelineAdapter(AdapterSection):
    """The adapter. Rank, targets and the rest are the denoiser's."""

    blocks: dict[str, Annotated[int, Field(ge=0, le=65536)]] | None = None
    """Ranks by block: the beginning of modules' names ("down_blocks.0", "mid_block", "transformer_blocks") -> rank; the
    longest that fits wins, and 0 leaves the block alone."""
    text_encoders: bool | list[str] = False
    """Adapt text encoders too: true for all that read the prompt by attention, or names such as [text_encoder]."""
    text_rank: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Their rank; left out: `rank`."""
    text_targets: str | list[str] = "attention"
    """What to adapt in them."""
    modules_to_save: None = None
    """Files of adapters have no place for modules that are trained whole."""
    norm: Literal["eval"] = "eval"
    """These models have no BatchNorm."""
    liger: Literal[False] = False
    """Liger has no kernels for these models."""

    @model_validator(mode="after")
    def _text_options_have_encoders(self):
        if not self.text_encoders and (self.text_rank is not None or self.text_targets != "attention"):
            raise ValueError("text_rank and text_targets have no effect without text_encoders: give both or neither")
        return self


class SubjectData(DataSection):
    """Images of the subject, and what is said of each."""

    images: str | list[str]
    """A folder of images (subfolders too), or files."""
    prompt: str | None = None
    """What is said of every image, with a rare word for the subject: "a photo of sks dog"."""
    captions: Literal["auto", "files", "none"] = "auto"
    """Captions beside the images: name.txt, name.caption, or metadata.jsonl (file_name, text). auto: where there are
    some, the prompt elsewhere; files: every image must have one; none: the prompt alone."""
    trigger: str | None = None
    """A word put before every caption that lacks it."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated parts of captions anew each time."""
    keep_tags: Annotated[int, Field(ge=0)] = 1
    """So many parts at the beginning stay where they are when tags are shuffled or dropped."""
    tag_dropout: Share = 0.0
    """Probability of leaving out each other part."""
    caption_dropout: Share = 0.0
    """Probability of training with an empty caption (arXiv:2207.12598)."""
    masks: str | None = None
    """A folder of masks with the images' names, white where the loss counts; or "alpha": the images' own transparency."""
    mask_floor: Probability = 0.0
    """Weight of the loss where the mask is black."""
    resolution: Pixels | None = None
    """Side of a square with as many pixels as an image has in training; left out: what the model was made for."""
    buckets: bool = True
    """Group images by shape, each with the same number of pixels; false: crop every image to a square."""
    bucket_step: Annotated[int, Field(ge=8, le=512)] = 64
    """Sides of buckets are multiples of this many pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Longest side over the shortest of a bucket."""
    crop: Literal["center", "random"] = "center"
    """Which part is taken where an image is larger than its bucket."""
    flip: Probability = 0.0
    """Probability of a mirror image; not for faces and letters."""
    min_side: Annotated[int, Field(ge=1)] = 64
    """Images with a shorter side are named before training: they would be blown up."""
    repeats: Positive = 1
    """How often each image counts in one epoch."""
    eval: str | list[str] | None = None
    """Images to measure the loss on, at fixed noise and timesteps."""
    eval_fraction: Share = 0.0
    """Share of the images to hold out for that when `eval` is left out."""
    cache_latents: Cache = "memory"
    """Encode each image once and put the VAE away; not with crop=random."""
    cache_text: Cache = "memory"
    """Encode each caption once and put the text encoders away; not where they are trained or tags are shuffled."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that read images where latents are not cached; 0 reads in the training process. The images are the same."""

    @model_validator(mode="after")
    def _agrees(self):
        if self.prompt is None and self.captions != "files":
            raise ValueError(
                'give prompt, such as "a photo of sks dog", or captions=files with a caption beside each image'
            )
        if self.mask_floor and self.masks is None:
            raise ValueError("mask_floor has no effect without masks: give both or neither")
        if self.max_aspect != 2.0 and not self.buckets:
            raise ValueError("max_aspect has no effect without buckets: leave it out")
        if self.keep_tags != 1 and not (self.shuffle_tags or self.tag_dropout):
            raise ValueError("keep_tags has no effect without shuffle_tags or tag_dropout: leave it out")
        return self


class Prior(Section):
    """Prior preservation (DreamBooth, arXiv:2208.12242): images of the class keep the model from forgetting it."""

    prompt: str
    """The class without the rare word: "a photo of a dog"."""
    images: Positive = 100
    """How many; what `folder` lacks is generated with the base."""
    folder: str | None = None
    """Where they are, or are put; left out: the user's cache folder, by model and prompt."""
    weight: AboveZero = 1.0
    """Weight of their loss."""
    batch_size: Positive = 4
    """Images generated at a time."""
    steps: Positive = 50
    """Denoising steps."""
    guidance_scale: NotNegative | None = None
    """Classifier-free guidance; left out: the pipeline's own."""


class Diffusion(Section):
    """The training objective."""

    prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = "auto"
    """What the denoiser predicts; auto: what its scheduler says."""
    min_snr: AboveZero | None = None
    """Gamma of the Min-SNR weights, 5 in the paper (arXiv:2303.09556); not for flow matching."""
    noise_offset: NotNegative = 0.0
    """Share of noise that is constant over each channel, for darker and lighter images (crosslabs.org, 2023)."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (arXiv:2305.08891); needs v_prediction or sample."""
    timesteps: Literal["auto", "uniform", "logit_normal", "shifted"] = "auto"
    """How timesteps are drawn; auto: logit_normal for flow matching (arXiv:2403.03206), uniform elsewhere. shifted:
    logit_normal, then moved towards noise."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: AboveZero = 1.0
    """Standard deviation of logit_normal."""
    shift: AboveZero | None = None
    """Shift of flow matching's timesteps with `shifted` (arXiv:2403.03206, eq. 23); left out: the scheduler's own."""
    guidance: NotNegative = 1.0
    """Guidance that Flux is told in training."""

    @model_validator(mode="after")
    def _agrees(self):
        if self.prediction == "flow" and (self.min_snr or self.zero_terminal_snr):
            raise ValueError("min_snr and zero_terminal_snr are of noise schedules; flow matching has none")
        return self


class DreamBoothTraining(TrainingSection):
    """How to train. Times are in optimizer steps."""

    batch_size: Positive = 1
    """Images of the subject per forward pass; with prior preservation as many of the class beside them."""
    epochs: Annotated[float, Field(gt=0)] = 100.0
    """Passes over the images of the subject."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate; of prodigy a factor, 1."""
    text_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """That of text encoders; left out: the same."""
    lora_plus: Annotated[float, Field(ge=1)] | None = None
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354)."""
    optimizer: str = "adamw"
    """adamw, adamw_8bit, prodigy, or any class of torch.optim by name, such as RAdam."""
    optimizer_options: dict[str, Any] = {}
    """Other arguments of it, such as betas or eps."""
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Below 1 a share of all steps, else a number of steps."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Record each shape's forward and backward pass as a CUDA graph, which takes the waiting for Python out of a step.
    auto: on a CUDA device, unless text encoders are trained, or dropout goes with gradient_checkpointing."""
    ema: Share = 0.0
    """Decay of a moving average of the adapter, which is what is sampled, measured and saved; 0 is none."""


class Samples(Section):
    """Images made while training, always from the same prompts and seeds, for the report."""

    prompts: list[str] | None = None
    """Left out: the subject's prompt, and the class's."""
    negative_prompt: str | None = None
    """What they should not be."""
    every: Positive | None = None
    """Steps between them; left out: before and after training only."""
    count: Annotated[int, Field(ge=0, le=16)] = 2
    """Images of each prompt; 0 makes none."""
    steps: Positive = 25
    """Denoising steps."""
    guidance_scale: NotNegative | None = None
    """Classifier-free guidance; left out: the pipeline's own."""
    height: Pixels | None = None
    """Left out: the training resolution."""
    width: Pixels | None = None
    """Left out: the training resolution."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the first image; the others follow."""


class DreamBoothRecipe(Recipe):
    """Teach a diffusion model a subject from a few images."""

    task: Literal["dreambooth"]
    """What to train."""
    model: PipelineModel
    """The base pipeline."""
    adapter: PipelineAdapter = PipelineAdapter()
    """The adapter."""
    data: SubjectData
    """Images of the subject."""
    prior: Prior | None = None
    """Images of its class; left out: none."""
    diffusion: Diffusion = Diffusion()
    """The training objective."""
    training: DreamBoothTraining = DreamBoothTraining()
    """How to train."""
    samples: Samples = Samples()
    """Images made while training."""

    @model_validator(mode="after")
    def _text_rate_has_encoders(self):
        if self.training.text_learning_rate is not None and not self.adapter.text_encoders:
            raise ValueError(
                "training.text_learning_rate has no effect without adapter.text_encoders: give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _caches_can_hold(self):
        data = self.data
        if data.cache_latents and data.crop == "random":
            if "cache_latents" in data.model_fields_set:
                raise ValueError(
                    "data.cache_latents encodes each image once, and data.crop=random takes another part each time: "
                    "leave it out"
                )
            data.cache_latents = None
        text = bool(self.adapter.text_encoders)
        if data.cache_text and (text or data.shuffle_tags or data.tag_dropout):
            if "cache_text" in data.model_fields_set:
                raise ValueError(
                    "data.cache_text encodes each caption once, and "
                    + ("text encoders are trained" if text else "its tags change each time")
                    + ": leave it out"
                )
            data.cache_text = None
        return self
