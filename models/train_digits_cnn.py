"""Trains ``digits_cnn``, the network that ships with the package, and writes its three files.

Run ``python -m channelfold.models.train_digits_cnn [--out DIR]`` with the extras ``train`` and ``cpu`` installed. The
training takes under a minute on two cores. Seed, split, schedule and thread count are fixed, so two runs with the same
PyTorch on the same kind of processor give the same weights. Nothing is selected on the evaluation samples: the schedule
has a fixed length, and the last weights are kept.

The network, for ``image`` float32 [N, 1, 8, 8] with pixel values 0..16::

    Sub mean, Div std                                    [N,  1, 8, 8]
    stem        Conv 3x3, no padding       + BN + ReLU   [N, 32, 6, 6]
    residual    Conv 3x3 + BN + ReLU,
                Conv 3x3 + BN, Add         +      ReLU   [N, 32, 6, 6]
    widen       Conv 3x3                   + BN + ReLU   [N, 64, 6, 6]
    pool        MaxPool 2x2                              [N, 64, 3, 3]
    depthwise   Conv 3x3, 64 groups        + BN + ReLU   [N, 64, 3, 3]
    pointwise   Conv 1x1                   + BN + ReLU   [N, 96, 3, 3]
    head        GlobalAveragePool, Flatten, Gemm         [N, 10] ``logits``

The stem has no padding, so that the subtraction of the mean folds into its bias exactly: a padded border has 0 where
the normalized image has -mean / std.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.session import Session

SEED = 0
EVALUATION_PER_CLASS = 50
CALIBRATION = 128
EPOCHS = 60
BATCH = 64
PEAK_RATE = 0.2
SPARSITY = 1.5e-3

METADATA = {
    "license": "Apache-2.0 (weights); CC-BY-4.0 (training data)",
    "source": "channelfold/models/train_digits_cnn.py",
    "dataset": "E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, https://doi.org/10.24432/C50P49; the 1797 samples that scikit-learn ships as load_digits",
}


@dataclass(frozen=True)
class Split:
    """Row numbers of the data set. ``calibration`` is part of ``train``; ``evaluation`` and ``train`` share no row."""

    train: np.ndarray
    calibration: np.ndarray
    evaluation: np.ndarray


def split(labels: np.ndarray) -> Split:
    """The fixed split: 50 samples of every class for evaluation, the others for training.

    ``labels`` is int [N], classes 0..9. Calibration takes 128 of the training samples. The indices come from numpy's
    ``RandomState``, whose stream is frozen, so they are the same with every numpy.
    """
    order = np.random.RandomState(SEED).permutation(len(labels))
    of_class = [order[labels[order] == digit] for digit in range(10)]
    evaluation = np.concatenate([rows[:EVALUATION_PER_CLASS] for rows in of_class])
    train = order[~np.isin(order, evaluation)]
    return Split(train, np.sort(train[:CALIBRATION]), np.sort(evaluation))


def load() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: images float32 [1797, 1, 8, 8] with values 0..16, labels int64 [1797]."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    return data.astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64)


def network(mean: np.ndarray, std: np.ndarray) -> Any:
    """The untrained network; ``mean`` and ``std`` are the per-channel input statistics, float32 [1, 1, 1, 1]."""
    from collections import OrderedDict

    import torch
    from torch import nn

    class Normalize(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.from_numpy(mean))
            self.register_buffer("std", torch.from_numpy(std))

        def forward(self, image):
            return (image - self.mean) / self.std

    class Residual(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.first = block(channels, channels)
            self.second = block(channels, channels)
            del self.second.relu  # the Relu comes after the Add
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(x + self.second(self.first(x)))

    def block(inputs: int, outputs: int, kernel: int = 3, padding: int = 1, groups: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, groups=groups, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU()))

    return nn.Sequential(
        OrderedDict(
            normalize=Normalize(),
            stem=block(1, 32, padding=0),
            residual=Residual(32),
            widen=block(32, 64),
            pool=nn.MaxPool2d(2),
            depthwise=block(64, 64, groups=64),
            pointwise=block(64, 96, kernel=1, padding=0),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(96, 10),
        )
    )


def train(images: np.ndarray, labels: np.ndarray) -> Any:
    """The network after ``EPOCHS`` epochs on ``images`` float32 [N, 1, 8, 8] and ``labels`` int64 [N], in eval mode.

    The loss is cross entropy + SPARSITY * sum |gamma| over the scales of all BatchNormalization (network slimming, Liu
    et al., ICCV 2017, eq. 1).
    """
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    model = network(*(stat(images, axis=(0, 2, 3), keepdims=True) for stat in (np.mean, np.std)))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    undecayed = [parameter for norm in norms for parameter in norm.parameters()]
    decayed = [parameter for parameter in model.parameters() if all(parameter is not other for other in undecayed)]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": undecayed}], lr=PEAK_RATE, momentum=0.9, nesterov=True
    )

    def penalty() -> Any:
        return SPARSITY * sum(norm.weight.abs().sum() for norm in norms)

    return fitted(model, optimizer, images, labels, penalty, epochs=EPOCHS, max_lr=PEAK_RATE)


def fitted(
    model: Any,
    optimizer: Any,
    images: np.ndarray,
    labels: np.ndarray,
    penalty: Callable[[], Any] | None = None,
    *,
    epochs: int,
    **schedule: float,
) -> Any:
    """The model after ``epochs`` epochs of cross entropy + ``penalty`` on jittered images, in eval mode."""
    import torch
    from torch import nn

    steps = len(images) // BATCH
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, total_steps=epochs * steps, **schedule)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    image, label = torch.from_numpy(images), torch.from_numpy(labels)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(image))[: steps * BATCH].view(steps, BATCH):
            optimizer.zero_grad()
            loss = loss_of(model(jitter(image[rows])), label[rows])
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            rates.step()
    return model.eval()


def jitter(images: Any) -> Any:
    """Images moved by up to 0.75 pixels, turned by up to 0.2 rad and scaled by up to 10 %; the outside is black."""
    import torch
    from torch.nn import functional

    count = len(images)
    angle, scale, x, y = torch.rand(4, count) * 2 - 1
    angle, scale = angle * 0.2, 1 + scale * 0.1
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # affine_grid measures in half image widths: 4 pixels
    matrix = torch.stack([cos, -sin, x * 0.75 / 4, sin, cos, y * 0.75 / 4], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def export(model: Any) -> onnx.ModelProto:
    """The trained network as ONNX, its BatchNormalization nodes unfused, its batch dimension ``N`` free."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # dynamo=False is deprecated, but PyTorch's newer exporter folds BatchNormalization while it optimizes, and
        # without optimizing it leaves Shape and Expand nodes around it
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 8, 8),),
            buffer,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    proto.graph.name = "digits_cnn"
    onnx.helper.set_model_props(proto, METADATA)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def logits_of(model: Any, proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """The logits float32 [N, 10] that ONNX Runtime computes. Raises ModelError where those of PyTorch differ."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "model.onnx")
        found = Session(Path(folder) / "model.onnx", threads=2).run({"image": images})["logits"]
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    difference = float(np.abs(found - expected).max())
    if difference > 1e-5:
        raise ModelError(
            f"the exported {proto.graph.name} differs from PyTorch by {difference:.1e} in logits, more than 1e-5",
            "Export with another version of PyTorch",
        )
    return found


def replace(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train digits_cnn and write its three files.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to [the package]")
    out = parser.parse_args().out
    missing = [name for name in ("torch", "sklearn", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} cannot be imported. Run: pip install 'channelfold[train,cpu]'")
    out.mkdir(parents=True, exist_ok=True)

    images, labels = load()
    rows = split(labels)
    model = train(images[rows.train], labels[rows.train])
    proto = export(model)
    found = logits_of(model, proto, images[rows.evaluation]).argmax(axis=1)
    replace(out / "digits_cnn.onnx", proto.SerializeToString())
    replace(out / "digits_calibration.npz", npz(image=images[rows.calibration]))
    replace(out / "digits_evaluation.npz", npz(image=images[rows.evaluation], label=labels[rows.evaluation]))
    correct = int((found == labels[rows.evaluation]).sum())
    print(f"{correct} of {len(found)} evaluation samples correct (stated in models/__init__.py and digits_cnn.md)")


if __name__ == "__main__":
    main()
