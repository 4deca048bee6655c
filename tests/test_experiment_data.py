"""Data sets, augmentation, and models by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pruningawaretraining import count_macs
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.calibration import SourceBatches, TrainingBatches
from pruningawaretraining.experiment.data import DataSet, MemorySource, Pipeline, channel_statistics, mirrored, shifted
from pruningawaretraining.experiment.datasets import data_shape, load_data
from pruningawaretraining.experiment.models import CifarResNet, PaddedShortcut
from pruningawaretraining.experiment.schema import DataConfig, ModelConfig

CPU = torch.device("cpu")


def images_of(data: DataSet, part: str = "test") -> torch.Tensor:
    source = getattr(data, part)
    return torch.cat([images for images, _ in source.batches(7, None, CPU)])


def labels_of(data: DataSet, part: str = "test") -> list[int]:
    return [int(label) for _, labels in getattr(data, part).batches(7, None, CPU) for label in labels]


def test_digits_are_split_once_and_for_all() -> None:
    data = load_data(DataConfig(name="digits"))
    assert (len(data.train), len(data.test), data.shape, len(data.classes)) == (1297, 500, (1, 8, 8), 10)
    assert labels_of(data)[:8] == labels_of(load_data(DataConfig(name="digits")))[:8]
    counts = np.bincount(labels_of(data))
    assert counts.min() >= 40
    everything = torch.cat([images_of(data), images_of(data, "train")]).flatten(1)
    assert int(everything.max()) == 255 and len(everything) == 1797


def test_a_folder_that_digits_would_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.root: 'images' has no effect: 'digits' comes with scikit-learn"):
        load_data(DataConfig(name="digits", root="images"))


RNG = np.random.default_rng(0)
GREY, COLOUR = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 6, 5), (20, 6, 5, 3)))
LABELS = np.arange(20) % 4


@pytest.mark.parametrize(
    ("arrays", "shape", "sizes"),
    [
        (
            {"x_train": GREY[8:], "y_train": LABELS[8:], "x_test": GREY[:8], "y_test": LABELS[:8]},
            (1, 6, 5),
            (12, 8),
        ),
        ({"images": COLOUR, "labels": LABELS[:, None].astype(np.uint8)}, (3, 6, 5), (16, 4)),
        ({"images": COLOUR.transpose(0, 3, 1, 2), "labels": LABELS}, (3, 6, 5), (16, 4)),
        (
            {
                "train_images": COLOUR[:15],
                "train_labels": LABELS[:15],
                "test_images": COLOUR[15:],
                "test_labels": LABELS[15:],
                "val_images": COLOUR,
            },
            (3, 6, 5),
            (15, 5),
        ),
    ],
)
def test_npz(tmp_path: Path, arrays: dict[str, Any], shape: tuple[int, ...], sizes: tuple[int, int]) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    for root in (tmp_path, tmp_path / "set.npz"):
        data = load_data(DataConfig(name="npz", root=str(root)))
        assert (data.shape, len(data.train), len(data.test), len(data.classes)) == (shape, *sizes, 4)
    if sizes == (15, 5):
        assert torch.equal(images_of(data), torch.from_numpy(COLOUR[15:].transpose(0, 3, 1, 2).copy()))
    assert sorted(labels_of(data) + labels_of(data, "train")) == sorted(LABELS.tolist())


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"images": GREY}, "holds images. Allowed: x_train, y_train, x_test, y_test; or"),
    ({"images": GREY.astype(np.float32), "labels": LABELS}, "data.images: float32 of shape .* Allowed: uint8"),
    ({"images": GREY, "labels": LABELS[:5]}, r"data.labels: int64 of shape \(5,\). Allowed: integers of shape \(20,\)"),
    ({"images": GREY, "labels": LABELS - 1}, "data.labels: 20 labels from -1. Allowed: at least two, from 0"),
    ({"images": GREY, "labels": LABELS / 2}, "data.labels: float64"),
    ({"images": np.array([{}] * 20), "labels": LABELS}, "cannot be read: .* Allowed: an .npz file of plain arrays"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(name="npz", root=str(tmp_path)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red and blue images of several sizes, six of each to train on and two to test on."""
    for part, count in (("train", 6), ("val", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20 + 3 * number, 16), colour).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "streamed"])
