"""The library without the command line: build the model, take a training step, look at who went where.

Run it with `python examples/train_in_python.py`.
"""

import torch

from diffmoe import ImageClassifier, ModelConfig
from diffmoe.config import DataConfig
from diffmoe.data import Batches, class_descriptions, load_dataset, tokenize


def main() -> None:
    """Train a small classifier on handwritten digits for a few seconds."""
    torch.manual_seed(0)
    data = load_dataset(DataConfig(dataset="digits"), img_size=8, in_channels=1)
    config = ModelConfig(
        img_size=8, patch_size=2, embed_dim=64, num_heads=4, img_encoder_layers=2, text_encoder_layers=1,
        num_general_experts=8, expansion_factor=1, dropout=0.0, use_gradient_checkpointing=False, patch_embed="conv",
    )  # fmt: skip

    # Every class is described by sentences; the contrastive loss reads them, the head never does.
    sentences = class_descriptions(data.name, data.class_names)
    tokens, mask = tokenize([sentence for of_class in sentences for sentence in of_class], config.max_text_len)
    shape = (len(sentences), len(sentences[0]))
    model = ImageClassifier(config, tokens.unflatten(0, shape), mask.unflatten(0, shape))

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    train = Batches(data.train, 64, mean=data.mean, std=data.std, shuffle=True)
    for epoch in range(6):
        for images, labels in train.epoch(epoch):
            out = model(images, labels)
            loss = torch.nn.functional.cross_entropy(out["logits"], labels) + out["router_loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    test = Batches(data.test, 500, mean=data.mean, std=data.std)
    with torch.inference_mode():
        for images, labels in test.epoch():
            out = model(images)
            print(f"accuracy on {len(labels)} test pictures: {(out['logits'].argmax(-1) == labels).float().mean():.1%}")
            for routing in out["routing"]:
                load = routing.tokens_per_expert.tolist()
                print(f"{routing.place:6} block {routing.layer}: tokens of each expert {load}")


if __name__ == "__main__":
    main()
