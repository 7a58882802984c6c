"""Images: EfficientNet-Lite0 (agreement with its float self, digits probe), a saliency ViT (find the pasted object)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tasks.base import Feed, OpenSet, Task, session
from tasks.sources import digits, photos

SIDE = 224
# ImageNet classes that are certainly right for a photograph.
KNOWN = {
    "chelsea": {281, 282, 283, 284, 285}, "coffee": {967, 968, 504, 925}, "rocket": {657, 744},
    "clock": {409, 892, 530}, "china.jpg": {668, 698, 832, 663, 536, 483},
    "flower.jpg": {985, 308, 309, 310, 94, 322, 323},
}  # fmt: skip
PROBE_DIGITS = 200
PROBE_TRAIN = 1200

Window = tuple[int, int, int, int, bool]


def lite_input(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 224, 224, 3) to what EfficientNet-Lite expects: float32 (n, 3, 224, 224) in about [-1, 1]."""
    return ((images.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2)


def random_windows(images: list[np.ndarray], n: int, rng: np.random.Generator) -> Iterator[Window]:
    """``n`` square windows as (image, top, left, side, mirrored), taking the images in turn."""
    for i in range(n):
        height, width = images[i % len(images)].shape[:2]
        side = int(min(height, width) * rng.uniform(0.4, 1))
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        yield i % len(images), top, left, side, bool(rng.random() < 0.5)


def distant_windows(images: list[np.ndarray], n: int, used: list[Window]) -> Iterator[Window]:
    """Windows that overlap those ``used`` as little as 50 random draws allow."""
    rng = np.random.default_rng(100)
    draws = [list(random_windows(images, n, rng)) for _ in range(50)]
    for candidates in zip(*draws, strict=True):
        near = [window for window in used if window[0] == candidates[0][0]]
        yield min(candidates, key=lambda window: max(_overlap(window, other) for other in near))


def _overlap(a: Window, b: Window) -> float:
    """Intersection over union."""
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    width = min(a[2] + a[3], b[2] + b[3]) - max(a[2], b[2])
    common = max(0, height) * max(0, width)
    return common / (a[3] ** 2 + b[3] ** 2 - common)


def crop(images: list[np.ndarray], window: Window) -> np.ndarray:
    index, top, left, side, mirrored = window
    square = Image.fromarray(images[index][top : top + side, left : left + side])
    square = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square)