def test_imagefolder(folder: Path, memory: float) -> None:
    data = load_data(DataConfig(name="imagefolder", root=str(folder), size=8, memory_gib=memory, workers=0))
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (("blue", "red"), (3, 8, 8), 12, 4)
    assert isinstance(data.train, MemorySource) == (memory > 0)
    for part in ("train", "test"):
        images, labels = images_of(data, part), labels_of(data, part)
        assert images.dtype == torch.uint8
        assert labels == [int(image[0, 0, 0]) // 255 for image in images]  # the red channel tells
    generator = torch.Generator().manual_seed(0)
    shuffled = [labels.tolist() for _, labels in data.train.batches(5, generator, CPU)]
    assert [len(labels) for labels in shuffled] == [5, 5] and shuffled[0] != [0] * 5


def test_what_is_missing_is_named(folder: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"name": "npz"}, "data.root: missing, but needed for 'npz'"),
        ({"name": "npz", "root": str(folder / "no.npz")}, "data.root: there is no .*no.npz"),
        ({"name": "npz", "root": str(folder)}, "holds 0 .npz files"),
        ({"name": "imagefolder", "root": str(folder)}, "data.size: missing, but needed"),
        ({"name": "imagefolder", "root": str(folder / "x"), "size": 8}, "data.root: there is no"),
        ({"name": "imagefolder", "root": str(folder / "train"), "size": 8}, r"no train/ and val/ \(or test/\) in"),
        ({"name": "CIFAR10", "root": str(folder), "download": False}, "data.root: .* does not give CIFAR10"),
        ({"name": "digits", "channels": 3, "std": [1.0]}, "data.std: .* has 1 values. Allowed: one for each of 3"),
    ]
    for values, message in bad:
        with pytest.raises(ConfigError, match=message) as caught:
            load_data(DataConfig(**values))
        assert len(str(caught.value).splitlines()) == 1
    (folder / "val" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="0.png' cannot be decoded"):
        load_data(DataConfig(name="imagefolder", root=str(folder), size=8))


