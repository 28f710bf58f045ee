"""Opens the dashboard, a report and the rating page in headless Chromium, looks at them, and clicks through a rating.

    python benchmarks/browser.py RUN [RUN ...] --out FOLDER

Needs `chromium` on the PATH. Screenshots go to FOLDER. All pictures of a copy of the first run are rated by clicks, and its TSV is
compared with what was clicked; no rating is written to the run itself.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from lightning_mmgen.metrics import rating_table
from lightning_mmgen.tools.rate import make_server
from lightning_mmgen.tools.report import report
from lightning_mmgen.tools.runs import find_run, name_run


class Browser:
    """A headless Chromium over the DevTools protocol's pipe: messages end with a zero byte, on file descriptors 3 and 4."""

    def __init__(self, folder: str, width: int = 1280, height: int = 1100) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        flags = f"--headless=new --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={folder} --window-size={width},{height}"
        command = f"exec chromium {flags} --remote-debugging-pipe 3<&{theirs_in} 4>&{theirs_out}"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.out, self.into, self.ids, self.session = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb"), itertools.count(1), ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            data = bytearray()
            while (byte := self.into.read(1)) != b"\0":
                if not byte:
                    raise RuntimeError("chromium has gone")
                data += byte
            answer = json.loads(data)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def open(self, url: str, ready: str = "document.readyState == 'complete'") -> None:
        """Go to a page, until it is ready."""
        self.ask("Page.navigate", url=url)
        self.wait(ready)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        chosen = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{chosen}")
        self.value(f"{chosen}.scrollIntoView({{block: 'center'}})")
        x, y = self.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({chosen}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def shot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def tensorboard(folder: Path, port: int = 16124) -> Iterator[str]:
    """A TensorBoard of a folder; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/data/logdir").close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def rate(browser: Browser, run: Path, out: Path) -> int:
    """Rate every picture of a run by clicks, and compare its TSV with them; how many there were."""
    scale, clicked = ("0.0", "0.5", "1.0"), {}
    with make_server(str(run)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.click("#rater")
        browser.ask("Input.insertText", text="ann")
        browser.click("#start")
        for i in range(len(server.rating.cases)):
            browser.wait(f"(document.querySelector('progress') || {{}}).value === {i}")
            uid, sc, pq = browser.value("document.querySelector('[name=uid]').value"), scale[i % 3], scale[i // 3 % 3]
            browser.click("#rate")  # nothing chosen: the browser keeps the form
            browser.click(f"[name=sc][value='{sc}']")
            browser.click(f"[name=pq][value='{pq}']")
            if i == 0:
                browser.wait("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                browser.value("scrollTo(0, 0)")
                browser.shot(out / "rate.png")
            browser.click("#rate")
            clicked[uid] = [float(sc), float(pq)]
        browser.wait("!!document.querySelector('#done')")
        found = {uid: rating for (uid, _), rating in rating_table(run / "ratings" / "ann.tsv").items()}
        server.shutdown()
    assert found == clicked, f"the TSV differs from the clicks: {found} and {clicked}"
    return len(clicked)


def main() -> None:
    """Look at everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = [find_run(run).resolve() for run in args.runs]
        out = args.out.resolve()
        os.chdir(folder)  # pages then show no path of this machine
        copies = [Path(shutil.copytree(run, Path("runs") / name_run(run))) for run in found]
        browser = Browser(f"{folder}/profile")
        try:
            print(report([str(run) for run in copies], "report.html"))
            browser.open(f"file://{folder}/report.html")
            broken = browser.value("[...document.images].filter(i => !i.naturalWidth).length")
            assert broken == 0, f"{broken} pictures of the report do not show"
            browser.shot(out / "report.png")
            browser.value("[...document.querySelectorAll('h2')].find(h => h.textContent == 'Pictures').scrollIntoView()")
            browser.shot(out / "report_pictures.png")
            print(f"{rate(browser, copies[0], out)} ratings by clicks: the TSV holds them")
            with tensorboard(Path("runs")) as address:
                for tab in ("custom_scalars", "hparams", "text", "images"):
                    browser.open(f"{address}/#{tab}")
                    browser.ask("Page.reload")
                    time.sleep(12)
                    browser.shot(out / f"tensorboard_{tab}.png")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
