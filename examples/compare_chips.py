# %% [markdown]
# # Which chip, which format?
# Comparing chips for private training of ViT-B/16, with no device at all. The cells run in any editor that knows
# `# %%`, and the file as a script: `python examples/compare_chips.py`

# %%
import torch

from dpquant.models import build_model
from hwmodels import estimate, load_profile, trace
from hwmodels.explore import break_even, pareto, sweep
from hwmodels.planner import reach

CHIPS = {"a100": "int8", "h100": "float8_e4m3fn", "l40s": "float8_e4m3fn", "b200": "nvfp4"}
profiles = {name: load_profile(name) for name in CHIPS}

# %% [markdown]
# The workload is read off the model by its shapes, on meta tensors: a network of any size takes a moment.

# %%
with torch.device("meta"):
    model = build_model("vit_b_16")
workload = trace(model, torch.zeros(1, 3, 224, 224, device="meta"), batch_size=1024)
print(f"{len(workload.quantizable)} layers can be quantized")

# %% [markdown]
# Each chip with a narrow format that its matrix unit takes, all layers quantized. `speedup` is over bfloat16
# training on the same chip; `reach` quantizes only those layers that gain by it. The batch goes through memory in
# passes of 256 examples, which fit everywhere.

# %%
print(f"{'chip':6s} {'format':14s} {'step':>9s} {'speedup':>8s} {'at most':>8s} {'energy':>8s} {'memory':>8s}  bound")
for name, profile in profiles.items():
    fmt = CHIPS[name]
    found = estimate(workload, dict.fromkeys(workload.quantizable, fmt), profile, physical_batch_size=256)
    most = reach(workload, profile, fmt, physical_batch_size=256)
    print(
        f"{name:6s} {fmt:14s} {1e3 * found.step_s:6.1f} ms {found.speedup:7.2f}x {most.max_speedup:7.2f}x "
        f"{found.energy_joules or float('nan'):6.1f} J {found.peak_memory_bytes / 1e9:5.1f} GB  {found.bound}"
    )

# %% [markdown]
# Where the time goes on one of them: phases add up to the step.

# %%
found = estimate(workload, dict.fromkeys(workload.quantizable, "nvfp4"), profiles["b200"])
plain = estimate(workload, {}, profiles["b200"])
for phase, seconds in found.phases.items():
    print(f"{phase:22s} {1e3 * seconds:7.2f} ms in nvfp4, {1e3 * plain.phases[phase]:7.2f} ms in bfloat16")
assert abs(sum(found.phases.values()) - found.step_s) < 1e-9

# %% [markdown]
# From which batch size on does the format pay, and how does the speedup grow with it?

# %%
pays = break_even(workload, profiles["b200"], "nvfp4")
first = pays.first_layer_batch_size
print(f"b200, nvfp4: all layers together pay from a batch of {pays.batch_size}, some layer from {first}")
for fmt, at in sweep(workload, profiles["b200"], ["float8_e4m3fn", "nvfp4"], [32, 256, 2048]):
    print(f"  batch {at.batch_size:5d} {fmt:14s} {at.speedup:.2f}x")

# %% [markdown]
# DPQuant quantizes a share of the layers. How the share turns into speedup, if the best layers are taken, and on
# average over random draws:

# %%
points = pareto(workload, profiles["b200"], "nvfp4", draws=20)
for point in points[:: max(1, len(points) // 6)]:
    print(f"  {point.quantized:3d} layers ({point.fraction:4.0%}): best {point.best:.2f}x, drawn {point.drawn:.2f}x")
