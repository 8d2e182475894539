"""Meta-batches as a map-style dataset, and the few-shot sampler over any labelled dataset."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset


class MetaBatch(NamedTuple):
    """T tasks, each with N support and Q query examples: ``maml(*batch)`` takes it as it is."""

    support_x: Tensor  # [T, N, ...]
    support_y: Tensor  # [T, N, ...]
    query_x: Tensor  # [T, Q, ...]
    query_y: Tensor  # [T, Q, ...]


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int; TypeError if it is none (a bool is none), ValueError if it is below ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    value = operator.index(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class MetaBatches(Dataset):
    """Meta-batch ``i`` is a function of ``(seed, i)`` alone.

    So the batches are the same whatever the number of ``DataLoader`` workers, training resumes where it
    stopped, and ranks share one stream without talking. Iterate over it, or use
    ``DataLoader(batches, batch_size=None, num_workers=w)`` and, to resume or to split,
    ``sampler=range(start + rank, length, ranks)``.

    Args:
        tasks: T, the tasks in a meta-batch.
        seed: any int.
        length: the number of meta-batches; None is endless: then a ``DataLoader`` needs
            ``sampler=itertools.count()``.

    Raises:
        TypeError, ValueError: tasks, seed or length is not an int, or tasks or length is not positive.
    """

    def __init__(self, tasks: int, seed: int, length: int | None) -> None:
        self.tasks = integer("tasks", tasks, 1)
        self.seed = integer("seed", seed)
        self.length = None if length is None else integer("length", length, 1)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("endless meta-batches have no len(): pass length=, or sampler=itertools.count()")
        return self.length

    def __getitem__(self, index: int) -> MetaBatch:
        return self._batch(self._generator(index))

    def _batch(self, generator: torch.Generator) -> MetaBatch:
        raise NotImplementedError

    def _generator(self, index: int) -> torch.Generator:
        """The random numbers of meta-batch ``index``; IndexError past the end, which ends a for loop."""
        index = position = integer("index", index)
        if self.length is not None and index < 0:
            position += self.length
        if position < 0 or (self.length is not None and position >= self.length):
            raise IndexError(f"index must be below length = {self.length} and not before 0, got {index}")
        # torch's CPU generator keeps 32 bits of its seed. The batches of one seed have all 2**32 of them, and
        # multiples of the golden ratio start the streams of seeds 0..999 more than a million batches apart.
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + position) % 2**32)


class few_shot(MetaBatches):  # noqa: N801 (used like a function)
    """Few-shot classification tasks over any labelled map-style dataset.

    ``few_shot(...)[i]`` is meta-batch ``i``: ``support_x [T, ways * shots, ...]`` and
    ``query_x [T, ways * queries, ...]`` in the images' dtype, ``support_y`` and ``query_y`` int64 in
    0..ways-1, class after class. A task draws its classes in random order, and of each class
    ``shots + queries`` different examples. See `MetaBatches` for workers, resuming and ranks.

    ``dataset`` yields ``(image tensor, label)``: `Glyphs`; torchvision's ``Omniglot`` and ``ImageFolder``
    (a folder of class folders, such as miniImagenet) with a transform that ends in ``ToTensor()``; a
    ``Subset`` of these. Labels come from ``.targets``, ``.labels``, ``._labels``, ``.samples`` or Omniglot's
    ``._flat_character_images``, else from one pass over the dataset. A dataset with ``__getitems__`` is asked
    for all images of a meta-batch at once.

    Args:
        dataset: of length at least 1.
        ways: classes in a task.
        shots: support examples of each class.
        queries: query examples of each class.
        tasks: T, the tasks in a meta-batch.
        seed: any int.
        length: the number of meta-batches, or None: endless.

    Raises:
        TypeError: an argument of the wrong type; images that are not tensors.
        ValueError: a number below 1; fewer than ``ways`` classes have ``shots + queries`` examples (smaller
            classes are left out); images of different shapes.
    """

    def __init__(
        self,
        dataset: Any,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        *,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        super().__init__(tasks, seed, length)
        self.ways = integer("ways", ways, 1)
        self.shots = integer("shots", shots, 1)
        self.queries = integer("queries", queries, 1)
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(f"dataset must have __getitem__ and __len__, got {type(dataset).__name__}")
        self.dataset = dataset

        classes: dict[Any, list[int]] = {}
        for index, label in enumerate(_labels(dataset)):
            classes.setdefault(label, []).append(index)
        need = self.shots + self.queries
        usable = [members for members in classes.values() if len(members) >= need]
        if len(usable) < self.ways:
            raise ValueError(
                f"dataset must have at least ways = {self.ways} classes of shots + queries = {need} examples "
                f"or more, got {len(usable)} such classes among its {len(classes)}"
            )
        # One row a class, short rows filled up with -1, so that a meta-batch is drawn without a Python loop.
        longest = max(map(len, usable))
        self._members = torch.tensor([members + [-1] * (longest - len(members)) for members in usable])
        _check_image(_item(dataset, usable[0][0])[0])

    def _batch(self, generator: torch.Generator) -> MetaBatch:
        # The places of the k largest of n random numbers are k of n without replacement, in random order.
        order = torch.rand(self.tasks, len(self._members), generator=generator)
        members = self._members[order.topk(self.ways).indices]  # [T, ways, longest class]
        order = torch.rand(members.shape, generator=generator).masked_fill_(members < 0, -1)
        indices = members.gather(-1, order.topk(self.shots + self.queries).indices)

        images = self._images(indices.flatten().tolist())
        images = images.unflatten(0, indices.shape)
        support, query = images.split([self.shots, self.queries], dim=2)
        labels = torch.arange(self.ways).expand(self.tasks, -1)
        return MetaBatch(
            support.flatten(1, 2),
            labels.repeat_interleave(self.shots, 1),
            query.flatten(1, 2),
            labels.repeat_interleave(self.queries, 1),
        )

    def _images(self, indices: list[int]) -> Tensor:
        if hasattr(self.dataset, "__getitems__"):
            images = [item[0] for item in self.dataset.__getitems__(indices)]
        else:
            images = [self.dataset[index][0] for index in indices]
        for image in images:
            _check_image(image)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ValueError(
                f"images must have one shape, got {' and '.join(map(str, sorted(shapes)[:2]))}: "
                "give the dataset a transform that resizes"
            )
        return torch.stack(images)


def _labels(dataset: Any) -> list:
    """The label of every example, without loading the images where the dataset has them in an attribute."""
    if isinstance(dataset, Subset):
        labels = _labels(dataset.dataset)
        return [labels[index] for index in dataset.indices]
    for name in ("targets", "labels", "_labels"):
        if (labels := getattr(dataset, name, None)) is not None:
            break
    else:
        for name in ("samples", "_flat_character_images"):
            if (pairs := getattr(dataset, name, None)) is not None:
                labels = [label for _, label in pairs]
                break
        else:
            labels = [_item(dataset, index)[1] for index in range(len(dataset))]
    labels = labels.tolist() if hasattr(labels, "tolist") else [_scalar(label) for label in labels]
    if len(labels) != len(dataset):
        raise ValueError(f"dataset.{name} must have {len(dataset)} labels, one an example, got {len(labels)}")
    return labels


def _scalar(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _item(dataset: Any, index: int) -> tuple:
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise TypeError(f"dataset must yield (image, label), got {type(item).__name__}")
    return item


def _check_image(image: Any) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(
            f"dataset must yield images as tensors, got {type(image).__module__}.{type(image).__name__}: "
            "pass transform=torchvision.transforms.ToTensor() to the dataset"
        )
