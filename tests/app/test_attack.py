"""What strangers send by hand: nothing but uploads is opened, all else is refused in a sentence, and the page lives on.

Over HTTP, without a browser. After every test the page answers as before, and its log has no traceback.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not there: pip install 'diff-moe[app]'")

import httpx

from diffmoe.app.answers import Answers

REFUSED = "This picture was not uploaded here: drop one or choose a file."
REFUSED_CHINESE = "这张图片不是上传到这里的：请拖入一张或选择一个文件。"
MARK = {"_type": "gradio.FileData"}
"""Only of what has it gradio itself asks whether it was uploaded."""
MODEL = "classifier.pth"
ADDRESS = "http://127.0.0.1:1/a.png"
SECONDS = 30

OUTSIDE = [
    *("{folder}/secret/key.png", "{folder}/gallery/0/0.jpg", "{folder}/models/classifier.pth", "{folder}"),
    *("{folder}/missing.png", "{folder}/picture.png/missing.png", "/", "/etc/passwd", "/etc/shadow", ".", ""),
    *(
        "picture.png",
        "../secret/key.png",
        "~/key.png",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/environ",
        "{folder}/pipe",
    ),
    *(
        "{upload}/../../secret/key.png",
        "{uploads}",
        "{uploads}/..",
        "{uploads}/missing.png",
        "{upload}/x",
        "{upload}\0",
    ),
    *(
        "{uploads}/../{folder}/secret/key.png",
        "{uploads}2",
        "\0",
        "a\0b",
        "{uploads}/\ud800",
        "\ud800",
        "a" * 900_000,
    ),
    *("a" * 5000, "/" + "a/" * 5000, "{uploads}/" + "a" * 300, "file:///etc/passwd", "file={upload}", ADDRESS),
    *("https://127.0.0.1:1/a.png", "data:image/png;base64,iVBORw0KGgo="),
]

ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 1e300, 10**400, float("nan"), float("inf"), "", "\0", "a\0b", "a\nb", "\ud800"),
    *(
        "x" * 100_000,
        "<img src=x>",
        "{0}{name}",
        "../../secret/key.png",
        "/etc/passwd",
        ADDRESS,
        "data:image/png;base64,",
    ),
    *([], {}, [[]], ["a"], [1] * 1000, {"a": {"b": [{}]}}, {"path": 5}, {"path": None}, {"path": []}, {"url": ADDRESS}),
    *(
        {"meta": MARK},
        {"path": "x", "meta": "x"},
        {"path": "/etc/passwd", "meta": MARK},
        {"path": ADDRESS, "meta": MARK},
    ),
    *([{"path": "/etc/passwd", "meta": MARK}], {"a": {"path": ADDRESS, "meta": MARK}}),
    {"path": "/etc/passwd", "meta": MARK, "size": "x", "url": [], "is_stream": "x"},
]

RAW = ("Error", "Errno", "object", "NoneType", "codec", " byte", "<class", "type:", "://", "/usr", "/tmp", "File ")
"""Of Python's errors, and of this machine."""


@dataclass(frozen=True)
class Page:
    """A page that is served, and how to ask it without a client that would put right what is sent."""

    client: httpx.Client
    """Of its address."""

    def get(self, route: str, **headers: str) -> httpx.Response:
        return self.client.get(f"/gradio_api/{route}", headers=headers)

    def post(self, route: str, body: Any) -> httpx.Response:
        """JSON as `json` writes it: httpx refuses half of a character, and NaN."""
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return self.client.post(f"/gradio_api/{route}", content=content, headers=headers)

    def ask(self, endpoint: str, *data: Any) -> tuple[bool, Any]:
        """Whether a named endpoint answers, and its answer, or what it says instead."""
        asked = self.post(f"call/{endpoint}", {"data": data})
        if asked.status_code != 200:
            return False, asked.json()["detail"]
        kind, answer = self.get(f"call/{endpoint}/{asked.json()['event_id']}").text.strip().split("\n")[-2:]
        told = json.loads(answer.removeprefix("data: "))
        return kind == "event: complete", told if kind == "event: complete" else told["error"]

    def event(self, number: int, data: list[Any], **more: Any) -> tuple[bool, Any]:
        """The same of an event of the page, which a browser would ask for by its number."""
        session = f"{random.getrandbits(64):x}"
        asked = self.post("queue/join", {"data": data, "fn_index": number, "session_hash": session, **more})
        if asked.status_code != 200:
            return False, asked.json()["detail"]
        lines = self.get(f"queue/data?session_hash={session}").text.splitlines()
        messages = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        (last,) = [message for message in messages if message["msg"] == "process_completed"]
        return last["success"], last["output"].get("data") if last["success"] else last["output"]["error"]

    def events(self) -> list[tuple[int, int, list[str]]]:
        """Number, component that sets it off, and the names of the inputs of each event."""
        config = self.client.get("/config").json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        return [
            (event["id"], event["targets"][0][0], [names[part] for part in event["inputs"]])
            for event in config["dependencies"]
        ]

    def send(self, *files: tuple[str, bytes]) -> httpx.Response:
        """Uploads, of names and contents."""
        return self.client.post("/gradio_api/upload", files=[("files", file) for file in files])

    def upload(self, path: str) -> str:
        """The path that the server gives a file."""
        return self.send(("picture.png", Path(path).read_bytes())).json()[0]


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served, timeout=SECONDS) as client:
        yield client


