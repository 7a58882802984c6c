"""Small trained networks that ship with the package, each with data to calibrate and to evaluate it.

``MODELS`` lists them, ``path`` finds their files::

    model = MODELS["digits_cnn"]
    session = Session(path(model.onnx))
    evaluation = np.load(path(model.evaluation))
    logits = session.run({model.input: evaluation[model.input]})[model.output]
    correct = (logits.argmax(axis=1) == evaluation[model.label]).sum()  # model.correct of model.samples

The card ``<name>.md`` describes a model, names the script beside it that made the model, and the licences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from channelfold.runtime.errors import UsageError, nearest


@dataclass(frozen=True)
class Model:
    """A shipped network: the names of its files, of its tensors, and its measured accuracy.

    ``calibration`` and ``evaluation`` are ``.npz`` files whose samples do not overlap. Both hold the samples under
    ``input``, the name of the model's input; ``evaluation`` also holds the class numbers, int64 [samples], under
    ``label``. ``correct`` of the ``samples`` in ``evaluation`` have their label at the maximum of ``output``.
    """

    name: str
    description: str
    onnx: str
    calibration: str
    evaluation: str
    card: str
    input: str
    output: str
    label: str
    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy of the float model on ``evaluation``, 0..1."""
        return self.correct / self.samples

    @property
    def files(self) -> tuple[str, ...]:
        return self.onnx, self.calibration, self.evaluation, self.card


def _digits(name: str, description: str, correct: int) -> Model:
    """A network for the 8x8 digits. All of them share the data."""
    return Model(
        name=name,
        description=description,
        onnx=f"{name}.onnx",
        calibration="digits_calibration.npz",
        evaluation="digits_evaluation.npz",
        card=f"{name}.md",
        input="image",
        output="logits",
        label="label",
        correct=correct,
        samples=500,
    )


MODELS = {
    model.name: model
    for model in (
        _digits(
            "digits_cnn",
            "CNN for 8x8 handwritten digits: unfused BatchNormalization, residual and depthwise blocks",
            correct=499,
        ),
        _digits("digits_vit", "vision transformer for 8x8 handwritten digits: 4 blocks, 48 channels", correct=494),
        _digits(
            "digits_repavit",
            "RePaViT for 8x8 handwritten digits: 3 of 4 hidden FFN channels idle between BatchNormalizations",
            correct=493,
        ),
        _digits(
            "digits_repavit_ln",
            "RePaViT for 8x8 handwritten digits: 3 of 4 hidden FFN channels idle behind LayerNormalization",
            correct=496,
        ),
    )
}


def path(name: str) -> Path:
    """The path of the shipped file ``name`` (``digits_cnn.onnx`` …). Raises UsageError where no such file ships."""
    shipped = [file for model in MODELS.values() for file in model.files]
    if name not in shipped:
        raise UsageError(f"No file {name!r} ships with channelfold", nearest(name, shipped))
    return Path(__file__).parent / name
