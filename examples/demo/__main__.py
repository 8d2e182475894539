"""The command line of the demo: ``make demo``, or ``python -m examples.demo --help``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from maml_ext.data import Glyphs

from . import evaluation, picture, sinusoid
from .training import QUICK, Checkpoint, Interrupted, MetaTraining, PreTraining, Settings, train


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.partition(":")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument(
        "--threads",
        type=int,
        help="of torch; default: 1 (2: faster on an idle machine, much slower on a busy one)",
    )
    parser.add_argument("--quick", action="store_true", default=None, help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if options.seed is not None and not 0 <= options.seed < 2**31:
        parser.error(f"--seed: expected 0 to {2**31 - 1}, got {options.seed}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: expected a folder, {options.output} is a file")

    options.chosen = {"seed": 0, "threads": 1, "quick": False}
    given = {key: getattr(options, key) for key in options.chosen if getattr(options, key) is not None}
    options.checkpoint = options.output / "checkpoint.pt"
    options.trainings = {}
    if options.resume:
        if not options.checkpoint.is_file():
            parser.error(f"--resume: there is no checkpoint {options.checkpoint}")
        try:
            saved = torch.load(options.checkpoint, weights_only=True)
            options.chosen, options.trainings = saved["options"], saved["trainings"]
        except Exception as error:  # whatever unpickling a foreign file raises
            parser.error(f"--resume: {options.checkpoint} is no checkpoint of this demo ({error})")
        for key, value in given.items():
            if value != options.chosen[key]:
                parser.error(f"--{key}: expected {options.chosen[key]}, as in the checkpoint, got {value}")
    options.chosen |= given
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    checkpoint = Checkpoint(options.checkpoint, options.chosen, options.trainings)
    try:
        with checkpoint.catch_interrupts():
            run(options.output, checkpoint)
    except Interrupted:
        print(f"\nStopped; {checkpoint.path} is kept. To go on: python -m examples.demo --resume", end="")
        print("" if options.output == Path("out/demo") else f" --output {options.output}")
        return 130
    return 0


def run(output: Path, checkpoint: Checkpoint) -> None:
    started = time.perf_counter()
    torch.set_num_threads(checkpoint.options["threads"])
    seed = checkpoint.options["seed"]
    settings = QUICK if checkpoint.options["quick"] else Settings()

    seen = Glyphs("train", size=settings.size, examples=settings.examples)
    held_out = Glyphs("test", size=settings.size, examples=settings.examples)
    meta = MetaTraining(settings, seen, seed)
    print(meta.maml.explain(*meta.batches[0][:2]), flush=True)
    print(f"\ntraining on {len(seen.classes)} letters of {len(set(seen.scripts))} scripts, "
          f"testing on {len(held_out.classes)} letters of {len(set(held_out.scripts))} others")  # fmt: skip

    pre = PreTraining(settings, seen, seed)
    sine_meta = sinusoid.SinusoidTraining(settings, seed)
    sine_pre = sinusoid.SinusoidPreTraining(settings, seed)
    trainings = [meta, pre, sine_meta, sine_pre]
    for training in trainings:
        train(training, checkpoint)

    networks = {
        "MAML": (meta.maml.module, settings.maml_rates),
        "fine-tuning": (evaluation.fine_tuned(pre.model, settings.ways), settings.finetune_rates),
    }
    chosen, tried = {}, {}
    for method, (network, rates) in tqdm(networks.items(), desc="choosing inner rates", unit="method"):
        rate, tried[method] = evaluation.best_rate(network, rates, seen, settings, seed, checkpoint)
        chosen[method] = network, rate
    results = evaluation.test(chosen, held_out, settings, seed, checkpoint)

    sines = {"MAML": sine_meta.maml.module, "pre-trained": sine_pre.model}
    summary = {
        "options": checkpoint.options,
        "settings": asdict(settings),
        "accuracy": results,
        "inner_rates": {method: rate for method, (_, rate) in chosen.items()},
        "accuracy_by_rate_on_training_scripts": tried,
        "together_only": evaluation.test_sets(held_out, settings.ways)[1],
        "sinusoid_mse": {method: sinusoid.errors(network, seed) for method, network in sines.items()},
        "seconds": {training.name: training.seconds for training in trainings},
    }
    report(summary, held_out, settings)
    (output / "results.json").write_text(json.dumps(summary, indent=1))
    picture.draw(
        output / "demo.png",
        examples=picture.example_tasks(*chosen["MAML"], held_out, settings, seed),
        history=meta.history,
        results=results,
        curves={method: sinusoid.example(network, seed) for method, network in sines.items()},
    )
    print(f"\n{output / 'demo.png'} and results.json, after {time.perf_counter() - started:.0f} seconds")


def report(summary: dict, held_out: Glyphs, settings: Settings) -> None:
    """Print the table, and what one must know to read it."""
    seconds = ", ".join(f"{name} {summary['seconds'][name]:.0f} s" for name in ("MAML", "pre-training"))
    rates = ", ".join(f"{method} {rate:g}" for method, rate in summary["inner_rates"].items())
    print(
        f"\n{settings.ways}-way 1-shot accuracy on held-out scripts in %, with 95% intervals "
        f"over {settings.test_tasks} tasks a script\nand {settings.together_tasks} of all together, "
        f"before adaptation and after each inner step.\nTrained for: {seconds}. "
        f"Inner rates, best on training scripts: {rates}.\n"
    )
    print(evaluation.table(summary["accuracy"], held_out))
    for script in summary["together_only"]:
        print(
            f"{script}: {held_out.scripts.count(script)} letters unlike those of other scripts, too few for "
            f"a task of {settings.ways}; they are in '{evaluation.TOGETHER}' only."
        )
    print(f"\nsinusoids, mean squared error after {', '.join(map(str, sinusoid.SHOWN))} steps:")
    for method, errors in summary["sinusoid_mse"].items():
        print(f"  {method:<12}" + "".join(f"{errors[steps]:>7.2f}" for steps in sinusoid.SHOWN))


if __name__ == "__main__":
    sys.exit(main())
