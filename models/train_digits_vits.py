"""Trains the vision transformers that ship with the package, ``digits_vit``, ``digits_repavit`` and
``digits_repavit_ln``, and writes their ONNX files.

Run ``python -m channelfold.models.train_digits_vits [NAME …] [--out DIR]`` with the extras ``train`` and ``cpu``
installed; each takes a few minutes on two cores. Data, split and augmentation are those of ``train_digits_cnn``; seed,
schedule and thread count are fixed, and the last weights are kept: nothing is selected on the evaluation samples.

The network, for ``image`` float32 [N, 1, 8, 8] with pixel values 0..16, C = 48::

    Sub mean, Div std                                             [N, 1, 8, 8]
    patches     Conv 2x2, stride 2; class token, positions        [N, 17, C]
    4 blocks    x + proj(attention(LN(x))), 3 heads               [N, 17, C]
                x + ffn(x)                                        [N, 17, C]
    head        LN, class token, Gemm                             [N, 10] ``logits``

The three differ in the FFN alone. With H = 4 C hidden channels and k = H / 4 of them active (RePaViT, Xu et al., ICML
2025, section 3; its theta is 0.75 and its rho 4)::

    digits_vit          fc2(gelu(fc1(LN(x))))
    digits_repavit      fc2(BN2(idle(fc1(BN1(x)))))        idle(h) = [gelu(h_1 .. h_k), h_k+1 .. h_H]
    digits_repavit_ln   fc2(idle(fc1(LN(x))))

BN1 and BN2 take their statistics over samples and tokens. The export folds nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from channelfold.models.train_digits_cnn import METADATA, SEED, fitted, load, logits_of, replace, split

CHANNELS = 48
DEPTH = 4
HEADS = 3
HIDDEN = 4 * CHANNELS
ACTIVE = HIDDEN // 4  # the first of the hidden channels: theta = 0.75
EPOCHS = 240
PEAK_RATE = 2e-3
DECAY = 0.05

NAMES = ("digits_vit", "digits_repavit", "digits_repavit_ln")


def network(name: str, mean: np.ndarray, std: np.ndarray) -> Any:
    """The untrained network; ``mean`` and ``std`` are the per-channel input statistics, float32 [1, 1, 1, 1]."""
    import torch
    from torch import nn
    from torch.nn import functional

    class TokenBatchNorm(nn.BatchNorm1d):
        """BatchNormalization of the last axis of [N, T, C]."""

        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(CHANNELS)
            self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
            self.proj = nn.Linear(CHANNELS, CHANNELS)

        def forward(self, x):
            qkv = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, CHANNELS // HEADS))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            batch_norm = name == "digits_repavit"
            self.norm = TokenBatchNorm(CHANNELS) if batch_norm else nn.LayerNorm(CHANNELS)
            self.fc1 = nn.Linear(CHANNELS, HIDDEN)
            self.norm2 = TokenBatchNorm(HIDDEN) if batch_norm else nn.Identity()
            self.fc2 = nn.Linear(HIDDEN, CHANNELS)
            self.active = HIDDEN if name == "digits_vit" else ACTIVE

        def forward(self, x):
            return self.fc2(self.norm2(self.activate(self.fc1(self.norm(x)))))

        def activate(self, h):
            if self.active == HIDDEN:
                return functional.gelu(h)
            idle = h.clone()
            idle[..., : self.active] = functional.gelu(h[..., : self.active])
            return idle

    class VisionTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.from_numpy(mean))
            self.register_buffer("std", torch.from_numpy(std))
            self.patches = nn.Conv2d(1, CHANNELS, 2, stride=2)
            self.token = nn.Parameter(0.02 * torch.randn(1, 1, CHANNELS))
            self.positions = nn.Parameter(0.02 * torch.randn(1, 17, CHANNELS))
            self.attention = nn.ModuleList(Attention() for _ in range(DEPTH))
            self.ffn = nn.ModuleList(FeedForward() for _ in range(DEPTH))
            self.norm = nn.LayerNorm(CHANNELS)
            self.head = nn.Linear(CHANNELS, 10)

        def forward(self, image):
            x = self.patches((image - self.mean) / self.std).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
            for attention, ffn in zip(self.attention, self.ffn, strict=True):
                x = x + attention(x)
                x = x + ffn(x)
            return self.head(self.norm(x[:, 0]))

    return VisionTransformer()


def train(name: str, images: np.ndarray, labels: np.ndarray) -> Any:
    """The network after ``EPOCHS`` epochs on ``images`` float32 [N, 1, 8, 8] and ``labels`` int64 [N], in eval mode."""
    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = network(name, *(stat(images, axis=(0, 2, 3), keepdims=True) for stat in (np.mean, np.std)))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], lr=PEAK_RATE
    )
    return fitted(model, optimizer, images, labels, epochs=EPOCHS, max_lr=PEAK_RATE, pct_start=0.1)


def export(name: str, model: Any) -> onnx.ModelProto:
    """The trained network as ONNX: norms and idle channels as they were trained, the batch dimension ``N`` free."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter meets its own deprecations
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    # the exporter's notes on nodes and values (stack traces, sources) are longer than the graph
    for noted in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del noted.metadata_props[:]
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
    proto.graph.name = name
    onnx.helper.set_model_props(proto, METADATA | {"source": "channelfold/models/train_digits_vits.py"})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the vision transformers and write their ONNX files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)} [all]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to [the package]")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no network is called {unknown.pop()!r}. Known: {', '.join(NAMES)}")
    required = ("torch", "onnxscript", "sklearn", "onnxruntime")
    if missing := [module for module in required if importlib.util.find_spec(module) is None]:
        parser.error(f"{', '.join(missing)} cannot be imported. Run: pip install 'channelfold[train,cpu]'")
    arguments.out.mkdir(parents=True, exist_ok=True)

    images, labels = load()
    rows = split(labels)
    for name in arguments.names or NAMES:
        model = train(name, images[rows.train], labels[rows.train])
        proto = export(name, model)
        found = logits_of(model, proto, images[rows.evaluation]).argmax(axis=1)
        replace(arguments.out / f"{name}.onnx", proto.SerializeToString())
        correct = int((found == labels[rows.evaluation]).sum())
        print(
            f"{name}: {correct} of {len(found)} evaluation samples correct (stated in models/__init__.py and {name}.md)"
        )


if __name__ == "__main__":
    main()
