"""Meta-batches are functions of (seed, index), episodes right for any dataset, sinusoids as published."""

import itertools
import math
import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from maml_ext.data import Sinusoid, few_shot


class Coded(Dataset):
    """Image ``i`` is filled with ``i``: so a test can look up which example, of which class, an image is."""

    def __init__(self, labels, attribute="targets"):
        self.truth = list(labels)
        if attribute is not None:
            setattr(self, attribute, self.truth)

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index)), self.truth[index]


class Omniglot(Coded):
    """As torchvision's: labels in a private list of (file name, class)."""

    def __init__(self, labels):
        super().__init__(labels, None)
        self._flat_character_images = [(f"{index}.png", label) for index, label in enumerate(labels)]


class ImageFolder(Coded):
    """As torchvision's, before it had ``targets``."""

    def __init__(self, labels):
        super().__init__(labels, None)
        self.samples = [(f"{index}.png", label) for index, label in enumerate(labels)]


LABELS = [index % 7 for index in range(70)]


def assert_equal(batch, other):
    for one, two in zip(batch, other, strict=True):
        assert torch.equal(one, two)


def check_episodes(batch, truth, ways, shots, queries):
    """Every promise about a meta-batch of a `Coded` dataset."""
    support_x, support_y, query_x, query_y = batch
    tasks = len(support_x)
    assert support_x.shape == (tasks, ways * shots, 1, 2, 2)
    assert query_x.shape == (tasks, ways * queries, 1, 2, 2)
    assert support_y.dtype == query_y.dtype == torch.int64
    assert torch.equal(support_y, torch.arange(ways).repeat_interleave(shots).expand(tasks, -1))
    assert torch.equal(query_y, torch.arange(ways).repeat_interleave(queries).expand(tasks, -1))
    for task in range(tasks):
        examples = torch.cat([support_x[task], query_x[task]])[:, 0, 0, 0].long().tolist()
        assert len(set(examples)) == len(examples), "an example came twice"
        labels = torch.cat([support_y[task], query_y[task]]).tolist()
        pairs = set(zip(labels, [truth[example] for example in examples]))
        assert len(pairs) == ways == len({c for _, c in pairs}), "a label must be one class, and the reverse"


@pytest.mark.parametrize(
    "dataset",
    [
        Coded(LABELS),
        Coded(LABELS, "labels"),
        Coded(LABELS, "_labels"),
        Coded(torch.tensor(LABELS)),
        Coded(LABELS, None),
        Coded([f"class {label}" for label in LABELS]),
        Omniglot(LABELS),
        ImageFolder(LABELS),
        Subset(Coded(LABELS), range(len(LABELS))),
    ],
    ids=["targets", "labels", "_labels", "tensor", "one pass", "names", "Omniglot", "ImageFolder", "Subset"],
)
def test_episodes_of_every_kind_of_dataset(dataset):
    batch = few_shot(dataset, ways=5, shots=2, queries=3, tasks=4)[0]
    check_episodes(batch, LABELS, 5, 2, 3)


def test_subset_keeps_to_its_examples():
    chosen = [index for index in range(70) if index % 7 in (1, 4, 6) and index >= 14]
    batch = few_shot(Subset(Omniglot(LABELS), chosen), ways=3, shots=3, queries=5, tasks=6)[0]
    check_episodes(batch, LABELS, 3, 3, 5)
    assert set(torch.cat([batch.support_x, batch.query_x], 1).flatten().long().tolist()) == set(chosen)


def test_classes_too_small_are_left_out_and_uneven_ones_used_whole():
    labels = [0] * 3 + [1] * 4 + [2] * 9 + [3] * 4
    batch = few_shot(Coded(labels), ways=3, shots=1, queries=3, tasks=50)[0]
    check_episodes(batch, labels, 3, 1, 3)
    assert set(torch.cat([batch.support_x, batch.query_x], 1).flatten().long().tolist()) == set(range(3, 20))


def test_classes_and_examples_are_uniform():
    """Classes take labels, and examples places, equally often (within five standard deviations)."""
    draws = 4000
    support_x, *_ = few_shot(Coded(LABELS), ways=2, shots=1, queries=1, tasks=draws)[0]
    first = support_x[:, 0, 0, 0, 0].long()  # the support example of the class with label 0
    for values, kinds in ((first % 7, 7), (first, 70)):
        counts = torch.bincount(values, minlength=kinds)
        deviation = math.sqrt(draws / kinds * (1 - 1 / kinds))
        assert (counts - draws / kinds).abs().max() < 5 * deviation


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: few_shot(Coded(LABELS), ways=5, shots=1, queries=2, tasks=3, **options),
        lambda **options: Sinusoid(tasks=3, **options),
    ],
    ids=["few_shot", "Sinusoid"],
)
class TestMetaBatches:
    def test_function_of_seed_and_index(self, make):
        batches = make(seed=3, length=4)
        for index in (2, 0, 3, 2):  # in any order, and again
            assert_equal(batches[index], make(seed=3)[index])
        assert_equal(batches[-1], batches[3])
        for other in (make(seed=3)[1], make(seed=4)[0], make(seed=-3)[0], make(seed=2)[1]):
            assert not torch.equal(batches[0].support_x, other.support_x)

    def test_workers_resuming_and_ranks(self, make):
        batches = make(seed=1, length=5)
        plain = list(batches)
        assert len(plain) == len(batches) == 5
        for options in ({"num_workers": 0}, {"num_workers": 2}):
            loaded = list(DataLoader(batches, batch_size=None, **options))
            assert len(loaded) == 5
            for one, two in zip(plain, loaded):
                assert_equal(one, two)
        rank = list(DataLoader(batches, batch_size=None, sampler=range(1, 5, 2)))
        assert_equal(rank[0], plain[1])
        assert_equal(rank[1], plain[3])

    def test_endless(self, make):
        batches = make()
        with pytest.raises(TypeError, match="length="):
            len(batches)
        with pytest.raises(IndexError):
            batches[-1]
        for source in (batches, DataLoader(batches, batch_size=None, sampler=itertools.count())):
            for index, batch in enumerate(itertools.islice(source, 3)):
                assert_equal(batch, batches[index])

    def test_end(self, make):
        with pytest.raises(IndexError, match="length = 2"):
            make(length=2)[2]
        with pytest.raises(IndexError, match="length = 2"):
            make(length=2)[-3]

    def test_pickle(self, make):
        assert_equal(pickle.loads(pickle.dumps(make(seed=5)))[7], make(seed=5)[7])

    def test_leaves_the_global_generator_alone(self, make):
        state = torch.get_rng_state()
        make()[0]
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("value", [0, -1])
    def test_length_value(self, make, value):
        with pytest.raises(ValueError, match=f"length must be at least 1, got {value}"):
            make(length=value)

    @pytest.mark.parametrize("name", ["length", "seed"])
    @pytest.mark.parametrize("value", [True, 1.0, "1"])
    def test_wrong_type(self, make, name, value):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {value!r}"):
            make(**{name: value})


