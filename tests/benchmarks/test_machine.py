"""The machine's side of timing: CUDA graphs, tried with graphs that are none; and what it says of itself."""

import contextlib
import gc
import weakref

import pytest
import torch

from benchmarks import machine as module
from benchmarks.machine import Machine
from benchmarks.results import IDENTITY, META, file_name


class Graphs:
    """Stands for torch.cuda: a "capture" that records what was called, and a replay that counts."""

    def __init__(self, monkeypatch, fails: bool = False):
        self.replays, self.capturing, self.fails = 0, False, fails
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        self.forgotten = []
        monkeypatch.setattr(Machine, "_forget_capture", lambda machine, pool: self.forgotten.append(pool))

    @contextlib.contextmanager
    def capture(self, graph, pool, stream):
        assert graph is self
        assert pool == (0, 1)
        assert stream == "the stream"
        self.capturing = True
        yield
        self.capturing = False
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        self.replays += 1


@pytest.fixture
def on_gpu(monkeypatch):
    machine = Machine("cpu")
    monkeypatch.setattr(machine, "is_cuda", True)
    return machine


def test_a_lap_is_captured_after_two_laps_to_warm_up(on_gpu, monkeypatch):
    graphs, seen = Graphs(monkeypatch), []
    run, method = on_gpu.lap([lambda i=i: seen.append((i, graphs.capturing)) for i in range(2)], graph=True)
    assert method == "graph"
    assert seen == [(0, False), (1, False)] * 2 + [(0, True), (1, True)]
    run()
    run()
    assert graphs.replays == 2
    assert len(seen) == 6


def test_what_a_graph_works_on_stays_as_long_as_its_replay(on_gpu, monkeypatch):
    """It knows addresses only; what is freed there would be somebody else's."""
    Graphs(monkeypatch)

    def lap():
        x = torch.ones(3)
        result = torch.zeros(3)
        return on_gpu.lap([lambda: result.copy_(x)], graph=True)[0], weakref.ref(x), weakref.ref(result)

    run, x, result = lap()
    gc.collect()
    assert x() is not None
    assert result() is not None
    del run
    gc.collect()
    assert x() is None


def test_without_a_graph_calls_are_made(on_gpu, monkeypatch):
    for graph, fails in ((False, False), (True, True)):
        graphs, seen = Graphs(monkeypatch, fails), []
        run, method = on_gpu.lap([lambda: seen.append(1)], graph)  # noqa: B023 - called in this round only
        assert method == "events"
        before = len(seen)
        run()
        assert len(seen) == before + 1
        assert graphs.replays == 0
        assert graphs.forgotten == ([(0, 1)] if fails else [])


def test_a_mistake_in_the_call_is_no_mistake_of_capturing(on_gpu, monkeypatch):
    Graphs(monkeypatch)

    def wrong():
        raise ValueError("x has shape (1,)")

    with pytest.raises(ValueError, match="x has shape"):
        on_gpu.lap([wrong], graph=True)


def test_facts():
    meta = Machine("cpu").meta("a command", "abc", quick=True)
    assert set(META) <= set(meta)
    assert set(IDENTITY) <= set(meta)
    assert meta["gpu"].startswith("CPU ")
    assert meta["commit"] == "abc"
    assert meta["by"] == "a command"
    assert meta["quick"] is True
    assert meta["torch"] == torch.__version__
    assert meta["driver"] is None
    assert file_name(meta).startswith("cpu-")
    assert file_name(meta).endswith(f"-{meta['date']}-abc.json")


def test_commit_says_when_the_tree_differs(monkeypatch):
    answers = {"--short=8": "abc12345", "--show-toplevel": str(module.ROOT), "--porcelain": None}
    monkeypatch.setattr(module, "_first_line", lambda command: answers[command[2]])
    assert Machine("cpu").meta("a command")["commit"] == "abc12345"
    answers["--porcelain"] = " M benchmarks/timing.py"
    assert Machine("cpu").meta("a command")["commit"] == "abc12345-dirty"
    answers["--show-toplevel"] = "/another/project"
    assert Machine("cpu").meta("a command")["commit"] == "unknown"
    answers["--short=8"] = None
    assert Machine("cpu").meta("a command")["commit"] == "unknown"


def test_fp32_is_fp32():
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        Machine("cpu").set_up()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = kept
