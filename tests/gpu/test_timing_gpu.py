"""The benchmarks' clock on a GPU, against work of known length: what is wrong here makes figures wrong."""

import statistics

import pytest
import torch
from torch.nn import functional as F

from benchmarks.machine import Machine
from benchmarks.operators import OPERATORS, Case
from benchmarks.probes import ceilings
from benchmarks.results import OURS
from benchmarks.timing import EventClock, interleave, ratios, timed
from tests.gpu.conftest import DEVICE, only_on_gpu, skip_without_gpu

skip_without_gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.alone, only_on_gpu]

CYCLES = 2_000_000  # about a millisecond


@pytest.fixture
def machine():
    """Set up as for benchmarks, on a stream of its own; nothing of it stays."""
    kept = torch.cuda.current_stream(), torch.backends.cudnn.benchmark
    machine = Machine(DEVICE)
    machine.set_up()
    yield machine
    torch.cuda.synchronize()
    torch.cuda.set_stream(kept[0])
    torch.backends.cudnn.benchmark = kept[1]


def sleep(cycles):
    return lambda: torch.cuda._sleep(cycles)


def test_time_of_sleeping_grows_with_the_cycles(machine):
    work = {str(n): timed(machine.clock, sleep(n * CYCLES)) for n in (1, 2, 5)}
    samples = interleave(machine.clock, work, seconds=0.5)
    for n in (2, 5):
        assert statistics.median(ratios(samples, str(n), "1")) == pytest.approx(n, rel=0.03)


def test_graphs_and_events_agree_on_long_work(machine):
    laps = {graph: machine.lap([sleep(CYCLES)] * 3, graph) for graph in (False, True)}
    assert [laps[graph][1] for graph in (False, True)] == ["events", "graph"]
    seconds = {graph: timed(machine.clock, run, 3).sample(machine.clock) for graph, (run, _) in laps.items()}
    assert seconds[True] == pytest.approx(seconds[False], rel=0.02)


def test_time_without_work_is_not_that_of_python(machine):
    """Hundreds of empty kernels: with gaps they take what Python needs for each, in a graph about a microsecond."""
    x = torch.zeros(1, device=machine.device)
    calls = [lambda: x.add_(1)] * 200
    seconds = {}
    for graph in (False, True):
        run, _ = machine.lap(calls, graph)
        seconds[graph] = timed(machine.clock, run, len(calls)).sample(machine.clock)
    assert seconds[True] < 3e-6
    assert seconds[True] < seconds[False]


def test_the_clock_starts_with_the_work(machine):
    """One short kernel by itself: the time until Python has sent it is not counted."""
    x = torch.zeros(1, device=machine.device)
    seconds = sorted(EventClock().seconds(lambda: x.add_(1), 1) for _ in range(50))
    assert seconds[25] < 20e-6


def test_rotated_copies_are_not_faster_than_memory(machine):
    """Maps of 4 MB fit into any L2: over one of them a copy is faster than memory, over many it is not."""
    limit = ceilings("copy", "bf16").open(machine)("torch").rate * 1e9
    size = 4 * 2**20
    most, rates = machine.sets_of_inputs(2 * size), {}
    for count in (1, most):
        pairs = [
            [torch.randint(127, (size,), dtype=torch.uint8, device=machine.device) for _ in "ab"] for _ in range(count)
        ]
        # As many copies in either graph, of which each costs something to begin with.
        calls = [lambda a=a, b=b: b.copy_(a) for a, b in pairs] * (most // count)
        run, method = machine.lap(calls, graph=True)
        assert method == "graph"
        rates[count] = 2 * size / timed(machine.clock, run, len(calls)).sample(machine.clock)
    rotated = rates[most]
    assert most > 10
    assert 0.2 * limit < rotated < 1.3 * limit  # caches do not forget the oldest first
    assert rates[1] > 0.9 * rotated


def test_what_cannot_be_captured_is_timed_by_events_and_harms_nothing(machine):
    x = torch.randn(1000, device=machine.device)
    run, method = machine.lap([lambda: x.sum().item()], graph=True)
    assert method == "events"
    run()
    torch.randn(1, device=machine.device)
    large = torch.empty(2**28, dtype=torch.uint8, device=machine.device)
    reserved = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**28
    assert machine.lap([lambda: x * 2], graph=True)[1] == "graph"
    torch.cuda.synchronize()


@pytest.mark.parametrize("suite", [suite for operator in OPERATORS.values() for suite in operator.passes])
def test_every_pass_is_captured(machine, suite):
    """Of ours and of PyTorch's: a figure with Python's gaps in it would compare something else."""
    operator = next(operator for operator in OPERATORS.values() if suite in operator.passes)
    case = Case(4, 64, 14, 14, kernel=None if operator.name == "norm_linear" else (7, 7))
    prepare = operator.contest(suite, case, (OURS, "eager")).open(machine)
    for provider in operator.providers:
        if provider in (OURS, "eager", "channels_last"):
            entry = prepare(provider)
            assert entry.facts["method"] == "graph", provider
            assert 0 < entry.timed.sample(machine.clock) < 1e-2


def test_a_replay_computes_what_the_call_computes(machine):
    x = torch.randn(8, 64, 14, 14, device=machine.device)
    weight = torch.randn(64, 1, 7, 7, device=machine.device)
    out = torch.zeros(8, 64, 14, 14, device=machine.device)
    run, method = machine.lap([lambda: out.copy_(F.conv2d(x, weight, padding=3, groups=64))], graph=True)
    assert method == "graph"
    x.mul_(2)
    run()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, F.conv2d(x, weight, padding=3, groups=64), rtol=1e-3, atol=1e-3)
