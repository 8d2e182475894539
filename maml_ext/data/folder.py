"""Images in a folder of class folders, such as miniImagenet or Omniglot as they are usually unpacked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .episodes import integer

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class Folder(Dataset):
    """A map-style dataset over ``root/<class>/.../<image>``: every folder with images in it is a class.

    ``folder[i]`` is ``(image, class index)``, the image float32 ``[channels, size, size]`` in [0, 1], read
    when it is asked for (give the ``DataLoader`` workers). Nested folders are classes of their own, so
    Omniglot's ``alphabet/character/*.png`` is one class a character.

    Attributes:
        classes: list of str, the class folders relative to ``root``, sorted.
        targets: list of int, the class index of every image.

    Args:
        root: the folder.
        size: pixels a side that images are resized to.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ImportError: Pillow is missing.
        TypeError, ValueError: size is not a positive int, channels not 1 or 3, or there are no images.
    """

    def __init__(self, root: str | Path, *, size: int = 84, channels: int = 3) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError("Folder reads images with Pillow: pip install pillow") from error
        self.size = integer("size", size, 1)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        self.channels = channels
        root = Path(root)
        self.files = sorted(f for f in root.rglob("*") if f.suffix.lower() in ENDINGS and f.parent != root)
        if not self.files:
            raise ValueError(f"root must have folders with images in them, got {str(root)!r}")
        self.classes = sorted({f.parent.relative_to(root).as_posix() for f in self.files})
        index = {name: i for i, name in enumerate(self.classes)}
        self.targets = [index[f.parent.relative_to(root).as_posix()] for f in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            image = image.convert("L" if self.channels == 1 else "RGB")
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, self.channels).permute(2, 0, 1) / 255, self.targets[index]
