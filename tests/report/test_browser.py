"""report.html in a real browser: the curves are on the screen, in light and dark, and nothing is fetched."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lora_adapters.report.html import render_report

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
#: Tells where the drawn curves of the page are and what colour they have; only a copy without the policy can run it.
MEASURE = """<script>
const found = [...document.querySelectorAll("figure.chart svg path[style*='var(--line-']")].map(path => {
  const box = path.getBoundingClientRect(), style = getComputedStyle(path);
  return {x: box.x, y: box.y, width: box.width, height: box.height, stroke: style.stroke,
          length: box.width ? path.getTotalLength() : 0};
});
parent.postMessage(JSON.stringify({curves: found, page: document.documentElement.scrollWidth}), "*");
</script>"""
#: Shows that copy in a frame, which can be narrower than any window, and writes down what it tells.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<script>onmessage = event => document.body.setAttribute("data-found", event.data)</script>
<iframe src="measured.html" style="border: 0; display: block; width: {width}px; height: {height}px"></iframe>"""
DARK = "--blink-settings=preferredColorScheme=0"


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium here")


@pytest.fixture
def browse(browser, tmp_path):
    """Return a function that opens a page, a fresh profile each time, and returns what the browser printed."""
    profiles = iter(range(100))

    def run(page: Path, *flags: str) -> str:
        quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        command = [browser, *quiet.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
        # What the browser itself wants to look up ends here; only a server on this machine could be reached.
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += [f"--user-data-dir={tmp_path / f'profile{next(profiles)}'}", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture
def report(make_facts, make_history, tmp_path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(render_report(make_facts(), make_history()), encoding="utf-8")
    return path


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", asked
    made.shutdown()
    thread.join()
    made.server_close()


def measure(browse, report: Path, *flags: str, width: int = 1280, height: int = 5000) -> dict:
    """Return the visible curves of a copy of the page that may run a script, and how wide it is."""
    html = report.read_text(encoding="utf-8")
    changed = POLICY.sub("", html).replace("</body>", f"{MEASURE}</body>")
    assert changed.count("<script>") == html.count("<script>") + 1
    report.with_name("measured.html").write_text(changed, encoding="utf-8")
    frame = report.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, height=height), encoding="utf-8")
    [found] = re.findall(r'data-found="([^"]*)"', browse(frame, *flags, "--dump-dom"))
    found = json.loads(found.replace("&quot;", '"'))
    found["curves"] = [curve for curve in found["curves"] if curve["width"] > 0]
    return found


def picture(browse, report: Path, *flags: str, width: int = 1280, height: int = 5000) -> np.ndarray:
    """Return the page as (height, width, 3) integers."""
    from PIL import Image

    path = report.with_suffix(".png")
    path.unlink(missing_ok=True)
    browse(report, *flags, f"--window-size={width},{height}", f"--screenshot={path}")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def share_with_colour(pixels: np.ndarray, box: dict, colour: str) -> float:
    """Return the share of the pixel columns of a box in which something of this colour is drawn."""
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    part = pixels[int(box["y"]) : int(box["y"] + box["height"]) + 1, int(box["x"]) : int(box["x"] + box["width"]) + 1]
    near = np.abs(part - [red, green, blue]).sum(axis=-1) < 90
    return float(near.any(axis=0).mean())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_are_drawn(browse, report, scheme):
    flags = [DARK] if scheme == "dark" else []
    curves = measure(browse, report, *flags)["curves"]
    pixels = picture(browse, report, *flags)
    assert pixels.shape == (5000, 1280, 3)
    assert (pixels[5, 5].sum() < 150) == (scheme == "dark")
    assert len(curves) == 6, "loss with its evaluation, learning rate, gradient norm, adapter norm, rougeL"
    assert len({curve["stroke"] for curve in curves}) == 2
    for curve in curves:
        assert curve["width"] > 300
        assert curve["height"] > 50
        assert curve["length"] > curve["width"]
        assert share_with_colour(pixels, curve, curve["stroke"]) > 0.9
        # The colours tell a curve from what is behind it: the same test finds none of another colour.
        assert share_with_colour(pixels, curve, "rgb(0, 255, 0)") == 0


def test_each_scheme_has_its_own_colours(browse, report):
    light, dark = (measure(browse, report, *flags)["curves"] for flags in ((), (DARK,)))
    assert {curve["stroke"] for curve in light}.isdisjoint({curve["stroke"] for curve in dark})


@pytest.mark.parametrize("width", [400, 700, 1280])
def test_the_page_fits_its_window(browse, report, width):
    found = measure(browse, report, width=width)
    assert found["page"] == width
    assert len(found["curves"]) == 6, "one drawing of each chart is visible"


def page_requests(browse, page: Path) -> list[str]:
    """Return the addresses on the network that a page made the browser ask for, from the browser's own log.

    The browser asks its maker for things too. Those requests have no origin; a page's request has one ("null" on disk).
    """
    log = page.with_name("net-log.json")
    log.unlink(missing_ok=True)
    browse(page, f"--log-net-log={log}", "--dump-dom")
    found = json.loads(log.read_text(encoding="utf-8"))
    start = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    made = [event.get("params", {}) for event in found["events"] if event["type"] == start]
    assert all("initiator" in params for params in made if "url" in params)
    return [p["url"] for p in made if p.get("url", "").startswith("http") and p["initiator"] != "not an origin"]


def test_the_log_shows_what_a_page_fetches(browse, server, tmp_path):
    address, asked = server
    page = tmp_path / "control.html"
    page.write_text(f'<img src="{address}/x"><link rel="stylesheet" href="{address}/y">')
    assert sorted(page_requests(browse, page)) == [f"{address}/x", f"{address}/y"]
    assert sorted(asked) == ["/x", "/y"]


def test_nothing_is_fetched(browse, report):
    assert page_requests(browse, report) == []


def test_nothing_would_be_fetched_without_the_policy_either(browse, report):
    report.write_text(POLICY.sub("", report.read_text(encoding="utf-8")), encoding="utf-8")
    assert page_requests(browse, report) == []


def test_the_policy_stops_what_a_text_might_smuggle_in(browse, report, server):
    address, asked = server
    smuggled = (
        f'<img src="{address}/a"><script src="{address}/b"></script><link rel="stylesheet" href="{address}/c">'
        f'<iframe src="{address}/d"></iframe><style>@import "{address}/e"; body {{ background: url({address}/f) }}</style>'
        "<script>document.title = 'ran'</script>"
    )
    html = report.read_text(encoding="utf-8").replace("<main>", f"<main>{smuggled}")
    report.write_text(html, encoding="utf-8")
    assert page_requests(browse, report) == []
    assert asked == []
    assert "<title>ran</title>" not in browse(report, "--dump-dom")
    report.write_text(POLICY.sub("", html), encoding="utf-8")
    assert {f"{address}/{name}" for name in "abcdef"} <= set(page_requests(browse, report))
    assert "<title>ran</title>" in browse(report, "--dump-dom")
