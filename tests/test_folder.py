"""A folder of class folders as a dataset, and through few_shot."""

import pytest
import torch

from maml_ext.data import Folder, few_shot

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def root(tmp_path):
    """Two alphabets of three characters, four images each; the grey level of an image tells its class."""
    for number in range(6):
        folder = tmp_path / f"alphabet{number // 3}" / f"character{number % 3}"
        folder.mkdir(parents=True)
        for example in range(4):
            Image.new("RGB", (9, 7), (10 * number, 10 * number, 10 * number)).save(folder / f"{example}.png")
        (folder / "notes.txt").write_text("no image")
    Image.new("L", (3, 3)).save(tmp_path / "loose.png")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(root, channels):
    folder = Folder(root, size=5, channels=channels)
    assert len(folder) == 24 and folder.classes[0] == "alphabet0/character0" and len(folder.classes) == 6
    for i in (0, 9, 23):
        image, label = folder[i]
        assert image.shape == (channels, 5, 5) and image.dtype == torch.float32
        assert torch.allclose(image, torch.tensor(10 * label / 255)) and label == folder.targets[i]


def test_through_few_shot(root):
    support_x, support_y, query_x, query_y = few_shot(Folder(root, size=5, channels=1), 3, 1, 2, 4)[0]
    assert support_x.shape == (4, 3, 1, 5, 5) and query_x.shape == (4, 6, 1, 5, 5)
    level = support_x[..., 0, 0, 0]
    assert torch.equal(query_x[..., 0, 0, 0], level.gather(1, query_y)), "a label is one class throughout a task"
    assert torch.equal(support_y, torch.arange(3).expand(4, 3))


def test_errors(root, tmp_path):
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        Folder(root, channels=2)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Folder(root, size=0)
    with pytest.raises(ValueError, match="root must have folders with images"):
        Folder(root / "alphabet0" / "character0")