@pytest.fixture
def page(client: httpx.Client, log: Path, picture: str, answers: Answers) -> Iterator[Page]:
    page = Page(client)
    yield page
    is_answer, answer = page.ask("predict", {"path": page.upload(picture)}, MODEL, "en")
    assert is_answer
    found = {row["label"]: row["confidence"] for row in answer[0]["confidences"]}
    assert found == pytest.approx(answers.predict(picture, MODEL))
    assert "Traceback" not in log.read_text()


def is_sentence(text: Any, given: Any = None) -> bool:
    """Whether a person can read it: a whole line, with nothing of Python's or of this machine's but what was given."""
    if not isinstance(text, str):
        return False
    own = text.replace(given, "") if isinstance(given, str) and given else text
    is_whole = len(text) < 300 and "\n" not in text and text.endswith((".", "。"))
    return is_whole and not any(word in own for word in RAW)


def usual(names: list[str]) -> list[Any]:
    """What the page itself would send, without a picture."""
    values = {
        "model": MODEL,
        "language": "en",
        "folder": "1",
        "query": "a cat",
        "labels": "a,b",
        "block": 1,
        "patch": 1,
        "theme": "dark",
    }
    return [values.get(name) for name in names]


class TestPictures:
    """Each path is refused in the same words, and soon."""

    @pytest.mark.parametrize("mark", [{}, {"meta": {}}, {"meta": {"_type": "another"}}, {"meta": "x"}, {"meta": MARK}])
    def test_what_is_no_upload_is_not_opened(self, page, folder, picture, mark):
        if not (folder / "pipe").exists():
            os.mkfifo(folder / "pipe")
        upload = page.upload(picture)
        values = {"{folder}": str(folder), "{upload}": upload, "{uploads}": str(Path(upload).parents[1])}
        for path in OUTSIDE:
            for name, value in values.items():
                path = path.replace(name, value)
            started = time.perf_counter()
            assert page.ask("predict", {"path": path, **mark}, MODEL, "en") == (False, REFUSED), path[:100]
            assert time.perf_counter() - started < SECONDS / 3

    def test_pipes_devices_and_links_among_the_uploads_are_not_opened(self, page, folder, picture):
        uploads = Path(page.upload(picture)).parents[1] / "odd"
        uploads.mkdir()
        os.mkfifo(uploads / "pipe")
        links = {"out": folder / "secret" / "key.png", "zero": "/dev/zero", "dangling": uploads / "missing"}
        links |= {"loop": uploads / "loop", "piped": uploads / "pipe", "beside": folder / "secret"}
        for name, target in links.items():
            (uploads / name).symlink_to(target)
        for path in [uploads / "pipe", uploads / "beside" / "key.png", *(uploads / name for name in links)]:
            assert page.ask("predict", {"path": str(path)}, MODEL, "en") == (False, REFUSED), path

    def test_no_endpoint_and_no_event_opens_another_file(self, page, folder):
        tried = 0
        for number, target, names in page.events():
            if "picture" in names:
                given = {"picture": {"path": str(folder / "secret" / "key.png")}, "query": ""}
                data = [given.get(name, value) for name, value in zip(names, usual(names), strict=True)]
                assert page.event(number, data, trigger_id=target) == (False, REFUSED), number
                tried += 1
        assert tried > 6

    def test_it_is_refused_in_the_language_asked_for(self, page):
        for picture in ({"path": "/etc/passwd"}, {"path": "/etc/passwd", "meta": MARK}, 5):
            assert page.ask("predict", picture, MODEL, "zh") == (False, REFUSED_CHINESE)

    def test_an_upload_is_opened(self, page, picture):
        path = page.upload(picture)
        around = f"{Path(path).parent}/../{Path(path).parent.name}//{Path(path).name}"
        for given in ({"path": path}, {"path": path, "meta": MARK}, {"path": around}):
            assert page.ask("predict", given, MODEL, "en")[0]


