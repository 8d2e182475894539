"""Tasks to meta-learn from: sinusoids, letters drawn from fonts, and a few-shot sampler for any labelled dataset."""

from .episodes import few_shot
from .folder import Folder
from .glyphs import Glyphs
from .sinusoid import Sinusoid

__all__ = ["Folder", "Glyphs", "Sinusoid", "few_shot"]
