"""Letters of 15 scripts in the DejaVu fonts that matplotlib ships: few-shot images without a download."""

from __future__ import annotations

import functools
import math
import os
import unicodedata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .episodes import integer

# The first word of a letter's Unicode name -> its script; others, such as MODIFIER, are left out.
SCRIPTS = {
    "LATIN": "Latin", "TURNED": "Latin", "ROMAN": "Latin",  # as in TURNED SMALL F
    "GREEK": "Greek", "COPTIC": "Coptic", "CYRILLIC": "Cyrillic", "ARABIC": "Arabic",
    "CANADIAN": "Canadian syllabics", "OGHAM": "Ogham", "OLD": "Old Italic",
    "ARMENIAN": "Armenian", "GEORGIAN": "Georgian", "HEBREW": "Hebrew", "LAO": "Lao", "LISU": "Lisu",
    "NKO": "N'Ko", "TIFINAGH": "Tifinagh",
}  # fmt: skip
HELD_OUT = frozenset({"Armenian", "Georgian", "Hebrew", "Lao", "Lisu", "N'Ko", "Tifinagh"})
TYPEFACES = (
    "Sans", "Sans-Oblique", "Sans-Bold", "Sans-BoldOblique",
    "Serif", "Serif-Italic", "Serif-Bold", "Serif-BoldItalic",
    "SansMono", "SansMono-Oblique", "SansMono-Bold", "SansMono-BoldOblique",
)  # fmt: skip

# A letter is rendered to fill a box of 40 x 40 pixels, in the middle of a square of 56 x 56.
BOX, MARGIN = 40, 8

# Letters whose correlation is greater count as one. Chosen by eye: the closest pairs kept can be told apart.
LOOK_ALIKE = 0.91
# Maps [15, 2, 3]: the widths and slants in which a held-out letter must not look like a training letter.
CHANGES = torch.tensor(
    [[[width, slant, 0], [0, 1, 0]] for width in (0.7, 0.85, 1, 1.2, 1.4) for slant in (-0.2, 0, 0.2)],
    dtype=torch.float32,
)
UNCHANGED = torch.eye(2, 3, dtype=torch.float32)[None]
COMPARED = 0.8  # the part of the square that is compared: the box and a little around it

# The largest distortion: degrees, relative scale, shear, and shift in half widths of the image.
ROTATION, SCALE, SHEAR, SHIFT = 10.0, 0.15, 0.15, 0.1


