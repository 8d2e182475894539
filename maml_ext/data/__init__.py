"""Tasks to meta-learn on: sinusoids, letters without a download, few-shot tasks over any labelled dataset."""

from .episodes import few_shot
from .glyphs import Glyphs
from .sinusoid import Sinusoid

__all__ = ["Glyphs", "Sinusoid", "few_shot"]
