"""Image files: what is said of one that can't be read, and pictures for the report."""

import base64
import io

import pytest
from PIL import Image

from lora_adapters.errors import RequestError
from lora_adapters.pictures import each, open_image, png


@pytest.mark.parametrize(
    ("size", "shown"), [((16, 16), (160, 160)), ((400, 100), (160, 40)), ((1000, 2), (160, 1))], ids=str
)
def test_pictures_for_the_report_are_of_a_size_to_see(size, shown):
    with Image.open(io.BytesIO(base64.b64decode(png(Image.new("L", size))))) as picture:
        assert (picture.size, picture.format) == (shown, "PNG")
    with Image.open(io.BytesIO(base64.b64decode(png(Image.new("L", size), 64)))) as picture:
        assert max(picture.size) == 64


def test_a_file_that_is_no_image_is_told_with_the_reason(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    assert open_image(tmp_path / "whole.png").getpixel((0, 0)) == (255, 0, 0)
    reasons = {"gone": "no such file", "empty": "it is empty", "text": "no known format", "cut": "runcated|broken"}
    for name, reason in reasons.items():
        with pytest.raises(RequestError, match=rf"{name}\.png is no image that can be read: .*({reason})"):
            open_image(tmp_path / f"{name}.png")


def test_work_in_threads_keeps_the_order():
    assert each(lambda number: number * 2, range(100)) == list(range(0, 200, 2))
