"""Your own number formats: a literal, and a few lines of YAML; compared on data, then trained with privately.

Run: python examples/own_format.py
"""

import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import DataLoader

from dpquant import PrivacyEvent, PrivacyLedger
from dpquant.clipping import PrivateOptimizer, private_criterion, private_module
from dpquant.data import DataSettings, load_data
from dpquant.models import build_model
from dpquant.privacy import epsilon
from dpquant.train import evaluate
from emulation import NumberFormat, Quantizer, quantize_model, set_plan
from emulation.compare import rank_formats
from emulation.formats import formats_from
from emulation.layers import quantizable_layers
from hwmodels.strict_yaml import load_yaml

# A format is a few integers; largest value, spacing and codes follow from them.
FP5 = NumberFormat(name="float5_e3m1", exponent_bits=3, mantissa_bits=1)

# Blocks of 16 of its elements, which share a power-of-two scale.
YAML = """\
float5_e3m1: {exponent_bits: 3, mantissa_bits: 1}
mxfp5: {element: float5_e3m1, block_size: 16, scale: float8_e8m0fnu, scale_rule: floor}
"""


def main() -> None:
    with open("formats.yaml", "w") as file:
        file.write(YAML)
    formats, _ = load_yaml("formats.yaml")
    mine = formats_from(formats)
    assert mine["float5_e3m1"] == FP5
    print(f"{FP5.name}: {FP5.bits} bits, {FP5.code_count} codes, up to {FP5.max_value}, from {FP5.min_subnormal}")
    print("  " + " ".join(f"{value:g}" for _, value in FP5.values() if value > 0))

    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    print("\nsignal to quantization noise on a normal distribution, one scale per row:")
    for found in rank_formats(x, ["float4_e2m1fn", *mine.values(), "float6_e3m2fn"], granularity="example"):
        print(f"  {found.format:14s} {found.bits_per_element:5.2f} bits  {found.sqnr_db:5.1f} dB")
    stored = Quantizer(FP5)(x)  # codes and scales; fake_quantize(x) gives the values alone
    print(f"  codes {tuple(stored.codes.shape)} {stored.codes.dtype}, scale {tuple(stored.scale.shape)}")

    # No chip has this format, so no hardware profile can time it and DPQuantEngine cannot plan with it:
    # these are the parts that the engine is made of.
    torch.manual_seed(0)
    data = load_data(DataSettings(name="digits"))
    model = build_model("digits_cnn")
    quantize_model(model, mine["mxfp5"])
    module = private_module(model)
    size, batch_size, noise_multiplier = len(data.train), 128, 1.0
    loader = DPDataLoader.from_data_loader(DataLoader(data.train, batch_size=batch_size))
    criterion = private_criterion(nn.CrossEntropyLoss())
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        expected_batch_size=batch_size,
        module=module,
    )

    set_plan(model, list(quantizable_layers(model)))  # names alone: all to the format given above
    module.train()
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(module(images), labels).backward()
        optimizer.step()
    set_plan(model, {})
    spent = PrivacyEvent(
        mechanism="training", noise_multiplier=noise_multiplier, sample_rate=loader.sample_rate, steps=len(loader)
    )
    _, accuracy = evaluate(module, data.test)
    epsilon_spent = epsilon(PrivacyLedger().record(spent), delta=0.1 / size)
    print(f"\none private epoch, every layer in mxfp5: accuracy {accuracy:.1%}, epsilon {epsilon_spent:.2f}")


if __name__ == "__main__":
    main()
