"""The demo's diffusion part: a small Stable Diffusion, pretrained here on nine handwritten digits, is taught the tenth."""
