"""The data sets that an experiment can name. Each is a function from its config to a :class:`DataSet`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.data import DataSet, FolderSource, MemorySource, channel_statistics
from pruningawaretraining.experiment.schema import DataConfig
from pruningawaretraining.files import reading
from pruningawaretraining.registry import lookup, register

TORCHVISION = ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NPZ_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels"),
)
SHAPES = {
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "fashionmnist": (10, (1, 28, 28)),
    "mnist": (10, (1, 28, 28)),
}
"""Classes and image shape of sets that would have to be downloaded to be looked at."""
TEST_SHARE = 0.2  # of an .npz that has one set of images only
DIGITS_TEST = 500


def load_data(config: DataConfig) -> DataSet:
    """The data set that a config names.

    Raises:
        ConfigError: the name is unknown, or the data is missing or not as it should be.
    """
    found: DataSet = lookup("dataset", config.name, "data.name")(config)
    channels = found.shape[0]
    for key in ("mean", "std"):
        given = getattr(config, key)
        if given is not None and len(given) != channels:
            raise ConfigError(
                f"data.{key}: {given} has {len(given)} values. Allowed: one for each of {channels} channels"
            )
    return found


def data_shape(config: DataConfig) -> tuple[int, tuple[int, int, int]]:
    """Number of classes, and channels, height and width of the images; nothing is downloaded for it.

    Raises:
        ConfigError: as in :func:`load_data`.
    """
    known = SHAPES.get(config.name.lower())
    if known is None:
        data = load_data(config)
        return len(data.classes), data.shape
    classes, (channels, height, width) = known
    return classes, (config.channels or channels, config.size or height, config.size or width)


@register("dataset", "digits")
def digits(config: DataConfig) -> DataSet:
    """1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998); 500 for testing."""
    from sklearn.datasets import load_digits

    if config.root is not None:
        raise ConfigError(
            f"data.root: {config.root!r} has no effect: 'digits' comes with scikit-learn. Allowed: none, or another "
            "data.name (imagefolder, npz, CIFAR10, ...)"
        )
    pack = load_digits()
    images = np.round(pack.images * (255 / 16)).astype(np.uint8)
    labels = pack.target.astype(np.int64)
    order = _fixed_order(len(labels)).numpy()
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    names = tuple(str(digit) for digit in range(10))
    return _in_memory(config, (images[train], labels[train]), (images[test], labels[test]), names)


def _torchvision(config: DataConfig) -> DataSet:
    """A data set of torchvision, downloaded by it when asked to."""
    from torchvision import datasets

    name = next(known for known in TORCHVISION if known.lower() == config.name.lower())
    root = config.root or "data"
    try:
        train, test = (getattr(datasets, name)(root, train=part, download=config.download) for part in (True, False))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        inside = getattr(getattr(datasets, name), "base_folder", f"{name}/raw")
        laid_out = f"a folder with {name} as torchvision lays it out ({inside})"
        allowed = f"{laid_out}, or one to download it to with data.download: true"
        raise ConfigError(f"data.root: {root!r} does not give {name}: {reason}. Allowed: {allowed}") from error
    parts = [(np.asarray(one.data), np.asarray(one.targets, dtype=np.int64)) for one in (train, test)]
    return _in_memory(config, parts[0], parts[1], tuple(train.classes))


for _name in TORCHVISION:
    register("dataset", _name, _name.lower())(_torchvision)


@register("dataset", "npz")
def npz(config: DataConfig) -> DataSet:
    """An .npz file: x_train, y_train, x_test, y_test; or train_images, ...; or images and labels, a fixed fifth of
    which is for testing. Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W); labels are integers from 0."""
    path = _npz_path(config)
    with (
        reading(path, "data.root", "an .npz file of plain arrays", ConfigError),
        np.load(path, allow_pickle=False) as pack,
    ):
        arrays = {key: pack[key] for key in pack.files}
    keys = next((keys for keys in NPZ_KEYS if set(keys) <= arrays.keys()), None)
    if keys is None:
        allowed = "; or ".join(", ".join(keys) for keys in NPZ_KEYS)
        raise ConfigError(f"data.root: {str(path)!r} holds {', '.join(arrays) or 'nothing'}. Allowed: {allowed}")
    pairs = [_checked_pair(arrays, *keys[at : at + 2]) for at in range(0, len(keys), 2)]
    if len(pairs) == 1:
        images, labels = pairs[0]
        order = _fixed_order(len(labels)).numpy()
        cut = max(1, round(TEST_SHARE * len(labels)))
        pairs = [(images[order[cut:]], labels[order[cut:]]), (images[order[:cut]], labels[order[:cut]])]
    classes = 1 + max(int(labels.max()) for _, labels in pairs)
    return _in_memory(config, pairs[0], pairs[1], tuple(str(number) for number in range(classes)))


def _npz_path(config: DataConfig) -> Path:
    if config.root is None:
        raise ConfigError("data.root: missing, but needed for 'npz'. Allowed: the path of an .npz file")
    path = Path(os.path.expanduser(config.root))
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if len(found) != 1:
            raise ConfigError(f"data.root: the folder {str(path)!r} holds {len(found)} .npz files. Allowed: one")
        return found[0]
    if not path.is_file():
        raise ConfigError(f"data.root: there is no {str(path)!r}. Allowed: the path of an .npz file")
    return path


def _checked_pair(arrays: Mapping[str, np.ndarray], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = arrays[x], arrays[y]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ConfigError(f"data.{x}: {images.dtype} of shape {images.shape}. Allowed: uint8 of shape (N, H, W[, C])")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        allowed = f"integers of shape ({len(images)},)"
        raise ConfigError(f"data.{y}: {labels.dtype} of shape {labels.shape}. Allowed: {allowed}")
    if len(labels) < 2 or labels.min() < 0:
        raise ConfigError(f"data.{y}: {len(labels)} labels from {labels.min(initial=0)}. Allowed: at least two, from 0")
    return images, labels.astype(np.int64)


@register("dataset", "imagefolder", "image_folder")
def imagefolder(config: DataConfig) -> DataSet:
    """Folders train and val (or test) with a folder of images for each class; decoded once if they fit in memory."""
    from torchvision.datasets import ImageFolder

    train_path, test_path = _split_folders(config)
    if config.size is None:
        raise ConfigError("data.size: missing, but needed for 'imagefolder'. Allowed: the side of the images in pixels")
    try:
        train, test = ImageFolder(str(train_path)), ImageFolder(str(test_path))
    except FileNotFoundError as error:
        raise ConfigError(f"data.root: {config.root!r}: {' '.join(str(error).split())}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"data.root: the class folders of {train_path} and {test_path} differ in {', '.join(odd[:5])}"
        )
    size = config.size
    if (len(train) + len(test)) * 3 * size * size > config.memory_gib * 2**30:
        return _streamed(config, train, test)
    return _in_memory(config, _decoded(train, size), _decoded(test, size), tuple(train.classes))


def _split_folders(config: DataConfig) -> tuple[Path, Path]:
    if config.root is None:
        raise ConfigError("data.root: missing, but needed for 'imagefolder'. Allowed: a folder with train/ and val/")
    root = Path(os.path.expanduser(config.root))
    test = next((root / name for name in ("val", "test", "valid", "validation") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        what = "there is no" if not root.is_dir() else "no train/ and val/ (or test/) in"
        raise ConfigError(f"data.root: {what} {str(root)!r}. Allowed: a folder with train/ and val/ (or test/)")
    return root / "train", test


def _decoded(folder: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of an ImageFolder, resized by the shorter side and cropped at the centre: uint8 (N, H, W, 3)."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as transforms

    def one(path: str) -> np.ndarray:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"data.root: {path!r} cannot be decoded: {error}") from error
        return np.asarray(transforms.center_crop(transforms.resize(image, [size], antialias=True), [size, size]))

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(one, (path for path, _ in folder.samples))))
    return images, np.asarray(folder.targets, dtype=np.int64)


def _streamed(config: DataConfig, train: Any, test: Any) -> DataSet:
    """An ImageFolder decoded lazily: random resized crops for training, centre crops for testing."""
    from torchvision.transforms import v2

    size = config.size or 0
    shape = (3, size, size)
    train.transform = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.PILToTensor()])
    resize = v2.Resize(round(size * 8 / 7), antialias=True)
    test.transform = v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])
    part: Any = train
    if config.train_fraction < 1:
        part = torch.utils.data.Subset(train, _fixed_order(len(train))[: _share(config, len(train))].tolist())
    mean, std = tuple(config.mean or IMAGENET_MEAN), tuple(config.std or IMAGENET_STD)
    sources = [FolderSource(one, shape, config.workers) for one in (part, test)]
    return DataSet(config.name, sources[0], sources[1], tuple(train.classes), mean, std)


def _in_memory(config: DataConfig, train: tuple[Any, Any], test: tuple[Any, Any], classes: tuple[str, ...]) -> DataSet:
    (train_images, train_labels), (test_images, test_labels) = train, test
    if config.train_fraction < 1:
        chosen = _fixed_order(len(train_labels))[: _share(config, len(train_labels))].numpy()
        train_images, train_labels = train_images[chosen], train_labels[chosen]
    images = [_with_channels(_channels_first(one, config.size), config) for one in (train_images, test_images)]
    if images[0].shape[1:] != images[1].shape[1:]:
        shapes = f"{tuple(images[0].shape[1:])} and {tuple(images[1].shape[1:])}"
        raise ConfigError(f"data.root: training and test images differ in shape: {shapes}")
    mean, std = channel_statistics(images[0])
    sources = [
        MemorySource(one, torch.from_numpy(np.ascontiguousarray(labels)))
        for one, labels in zip(images, (train_labels, test_labels), strict=True)
    ]
    return DataSet(config.name, sources[0], sources[1], classes, tuple(config.mean or mean), tuple(config.std or std))


def _share(config: DataConfig, count: int) -> int:
    return max(2, round(config.train_fraction * count))


def _channels_first(images: np.ndarray, size: int | None) -> Tensor:
    """uint8 images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W), resized if ``size`` says so."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] <= 4 < images.shape[1]:
        images = images.transpose(0, 3, 1, 2)
    images_NCHW = torch.from_numpy(np.ascontiguousarray(images))
    if size is None or images_NCHW.shape[2:] == (size, size):
        return images_NCHW
    parts = []
    for part in torch.split(images_NCHW, 256):
        resized = functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        parts.append(resized.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def _with_channels(images_NCHW: Tensor, config: DataConfig) -> Tensor:
    channels = images_NCHW.shape[1]
    if config.channels in (None, channels):
        return images_NCHW
    if channels != 1:
        raise ConfigError(f"data.channels: {config.channels} for images of {channels} channels. Allowed: {channels}")
    return images_NCHW.expand(-1, config.channels, -1, -1).contiguous()


def _fixed_order(count: int) -> Tensor:
    """The same random permutation everywhere and always."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