@pytest.mark.parametrize("name", ["ways", "shots", "queries", "tasks"])
def test_few_shot_refuses_wrong_numbers(name):
    sizes = {"ways": 5, "shots": 1, "queries": 1, "tasks": 2}
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
            few_shot(Coded(LABELS), **{**sizes, name: value})
    for value in (True, 1.5, None):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {value}"):
            few_shot(Coded(LABELS), **{**sizes, name: value})


def test_few_shot_refuses_datasets_that_cannot_serve():
    with pytest.raises(ValueError, match="ways = 8 classes .* = 2 examples or more, got 7 such .* its 7"):
        few_shot(Coded(LABELS), ways=8, shots=1, queries=1, tasks=1)
    with pytest.raises(ValueError, match="ways = 5 classes .* = 11 examples or more, got 0 such .* its 7"):
        few_shot(Coded(LABELS), ways=5, shots=5, queries=6, tasks=1)
    with pytest.raises(TypeError, match="__getitem__ and __len__, got generator"):
        few_shot((item for item in Coded(LABELS)), 5, 1, 1, 1)

    wrong = Coded(LABELS)
    wrong.targets = LABELS[:-1]
    with pytest.raises(ValueError, match="dataset.targets must have 70 labels, one an example, got 69"):
        few_shot(wrong, 5, 1, 1, 1)


def test_few_shot_refuses_images_it_cannot_stack():
    class Pictures(Coded):
        def __getitem__(self, index):
            return Image.new("L", (2, 2)), self.truth[index]

    class Uneven(Coded):
        def __getitem__(self, index):
            return torch.zeros(1, 2, 2 + index % 2), self.truth[index]

    class Bare(Coded):
        def __getitem__(self, index):
            return torch.zeros(1, 2, 2)

    with pytest.raises(TypeError, match=r"got PIL\.Image\.Image: pass .*ToTensor\(\)"):
        few_shot(Pictures(LABELS), 5, 1, 1, 1)
    with pytest.raises(TypeError, match=r"must yield \(image, label\), got Tensor"):
        few_shot(Bare(LABELS), 5, 1, 1, 1)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 2\) and \(1, 2, 3\)"):
        few_shot(Uneven(LABELS), 5, 4, 4, 1)[0]


def test_sinusoid_is_the_published_one():
    """y = A sin(x - phase); the three uniform distributions by range, mean and standard deviation."""
    data = Sinusoid(tasks=20_000, shots=3, queries=2, dtype=torch.float64)
    batch = data[0]
    amplitude, phase = data.amplitude_phase(0)
    assert [tuple(t.shape) for t in batch] == [(20_000, 3, 1)] * 2 + [(20_000, 2, 1)] * 2
    assert amplitude.shape == phase.shape == (20_000, 1, 1)
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        torch.testing.assert_close(y, amplitude * torch.sin(x - phase), rtol=0, atol=1e-14)
    for values, low, high in (
        (amplitude, 0.1, 5),
        (phase, 0, math.pi),
        (batch.support_x, -5, 5),
        (batch.query_x, -5, 5),
    ):
        deviation = (high - low) / math.sqrt(12)
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 5 * deviation / math.sqrt(values.numel())
        assert abs(values.std() / deviation - 1) < 0.02


def test_sinusoid_defaults_and_dtypes():
    single, double = Sinusoid(seed=2)[1], Sinusoid(seed=2, dtype=torch.float64)[1]
    assert single.support_x.shape == single.query_y.shape == (25, 10, 1)
    for one, two in zip(single, double):
        assert (one.dtype, two.dtype) == (torch.float32, torch.float64)
        assert torch.equal(one, two.float())
    assert Sinusoid(device="meta")[0].support_x.device.type == "meta"


def test_sinusoid_refuses():
    for name in ("tasks", "shots", "queries"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Sinusoid(**{name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an int, got True"):
            Sinusoid(**{name: True})
    for dtype in (torch.int64, "float32"):
        with pytest.raises(TypeError, match="dtype must be a floating point torch.dtype"):
            Sinusoid(dtype=dtype)
