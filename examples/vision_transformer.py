# %% A small vision transformer, from PyTorch to an engine whose attention is the plugin.
# Usage: python examples/vision_transformer.py [--output-dir vit]
# Needs: pip install '.[onnx]' torch
# For the engine: TensorRT, a GPU, and `pyfmha build --dtype fp32 --head-size 64`.
import argparse
from pathlib import Path

import numpy as np

from pyfmha.onnx.command import rewrite
from pyfmha.onnx.engine import build_onnx_engine, parsed_range
from pyfmha.trt.modules import MODULES
from pyfmha.trt.session import Session

parser = argparse.ArgumentParser(description="A vision transformer with the plugin's attention.")
parser.add_argument("--output-dir", "--output_dir", type=Path, default=Path("vit"))
folder = parser.parse_args().output_dir
try:
    import torch
    from torch import nn
except ModuleNotFoundError:
    parser.exit(2, "error: PyTorch is not installed: pip install torch\n")
folder.mkdir(parents=True, exist_ok=True)


# %% The model, as one writes it: no mention of the plugin.
class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.project(self.before(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.wide(self.between(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 128, heads: int = 2, depth: int = 2, patch: int = 16, image: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.classes = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.classes(self.blocks(x).mean(1))


# %% PyTorch to ONNX.
torch.manual_seed(0)
model, images = VisionTransformer().eval(), torch.randn(2, 3, 64, 64)
batch = torch.export.Dim("batch", min=1, max=8)
program = torch.onnx.export(
    model, (images,), dynamo=True, opset_version=20, dynamic_shapes=({0: batch},), input_names=["images"],
    output_names=["classes"], verbose=False,
)  # fmt: skip
program.save(str(folder / "model.onnx"))

# %% Its attention replaced, and both models compared: what `pyfmha onnx model.onnx --prove` does.
done = rewrite(folder / "model.onnx", folder / "model.pyfmha.onnx", proof=True)
for entry in done.report.found:
    print(f"{entry.name}: {entry.problem or entry.reason}")
for trial in done.trials:
    print(f"{trial.sizes}: {'same' if trial.same else 'DIFFERENT'}, {trial.compared[0]}")
if not done.same:
    raise SystemExit(1)

# %% An engine, and its answer beside PyTorch's: what `pyfmha onnx-engine` and Session do.
try:
    __import__(MODULES[0])
except ImportError:
    print(f"No engine: TensorRT is not installed. The model is {folder / 'model.pyfmha.onnx'}.")
    raise SystemExit(0) from None
built = build_onnx_engine(
    folder / "model.pyfmha.onnx", {"images": parsed_range(("1x3x64x64", "2x3x64x64", "8x3x64x64"))}
)
(folder / "model.engine").write_bytes(built.plan)
with Session(folder / "model.engine") as session:
    answer = session.run({"images": images.numpy()})["classes"]
print(f"largest difference to PyTorch: {np.abs(answer - model(images).detach().numpy()).max():.1e}")
