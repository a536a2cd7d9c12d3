"""What a part of the page cannot have sent is refused, faults of ours stay in the log, and requests are bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not there: pip install 'diff-moe[app]'")

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffmoe.app.guard import MAX_NAME, MAX_REQUEST, MAX_TEXT, UNUSED, GuardedBlocks, RequestGuard, checked_input
from diffmoe.app.picture_input import PictureInput
from diffmoe.app.uploads import MAX_BYTES
from diffmoe.config import UserError
from diffmoe.visualization.language import Language, say

MARK = {"_type": "gradio.FileData"}
PARTS = {
    "picture": PictureInput(elem_id="picture", render=False),
    "text": gr.Textbox(elem_id="text", render=False),
    "name": gr.Dropdown(["a"], elem_id="name", allow_custom_value=True, render=False),
    "number": gr.Slider(0, 9, step=1, elem_id="number", render=False),
    "language": gr.Radio([("English", "en"), ("中文", "zh")], elem_id="language", render=False),
}


class TestInputs:
    @pytest.mark.parametrize(
        ("part", "value", "wanted"),
        [
            ("picture", None, None),
            ("picture", {"path": "/a.png", "meta": MARK, "url": "http://a/", "size": "x"}, {"path": "/a.png"}),
            ("text", None, ""),
            ("text", "图\n\0", "图\n\0"),
            ("text", "x" * MAX_TEXT, "x" * MAX_TEXT),
            ("name", None, None),
            ("name", "a/ b.图", "a/ b.图"),
            ("number", 3, 3),
            ("number", 3.0, 3),
            ("number", -1, -1),
            ("language", "zh", "zh"),
        ],
    )
    def test_what_a_part_sends(self, part, value, wanted):
        assert checked_input(PARTS[part], value) == wanted

    @pytest.mark.parametrize(
        ("part", "values", "sentence"),
        [
            (
                "picture",
                [5, "/a.png", [], {}, {"path": 5}, [{"path": "/a.png"}], True],
                "This picture was not uploaded here",
            ),
            ("text", ["x" * (MAX_TEXT + 1), "\ud800", 5], "text must be a text of at most 20000 characters."),
            ("name", ["x" * (MAX_NAME + 1), "\0", "a\nb", "\ud800", 5], "name must be one of the names that the page"),
            ("number", [None, "1", 1.5, float("nan"), float("inf")], "number must be a whole number."),
            ("language", [None, "fr", 5], "language must be one of en, zh."),
        ],
    )
    def test_what_it_does_not(self, part, values, sentence):
        marked = {"path": "http://127.0.0.1:1/", "meta": MARK}
        others = [] if part == "picture" else [{}, [], ["a"], True, marked, [marked], {"value": marked}]
        for value in values + others:
            with pytest.raises(UserError) as caught:
                checked_input(PARTS[part], value)
            assert str(caught.value).startswith(sentence)

    def test_of_a_part_that_is_not_known_nothing_is_let_through(self):
        with pytest.raises(TypeError, match="Number"):
            checked_input(gr.Number(render=False), 5)


def asked(function: Callable[..., Any], *given: Any, language: Language = "en") -> Any:
    """What a page with this one function answers."""

    async def ask() -> Any:  # blocks too are made in the loop: without one they would make their own, and leave it open
        with GuardedBlocks(language, analytics_enabled=False) as blocks:
            languages = gr.Radio(["en", "zh"], elem_id="language")
            number = gr.Slider(0, 9, step=1, elem_id="number")
            gr.Button().click(function, [number, languages], gr.Textbox())
        (function_id,) = blocks.fns
        return await blocks.process_api(function_id, list(given))

    return asyncio.run(ask())["data"]


class TestBlocks:
    def test_an_answer_in_the_language_asked_for(self):
        def answer(number: int, language: str) -> str:
            return f"{number + 1} {say('Picture')}"

        assert asked(answer, 2.0, "zh") == ["3 图片"]
        assert asked(answer, 2, "en", language="zh") == ["3 Picture"]

    def test_each_step_of_an_answer_that_comes_bit_by_bit(self):
        def answer(number: int, language: str) -> Any:
            yield say("Picture")

        assert asked(answer, 2, "zh") == ["图片"]

    def test_a_users_mistake_is_a_sentence_and_no_traceback(self):
        def answer(number: int, language: str) -> None:
            raise UserError("<b> & such")

        with pytest.raises(gr.Error) as caught:
            asked(answer, 2, "zh")
        assert (caught.value.message, caught.value.print_exception) == ("&lt;b&gt; &amp; such", False)

    def test_a_fault_of_ours_is_for_the_log_alone(self):
        def answer(number: int, language: str) -> float:
            return number / 0

        with pytest.raises(gr.Error) as caught:
            asked(answer, 2, "en")
        assert caught.value.message == "The page failed: the log of its server says why."
        assert caught.value.print_exception
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ([2], "必须是 2 个值。"),
            ([2, "fr"], "language 必须是 en, zh 之一。"),
            ([1.5, "en"], "number must be a whole number."),
            ([10, "en"], "A number is out of its range on the page."),
            ([10**400, "zh"], "有数字超出了页面上的范围。"),
        ],
    )
    def test_what_is_refused_never_reaches_the_answer(self, given, sentence):
        with pytest.raises(gr.Error) as caught:
            asked(lambda number, language: pytest.fail("it was called"), *given, language="zh")
        assert caught.value.message.endswith(sentence)
        assert not caught.value.print_exception


def respond(app: ASGIApp, path: str, body: list[bytes] | None = None) -> tuple[int, bytes, list[Message]]:
    """Status, body and messages of the guarded `app`."""
    sent: list[Message] = []
    chunks = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in body or []]
    chunks.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Message:
        return chunks.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    asyncio.run(RequestGuard(app)(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), sent


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long the body is."""
    await JSONResponse(len(await Request(scope, receive).body()))(scope, receive, send)


