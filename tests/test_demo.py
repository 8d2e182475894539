"""The demo does what ``make demo`` promises, at a tiny size."""

import json
import math
import os
import signal

import matplotlib.image
import pytest
import torch

from examples.demo import evaluation
from examples.demo.__main__ import main
from examples.demo.training import QUICK, MetaTraining, PreTraining, Settings
from maml_ext.ops import library

SCRIPTS = {"Armenian", "Georgian", "Hebrew", "Lao", "N'Ko", "Tifinagh", "together"}


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["--quick", "--output", str(folder)]) == 0
    return folder


def test_results(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["together_only"] == ["Lisu"]
    assert set(results["inner_rates"]) == set(results["accuracy"]) == {"MAML", "fine-tuning"}
    for by_script in results["accuracy"].values():
        assert set(by_script) == SCRIPTS
        for rows in by_script.values():
            assert len(rows) == QUICK.test_steps + 1
            assert all(0 <= mean <= 1 and 0 <= half < 0.5 for mean, half in rows)
    # A head of zeros knows nothing before its first step.
    assert results["accuracy"]["fine-tuning"]["together"][0] == pytest.approx([0.2, 0])
    assert all(len(values) == 11 for values in results["sinusoid_mse"].values())


def test_picture(finished):
    image = matplotlib.image.imread(finished / "demo.png")
    assert image.shape[1] >= 900
    assert image[..., :3].std() > 0.05  # something is drawn


def test_interrupted_and_resumed_is_the_same(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in both trainings on letters: the same bits at the end as without."""
    for training, iteration in ((MetaTraining, 5), (PreTraining, 3)):
        loss = training.loss

        def interrupt(self, i, iteration=iteration, loss=loss):
            if i == iteration and not os.path.exists(tmp_path / self.name):
                (tmp_path / self.name).touch()
                os.kill(os.getpid(), signal.SIGINT)
            return loss(self, i)

        monkeypatch.setattr(training, "loss", interrupt)

    arguments = ["--output", str(tmp_path)]
    assert main(["--quick", *arguments]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["engine", "torch" if library.ABSENT else "cpu"]
    assert f"--resume --output {tmp_path}" in lines[-1]
    assert torch.load(tmp_path / "checkpoint.pt")["trainings"]["MAML"]["iteration"] == 6
    assert main(["--resume", *arguments]) == 130
    assert torch.load(tmp_path / "checkpoint.pt")["trainings"]["pre-training"]["iteration"] == 4
    assert main(["--resume", *arguments]) == 0
    assert "95% intervals" in capsys.readouterr().out

    once, again = (torch.load(folder / "checkpoint.pt")["trainings"] for folder in (finished, tmp_path))
    assert set(once) == set(again) and len(once) == 4
    for name in once:
        for key in ("model", "optimizer", "history", "iteration"):
            torch.testing.assert_close(again[name][key], once[name][key], rtol=0, atol=0)
    once, again = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path))
    assert again["accuracy"] == once["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected 0 to"),
        (["--resume"], "--resume: there is no checkpoint"),
        (["--resume", "--seed", "1"], "--seed: expected 0, as in the checkpoint, got 1"),
        (["--resume", "--threads", "x"], "invalid int"),
    ],
)
def test_bad_options(finished, tmp_path, capsys, arguments, message):
    folder = finished if "--seed" in arguments and "--resume" in arguments else tmp_path
    with pytest.raises(SystemExit):
        main([*arguments, "--output", str(folder)])
    assert message in capsys.readouterr().err


def test_foreign_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_text("not a checkpoint")
    with pytest.raises(SystemExit):
        main(["--resume", "--output", str(tmp_path)])
    assert "is no checkpoint of this demo" in capsys.readouterr().err


def test_interval():
    values = torch.tensor([0.2, 0.4, 0.6, 0.8])
    mean, half = evaluation.interval(values)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * math.sqrt(0.2 / 3) / 2)
    with pytest.raises(ValueError, match="at least 2 tasks"):
        evaluation.interval(values[:1])


def test_interval_covers():
    """The interval contains the true mean in about 95 of 100 samples of tasks."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 600, generator=generator)
    inside = [abs(mean - 0.5) <= half for mean, half in map(evaluation.interval, samples)]
    assert 0.93 < sum(inside) / len(inside) < 0.97


def test_enough_tasks():
    """The intervals are over at least 600 tasks."""
    assert Settings().test_tasks >= 600 and Settings().together_tasks >= 600
