"""How many tasks a second the demo's training takes on either engine: `python -m benchmarks --demo`."""

import statistics
from collections.abc import Callable

import torch

from . import measure
from .measure import Row
from .profile import need_engine

BACKENDS = ("torch", "compiled")


def _iterations(settings, letters, backend: str) -> tuple[Callable[[], object], int]:
    """The demo's training with this backend, a call an iteration as in its `train`; tasks an iteration."""
    from examples.demo.training import MetaTraining

    training = MetaTraining(settings, letters, seed=0)
    training.maml.backend = backend

    def iteration() -> None:
        training.optimizer.zero_grad()
        loss, _ = training.loss(training.iteration)
        loss.backward()
        training.optimizer.step()
        training.iteration += 1

    return iteration, training.per_iteration


def run(rounds: int, seconds: float, quick: bool) -> int:
    """Train with both in turn; print tasks a second and the median ratio of the rounds."""
    need_engine("--demo")
    try:
        from examples.demo.training import QUICK, Settings
        from maml_ext.data import Glyphs
    except ImportError as error:
        raise SystemExit(f"--demo: the demo's requirements are not there ({error})") from None
    settings = QUICK if quick else Settings()
    letters = Glyphs("train", size=settings.size, examples=settings.examples)
    rows = {backend: Row(backend, backend) for backend in BACKENDS}
    calls = {backend: _iterations(settings, letters, backend) for backend in BACKENDS}
    measure.interleave([(rows[backend], calls[backend][0]) for backend in BACKENDS], rounds, seconds)
    for backend, row in rows.items():
        rate = 1e3 * calls[backend][1] / row.median_ms
        print(f"{backend}: {rate:.0f} tasks a second, spread {row.spread:.0%}")
    ratio = statistics.median(a / b for a, b in zip(rows["torch"].rounds_ms, rows["compiled"].rounds_ms))
    threads = torch.get_num_threads()
    print(f"compiled / torch: {ratio:#.3g}, over {len(rows['torch'].rounds_ms)} rounds, threads: {threads}")
    return 0