class TestRequests:
    def test_a_request_passes_unchanged(self):
        assert respond(count, "/gradio_api/call/predict", [b"ab", b"c"])[:2] == (200, b"3")

    @pytest.mark.parametrize(("route", "limit"), [("call/predict", MAX_REQUEST), ("upload", MAX_REQUEST + MAX_BYTES)])
    def test_a_body_that_is_too_large_is_not_read(self, route, limit, capsys):
        kilobytes = limit // 1000
        assert respond(count, f"/gradio_api/{route}", [bytes(1000)] * kilobytes)[1] == str(limit).encode()
        status, body, _ = respond(count, f"/gradio_api/{route}", [bytes(1000)] * kilobytes + [b"x"])
        assert (status, json.loads(body)) == (413, {"detail": "This request cannot be answered."})
        assert capsys.readouterr().err.count("\n") == 1

    def test_what_a_route_cannot_bear_is_one_line_of_the_log(self, capsys):
        async def fail(scope: Scope, receive: Receive, send: Send) -> None:
            raise KeyError("a\nb")

        status, body, _ = respond(fail, "/x\n" + "y" * 1000)
        assert (status, json.loads(body)) == (400, {"detail": "This request cannot be answered."})
        logged = capsys.readouterr().err
        assert logged.startswith("a request that cannot be answered: ")
        assert "KeyError" in logged
        assert logged.count("\n") == 1
        assert len(logged) < 500

    def test_an_answer_that_breaks_off_is_ended(self, capsys):
        async def words() -> AsyncIterator[bytes]:
            yield b"one"
            raise KeyError(5)

        async def begin(scope: Scope, receive: Receive, send: Send) -> None:
            await StreamingResponse(words()).stream_response(send)

        status, body, sent = respond(begin, "/x")
        assert (status, body) == (200, b"one")
        assert not sent[-1].get("more_body")
        assert "KeyError(5)" in capsys.readouterr().err

    def test_after_a_whole_answer_nothing_is_added(self, capsys):
        async def fail_later(scope: Scope, receive: Receive, send: Send) -> None:
            await count(scope, receive, send)
            raise KeyError(5)

        assert len(respond(fail_later, "/x")[2]) == 2
        assert "KeyError(5)" in capsys.readouterr().err

    @pytest.mark.parametrize("route", [*UNUSED, "file=http://a/", "file/https://a/", "file=x://a"])
    def test_routes_that_the_page_does_not_need_are_closed(self, route):
        assert respond(count, f"/gradio_api/{route}")[0] == 404
        assert respond(count, f"/root/gradio_api/{route}")[0] == 404

    @pytest.mark.parametrize("route", ["file=/tmp/a.png", "upload", "queue/join", "call/predict", "info"])
    def test_those_that_it_needs_are_open(self, route):
        assert respond(count, f"/gradio_api/{route}")[0] == 200
