"""Images in memory or from disk, and the pipeline that augments and normalises them a batch at a time.

Shape suffixes: ``_N`` images of a set, ``_B`` images of a batch, ``_BCHW`` a batch of images, ``_BP`` a batch of padded
images, ``_C`` channels.

Images stay uint8 until they are in a batch on the device. Augmentation works on whole batches there, from a CPU
generator, so that it is the same on every device and a resumed epoch sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pruningawaretraining.distributed.collectives import ALONE, Ranks

Batch = tuple[Tensor, Tensor]


class Source(Protocol):
    """One split of a data set: images of equal shape with labels."""

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(
        self, size: int, generator: torch.Generator | None, device: torch.device, share: Ranks = ALONE
    ) -> Iterator[Batch]:
        """uint8 images and int64 labels on the device: in order, or shuffled by ``generator`` and without the rest;
        of each batch the ``share``."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Both splits.

    Attributes:
        name: what the user called it.
        train, test: the splits.
        classes: names of the classes, in label order.
        mean, std: of each channel of the training images, for pixels in [0, 1].
    """

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.train.shape

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return max(1, len(self.train) // batch_size)


class MemorySource:
    """Images held as one tensor, moved to the device once.

    Args:
        images_NCHW: uint8.
        labels_N: int64.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        self.images_NCHW = images_NCHW
        self.labels_N = labels_N
        channels, height, width = images_NCHW.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.labels_N)

    def batches(
        self, size: int, generator: torch.Generator | None, device: torch.device, share: Ranks = ALONE
    ) -> Iterator[Batch]:
        """See :class:`Source`."""
        if self.images_NCHW.device != device:
            self.images_NCHW, self.labels_N = self.images_NCHW.to(device), self.labels_N.to(device)
        if generator is None:
            for images, labels in zip(
                *(torch.split(one, size) for one in (self.images_NCHW, self.labels_N)), strict=True
            ):
                yield share.slice_of(images), share.slice_of(labels)
            return
        order_N = torch.randperm(len(self), generator=generator).to(device)
        for index_B in torch.split(order_N, size):
            if len(index_B) == size or len(self) < size:
                yield self.images_NCHW[share.slice_of(index_B)], self.labels_N[share.slice_of(index_B)]


class _Shares(torch.utils.data.Sampler[list[int]]):
    """One process's indices of every batch; all processes shuffle alike."""

    def __init__(self, length: int, size: int, generator: torch.Generator | None, share: Ranks) -> None:
        self.length, self.size, self.generator, self.share = length, size, generator, share

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = self.generator is not None
        numbers = range(self.length)
        data: Any = numbers
        order = (
            torch.utils.data.RandomSampler(data, generator=self.generator)
            if shuffled
            else torch.utils.data.SequentialSampler(data)
        )
        for batch in torch.utils.data.BatchSampler(order, self.size, shuffled and self.length >= self.size):
            yield self.share.slice_of(batch)


class FolderSource:
    """Images decoded by worker processes whenever they are needed, for sets that do not fit in memory.

    Args:
        dataset: a map-style data set of (uint8 image tensor, label).
        shape: of an image.
        workers: decoding processes; 0 decodes in this one.
    """

    def __init__(self, dataset: Any, shape: tuple[int, int, int], workers: int) -> None:
        self.dataset = dataset
        self.shape = shape
        self.workers = workers

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(
        self, size: int, generator: torch.Generator | None, device: torch.device, share: Ranks = ALONE
    ) -> Iterator[Batch]:
        """See :class:`Source`."""
        loader: torch.utils.data.DataLoader[Batch] = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=_Shares(len(self), size, generator, share),
            generator=generator,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
        )
        for images_BCHW, labels_B in loader:
            yield images_BCHW.to(device, non_blocking=True), labels_B.to(device, non_blocking=True)


@dataclass(frozen=True)
class Pipeline:
    """From a split to what the model takes.

    Attributes:
        mean, std: of each channel, for normalisation.
        flip: mirror half of the training images.
        crop: shift training images by up to so many pixels.
        channels_last: memory order of the batches.
        share: what this process gets of every batch.
    """

    mean: Sequence[float]
    std: Sequence[float]
    flip: bool = False
    crop: int = 0
    channels_last: bool = False
    share: Ranks = ALONE

    def train(self, source: Source, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
        """One epoch of shuffled, augmented, normalised batches."""
        whole = min(size, len(source))
        for images_BCHW, labels_B in source.batches(size, generator, device, self.share):
            if self.crop:
                images_BCHW = shifted(images_BCHW, self.crop, generator, whole, self.share)
            if self.flip:
                images_BCHW = mirrored(images_BCHW, generator, whole, self.share)
            yield self.normalised(images_BCHW), labels_B

    def test(self, source: Source, size: int, device: torch.device, share: Ranks = ALONE) -> Iterator[Batch]:
        """All images once, in order, normalised; of each batch the ``share``."""
        for images_BCHW, labels_B in source.batches(size, None, device, share):
            yield self.normalised(images_BCHW), labels_B

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images as float32 with the set's mean 0 and deviation 1."""
        mean_C = torch.tensor(self.mean, device=images_BCHW.device).view(-1, 1, 1)
        std_C = torch.tensor(self.std, device=images_BCHW.device).view(-1, 1, 1)
        out_BCHW = (images_BCHW.float() / 255 - mean_C) / std_C
        return out_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else out_BCHW


def shifted(
    images_BCHW: Tensor, most: int, generator: torch.Generator, whole: int | None = None, share: Ranks = ALONE
) -> Tensor:
    """Each image moved by its own offset of up to ``most`` pixels in each direction; zeros come in.

    Args:
        images_BCHW: the images: a share of a batch of ``whole``, for which chance is drawn.
        most: the largest offset.
        generator: of chance, the same on every process.
        whole, share: see above.
    """
    count, channels, height, width = images_BCHW.shape
    images_BP = functional.pad(images_BCHW, (most, most, most, most))
    offsets = torch.randint(0, 2 * most + 1, (2, whole or count, 1), generator=generator)
    offsets = torch.stack([share.slice_of(offsets[0]), share.slice_of(offsets[1])]).to(images_BCHW.device)
    rows_BH = offsets[0] + torch.arange(height, device=images_BCHW.device)
    columns_BW = offsets[1] + torch.arange(width, device=images_BCHW.device)
    image = torch.arange(count, device=images_BCHW.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images_BCHW.device).view(1, -1, 1, 1)
    return images_BP[image, channel, rows_BH[:, None, :, None], columns_BW[:, None, None, :]]


def mirrored(images_BCHW: Tensor, generator: torch.Generator, whole: int | None = None, share: Ranks = ALONE) -> Tensor:
    """Each image mirrored left to right with probability a half; arguments as of :func:`shifted`."""
    flip_B = share.slice_of(torch.rand(whole or len(images_BCHW), generator=generator) < 0.5).to(images_BCHW.device)
    return torch.where(flip_B.view(-1, 1, 1, 1), images_BCHW.flip(3), images_BCHW)


def channel_statistics(images_NCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, in units of [0, 1]; exact, in integer sums."""
    counts = [
        torch.bincount(images_NCHW[:, channel].flatten(), minlength=256) for channel in range(images_NCHW.shape[1])
    ]
    level = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = float((share * level).sum())
        means.append(mean)
        deviations.append(max(float((share * (level - mean) ** 2).sum()) ** 0.5, 1e-3))
    return tuple(means), tuple(deviations)
