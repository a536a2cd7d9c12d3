"""The page's layout and events, in gradio. What is written on it stands in `texts`.

The named endpoints (`/predict`, `/zero_shot`, `/caption`, `/retrieve`, `/routing`, `/attention`) are for gradio_client.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image

from diffmoe.app.answers import Answers
from diffmoe.app.guard import GuardedBlocks
from diffmoe.app.picture_input import PictureInput
from diffmoe.app.seen import not_on_picture, patch_at
from diffmoe.app.texts import texts
from diffmoe.visualization.colors import THEMES, shown_in
from diffmoe.visualization.language import Language, speaking
from diffmoe.visualization.style import styled

DPI = 130
MOST = 10_000
"""Of a slider before a model is known; `Answers` says what is too much."""
HIDDEN: dict[str, Any] = {"api_visibility": "private"}
BROWSERS_THEME = "() => document.body.classList.contains('dark') ? 'dark' : 'light'"


class Page:
    """The page of these answers, in `blocks`. `parts` are its components by the names that `texts` has for them."""

    def __init__(self, answers: Answers, language: Language) -> None:
        self.answers = answers
        with speaking(language):
            self.texts = texts()
        self.parts: dict[str, Any] = {}
        # Uploads and answers are files; after an hour they are removed.
        with GuardedBlocks(
            language, title="Diff-MoE", analytics_enabled=False, delete_cache=(600, 3600)
        ) as self.blocks:
            self._lay_out(language)
            self._connect_answers()
            self._connect_page()

    def _add(self, kind: Callable[..., Any], name: str, **settings: Any) -> Any:
        self.parts[name] = kind(elem_id=name, **self.texts.get(name, {}), **settings)
        return self.parts[name]

    def _lay_out(self, language: Language) -> None:
        names = self.answers.models.names()
        with gr.Row(equal_height=True):
            self._add(gr.Markdown, "title")
            languages = [("English", "en"), ("中文", "zh")]
            plain = {"show_label": False, "container": False, "scale": 0, "min_width": 300}
            self._add(gr.Radio, "language", choices=languages, value=language, **plain)
        self._add(gr.Radio, "theme", choices=list(THEMES), value="light", visible=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._add(PictureInput, "picture", type="filepath", sources=["upload", "clipboard"], height=260)
                self._add(gr.Label, "classes")
                self._add(gr.Textbox, "caption", interactive=False, lines=2, visible=False)
                self._add(gr.Dropdown, "model", choices=names, value=names[0], allow_custom_value=True)
                self._add(gr.Markdown, "about")
                # Nobody has to press these: they carry the endpoints of what comes by itself.
                for name in ("predict", "write", "route", "look"):
                    self._add(gr.Button, name, visible=False)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                self._lay_out_tabs()

    def _lay_out_tabs(self) -> None:
        has_gallery = self.answers.gallery is not None
        shown: dict[str, Any] = {"format": "png", "interactive": False, "show_label": False}
        with self._add(gr.Tab, "routing_tab"):
            self._add(gr.Markdown, "dense", visible=False)
            self._add(gr.Slider, "block", minimum=0, maximum=MOST, step=1, value=0)
            self._add(gr.Markdown, "routing_reading")
            self._add(gr.Image, "routing", buttons=["download", "fullscreen"], **shown)
        with self._add(gr.Tab, "attention_tab"):
            with gr.Row():
                self._add(gr.Image, "seen", height=230, scale=1, min_width=230, buttons=[], **shown)
                with gr.Column(scale=2, min_width=300):
                    self._add(gr.Slider, "patch", minimum=0, maximum=MOST, step=1, value=0)
                    self._add(gr.Markdown, "attention_reading")
            self._add(gr.Image, "attention", buttons=["download", "fullscreen"], **shown)
        with self._add(gr.Tab, "zero_shot_tab"):
            self._add(gr.Textbox, "labels", lines=3)
            self._add(gr.Button, "compare")
            self._add(gr.Label, "likely")
        with self._add(gr.Tab, "retrieve_tab"):
            self._add(gr.Markdown, "no_gallery", visible=not has_gallery)
            with gr.Row(visible=has_gallery):
                self._add(gr.Textbox, "query")
                folders = self.answers.folders() or ["."]
                self._add(gr.Dropdown, "folder", choices=folders, value=".", allow_custom_value=True)
            self._add(gr.Button, "search", visible=has_gallery)
            self._add(gr.Gallery, "found", columns=4, object_fit="contain", visible=has_gallery, format="jpeg")

    def _connect_answers(self) -> None:
        """The named endpoints, each on the button or slider that asks for it."""
        answers, parts = self.answers, self.parts

        def predict(picture: str | None, model: str | None, language: Language) -> dict[str, float]:
            return answers.predict(picture, model)

        def zero_shot(picture: str | None, labels: str, model: str | None, language: Language) -> dict[str, float]:
            return answers.zero_shot(picture, labels, model)

        def caption(picture: str | None, model: str | None, language: Language) -> str:
            return answers.caption(picture, model)

        def retrieve(text: str, picture: str | None, folder: str, model: str | None, language: Language) -> Any:
            return answers.retrieve(text, picture, folder, model)

        def routing(
            picture: str | None, block: int, model: str | None, language: Language, theme: str = "light"
        ) -> Any:
            with shown_in(THEMES[theme]):
                return drawn(answers.routing(picture, block, model))

        def attention(
            picture: str | None, patch: int, model: str | None, language: Language, theme: str = "light"
        ) -> Any:
            with shown_in(THEMES[theme]):
                return drawn(answers.attention(picture, patch, model)), answers.seen(picture, patch, model)

        def connect(event: Any, answer: Callable[..., Any], inputs: str, outputs: str, **options: Any) -> None:
            given, shown = ([parts[name] for name in names.split()] for names in (inputs, outputs))
            options = options or {"api_name": answer.__name__}
            event(answer, given, shown, trigger_mode="always_last", **options)

        connect(parts["predict"].click, predict, "picture model language", "classes")
        connect(parts["compare"].click, zero_shot, "picture labels model language", "likely")
        connect(parts["write"].click, caption, "picture model language", "caption")
        connect(parts["search"].click, retrieve, "query picture folder model language", "found")
        connect(parts["route"].click, routing, "picture block model language", "routing")
        connect(parts["look"].click, attention, "picture patch model language", "attention seen")
        # What the page itself asks for is drawn for the light or for the dark.
        connect(parts["block"].input, routing, "picture block model language theme", "routing", **HIDDEN)
        connect(parts["patch"].input, attention, "picture patch model language theme", "attention seen", **HIDDEN)
        self._attention = attention

    def _connect_page(self) -> None:
        """What follows a new picture, another model, another language, a click on a patch."""
        parts = self.parts
        looked = [parts[name] for name in ("picture", "model", "block", "patch", "language", "theme")]
        shown = [parts[name] for name in ("classes", "caption", "routing", "attention", "seen")]
        chosen = [parts["model"], parts["language"]]
        fitted = [parts[name] for name in ("classes", "caption", "dense", "block", "patch")]

        def about(model: str | None, language: Language) -> str:
            return self.answers.models.about(model)

        parts["picture"].upload(self._show, looked, shown, **HIDDEN)
        parts["picture"].clear(self._show, looked, shown, **HIDDEN)
        self.blocks.load(None, None, parts["theme"], js=BROWSERS_THEME, **HIDDEN)
        listed = self.blocks.load(self._models, None, parts["model"], **HIDDEN)
        for begin in (listed.then, parts["model"].change):
            told = begin(about, chosen, parts["about"], **HIDDEN)
            told.success(self._adapt, parts["model"], fitted, **HIDDEN).success(self._show, looked, shown, **HIDDEN)
        labelled = [parts[name] for name in self.texts]
        relabelled = parts["language"].change(self._relabel, parts["language"], labelled, **HIDDEN)
        retold = relabelled.then(about, chosen, parts["about"], **HIDDEN)
        retold.success(self._show, looked, shown, **HIDDEN)
        clicked = parts["seen"].select(self._clicked, parts["model"], parts["patch"], **HIDDEN)
        asked = [parts[name] for name in ("picture", "patch", "model", "language", "theme")]
        clicked.success(self._attention, asked, [parts["attention"], parts["seen"]], **HIDDEN)

    def _show(
        self, picture: str | None, model: str | None, block: int, patch: int, language: Language, theme: str
    ) -> Iterator[dict[Any, Any]]:
        """All that is shown of a picture: an old one's is cleared, then the answer comes, at last both maps.

        Once the maps are there nothing more comes: it would undo what a slider asked for in the meantime.
        """
        answers, parts = self.answers, self.parts
        shown: dict[Any, Any] = dict.fromkeys(
            parts[name] for name in ("classes", "caption", "routing", "attention", "seen")
        )
        yield shown
        if picture is None:
            return
        # Each time all there is: of parts handed over one by one in a hurry gradio loses some.
        if answers.models.is_classifier(model):
            shown[parts["classes"]] = answers.predict(picture, model)
        else:
            shown[parts["caption"]] = answers.caption(picture, model)
        yield shown
        with shown_in(THEMES[theme]):
            if not answers.models.open(model).model.config.dense:
                shown[parts["routing"]] = drawn(answers.routing(picture, block, model))
            shown[parts["attention"]] = drawn(answers.attention(picture, patch, model))
        shown[parts["seen"]] = answers.seen(picture, patch, model)
        yield shown

    def _models(self) -> Any:
        """The models that there are now; asked when the page is loaded."""
        return gr.update(choices=self.answers.models.names())

    def _adapt(self, model: str | None) -> list[Any]:
        """The answer and the sliders that fit the model."""
        config, is_classifier = self.answers.models.open(model).model.config, self.answers.models.is_classifier(model)
        return [
            gr.update(visible=is_classifier),
            gr.update(visible=not is_classifier),
            gr.update(visible=config.dense),
            gr.update(visible=not config.dense, maximum=config.img_encoder_layers, value=0),
            gr.update(maximum=config.num_patches, value=0),
        ]

    def _clicked(self, model: str | None, click: gr.EventData) -> int:
        """The number of the patch that was clicked on."""
        match click._data:  # not `gr.SelectData`, which takes for granted what is in it
            case {"index": [int() | float() as x, int() | float() as y]}:
                return patch_at(self.answers.models.open(model).model.config, x, y)
        raise not_on_picture()

    def _relabel(self, language: Language) -> list[Any]:
        """Every text of the page, in another language."""
        with speaking(language):
            return [gr.update(**written) for written in texts().values()]


def drawn(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    written = io.BytesIO()
    with styled():  # savefig too reads matplotlib's global settings
        figure.savefig(written, format="png", dpi=DPI)
    return Image.open(written)


def build(answers: Answers, language: Language) -> gr.Blocks:
    """The page, not yet served. Raises `UserError` where there is no model file."""
    return Page(answers, language).blocks
