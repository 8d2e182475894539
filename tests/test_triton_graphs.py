"""Functions as CUDA graphs: the rules with a stand-in for CUDA's, and on a device with its own."""

import contextlib
import threading

import pytest
import torch
from maml_ext.kernels import graphs
from maml_ext.kernels.launch import launch, watched

CUDA = torch.device("cuda")


class Graph:
    """As torch.cuda.CUDAGraph, for kernels that are Python functions."""

    recording = None

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        Graph.recording, self.launched = self, []

    def capture_end(self):
        Graph.recording = None

    def replay(self):
        for kernel in self.launched:
            kernel()


class Kernel:
    """What `launch` takes for a kernel: launched in a recording, it only is recorded."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return lambda **_: Graph.recording.launched.append(self.run) if Graph.recording else self.run()


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Graph.recording is not None)


class Counted:
    """A function of some launches, how often it was called, and how many of its kernels ran."""

    def __init__(self, launches=3, fails_at=None):
        self.launches, self.fails_at, self.calls, self.ran = launches, fails_at, 0, 0

    def kernel(self):
        self.ran += 1

    def __call__(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("operation not permitted")
        for _ in range(self.launches):
            launch(Kernel(self.kernel), 1, flops=0, moved=0)


def plain(replayed, function, why):
    """Every call is one of the function."""
    for n in range(1, 4):
        replayed()
        assert (function.calls, function.ran) == (n, n * function.launches)
    assert why in replayed.why


def test_the_second_call_records_and_later_ones_replay(cuda):
    function = Counted()
    replayed = graphs.Replayed(function, CUDA)
    seen = []
    for _ in range(4):
        replayed()
        seen.append((function.calls, function.ran))
    assert seen == [(1, 3), (2, 6), (2, 9), (2, 12)]
    assert replayed.why is None


def test_switches(cuda, monkeypatch):
    function = Counted()
    plain(graphs.Replayed(function, CUDA, enabled=False), function, "switched off")
    monkeypatch.setenv(graphs.SWITCH, "0")
    function = Counted()
    plain(graphs.Replayed(function, CUDA), function, "MAML_EXT_CUDA_GRAPHS=0")
    assert graphs.unavailable(CUDA) == "MAML_EXT_CUDA_GRAPHS=0"


def test_none_without_a_device(cuda):
    function = Counted()
    plain(graphs.Replayed(function, torch.device("cpu")), function, "there are none on cpu tensors")


def test_none_of_too_many_launches(cuda, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    function = Counted(4)
    plain(graphs.Replayed(function, CUDA), function, "there are 4 launches, more than 3")


def test_what_cannot_be_recorded_is_launched(cuda):
    function = Counted(fails_at=2)
    replayed = graphs.Replayed(function, CUDA)
    replayed(), replayed()
    assert (function.calls, function.ran) == (3, 6) and Graph.recording is None
    assert replayed.why == "recording failed: operation not permitted"
    replayed()
    assert (function.calls, function.ran) == (4, 9)


def test_a_graph_in_a_graph_is_its_launches(cuda):
    """Until the other is done."""
    function = Counted()
    replayed = graphs.Replayed(function, CUDA)
    replayed()
    other = Graph()
    other.capture_begin("thread_local")
    assert replayed.why == "another graph is being recorded"
    replayed()
    other.capture_end()
    assert len(other.launched) == 3 and function.ran == 3
    replayed(), replayed()
    assert (function.calls, function.ran) == (3, 9)


def test_watched_launches_take_place(cuda):
    function, launches = Counted(), []
    replayed = graphs.Replayed(function, CUDA)
    replayed(), replayed()
    with watched(lambda launch: launches.append(launch) or True):
        assert replayed.why == "launches are watched"
        replayed()
    assert len(launches) == 3


def test_threads_record_once(cuda):
    function = Counted()
    replayed = graphs.Replayed(function, CUDA)
    threads = [threading.Thread(target=replayed) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (function.calls, function.ran) == (2, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device():
    update = pytest.importorskip("maml_ext.kernels.update")
    table = update.Table.of([update.Slot(0, 2000, 0, 3)], "cuda")
    partials, rates = torch.randn(3 * 2 * 2000, device="cuda"), torch.full([1], 0.5, device="cuda")
    theta, following = torch.randn(2, 2, 2000, device="cuda")
    replayed = graphs.Replayed(lambda: update.step(table, (partials,), (theta,), rates, (following,)), partials.device)
    for _ in range(4):
        theta.normal_(), following.fill_(float("nan"))
        replayed()
        torch.testing.assert_close(following, theta - 0.5 * partials.view(3, 2, 2000).sum(0))
    assert replayed.why is None
