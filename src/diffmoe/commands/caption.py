"""`caption`: a sentence for each picture, as JSON and as a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffmoe.commands.captions import FILE, SHEET, check_captions_file, is_captions_file, save_captions, write_captions
from diffmoe.commands.use import open_model
from diffmoe.config import UserError
from diffmoe.files import check_writable
from diffmoe.model.captioner import Captioner
from diffmoe.recipes import generation_config


def caption(
    images: Sequence[str],
    checkpoint: str,
    given: Mapping[str, Any],
    *,
    seed: int,
    output_dir: str,
    device: str,
    overwrite: bool = False,
) -> list[str]:
    """A caption for each picture file, also saved as `captions.json` and drawn as `captions.png` in `output_dir`.

    What an earlier call wrote is replaced; other files of these names only where told to `overwrite`. Its own are a
    `captions.json` in the layout and with the keys that it writes, and the `captions.png` beside such a one.

    `given`: fields of `GenerationConfig`; the others are as the recipe of the model's dataset has them.
    """
    from diffmoe.visualization import captions, figures

    folder = Path(output_dir)
    texts, sheet = folder / FILE, folder / "captions.png"
    check_writable(folder)
    check_captions_file(texts, overwrite)
    if sheet.exists() and not overwrite and not is_captions_file(texts):
        raise UserError(f"{sheet} is not one that this program wrote: give another --output_dir or --overwrite")
    used = open_model(checkpoint, device)
    if not isinstance(used.model, Captioner):
        raise UserError(f"{checkpoint} tells classes apart: captions need a model trained on captions, as on flickr8k")
    pictures = used.read(images)
    config = generation_config(used.info.dataset, **given)
    written = write_captions(used.model, pictures, used.info, config, seed)
    save_captions(texts, list(images), written)
    figures.save(captions.caption_sheet(pictures[:SHEET], written[:SHEET]), sheet)
    return written
