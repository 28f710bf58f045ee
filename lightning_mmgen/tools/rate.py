"""``mmgen rate``: a local page where people score a run's pictures.

Served by Python's own ``http.server``: one form needs no more, and Gradio asks for an older Pillow than the one that is pinned.
"""

from __future__ import annotations

import csv
import os
import re
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from jinja2 import Environment, StrictUndefined

from ..data.images import open_picture
from ..metrics.ratings import SCALE, rating_table
from ..prompt import RecordError
from .runs import Case, Run, read_run

TEMPLATE = Path(__file__).parent / "templates" / "rate.html"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
HOST = "127.0.0.1"


class Rating:
    """The ratings of one run: ``ratings/<rater>.tsv`` in its folder, in ImagenHub's format (``uid``, and ``[SC, PQ]`` under the run's
    name). A file holds what its rater has rated so far, and every rating is on disk before the next picture is shown.

    Raises:
        ValueError: no evaluation of the run left a picture.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.folder = run, run.folder / "ratings"
        self.cases: dict[str, Case] = {uid: case for uid, case in run.cases.items() if case.picture is not None}
        if not self.cases:
            raise ValueError(f"{run.folder}: no pictures to rate; evaluation callbacks write them ({'; '.join(run.notes)})")
        self.lock = threading.Lock()

    def file(self, rater: str) -> Path:
        """Where a rater's ratings are.

        Raises:
            ValueError: the name is more than letters, digits, ``-`` and ``_``.
        """
        if not NAME.fullmatch(rater):
            raise ValueError("a rater's name has letters, digits, - and _ only, at most 40")
        return self.folder / f"{rater}.tsv"

    def ratings(self, rater: str) -> dict[str, list[float]]:
        """What a rater has rated: picture -> [SC, PQ].

        Raises:
            ValueError: the name, or the file is no file of ratings.
        """
        file = self.file(rater)
        return {uid: rating for (uid, _), rating in rating_table(file).items()} if file.is_file() else {}

    def next(self, rater: str) -> Case | None:
        """The first picture that a rater has not rated; None after the last."""
        rated = self.ratings(rater)
        return next((case for uid, case in self.cases.items() if uid not in rated), None)

    def rate(self, rater: str, uid: str, sc: float, pq: float) -> None:
        """Keep a rating; one that was given before is replaced.

        Raises:
            ValueError: the name, the picture or the scale.
        """
        if uid not in self.cases:
            raise ValueError(f"no picture {uid!r}")
        if sc not in SCALE or pq not in SCALE:
            raise ValueError("a rating must be 0, 0.5 or 1")
        with self.lock:
            ratings = self.ratings(rater) | {uid: [sc, pq]}
            self.folder.mkdir(exist_ok=True)
            staged = self.file(rater).with_suffix(".tmp")
            with staged.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file, delimiter="\t", lineterminator="\n")
                table.writerow(["uid", self.run.name])
                table.writerows([u, f"[{r[0]:g}, {r[1]:g}]"] for u, r in ratings.items())
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self.file(rater))

    def page(self, rater: str, uid: str | None, token: str, error: str = "") -> str:
        """The form for a picture, by default the next one; without a rater, the form that asks for a name."""
        ratings = self.ratings(rater) if rater else {}
        case = self.cases.get(uid or "") or (self.next(rater) if rater else None)
        uids = list(self.cases)
        before = uids[uids.index(case.id) - 1] if case and case.id != uids[0] else uids[-1] if rater and not case else None
        given = ratings.get(case.id) if case else None
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["quoted"] = lambda text: quote(text, safe="")
        known = {"run": self.run.name, "rater": rater, "case": case, "given": given, "token": token, "error": error, "scale": SCALE}
        done = sum(uid in ratings for uid in uids)
        return environment.from_string(TEMPLATE.read_text()).render(**known, done=done, count=len(uids), before=before)

    def pictures(self) -> set[str]:
        """The files that the page may show."""
        paths = {p for c in self.cases.values() for p in (c.picture, *c.references)}
        return {p for p in paths if p is not None}


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if not self._from_here():
            self._send(HTTPStatus.FORBIDDEN, b"this page is for 127.0.0.1", "text/plain")
        elif url.path == "/":
            self._page(asked.get("rater", "").strip(), asked.get("uid"))
        elif url.path == "/picture" and (path := asked.get("path", "")) in self.server.files:
            self._picture(path)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"not here", "text/plain")

    def do_POST(self) -> None:
        length = min(int(self.headers.get("Content-Length") or 0), 4096)
        form = {key: values[-1] for key, values in parse_qs(self.rfile.read(length).decode("utf-8", "replace")).items()}
        if not self._from_here() or not secrets.compare_digest(form.get("token", "").encode(), self.server.token.encode()):
            self._send(HTTPStatus.FORBIDDEN, b"load the page again", "text/plain")
            return
        rater, uid = form.get("rater", ""), form.get("uid", "")
        try:
            self.server.rating.rate(rater, uid, float(form.get("sc", "nan")), float(form.get("pq", "nan")))
        except ValueError as error:
            self._page(rater, uid, str(error))
            return
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", f"/?rater={quote(rater)}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _from_here(self) -> bool:
        """Whether the request names this machine: another site's name that resolves to it does not."""
        return (self.headers.get("Host") or "").rsplit(":", 1)[0] in (HOST, "localhost")

    def _page(self, rater: str, uid: str | None, error: str = "") -> None:
        try:
            text, status = self.server.rating.page(rater, uid, self.server.token, error), HTTPStatus.OK
        except ValueError as wrong:
            text, status = self.server.rating.page("", None, self.server.token, str(wrong)), HTTPStatus.BAD_REQUEST
        self._send(HTTPStatus.BAD_REQUEST if error else status, text.encode(), "text/html; charset=utf-8")

    def _picture(self, path: str) -> None:
        try:
            open_picture(path, self.server.rating.run.folder)
        except RecordError as error:
            self._send(HTTPStatus.NOT_FOUND, str(error).encode(), "text/plain")
        else:
            self._send(HTTPStatus.OK, (self.server.rating.run.folder / path).read_bytes(), "image/png")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, rating: Rating, port: int) -> None:
        self.rating, self.files, self.token = rating, rating.pictures(), secrets.token_urlsafe(16)
        super().__init__((HOST, port), _Handler)


def make_server(run: str, port: int = 0) -> _Server:
    """The server of a run's rating page, not yet serving; port 0 takes a free one.

    Raises:
        FileNotFoundError: no such run folder.
        ValueError: no evaluation of the run left a picture.
        OSError: the port is taken.
    """
    return _Server(Rating(read_run(Path(run), curves=False)), port)


def serve(run: str, port: int) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    with make_server(run, port) as server:
        rating = server.rating
        print(f"http://{HOST}:{server.server_address[1]}  ({len(rating.cases)} pictures; ratings go to {rating.folder})", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
