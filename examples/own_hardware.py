"""Your own hardware profile: a variant of a chip that ships, checked, and asked what it would buy.

Run: python examples/own_hardware.py
"""

from pathlib import Path

import torch

from dpquant.models import build_model
from hwmodels import estimate, list_profiles, load_profile, trace
from hwmodels.profile import check

# Every number says where it is from; what is not said is the base's. This chip is made up.
PROFILE = """\
extends: b200
title: A B200 with slower memory, 600 W
note: made up for this example
sources:
  DS: {title: "A datasheet", url: "https://example.com/datasheet"}
memory:
  capacity_bytes: {value: 96e9, status: assumed, source: DS, note: "half of B200's"}
  bandwidth_bytes_per_s: {value: 4e12, status: assumed, source: DS, note: "half of B200's"}
power:
  limit_w: {value: 1000, status: published, source: DS}
  idle_w: {value: 140, status: assumed, source: DS, note: "as B200"}
"""


def main() -> None:
    folder = Path("chips")
    folder.mkdir(exist_ok=True)
    path = folder / "my_chip.yaml"

    path.write_text(PROFILE.replace("bandwidth_bytes_per_s", "bandwith_bytes_per_s"))
    print("with a slip of the pen, `check` says:")
    for problem in check(path):
        print(f"  {problem}" + (f" ({problem.hint})" if problem.hint else ""))

    path.write_text(PROFILE)
    assert check(path) == []
    assert "my_chip" in list_profiles(folder)

    torch.manual_seed(0)
    model = build_model("resnet18", stem="cifar")
    workload = trace(model, torch.zeros(1, 3, 32, 32), batch_size=1024)  # shapes alone: nothing is computed
    print("\nResNet-18 on 3x32x32, batch 1024, DP-SGD, every layer in NVFP4:")
    for name in ("b200", path):
        chip = load_profile(name)
        found = estimate(workload, dict.fromkeys(workload.quantizable, "nvfp4"), chip)
        assert found.energy_joules is not None
        print(
            f"  {chip.name:8s} {1e3 * found.step_s:6.2f} ms a step, {found.speedup:.2f}x over bfloat16, "
            f"{found.energy_joules:5.1f} J, {found.peak_memory_bytes / 1e9:.1f} GB, bound by {found.bound}"
        )


if __name__ == "__main__":
    main()
