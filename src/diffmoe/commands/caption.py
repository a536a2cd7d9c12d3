"""`caption`: a sentence for each picture, as JSON and as a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffmoe.commands.captions import SHEET, save_captions, write_captions
from diffmoe.commands.use import open_model
from diffmoe.config import GenerationConfig, UserError
from diffmoe.files import check_writable
from diffmoe.model.captioner import Captioner


def caption(
    images: Sequence[str], checkpoint: str, config: GenerationConfig, *, seed: int, output_dir: str, device: str
) -> list[str]:
    """A caption for each picture file, also saved as `captions.json` and drawn as `captions.png` in `output_dir`."""
    from diffmoe.visualization import captions, figures

    folder = Path(output_dir)
    check_writable(folder)
    used = open_model(checkpoint, device)
    if not isinstance(used.model, Captioner):
        raise UserError(f"{checkpoint} tells classes apart: captions need a model trained on captions, as on flickr8k")
    pictures = used.read(images)
    written = write_captions(used.model, pictures, used.info, config, seed)
    save_captions(folder / "captions.json", list(images), written)
    figures.save(captions.caption_sheet(pictures[:SHEET], written[:SHEET]), folder / "captions.png")
    return written
