"""The page, served: how it looks, and what may be handed to it."""

from __future__ import annotations

import gradio as gr
from gradio import themes

from diffmoe.app.guard import APP_SETTINGS
from diffmoe.app.uploads import MAX_BYTES
from diffmoe.config import UserError
from diffmoe.visualization.colors import DARK

FONT = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif")
CSS = """
.gradio-container {max-width: 1240px !important}
#picture .image-container img {width: 100%; height: 100%; object-fit: contain}
#classes {max-height: 260px; overflow-y: auto}
#seen img {image-rendering: pixelated; cursor: crosshair}
#about ul {font-size: 0.9em; margin: 0; padding-left: 1.4em}
#language label {white-space: nowrap}
#routing img {max-height: 560px; object-fit: contain}
#title {flex-basis: 18rem}
/* On a phone a figure is not shrunk until nothing in it can be read: it is moved sideways. */
@media (max-width: 640px) {
  #routing .image-container, #attention .image-container {overflow-x: auto; padding-top: 2rem}
  #routing .image-container > button, #attention .image-container > button {width: max-content; min-width: 100%}
  #routing .image-frame, #attention .image-frame {width: max-content}
  #routing img, #attention img {width: auto; height: auto; max-width: none; max-height: none; zoom: 0.58}
}
"""
CSS += f".dark #routing, .dark #attention {{background: {DARK.ground}}}"  # that of the figures


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Begin to serve the page, in threads.

    Raises `UserError` where the address was taken in the meantime.
    """
    theme = themes.Default(primary_hue="blue", font=FONT, font_mono=("ui-monospace", "monospace"))
    try:
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MAX_BYTES,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=["api"],
            theme=theme,
            css=CSS,
            app_kwargs=dict(APP_SETTINGS),  # gradio adds its own to it
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used: give another --port") from error
