"""Public pre-training for the fine-tuning sweep: CIFAR-10's first five classes are public, the other five private.

    python benchmarks/pretrain.py DATA.npz OUT_DIR [--device cuda]

Writes OUT_DIR/private.npz (classes 5 to 9, as 0 to 4) and OUT_DIR/pretrained.pt (the network trained without privacy
on classes 0 to 4, its last layer left out); both are named in configs/sweeps/cifar10_finetune.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.data import DataSettings, load_data
from dpquant.models import build_model

OPTIONS = {"activation": "tanh", "norm": "none", "num_classes": 5}


def main() -> None:
    """Splits the data, trains, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10: a folder, an archive or an .npz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    splits = load_data(DataSettings(name="cifar10", root=args.data))
    (x, y), (x_test, y_test) = splits.train.tensors, splits.test.tensors
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {}
    for part, images, labels in (("train", x, y), ("test", x_test, y_test)):
        own = labels >= 5
        parts[f"x_{part}"] = images[own].numpy()  # standardised already: reading as npz must not do it again
        parts[f"y_{part}"] = (labels[own] - 5).numpy()
    for name in ("x_train", "x_test"):
        parts[name] = parts[name] * 0.5 + 0.5
    np.savez(args.out / "private.npz", **parts)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_model("cifar_cnn", **OPTIONS).to(args.device)
    public, public_test = y < 5, y_test < 5
    images, labels = x[public].to(args.device), y[public].to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(args.epochs):
        for chosen in torch.randperm(len(images), device=args.device).split(256):
            batch = images[chosen]
            batch = torch.where(torch.rand(len(batch), 1, 1, 1, device=args.device) < 0.5, batch.flip(3), batch)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[chosen]).backward()
            optimizer.step()
        right = accuracy(model, x_test[public_test].to(args.device), y_test[public_test].to(args.device))
        print(f"epoch {epoch + 1}: {100 * right:.1f} % of the public test images", flush=True)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items() if not name.startswith("fc2")}
    torch.save(state, args.out / "pretrained.pt")


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is told right."""
    outputs = torch.cat([model(part) for part in images.split(1000)])
    return float((outputs.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
