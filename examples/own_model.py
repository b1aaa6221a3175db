"""Your own model in your own loop: private, partly in FP4, evaluated every epoch, weights saved.

Run: python examples/own_model.py [EPOCHS]
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant import DPQuantEngine
from dpquant.data import DataSettings, load_data
from dpquant.sensitivity import AnalysisSettings


def my_model() -> nn.Module:
    """Any model whose layers keep examples apart; GroupNorm where you would have BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 3) -> None:
    torch.manual_seed(0)  # of the initial weights alone: the engine draws its own randomness, secret without a seed
    data = load_data(DataSettings(name="digits"))  # or your own data set of (input, label) pairs
    train: TensorDataset = data.train
    model = my_model()

    engine = DPQuantEngine(
        hardware="b200",
        basis="peak",
        format="luq_fp4",
        scheduler="dpquant",
        fraction=0.5,  # of the layers, in every epoch; or target_speedup=..., which a chip must be able to reach
        analysis=AnalysisSettings(interval=2, expected_batch_size=256),
    )
    module, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(train, batch_size=128),
        target_epsilon=8.0,
        target_delta=1e-4,
        epochs=epochs,
        max_grad_norm=1.0,
        sample_rate=128 / 1500,  # public numbers; left out, they are taken from the loader, with a warning
        expected_batch_size=128,
    )
    print(f"at most {engine.reach.max_speedup:.2f}x in FP4; noise multiplier {engine.noise_multiplier:.2f}")

    for epoch in engine.epochs():
        module.train()
        for x, y in loader:  # Poisson batches; quantized while this loop runs
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
        reached = accuracy(module, *data.test.tensors)  # outside it: full precision
        print(
            f"epoch {epoch.index + 1}: {len(epoch.plan)} of {len(engine.workload.quantizable)} layers in FP4 "
            f"({', '.join(epoch.plan)}), modelled speedup {epoch.speedup:.2f}x, "
            f"accuracy {reached:.1%}, epsilon {engine.epsilon():.2f}"
        )

    torch.save(model.state_dict(), "weights.pt")  # the names and shapes are those of the model before
    fresh = my_model()
    fresh.load_state_dict(torch.load("weights.pt", weights_only=True))
    print(f"saved to weights.pt; a fresh stock model has accuracy {accuracy(fresh, *data.test.tensors):.1%} with them")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
