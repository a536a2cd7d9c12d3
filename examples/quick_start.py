"""The whole way in Python: train, test, use, look. No download.

Run it with `python examples/quick_start.py`; it writes to `checkpoints/example` and `visualizations/example`.
"""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from diffmoe import Predictor, test, train
from diffmoe.visualization import routing_map, save


def main() -> None:
    """Learn the handwritten digits, and ask for one of them."""
    # The arguments are the flags of `diffmoe train`; what comes back is what metrics.json holds.
    where = {"dataset": "digits", "save_dir": "checkpoints/example", "quiet": True}
    trained = train(epochs=3, overwrite=True, **where)
    print(f"{trained['parameters_active']:,} parameters active for a token, {trained['train_seconds']:.0f} s")
    tested = test(output_dir="visualizations/example", **where)
    print(f"test accuracy {tested['test_accuracy']:.1%}, by descriptions alone {tested['zero_shot_accuracy']:.1%}")

    # Pictures are paths or PIL's, one or several; a row belongs to each.
    predictor = Predictor("checkpoints/example/digits_model.pth")
    pixels, _ = load_digits(return_X_y=True)
    picture = Image.fromarray((pixels[0].reshape(8, 8) * 15).astype(np.uint8))
    [row] = predictor.classify(picture, top=3)
    print("the picture is", ", ".join(f"{p['class']} ({p['probability']:.1%})" for p in row["predictions"]))
    [row] = predictor.zero_shot(picture, ["a ring with an empty middle", "one upright stroke"])
    print("it looks like", row["predictions"][0]["class"])

    figure = routing_map(predictor.read(picture)[0], predictor.routing(picture))
    print("which expert takes which patch:", save(figure, "visualizations/example/routing.png"))


if __name__ == "__main__":
    main()
