"""What a block of the CUDA kernel `meta` does, phase by phase: a count by its rules, from the kernels' own layout.

A phase ends at a barrier of the block. How the kernels lay a network out in shared memory, how many samples and
threads a block has, comes from their host code (`plan_of_meta` in tests/emulation/module.cpp); what a rule does with
that is restated here, in the order of csrc/cuda/task.h and meta.cu, and tests/test_gpu_model.py holds it to the
emulation's barriers and launches. It knows what the workloads that fit need: linear layers with activations, float32,
gradients of the parameters alone. (That constants are loaded once is left out.)
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

WARP, BANKS, NUMBER_BYTES = 32, 32, 4

# Instructions, as nvcc 13.0 compiles the kernels for sm_90, rounded: of a product, its loop by step of depth, on plain
# numbers and on Duals (True); what a tile of 2 x 2 takes around that loop; and an activation at one of its places.
# BATCH: how many steps of depth load before the first of them is waited for. (Where depth allows it is more, which is
# not counted.)
STEP = {False: 12, True: 36}
BATCH = {False: 4, True: 2}
LOADS = 4  # of `each_element`
TILE, FINISH = 40, 40
PASS, SAMPLE, LOSS = 16, 55, 100  # by element of a pass over parameters, samples, losses

# Latencies in cycles. Assumptions: table 3 of PMC10448217 has 20 for shared memory, 200 for the second level cache and
# 4 for arithmetic on both A100 and H100; taken here is the upper end of what is usually given, up to 30 and 270.
SHARED, FIRST_CACHE, SECOND_CACHE, SHUFFLE = 29, 38, 260, 25


@dataclass
class Phase:
    """What a block does between two barriers, in warp instructions and cycles.

    `chain` is what its busiest warp would take by itself, by kind of work: its instructions one after another, and the
    latencies that it waits for. `wavefronts` are cycles of the shared memory in products, `smooth` what they would be
    if no two lanes met in a bank. `multiply_adds` are of linear layers, `lanes` what its warps have room for meanwhile.
    """

    instructions: int = 0
    arithmetic: int = 0
    wavefronts: int = 0
    smooth: int = 0
    chain: Counter = field(default_factory=Counter)
    multiply_adds: int = 0
    lanes: int = 0
    read: int = 0  # bytes of device memory
    written: int = 0


@dataclass
class Block:
    """The phases of one task, while they are counted."""

    plan: dict
    phases: list[Phase] = field(default_factory=lambda: [Phase()])

    @property
    def now(self) -> Phase:
        return self.phases[-1]

    def barrier(self) -> None:
        self.phases.append(Phase())

    def rounds(self, count: int) -> int:
        """How often the busiest thread goes round a loop over so many elements."""
        return math.ceil(count / self.plan["threads"])

    def each(self, kind: str, count: int, instructions: int, waits: int) -> None:
        """A loop of all threads over elements, waiting so many cycles at each."""
        self.now.instructions += math.ceil(count / WARP) * instructions
        self.now.chain[kind] += self.rounds(count) * (instructions + waits)

    def product(self, rows: int, columns: int, depth: int, pitches: tuple, dual: bool, finish: bool) -> None:
        """`product` of block.h; `pitches`: how far rows and columns lie apart."""
        tiles = math.ceil(rows / 2) * math.ceil(columns / 2)
        warps, numbers = math.ceil(tiles / WARP), 2 if dual else 1
        now, behind = self.now, 4 * FINISH if finish else 0
        now.instructions += warps * (TILE + depth * STEP[dual] + behind)
        now.arithmetic += warps * depth * (16 if dual else 4)
        now.wavefronts += numbers * depth * wavefronts(rows, columns, *pitches)
        now.smooth += numbers * depth * warps * 4
        now.multiply_adds += rows * columns * depth * (3 if dual else 1)
        now.lanes += warps * WARP * 4 * depth * (3 if dual else 1)
        waits = (depth // BATCH[dual] + depth % BATCH[dual]) * SHARED + (4 * SHARED if finish else 0)
        now.chain["products"] += self.rounds(tiles) * (TILE + depth * STEP[dual] + behind + waits)

    def each_parameter(self, waits: int, reads: int = 0, writes: int = 0) -> None:
        """A pass over theta: a thread has LOADS elements of a stretch under way before it waits for the first."""
        for count in self.plan["stretches"]:
            self.now.instructions += math.ceil(count / WARP) * PASS
            turns = math.ceil(count / (self.plan["threads"] * LOADS))
            self.now.chain["passes over parameters"] += self.rounds(count) * PASS + turns * waits
        size = self.plan["parameters"] * NUMBER_BYTES
        self.now.read += reads * size
        self.now.written += writes * size

    def clear_slopes(self) -> None:
        self.each("passes over parameters", self.plan["vector"], 4, 0)

    def load_samples(self, count: int) -> None:
        self.each("samples and losses", count * self.plan["features"], SAMPLE, SECOND_CACHE)
        self.now.read += count * self.plan["features"] * NUMBER_BYTES

    def sum_over_block(self) -> None:
        self.now.chain["samples and losses"] += 5 * SHUFFLE
        self.barrier()
        self.barrier()
        self.now.chain["samples and losses"] += self.plan["threads"] // WARP * (6 + SHARED)

    def forward(self, count: int, dual: bool) -> None:
        for s in self.plan["stages"]:
            pitches = s["input_pitch"], s["input_pitch"]
            self.product(count, s["outputs"], s["inputs"], pitches, dual, s["activated"])
            self.barrier()

    def losses(self, count: int) -> None:
        outputs, labels = self.plan["outputs"], self.plan["labels"]
        passes = 4 if labels else 1  # maximum, sum, loss, gradient
        by_sample = LOSS + outputs * passes * 25, outputs * passes * SHARED + FIRST_CACHE
        self.each("samples and losses", count, *by_sample)
        self.now.read += count * (8 if labels else outputs * NUMBER_BYTES)

    def backward(self, count: int, dual: bool) -> None:
        for i, s in reversed(list(enumerate(self.plan["stages"]))):
            rows = s["inputs"] * s["learns"] + s["learns_bias"]  # the bias is the weight of one more input
            if rows:
                self.product(rows, s["outputs"], count, (1, 1), dual, False)
            if s["moves"]:
                activated = i > 0 and self.plan["stages"][i - 1]["activated"]
                self.product(count, s["inputs"], s["outputs"], (s["output_pitch"], 1), dual, activated)
            self.barrier()
            if not s["moves"]:
                break

    def score(self, samples: int, dual: bool, resident: bool, asked: bool) -> None:
        """`Task::score`: one pass over the samples, by chunks."""
        chunk = self.plan["chunk"]
        if self.plan["labels"]:  # the normaliser is the sum of their weights
            for _ in range(2 if dual else 1):
                self.sum_over_block()
        for first in range(0, samples, chunk):
            count = min(chunk, samples - first)
            if not resident or samples > chunk:
                self.load_samples(count)
            self.barrier()
            self.forward(count, dual)
            self.losses(count)
            self.barrier()
            self.backward(count, dual)
        if asked:
            self.sum_over_block()


@cache
def wavefronts(rows: int, columns: int, row_pitch: int, column_pitch: int) -> int:
    """Cycles of the shared memory for the four loads of a step of depth, summed over the warps of a product.

    Lanes that read one word share it; different words of one bank take a cycle each. One step of depth to the next
    moves all lanes alike, so that this is the same for all of them.
    """
    down, across = math.ceil(rows / 2), math.ceil(columns / 2)
    total = 0
    for first in range(0, down * across, WARP):
        tiles = range(first, min(first + WARP, down * across))
        for i in range(2):
            left = {min(tile % down + i * down, rows - 1) * row_pitch for tile in tiles}
            right = {min(tile // down + i * across, columns - 1) * column_pitch for tile in tiles}
            total += sum(max(Counter(word % BANKS for word in words).values()) for words in (left, right))
    return total


def meta(plan: dict, support: int, query: int, steps: int) -> list[Phase]:
    """The phases of one task in the kernel `meta`: inner loop, query loss, adjoint recursion."""
    if not all(stage["linear"] for stage in plan["stages"]):
        raise NotImplementedError("only linear layers and their activations are counted")
    block = Block(plan)
    block.each_parameter(SECOND_CACHE, reads=1)
    block.barrier()
    for k in range(steps + 1):
        last = k == steps
        block.clear_slopes()
        block.score(query if last else support, dual=False, resident=k > 0 and not last, asked=last)
        if not last:
            block.each_parameter(FIRST_CACHE + 2 * SHARED, writes=1)
            block.barrier()
    block.each_parameter(SHARED, writes=1)
    block.barrier()
    for k in reversed(range(steps)):
        block.each_parameter(SECOND_CACHE, reads=1)  # theta_k
        block.clear_slopes()
        block.each_parameter(SECOND_CACHE, reads=1)  # lambda
        block.barrier()
        block.score(support, dual=True, resident=k < steps - 1, asked=False)
        block.each_parameter(FIRST_CACHE + SHARED, reads=1, writes=1)
        block.barrier()
    return block.phases[:-1]


def launches(plan: dict, steps: int) -> dict[str, int]:
    """Of a meta-gradient summed over tasks: in a single pass, and where the inner loop is differentiated by itself."""
    by_steps = math.ceil(steps / plan["steps_of_a_launch"])
    return {"single pass": 2, "inner loop": by_steps, "query loss": 1, "adjoint": by_steps}