class TestValues:
    """Whatever stands where a value should."""

    def test_every_event_answers_or_says_what_is_wrong(self, page, picture):
        """Each input's whole list where it first comes; elsewhere a few, for it is the same input."""
        upload = {"path": page.upload(picture), "meta": MARK}
        tried: set[str] = set()
        for number, target, names in page.events():
            for place, name in enumerate(names):
                for odd in ODD[::18] if name in tried else ODD:
                    data = [upload if of == "picture" else value for of, value in zip(names, usual(names), strict=True)]
                    data[place] = odd
                    is_answer, told = page.event(number, data, trigger_id=target)
                    assert is_answer or is_sentence(told, odd), (number, name, str(odd)[:100], told)
                tried.add(name)
        assert tried == {"picture", "model", "language", "labels", "query", "folder", "block", "patch", "theme"}

    def test_too_few_too_many_or_too_deep(self, page):
        deep = [json.loads("[" * depth + "]" * depth) for depth in (100, 300, 900)]
        for name in ("predict", "zero_shot", "caption", "retrieve", "routing", "attention"):
            for data in ([], [None], [{"path": "/etc/passwd"}], ["en"] * 50, [None] * 50, deep, deep[2:] * 5):
                is_answer, told = page.ask(name, *data)
                assert not is_answer
                assert is_sentence(told), told

    @pytest.mark.parametrize(
        ("endpoint", "data", "sentence"),
        [
            ("predict", [None, ["a"], "en"], "model must be one of the names that the page offers."),
            ("predict", [None, "a\0", "en"], "model must be one of the names that the page offers."),
            ("predict", [None, MODEL, "fr"], "language must be one of en, zh."),
            ("predict", [5, MODEL, "fr"], REFUSED),
            ("predict", [None], "Too little was sent: it must be 3 values."),
            ("routing", [None, 1.5, MODEL, "en"], "block must be a whole number."),
            ("routing", [None, True, MODEL, "en"], "block must be a whole number."),
            ("attention", [None, -1, MODEL, "en"], "A number is out of its range on the page."),
            ("zero_shot", [None, "\ud800", MODEL, "en"], "labels must be a text of at most 20000 characters."),
            ("zero_shot", [None, "x" * 20_001, MODEL, "zh"], "labels 必须是最多 20000 个字符的文字。"),
            ("zero_shot", [None, ",".join(map(str, range(1001))), MODEL, "en"], "Give at most 1000 labels."),
            ("retrieve", ["a", None, [], MODEL, "en"], "folder must be one of the names that the page offers."),
            # gradio itself would fetch these, or move them to where it serves them.
            ("zero_shot", [None, {"path": ADDRESS, "meta": MARK}, MODEL, "en"], "labels must be a text of at most"),
            ("predict", [None, {"path": "/etc/passwd", "meta": MARK}, "en"], "model must be one of the names"),
        ],
    )
    def test_what_is_wrong_is_named(self, page, endpoint, data, sentence):
        is_answer, told = page.ask(endpoint, *data)
        assert not is_answer
        assert told.startswith(sentence)

    def test_no_folder_beside_the_gallery_is_searched(self, page):
        for name in ("..", "../secret", "/", "way_out", "0/../../secret", "0/link.png", "missing", "x" * 1000):
            wanted = f"{name} is no folder of the gallery: only its folders may be searched."
            assert page.ask("retrieve", "a cat", None, name, MODEL, "en") == (False, wanted)

    def test_a_click_beside_the_picture(self, page):
        events = [(number, target) for number, target, names in page.events() if names == ["model"]]
        number, target = events[-1]
        places: list[Any] = [None, 5, "ab", [1], [1, 2, 3], ["1", "2"], [None, None], [float("nan"), 1]]
        places += [[1, float("inf")], [-1, 0], [0, 1e300], [0, 448], [10**400, 0], {"x": 1}, [[0, 0]]]
        for data in (None, 5, "x", [], {}, {"value": 1}, *({"index": place} for place in places)):
            told = page.event(number, [MODEL], trigger_id=target, event_data=data)
            assert told == (False, "This is beside the picture: click on one of its patches."), data
        clicked = {"index": [447, 112.5], "value": None}
        assert page.event(number, [MODEL], trigger_id=target, event_data=clicked) == (True, [8])