class Glyphs(Dataset):
    """Letters as classes, a letter's typefaces under small affine distortions as its examples.

    A map-style dataset in torchvision's manner: ``glyphs[i]`` is ``(image, class index)``, the image float32
    ``[1, size, size]`` in [0, 1], ink 1, upright and size-normalised. All images are drawn on construction
    (a few seconds the first time in a process) and depend on the arguments alone, so workers and runs agree.

    As Omniglot holds out alphabets, ``"test"`` has scripts of its own: Armenian, Georgian, Hebrew, Lao, Lisu,
    N'Ko and Tifinagh. Many letters have a twin in another script (A is Latin, Greek and Cyrillic). Of letters
    that look alike one is kept, and a held-out letter that looks like a training letter is left out: nearly
    all of Lisu, whose letters are Latin capitals. Left out from the start are presentation forms, letters
    that decompose into base and accent, modifier letters, and letters found in one typeface only.

    Attributes:
        images: uint8 ``[len, size, size]``, the examples of a class one after another.
        targets: list of int, the class index of every image.
        classes: list of str, the Unicode name of every class.
        scripts: list of str, the script of every class.

    Args:
        split: "train" or "test".
        size: pixels a side; the letters are sampled from 56 x 56 renderings.
        examples: of each letter, its typefaces in turn.
        seed: of the distortions, any int.

    Raises:
        ImportError: matplotlib is missing: ``pip install maml_ext[demo]``.
        TypeError: size, examples or seed is not an int.
        ValueError: split is unknown, or size or examples is below 1.
    """

    def __init__(self, split: str = "train", *, size: int = 28, examples: int = 20, seed: int = 0) -> None:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        self.split = split
        self.size = integer("size", size, 1)
        self.examples = integer("examples", examples, 1)
        self.seed = integer("seed", seed)
        letters = _letters()[split]
        self.classes = [letter.name for letter in letters]
        self.scripts = [letter.script for letter in letters]
        self.targets = [label for label in range(len(letters)) for _ in range(self.examples)]

        faces = _faces(letters)
        counts = torch.tensor([[len(letter.faces)] for letter in letters])
        first = counts.cumsum(0) - counts
        used = first + torch.arange(self.examples) % counts  # [letters, examples], indices into faces
        generator = torch.Generator().manual_seed(self.seed % 2**32)
        # In parts, because the renderings are much larger than the images.
        parts = [_distort(faces[part], self.size, generator) for part in used.flatten().split(1024)]
        self.images = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].unsqueeze(0).float() / 255, self.targets[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Many examples at once, much faster: `DataLoader`, `Subset` and `few_shot` ask for them so."""
        images = self.images[torch.as_tensor(indices)].unsqueeze(1).float() / 255
        return list(zip(images.unbind(), [self.targets[index] for index in indices]))


class _Letter(NamedTuple):
    name: str
    script: str
    faces: Tensor  # uint8 [typefaces, 56, 56]


def _features(faces: Tensor, changes: Tensor = UNCHANGED) -> Tensor:
    """n renderings under m changes, as unit vectors ``[n * m, features]``.

    The product of two vectors says how alike the renderings look: the correlation of the blurred pixels.
    Blurred, because twins of two scripts seldom have exactly the same outline.
    """
    blurred = F.avg_pool2d(faces[:, None].float(), 4, stride=2, padding=1).repeat_interleave(len(changes), 0)
    maps = (changes * COMPARED).repeat(len(faces), 1, 1)
    grid = F.affine_grid(maps, [len(maps), 1, 15, 15], align_corners=False)
    pixels = F.grid_sample(blurred, grid, align_corners=False).flatten(1)
    return F.normalize(pixels - pixels.mean(1, keepdim=True))


def _distinct(letters: list[_Letter]) -> list[_Letter]:
    """The letters of which no typeface looks like any typeface of a letter kept before."""
    kept: list[_Letter] = []
    known: list[Tensor] = []  # the features of the letters kept
    for start in range(0, len(letters), 64):  # in blocks: a few large products, not many small ones
        block = letters[start : start + 64]
        features = _features(_faces(block))
        new = torch.ones(len(features), dtype=torch.bool)
        if known:
            new = (features @ torch.cat(known).T).amax(1) <= LOOK_ALIKE
        alike = features @ features.T > LOOK_ALIKE
        chosen = torch.zeros_like(new)
        stop = 0
        for letter in block:
            own = slice(stop, stop := stop + len(letter.faces))
            if new[own].all() and not (alike[own] & chosen).any():
                chosen[own] = True
                kept.append(letter)
        known.append(features[chosen])
    return kept


def _strangers(letters: list[_Letter], others: list[_Letter]) -> list[_Letter]:
    """The letters of which no typeface, in any width and slant of `CHANGES`, looks like any of ``others``."""
    known = _features(_faces(others)).T
    parts = _features(_faces(letters), CHANGES).split(2048)
    closest = torch.cat([(part @ known).amax(1) for part in parts])
    closest = closest.split([len(letter.faces) * len(CHANGES) for letter in letters])
    return [letter for letter, values in zip(letters, closest) if values.max() <= LOOK_ALIKE]


def _faces(letters: list[_Letter]) -> Tensor:
    return torch.cat([letter.faces for letter in letters])


@functools.lru_cache(maxsize=1)
def _letters() -> dict[str, list[_Letter]]:
    """The letters of each split. Kept in memory: every `Glyphs` of a process starts from the same ones."""
    letters = [
        _Letter(unicodedata.name(character), _script(character), torch.stack(faces))
        for character, faces in sorted(_render().items())
        if len(faces) > 1
    ]
    train = _distinct([letter for letter in letters if letter.script not in HELD_OUT])
    test = _distinct([letter for letter in letters if letter.script in HELD_OUT])
    return {"train": train, "test": _strangers(test, train)}


def _script(character: str) -> str | None:
    """The script of a letter; None for all that is not a letter of its own, such as A with an accent."""
    letter = unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lo")
    if not letter or unicodedata.decomposition(character):
        return None
    return SCRIPTS.get(unicodedata.name(character).split()[0])


def _render() -> dict[str, list[Tensor]]:
    """Every letter in every typeface that has it, uint8 ``[56, 56]``."""
    try:
        import matplotlib
        import numpy as np
        from matplotlib.ft2font import FT2Font
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Glyphs draws with matplotlib: pip install maml_ext[demo]") from error

    rendered: dict[str, list[Tensor]] = {}
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    for typeface in TYPEFACES:
        font = FT2Font(os.path.join(folder, f"DejaVu{typeface}.ttf"))
        font.set_size(96, 72)
        for character in filter(_script, map(chr, font.get_charmap())):
            font.set_text(character)
            font.draw_glyphs_to_bitmap(antialiased=True)
            image = Image.fromarray(np.asarray(font.get_image()))
            image = ImageOps.pad(image.crop(image.getbbox()), (BOX, BOX), Image.Resampling.BILINEAR)
            image = np.array(ImageOps.expand(image, MARGIN))
            rendered.setdefault(character, []).append(torch.from_numpy(image))
    return rendered


def _distort(faces: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Renderings ``[n, 56, 56]`` under random affine maps, sampled at ``[n, size, size]``; uint8 both."""
    uniform = torch.rand(5, len(faces), generator=generator, dtype=torch.float32) * 2 - 1
    rotation, scale, shear, *shift = uniform
    angle = rotation * math.radians(ROTATION)
    zoom = 1 + scale * SCALE
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    slant = shear * SHEAR
    # Where each pixel of the result comes from: shear, then rotate and zoom, then shift.
    maps = torch.stack(
        [cos, cos * slant - sin, shift[0] * SHIFT, sin, sin * slant + cos, shift[1] * SHIFT], dim=1
    ).view(-1, 2, 3)
    # A bilinear sample covers 2 x 2 pixels of the rendering: smaller images average several.
    samples = math.ceil(faces.shape[-1] / (2 * size))
    grid = F.affine_grid(maps, [len(faces), 1, size * samples, size * samples], align_corners=False)
    images = F.grid_sample(faces[:, None].float(), grid, align_corners=False)
    return F.avg_pool2d(images, samples)[:, 0].round().to(torch.uint8)