def digit_images(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 28, 28) to (n, 224, 224, 3)."""
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB"))
            for image in images
        ]
    )


def centre(image: np.ndarray) -> np.ndarray:
    """The middle 224 x 224 after scaling the shorter side to 256."""
    photo = Image.fromarray(image)
    scale = 256 / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    left, top = (photo.width - SIDE) // 2, (photo.height - SIDE) // 2
    return np.asarray(photo.crop((left, top, left + SIDE, top + SIDE)))


def logits(model: Path, images: np.ndarray, batch: int = 20) -> np.ndarray:
    run = session(model)
    name = run.get_inputs()[0].name
    return np.concatenate(
        [run.run(None, {name: lite_input(images[i : i + batch])})[0] for i in range(0, len(images), batch)]
    )


def effnet(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Top-1 agreement with the float model on 200 crops; certain photographs; a linear probe on digits.

    The probe is trained on the float model's logits, so that it measures how far the model's features moved.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    float_model = open_set.models / "effnet_lite0.onnx"
    images = photos()
    views = list(images.values())
    crops = np.stack([crop(views, window) for window in random_windows(views, 200, np.random.default_rng(0))])
    agreement = (logits(model, crops).argmax(1) == logits(float_model, crops).argmax(1)).mean()
    best = logits(model, np.stack([centre(images[name]) for name in KNOWN])).argsort(1)[:, ::-1][:, :5]
    top1 = sum(row[0] in known for row, known in zip(best, KNOWN.values(), strict=True))
    top5 = sum(bool(set(row) & known) for row, known in zip(best.tolist(), KNOWN.values(), strict=True))

    small, classes = digits(open_set, 0, PROBE_DIGITS)
    large = digit_images(small)
    learned = open_set.cached("effnet_mnist", lambda: logits(float_model, large))[:PROBE_TRAIN]
    scaler = StandardScaler().fit(learned)
    probe = LogisticRegression(C=0.01, max_iter=500).fit(scaler.transform(learned), classes[:PROBE_TRAIN])
    accuracy = probe.score(scaler.transform(logits(model, large[PROBE_TRAIN:])), classes[PROBE_TRAIN:])
    return {
        "top1_agreement": round(float(agreement), 4),
        "digits_probe": round(float(accuracy), 4),
        "photos_top1": f"{top1}/{len(KNOWN)}",
        "photos_top5": f"{top5}/{len(KNOWN)}",
        "crops": len(crops),
        "digits": len(classes) - PROBE_TRAIN,
    }


def effnet_samples(open_set: OpenSet) -> Iterator[Feed]:
    """64 crops that overlap the evaluated ones as little as possible, and 40 digits the probe never sees."""
    views = list(photos().values())
    used = list(random_windows(views, 200, np.random.default_rng(0)))
    for window in distant_windows(views, 64, used):
        yield {"image": lite_input(crop(views, window)[None])}
    for image in digit_images(digits(open_set, PROBE_DIGITS, PROBE_DIGITS + 4)[0]):
        yield {"image": lite_input(image[None])}


def compositions(n: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Round cut-outs of objects on textures: float32 (1, 3, 224, 224), and where they lie: bool (224, 224)."""
    rng, images = np.random.default_rng(seed), photos()
    textures = [np.array(Image.fromarray(images[name]).resize((SIDE, SIDE))) for name in ("brick", "grass", "gravel")]
    objects = [
        images["chelsea"][30:270, 90:330], images["coffee"][60:340, 150:430], images["astronaut"][0:250, 120:370],
        images["flower.jpg"][60:360, 180:480], images["rocket"][60:360, 200:420],
    ]  # fmt: skip
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    for i in range(n):
        side = int(rng.integers(64, 110))
        top, left = rng.integers(0, SIDE - side, 2)
        small = np.array(Image.fromarray(objects[i % 5]).resize((side, side), Image.Resampling.BICUBIC))
        rows, columns = np.mgrid[0:side, 0:side]
        middle = (side - 1) / 2
        disc = (rows - middle) ** 2 + (columns - middle) ** 2 <= middle**2
        scene, truth = textures[i % 3].copy(), np.zeros((SIDE, SIDE), bool)
        scene[top : top + side, left : left + side][disc] = small[disc]
        truth[top : top + side, left : left + side] = disc
        yield ((scene / 255.0 - mean) / deviation).astype(np.float32).transpose(2, 0, 1)[None], truth


def imgfocus(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Does the saliency map peak on the object (pointing), and how well does its upper half cover it (IoU)?"""
    run = session(model)
    hits, overlaps, errors = [], [], []
    for image, truth in compositions(60, seed=1):
        heat = run.run(None, {"input_image": image})[0][0, 0]
        if heat.shape != truth.shape:
            heat = np.array(Image.fromarray(heat).resize(truth.shape[::-1], Image.Resampling.BILINEAR))
        hot = heat > 0.5 * heat.max()
        hits.append(truth[np.unravel_index(heat.argmax(), heat.shape)])
        overlaps.append((hot & truth).sum() / max(1, (hot | truth).sum()))
        errors.append(np.abs(heat - truth).mean())
    return {
        "iou": round(float(np.mean(overlaps)), 4),
        "pointing": round(float(np.mean(hits)), 4),
        "mean_absolute_error": round(float(np.mean(errors)), 4),
        "images": len(hits),
    }


def imgfocus_samples(open_set: OpenSet) -> Iterator[Feed]:
    return ({"input_image": image} for image, _ in compositions(48, seed=101))


TASKS = (
    Task("effnet", "effnet_lite0.bn.onnx", "top1_agreement", effnet, effnet_samples),
    Task("imgfocus", "vit_s_focus.onnx", "iou", imgfocus, imgfocus_samples),
)