def test_torchvision_sets_are_read_from_their_files(tmp_path: Path) -> None:
    """CIFAR-10's own file format, with few images in it."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch", "batches.meta"]
    for number, name in enumerate(names[:-1]):
        values = {"data": np.full((2, 3072), number, dtype=np.uint8), "labels": [number, 9]}
        (folder / name).write_bytes(pickle.dumps(values))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{number}" for number in range(10)]}))
    from torchvision import datasets

    class Small(datasets.CIFAR10):
        train_list = [[name, None] for name in names[:5]]
        test_list = [["test_batch", None]]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": None}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "CIFAR10", Small)
        data = load_data(DataConfig(name="cifar10", root=str(tmp_path)))
    assert (data.shape, len(data.train), labels_of(data), data.classes[9]) == ((3, 32, 32), 10, [5, 9], "class9")
    assert data_shape(DataConfig(name="cifar10")) == (10, (3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "shape", "count"),
    [
        ({}, (1, 8, 8), 1297),
        ({"size": 16}, (1, 16, 16), 1297),
        ({"channels": 3}, (3, 8, 8), 1297),
        ({"train_fraction": 0.5}, (1, 8, 8), 648),
    ],
)
def test_images_are_made_to_fit(changes: dict[str, Any], shape: tuple[int, ...], count: int) -> None:
    data = load_data(DataConfig(name="digits", **changes))
    assert (data.shape, len(data.train), data_shape(DataConfig(name="digits", **changes))[1]) == (shape, count, shape)


def test_batches_are_normalised() -> None:
    data = load_data(DataConfig(name="digits"))
    pipeline = Pipeline(data.mean, data.std)
    images = torch.cat([images for images, _ in pipeline.test(data.train, 100, CPU)])
    assert float(images.mean()) == pytest.approx(0, abs=1e-5) and float(images.std()) == pytest.approx(1, abs=1e-3)


def test_every_image_is_seen_once_an_epoch_and_the_rest_batch_is_left_out() -> None:
    source = MemorySource(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    seen = [labels.tolist() for _, labels in source.batches(4, torch.Generator().manual_seed(0), CPU)]
    assert [len(labels) for labels in seen] == [4, 4] and len(set(sum(seen, []))) == 8
    for images, labels in source.batches(4, torch.Generator().manual_seed(0), CPU):
        assert images.flatten().tolist() == labels.tolist()
    assert [len(labels) for _, labels in source.batches(4, None, CPU)] == [4, 4, 2]
    assert [len(labels) for _, labels in source.batches(16, torch.Generator().manual_seed(0), CPU)] == [10]


def test_a_shift_moves_each_image_and_brings_in_zeros() -> None:
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(200, 2, 1, 1)
    moved = shifted(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1))
    expected = {tuple(padded[0, y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    assert {tuple(image[0].flatten().tolist()) for image in moved} == expected
    assert torch.equal(moved[:, 0], moved[:, 1])


def test_a_mirror_turns_half_of_the_images() -> None:
    images = torch.tensor([[1, 2, 3]], dtype=torch.uint8).view(1, 1, 1, 3).repeat(400, 1, 1, 1)
    rows = [tuple(image.flatten().tolist()) for image in mirrored(images, torch.Generator().manual_seed(0))]
    assert set(rows) == {(1, 2, 3), (3, 2, 1)} and 150 < rows.count((3, 2, 1)) < 250


def test_channel_statistics() -> None:
    images = torch.tensor([0, 255, 51, 51], dtype=torch.uint8).view(2, 2, 1, 1)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx((0.1, 0.6)) and std == pytest.approx((0.1, 0.4))


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "macs", "parameters"), [(20, 40.55e6, 269722), (56, 125.49e6, 853018)])
def test_cifar_resnets_are_the_published_ones(depth: int, macs: float, parameters: int) -> None:
    model = CifarResNet(depth)
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == pytest.approx(macs, rel=1e-3)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    names = {name.rpartition(".")[0] for name in model.state_dict()}
    assert {"conv1", "bn1", "layer1.0.conv1", f"layer3.{(depth - 2) // 6 - 1}.bn2", "linear"} <= names


def test_option_a_shortcut() -> None:
    x = torch.arange(1.0, 9.0).view(1, 2, 2, 2)
    assert PaddedShortcut(1)(x).flatten().tolist() == [0, 1, 5, 0]


@pytest.mark.parametrize(
    ("name", "classes", "channels", "shape"),
    [
        ("resnet18", 7, 3, (1, 3, 64, 64)),
        ("torchvision:mobilenet_v2", 7, 3, (1, 3, 64, 64)),
        ("pruningawaretraining.experiment.models:digits_resnet", 7, 2, (1, 2, 8, 8)),
        ("pruningawaretraining.experiment.models:cifar_resnet20", 7, 3, (1, 3, 32, 32)),
    ],
)
def test_models_by_name(name: str, classes: int, channels: int, shape: tuple[int, ...]) -> None:
    model = build_model(ModelConfig(name=name), classes, channels).eval()
    assert model(torch.zeros(shape)).shape == (1, classes)


@pytest.mark.parametrize("name", ["timm:resnet18", "test_resnet"])
def test_timm_models_by_name(name: str) -> None:
    pytest.importorskip("timm")
    model = build_model(ModelConfig(name=name), 5, 1).eval()
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_weights_are_loaded_with_or_without_prefix(tmp_path: Path) -> None:
    spec = {"name": "pruningawaretraining.experiment.models:cifar_resnet20"}
    torch.manual_seed(1)
    state = build_model(ModelConfig(**spec)).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "weights.pt")
    loaded = build_model(ModelConfig(**spec, weights=str(tmp_path / "weights.pt"))).state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"linear.bias": None}, "lacks 'linear.bias'"),
        ({"head.bias": torch.zeros(3)}, "the model does not know 'head.bias'"),
        ({"linear.bias": torch.zeros(3)}, r"'linear.bias' is of shape \(3,\) where the model has \(10,\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    spec = {"name": "pruningawaretraining.experiment.models:cifar_resnet20"}
    state = {**build_model(ModelConfig(**spec)).state_dict(), **content}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        build_model(ModelConfig(**spec, weights=str(tmp_path / "weights.pt")))


def test_weights_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "weights.pt")  # a pickled module, which could run anything
    with pytest.raises(CheckpointError, match="cannot be read"):
        build_model(ModelConfig(name="resnet18", weights=str(tmp_path / "weights.pt")))


def test_training_batches_are_augmented_and_the_same_each_time() -> None:
    """What norms and fits are measured on looks like what training saw; plain batches are the images as they are."""
    images = torch.randint(1, 256, (12, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = MemorySource(images, torch.arange(12))
    pipeline = Pipeline((0.5,), (0.25,), flip=True, crop=2)
    seen, again = (list(TrainingBatches(pipeline, source, 4, torch.device("cpu"))) for _ in range(2))
    for (x, y), (other_x, other_y) in zip(seen, again, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    labels = torch.cat([y for _, y in seen])
    assert labels.sort().values.tolist() == list(range(12))
    plain = torch.cat([x for x, _ in SourceBatches(pipeline, source, 4, torch.device("cpu"))])
    augmented = torch.cat([x for x, _ in seen])[labels.argsort()]
    assert (plain != augmented).flatten(1).any(1).sum() >= 10
