"""DreamBooth (arXiv:2208.12242): teaching a diffusion model a subject from a few images."""
