"""DreamBooth: a diffusion model learns a subject from a few images (arXiv:2208.12242)."""
