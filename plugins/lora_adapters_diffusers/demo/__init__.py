"""The demo's diffusion part: a small text-to-image model, pretrained here on nine handwritten digits, is taught the tenth."""
