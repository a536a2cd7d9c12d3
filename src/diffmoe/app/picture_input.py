"""Where the page takes a picture."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta


class WritesNoStub(ComponentMeta):
    """gradio's metaclass, less that it writes a `.pyi` file beside every file that derives from a component."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, object]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attributes)


class PictureInput(gr.Image, metaclass=WritesNoStub):
    """gradio's picture, handed on as the path of the file: `read_upload` checks it where it opens it."""

    is_template = True  # it looks as its parent does

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path
