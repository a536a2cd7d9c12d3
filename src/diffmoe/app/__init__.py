"""The web page: a picture in, what the model says of it and how it came to it out. On this machine, without a network.

`models` finds and opens model files, `uploads` opens what is handed in, `answers` computes, `page` lays it out with
gradio (the extra `app`), `guard` refuses what nobody should ask, `server` serves it. Nothing heavy is imported before
it is known that the page can be served.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.config import UserError, expanded

if TYPE_CHECKING:  # it comes with matplotlib
    from diffmoe.visualization.language import Language


def serve(
    checkpoints: Sequence[str],
    *,
    checkpoints_dir: str = "checkpoints",
    host: str = "127.0.0.1",
    port: int = 7860,
    gallery: str | None = None,
    language: Language = "en",
    device: str = "auto",
) -> None:
    """Serve the page until it is interrupted.

    Args:
        checkpoints: model files to choose from; where there are none, those in `checkpoints_dir` and its folders.
        checkpoints_dir: looked through again whenever the page is loaded.
        host: address to listen on.
        port: 1 to 65535.
        gallery: the only folder whose pictures may be searched; None: no retrieval.
        language: of the page when it opens.
        device: where to compute.

    Raises:
        UserError: without gradio, where the address is taken or is none, without a model file or the gallery.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app needs gradio: pip install 'diff-moe[app]'")
    check_address(host, port)
    searched = _folder(gallery)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: gradio would call home
    # The check that the page is up must not be sent through a proxy.
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), host]))
    with upload_folder() as uploads:
        from diffmoe.app.answers import Answers
        from diffmoe.app.models import Models
        from diffmoe.app.page import build
        from diffmoe.app.server import launch
        from diffmoe.hardware import pick_device

        pick_device(device)
        models = Models(checkpoints, Path(checkpoints_dir), device)
        for name in models.names() if checkpoints else models.names()[:1]:
            models.open(name)
        page = build(Answers(models, searched, uploads), language)
        launch(page, host, port)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does: uploads are not left behind
        print(f"open http://{f'[{host}]' if ':' in host else host}:{port}   (Ctrl-C ends it)", flush=True)
        if host not in ("127.0.0.1", "localhost", "::1"):
            print(f"note: with --host {host} everybody who reaches this machine can use the page", file=sys.stderr)
        page.block_thread()


def check_address(host: str, port: int) -> None:
    """Raises `UserError` where nothing can be served at `host` and `port`."""
    if not 1 <= port <= 65535:
        raise UserError(f"port is {port}: it must be from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # As the server will: a port that was just left is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host is {host!r}: it must be a name or address of this machine") from error
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used ({error.strerror}): give another --port") from error


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Where gradio puts uploads and answers: resolved, empty, this server's alone, removed at the end.

    gradio's own is shared by all pages of a user, and each serves whatever lies in it. `GRADIO_TEMP_DIR` says where it
    is made, and names it meanwhile. Raises `UserError` where it cannot be made.
    """
    named = os.environ.get("GRADIO_TEMP_DIR")
    try:
        if named:
            os.makedirs(named, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="diffmoe-app-", dir=named or None, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"GRADIO_TEMP_DIR is {named!r}: it must be a folder that can be written to") from error
    with made:
        folder = Path(made.name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            yield folder
        finally:
            if named is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = named


def _folder(gallery: str | None) -> Path | None:
    if gallery is None:
        return None
    folder = Path(expanded(gallery)).resolve()
    if not folder.is_dir():
        raise UserError(f"gallery is {gallery!r}: it must be a folder of pictures")
    return folder
