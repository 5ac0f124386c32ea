# %% A small language model with grouped heads and a cache, from PyTorch to an engine whose attention is the plugin.
# Usage: python examples/language_model.py [--output-dir llm]
# Needs: pip install '.[onnx]' torch
# For the engine: TensorRT, a GPU, and `pyfmha build --dtype fp32 --head-size 64`.
import argparse
from pathlib import Path

import numpy as np

from pyfmha.onnx.command import rewrite
from pyfmha.onnx.engine import build_onnx_engine, parsed_range
from pyfmha.trt.modules import MODULES
from pyfmha.trt.session import Session

parser = argparse.ArgumentParser(description="A language model with the plugin's attention.")
parser.add_argument("--output-dir", "--output_dir", type=Path, default=Path("llm"))
folder = parser.parse_args().output_dir
try:
    import torch
    from torch import nn
except ModuleNotFoundError:
    parser.exit(2, "error: PyTorch is not installed: pip install torch\n")
folder.mkdir(parents=True, exist_ok=True)
HEADS, KV_HEADS, SIZE, DEPTH, WORDS = 4, 2, 64, 2, 100


# %% The model. A step sees the keys and values of earlier ones, and gives back those of all.
class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(width, HEADS * SIZE), nn.Linear(width, 2 * KV_HEADS * SIZE)
        self.out, self.norm = nn.Linear(HEADS * SIZE, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tokens, _ = x.shape
        normed = self.norm(x)
        q = self.q(normed).view(batch, tokens, HEADS, SIZE).transpose(1, 2)
        new = self.kv(normed).view(batch, tokens, 2, KV_HEADS, SIZE).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([past, new], dim=3).unbind(0)
        keys, values = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
        at, key = torch.arange(tokens) + past.shape[3], torch.arange(k.shape[2])
        mask = torch.where(key[None, :] <= at[:, None], 0.0, float("-inf"))
        seen = torch.softmax(q @ keys.transpose(2, 3) / SIZE**0.5 + mask, dim=-1) @ values
        return x + self.out(seen.transpose(1, 2).reshape(batch, tokens, HEADS * SIZE)), torch.stack([k, v])


class LanguageModel(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(WORDS, width), nn.ModuleList(Layer(width) for _ in range(DEPTH))

    def forward(self, tokens: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, kept = self.words(tokens), []
        for layer, earlier in zip(self.layers, past.unbind(0), strict=True):
            x, all_of_it = layer(x, earlier)
            kept.append(all_of_it)
        return x @ self.words.weight.T, torch.stack(kept)


# %% PyTorch to ONNX.
torch.manual_seed(0)
model = LanguageModel().eval()
tokens, past = torch.randint(0, WORDS, (2, 3)), torch.randn(DEPTH, 2, 2, KV_HEADS, 5, SIZE)
axes = {name: torch.export.Dim(name, min=1, max=512) for name in ("batch", "seq", "past")}
program = torch.onnx.export(
    model, (tokens, past), dynamo=True, opset_version=20,
    dynamic_shapes=({0: axes["batch"], 1: axes["seq"]}, {2: axes["batch"], 4: axes["past"]}),
    input_names=["tokens", "past"], output_names=["scores", "present"], verbose=False,
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
ranges = {
    "tokens": parsed_range(("1x1", "2x3", "8x512")),
    "past": parsed_range(("2x2x1x2x1x64", "2x2x2x2x5x64", "2x2x8x2x512x64")),
}
built = build_onnx_engine(folder / "model.pyfmha.onnx", ranges)
(folder / "model.engine").write_bytes(built.plan)
with Session(folder / "model.engine") as session:
    answer = session.run({"tokens": tokens.numpy(), "past": past.numpy()})["scores"]
print(f"largest difference to PyTorch: {np.abs(answer - model(tokens, past)[0].detach().numpy()).max():.1e}")