class TestRequests:
    """What is sent to gradio's own routes."""

    def test_a_request_that_cannot_be_answered(self, page):
        requests: list[tuple[str, Any]] = [
            *(
                ("call/nothing", {"data": []}),
                ("call/predict", {}),
                ("call/predict", []),
                ("call/predict", '{"data": ['),
            ),
            *(("call/predict", {"data": 5}), ("call/predict", "[" * 100_000), ("call/predict", '{"data": [NaN]')),
            *(("call/v2/nothing", {}), ("call/v2/predict", {"nothing": 5}), ("run/nothing", {"data": []})),
            *(("queue/join", {"data": []}), ("queue/join", {"data": [], "fn_index": 999, "session_hash": "a"})),
            *(("queue/join", {"data": [], "fn_index": "x"}), ("queue/join", {"data": [], "session_hash": 5})),
            *(("component_server", {}), ("component_server", {"data": 1, "component_id": 999, "session_hash": "a"})),
            *(("process_recording", {}), ("call/predict", {"data": ["x" * 1_100_000]}), ("upload", {"files": "x"})),
            *(("deep_link", {}), ("stream/a", {"data": []}), ("vibe-edit", {"prompt": "x"}), ("proxy=http://a/", {})),
        ]
        for route, body in requests:
            response = page.post(route, body)
            assert 400 <= response.status_code < 500
            detail = response.json()["detail"]
            assert is_sentence(detail) or detail == "There was an error parsing the body", (route, detail)

    def test_asked_without_the_queue(self, page, folder):
        given = {"path": str(folder / "secret" / "key.png")}
        for route in ("run/predict", "api/predict"):
            response = page.post(route, {"data": [given, MODEL, "en"]})
            assert (response.status_code, response.json()["error"]) == (500, REFUSED)

    def test_nothing_is_served_but_what_the_page_made(self, page, folder):
        for route in (
            *(f"file={folder}/secret/key.png", f"file={folder}/missing.png", "file=%00", "file=", "file=/dev/zero"),
            *(f"file={ADDRESS}", f"file/{ADDRESS}", "file=HTTPS://127.0.0.1:1/", "file=" + "a" * 5000, "file=%ff%fe"),
            *("file=..%2F..%2Fetc%2Fpasswd", f"proxy={ADDRESS}", "custom_component/a/client/b/c", "upload", "nothing"),
            *("deep_link?session_hash=a", "stream/a/b/1/playlist.m3u8", "heartbeat", "upload_progress"),
        ):
            response = page.get(route)
            assert 400 <= response.status_code < 500, route
            assert "detail" in response.json()

    def test_files_that_are_there_and_that_are_not_are_refused_alike(self, page, folder):
        names = ("secret/key.png", "secret/missing", "secret", "picture.png")
        responses = [(page.get(f"file={folder}/{name}"), name) for name in names]
        assert len({(response.status_code, response.text.replace(name, "")) for response, name in responses}) == 1

    def test_answers_that_nobody_asked_for(self, page):
        for route in ("queue/data?session_hash=unknown", "call/predict/unknown"):
            assert "404: Not Found" in page.get(route).text

    def test_parts_of_a_file(self, page, picture):
        path = page.upload(picture)
        for part in ("bytes=0-3", "bytes=9-3", "bytes=-", "bytes=1-2-3", "bytes=0-999999999", "x"):
            assert page.get(f"file={path}", Range=part).status_code < 500, part

    def test_an_upload_of_any_name_stays_in_its_folder(self, page, picture):
        uploads = Path(page.upload(picture)).parents[1]
        for name in (
            "..",
            ".",
            "a/../../b.png",
            "/etc/passwd",
            "x" * 5000,
            "a\0b.png",
            "图.png",
            "-",
            "<b>.png",
            "a\nb",
        ):
            response = page.send((name, Path(picture).read_bytes()))
            if response.status_code == 200:
                (path,) = response.json()
                assert Path(path).resolve().is_relative_to(uploads)
                assert page.ask("predict", {"path": path}, MODEL, "en")[0], name
            else:
                assert response.status_code in (400, 413), name
                assert "/" not in response.text

    def test_an_upload_that_is_none(self, page):
        multipart = {"Content-Type": "multipart/form-data; boundary=b"}
        field = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n'
        for content, headers in ((b"x", {}), (b"x", multipart), (b"--b\r\n", multipart), (field, multipart)):
            response = page.client.post("/gradio_api/upload", content=content, headers=headers)
            assert response.status_code < 500

    def test_many_files_at_once_are_too_large(self, page):
        assert page.send(*((f"{n}.png", bytes(8_000_000)) for n in range(3))).status_code == 413


def test_60_at_once_each_in_its_language(page, picture, answers):
    """Every third one is refused."""
    upload = {"path": page.upload(picture), "meta": MARK}
    wanted = answers.predict(picture, MODEL)

    def ask(number: int) -> tuple[bool, Any]:
        given = {"path": "/etc/passwd"} if number % 3 == 0 else upload
        return page.ask("predict", given, MODEL, "zh" if number % 2 else "en")

    with ThreadPoolExecutor(60) as pool:
        told = list(pool.map(ask, range(60)))
    for number, (is_answer, answer) in enumerate(told):
        if number % 3 == 0:
            assert (is_answer, answer) == (False, REFUSED_CHINESE if number % 2 else REFUSED)
        else:
            assert {row["label"]: row["confidence"] for row in answer[0]["confidences"]} == pytest.approx(wanted)
