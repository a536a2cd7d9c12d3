"""Makes `docs/images/app.png`: the page with a picture answered, and which expert takes which patch of it.

python docs/screenshot_app.py checkpoints/cifar10_model.pth cat.jpg      (extras app and dev; needs Chromium)
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

OUTPUT = Path(__file__).parent / "images" / "app.png"
SECONDS = 60_000


def main(checkpoint: str, picture: str) -> None:
    """Serve the page, open it, drop the picture, and write what is to be seen."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", "from diffmoe.cli import main; raise SystemExit(main())", "app"]
    command += ["--checkpoint", checkpoint, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout
            server.stdout.readline()
            flags = ["--no-sandbox", "--disable-gpu"]
            chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
            page = chromium.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"http://127.0.0.1:{port}")
            expect(page.locator("#about li").first).to_be_visible(timeout=SECONDS)
            page.locator("#picture input[type=file]").set_input_files(picture)
            expect(page.locator("#routing img")).to_be_visible(timeout=SECONDS)
            expect(page.locator(".generating")).to_have_count(0, timeout=SECONDS)
            page.locator("#title").click()  # the pointer away from the picture
            page.wait_for_timeout(1500)
            page.screenshot(path=OUTPUT)
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
