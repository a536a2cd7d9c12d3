"""Between strangers and the page: what they send is checked before gradio sees it, every refusal is one sentence."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi.exceptions import RequestValidationError
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffmoe.app.picture_input import PictureInput
from diffmoe.app.uploads import MAX_BYTES, no_upload
from diffmoe.config import UserError
from diffmoe.visualization.language import LANGUAGES, Language, say, speaking

if TYPE_CHECKING:  # older versions of gradio have it elsewhere
    from gradio.block_function import BlockFunction

MAX_TEXT = 20_000
"""Characters of labels or of a text to search for."""
MAX_NAME = 1000
"""Characters of the name of a model or of a folder."""
MAX_REQUEST = 1_000_000
"""Bytes of a request's body, less the picture that it brings."""

UNUSED = ("proxy=", "process_recording", "component_server", "custom_component", "deep_link", "stream/", "vibe-")
"""Beginnings of routes that gradio has and this page does not need: they fetch, start programs, call and write."""


class GuardedBlocks(gr.Blocks):
    """A page that answers, and refuses, in the language that is asked for: `language` where none is.

    Whatever is asked, by the page, by `gradio_client` or by hand, comes through here. A `UserError` becomes a sentence
    on the page. Another exception is a fault of ours: its traceback is for the log, not for strangers.
    """

    def __init__(self, language: Language, **settings: Any) -> None:
        self.language: Language = language
        super().__init__(**settings)

    async def process_api(
        self, block_fn: BlockFunction | int, inputs: list[Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in `gr.Blocks`, but raises `gr.Error` only."""
        function = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        with speaking(_language_of(function.inputs, inputs) or self.language):
            try:
                return await super().process_api(function, inputs, *args, **kwargs)
            except UserError as error:
                # The page takes messages for HTML, and a file may be called anything.
                raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
            except Exception as error:
                raise gr.Error(say("The page failed: the log of its server says why.")) from error

    async def preprocess_data(self, block_fn: BlockFunction, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """As in `gr.Blocks`, of checked inputs. Raises `UserError`."""
        if len(inputs) < (count := len(block_fn.inputs)):
            raise UserError(say("Too little was sent: it must be {count} values.", count=count))
        checked = [checked_input(*pair) for pair in zip(block_fn.inputs, inputs, strict=False)]
        try:
            return await super().preprocess_data(block_fn, checked, *args, **kwargs)
        except gr.Error as error:  # a slider's own check
            raise UserError(say("A number is out of its range on the page.")) from error


def checked_input(part: object, value: Any) -> Any:
    """What was sent for a part of the page, plain: nothing in it makes gradio look for a file or an address.

    Raises `UserError` where the part cannot have sent it.
    """
    match part, value:
        case PictureInput(), None:
            return None
        case PictureInput(), {"path": str(path)}:
            return {"path": path}  # without gradio's own mark nothing looks at it before `read_upload`
        case PictureInput(), _:
            raise no_upload()
        case gr.Textbox(elem_id=name), _:
            if value is None or (isinstance(value, str) and len(value) <= MAX_TEXT and _is_unicode(value)):
                return value or ""
            raise UserError(say("{name} must be a text of at most {limit} characters.", name=name, limit=MAX_TEXT))
        case gr.Dropdown(elem_id=name), _:
            if value is None or (isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()):
                return value
            raise UserError(say("{name} must be one of the names that the page offers.", name=name))
        case gr.Slider(elem_id=name), _:
            if isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
                return int(value)
            raise UserError(say("{name} must be a whole number.", name=name))
        case gr.Radio(elem_id=name, choices=choices), _:
            if value in (names := [choice for _, choice in choices]):
                return value
            raise UserError(say("{name} must be one of {names}.", name=name, names=", ".join(map(str, names))))
    raise TypeError(f"nothing is known of what a {type(part).__name__} sends")


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON may hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _language_of(parts: Sequence[object], values: Sequence[Any]) -> Language | None:
    """The language among what was sent."""
    for part, value in zip(parts, values, strict=False):
        if isinstance(part, gr.Radio) and value in LANGUAGES:
            return value
    return None


class RequestGuard:
    """Around gradio's routes: no body is read that is too large, and what a route cannot bear is not a traceback.

    Our own code raises nothing here: it runs within `GuardedBlocks`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        route = scope["path"].partition("/gradio_api/")[2]
        if route.startswith(UNUSED) or (route.startswith("file") and "://" in route):
            return await _refusal(404)(scope, receive, send)
        left = MAX_REQUEST + (MAX_BYTES if route.startswith("upload") else 0)
        last: Message = {}

        async def receive_some() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise ValueError("the body is too large")
            return message

        async def note_and_send(message: Message) -> None:
            nonlocal last
            last = message
            await send(message)

        try:
            await self.app(scope, receive_some, note_and_send)
        except Exception as error:
            asked = f"{scope['method']} {scope['path']:.100}: {error!r:.200}"
            print(f"a request that cannot be answered: {asked!a}", file=sys.stderr, flush=True)
            if not last:
                await _refusal(413 if left < 0 else 400)(scope, receive, send)
            elif last["type"] == "http.response.start" or last.get("more_body"):
                await send({"type": "http.response.body"})


def _refusal(status_code: int) -> JSONResponse:
    return JSONResponse({"detail": "This request cannot be answered."}, status_code)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    return _refusal(422)


APP_SETTINGS: dict[str, object] = {
    "middleware": [Middleware(RequestGuard)],
    "exception_handlers": {RequestValidationError: _refuse},  # FastAPI's own repeats all that was sent
}
"""Of the FastAPI application that serves the page."""
