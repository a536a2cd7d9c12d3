"""The texts of the page."""

from __future__ import annotations

from diffmoe.app.answers import FOUND
from diffmoe.visualization.language import say


def texts() -> dict[str, dict[str, str]]:
    """What is written on each part of the page, in the current language."""
    no_gallery = say("There is no gallery: start the page with --gallery DIR, a folder of pictures.")
    return {
        "title": {"value": "## Diff-MoE · " + say("see what the experts do")},
        "picture": {"label": say("Picture"), "placeholder": say("Drop a picture here, or click to choose one")},
        "model": {"label": say("Model")},
        "classes": {"label": say("Probability of each class")},
        "caption": {"label": say("What the model writes")},
        "zero_shot_tab": {"label": say("Own labels")},
        "labels": {
            "label": say("Labels"),
            "info": say("Names or whole sentences, each on a line of its own or between commas."),
        },
        "compare": {"value": say("Compare")},
        "likely": {"label": say("Probability of each label (zero-shot)")},
        "retrieve_tab": {"label": say("Search")},
        "no_gallery": {"value": no_gallery},
        "query": {"label": say("Text"), "info": say("Where it is empty, the picture is searched for.")},
        "folder": {"label": say("Folder of the gallery")},
        "search": {"value": say("Search")},
        "found": {"label": say("The {count} best, with their similarity", count=FOUND)},
        "routing_tab": {"label": say("Experts")},
        "dense": {"value": say("This model is dense: it has no experts, so there is no routing to show.")},
        "block": {"label": say("Block"), "info": say("0 shows all blocks of the image tower.")},
        "routing": {"label": say("Which expert takes which patch")},
        "routing_reading": {
            "value": say(
                "A patch has the colour of the expert that takes it, and a corner in that of the second, if it has one."
            )
        },
        "attention_tab": {"label": say("Attention")},
        "seen": {"label": say("As the model sees it")},
        "patch": {"label": say("Patch"), "info": say("Click on a patch of the picture; 0 is the mean over all.")},
        "attention_reading": {"value": say("The brighter a patch, the more the chosen one looks at it.")},
        "attention": {"label": say("Where the patch looks")},
    }
