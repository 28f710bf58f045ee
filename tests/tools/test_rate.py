"""The rating page, asked over HTTP as a browser does."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image

from lightning_mmgen.metrics import read_ratings
from lightning_mmgen.tools.main import main
from lightning_mmgen.tools.rate import make_server

Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three pictures, one of a file that is no picture, and one instruction that gave none."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "evaluation").mkdir(parents=True)
    for name in ("a b.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "c.png").write_bytes(b"nothing")
    (folder / "secret.png").write_bytes(b"secret")
    pictures = {"a/1": "a b.png", "b": "b.png", "c": "c.png", "d": None}
    base = {"step": 5, "task": "subject", "instruction": "draw <i>", "references": ["b.png"], "target": None, "scores": {}}
    rows = [{**base, "id": uid, "picture": picture} for uid, picture in pictures.items()]
    (folder / "evaluation" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@contextmanager
def served(run: Path) -> Iterator[Ask]:
    """Asks a running page: a path, or a form to send."""
    with make_server(str(run)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        assert server.server_address[0] == "127.0.0.1"

        def ask(path: str = "/", form: dict[str, str] | None = None, **headers: str) -> tuple[int, str]:
            connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            connection.request("GET" if form is None else "POST", path, None if form is None else urlencode(form), headers)
            answer = connection.getresponse()
            text = answer.read().decode("latin-1")
            return answer.status, answer.getheader("Location") or text

        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()


def form_of(page: str) -> dict[str, str]:
    """The hidden fields of the form on a page."""
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))


def rate(ask: Ask, rater: str, sc: str, pq: str) -> str:
    """Rate the next picture; its uid."""
    page = ask(f"/?rater={rater}")[1]
    status, location = ask("/", {**form_of(page), "sc": sc, "pq": pq})
    assert (status, location) == (303, f"/?rater={rater}")
    return form_of(page)["uid"]


def test_raters_go_on_where_they_were_and_the_metric_reads_their_files(run: Path) -> None:
    with served(run) as ask:
        first = ask("/")[1]
        assert "Who rates?" in first and "condition which is followed least" in " ".join(first.split())
        page = ask("/?rater=ann")[1]
        assert "checked" not in page and "0 of 3 rated by ann" in page and "draw &lt;i&gt;" in page and page.count("<img") == 2
        assert [rate(ask, "ann", "1", "0.5"), rate(ask, "ann", "0.5", "0")] == ["a/1", "b"]
        assert rate(ask, "bob", "0", "1") == "a/1"
    with served(run) as ask:  # another day
        assert "2 of 3 rated by ann" in ask("/?rater=ann")[1]
        assert rate(ask, "ann", "0", "0") == "c" and "has rated all 3" in ask("/?rater=ann")[1]
        assert [rate(ask, "bob", "1", "1"), rate(ask, "bob", "0", "0.5")] == ["b", "c"]
        again = ask("/?rater=ann&uid=b")[1]  # a change of mind
        assert re.search(r'name="sc" value="0.5" required checked', again)
        ask("/", {**form_of(again), "sc": "1", "pq": "1"})
    assert (run / "ratings" / "ann.tsv").read_text() == "uid\ttiny\na/1\t[1, 0.5]\nb\t[1, 1]\nc\t[0, 0]\n"
    ((model, (sc, pq)),) = read_ratings([run / "ratings" / "ann.tsv", run / "ratings" / "bob.tsv"]).items()
    assert model == "tiny" and torch.equal(sc, torch.tensor([[1.0, 0], [1, 1], [0, 0]])) and pq[0].tolist() == [0.5, 1]


def test_only_this_page_may_rate_and_only_these_pictures_are_shown(run: Path) -> None:
    with served(run) as ask:
        form = form_of(ask("/?rater=ann")[1]) | {"sc": "1", "pq": "1"}
        assert ask("/", {**form, "token": "x"})[0] == ask("/", form, Host="evil.example:80")[0] == ask("/", Host="evil.example")[0] == 403
        for wrong in ({"sc": "0.7"}, {"sc": "nan"}, {"pq": "good"}, {"uid": "d"}, {"rater": "../ann"}, {"rater": ""}):
            status, page = ask("/", {**form, **wrong})
            assert status == 400 and 'class="error"' in page
        assert ask("/?rater=..%2Fann")[0] == 400 and not (run / "ratings").exists()
        assert ask("/picture?path=a%20b.png")[0] == 200
        for path in ("secret.png", "../../x", "c.png", ""):
            assert ask(f"/picture?path={path}")[0] == 404
        assert ask("/", form)[0] == 303


def test_a_run_without_pictures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rate", "--run", str(tmp_path)]) == 1
    assert "no pictures to rate; evaluation callbacks write them" in capsys.readouterr().err
