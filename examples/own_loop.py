"""A training loop of your own: build the model, take the steps, look at who went where.

Run it with `python examples/own_loop.py`; it takes a few seconds and writes nothing.
"""

import torch

from diffmoe import ImageClassifier, ModelConfig
from diffmoe.config import DataConfig
from diffmoe.data.batches import Batches
from diffmoe.data.descriptions import class_descriptions
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.tasks.classification import class_tokens


def main(epochs: int = 3) -> None:
    """Train a small classifier on handwritten digits, and test it."""
    torch.manual_seed(0)
    data = load_dataset(DataConfig(dataset="digits"), PictureSpec(size=8, channels=1))
    config = ModelConfig(
        img_size=8, patch_size=2, embed_dim=64, num_heads=4, img_encoder_layers=2, text_encoder_layers=1,
        num_general_experts=8, expansion_factor=1, dropout=0.0, use_gradient_checkpointing=False, patch_embed="conv",
    )  # fmt: skip
    # Every class is described by sentences; the contrastive loss reads them, the head never does.
    model = ImageClassifier(config, *class_tokens(class_descriptions("digits", data.class_names), config.max_text_len))

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    train = Batches(data.train, 64, picture=data.picture, shuffle=True)
    for epoch in range(epochs):
        for images, labels in train.epoch(epoch):
            out = model(images, labels)
            loss = torch.nn.functional.cross_entropy(out["logits"], labels) + out["router_loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    [(images, labels)] = Batches(data.test, len(data.test), picture=data.picture).epoch()
    with torch.inference_mode():
        out = model(images)
    print(f"accuracy on {len(labels)} test pictures: {(out['logits'].argmax(-1) == labels).float().mean():.1%}")
    for routing in out["routing"]:
        load = routing.tokens_per_expert.tolist()
        print(f"{routing.place:6} block {routing.layer}: tokens of each expert {load}")


if __name__ == "__main__":
    main()
