"""What is measured without rounds, with clocks, counters and processes whose answers are known."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import probes
from benchmarks.machine import ROOT, Machine
from benchmarks.operators import Case
from benchmarks.results import OURS


class TenMilliseconds:
    """A clock on which every run takes that long."""

    method = "clock"

    def seconds(self, run, repeats):
        run()
        return 0.01 * repeats


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(Machine, "clock", TenMilliseconds())
    return Machine("cpu")


def test_ceilings(machine):
    copy = probes.ceilings("copy", "fp32").open(machine)("torch")
    assert (copy.rate, copy.unit) == (pytest.approx(2 * 2**27 / 0.01 / 1e9), "GB/s")  # read and written
    product = probes.ceilings("matmul", "fp32").open(machine)("torch")
    assert (product.rate, product.unit) == (pytest.approx(2 * 1024**3 / 0.01 / 1e12), "TFLOP/s")
    assert product.median_us == pytest.approx(10_000)


def test_memory_of_a_block(machine):
    case = Case(1, 16, 8, 8, "fp32", (7, 7))
    prepare = probes.memory_of_block(case).open(machine)
    rows = {provider: prepare(provider) for provider in (OURS, "ours_lean", "eager", "channels_last")}
    elements, pixels = case.pixels * case.c, case.pixels
    assert rows["channels_last"].saved_bytes == 4 * (12 * elements + 2 * pixels)
    assert rows["ours_lean"].saved_bytes < rows[OURS].saved_bytes / 4
    assert rows[OURS].median_us == pytest.approx(10_000)
    assert rows[OURS].peak_bytes is None  # which a CPU does not tell
    assert "not measured on a CPU" in rows[OURS].note


def test_memory_of_a_network(machine):
    prepare = probes.memory_of_network("convnext_atto", 32, 2, "fp32").open(machine)
    one, two = (
        probes.memory_of_network("convnext_atto", 32, n, "fp32").open(machine)(OURS).saved_bytes for n in (1, 2)
    )
    assert prepare("channels_last").saved_bytes == two
    assert 1.8 * one < two <= 2 * one + 10**4  # maps, and hardly anything else
    assert prepare(OURS).images == 2


def test_peak_is_over_what_was_there(monkeypatch):
    answers = {"memory_allocated": 300, "max_memory_allocated": 1000}
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    ran = []
    assert probes._peak_bytes(SimpleNamespace(is_cuda=True), lambda: ran.append(1)) == 700
    assert ran == [1]


def test_host_time_is_per_call_and_without_the_wait():
    now, waited = [0.0], []

    def call():
        now[0] += 2e-6

    def synchronize():
        now[0] += 1.0  # what the GPU still has to do
        waited.append(now[0])

    samples = probes.host_samples(call, synchronize, lambda: now[0], calls=10, samples=4)
    assert samples == pytest.approx([2e-6] * 4)
    assert len(waited) == 5


def test_host_rows(machine):
    row = probes.host("norm_linear", training=True).open(machine)(OURS)
    assert row.samples == 15
    assert 1 < row.median_us < 1e5
    assert row.case == "norm_linear forward and backward"


def test_variants_are_those_of_this_contest(machine, monkeypatch):
    counted, sizes = iter((5, 8)), []

    def function(x, weight, bias):
        sizes.append(tuple(x.shape))
        return x

    monkeypatch.setattr(probes, "_compile_and_count", lambda case, machine: (function, lambda: next(counted)))
    contest = probes.variants(training=False, sizes=6)
    row = contest.open(machine)("compile")
    assert row.variants == 3
    assert sizes == [(n, 80, h, w) for n, h, w in probes.random_sizes(6)]
    ours = pytest.raises(Exception, match="x is on cpu")
    with ours:
        contest.open(machine)(OURS)


def test_random_sizes_differ_and_are_the_same_every_time():
    sizes = probes.random_sizes(200)
    assert len(set(sizes)) == 200
    assert sizes == probes.random_sizes(200)
    assert all(len({size[place] for size in sizes}) > 20 for place in range(3))


def test_cold_start_has_empty_caches_and_takes_the_first_step(machine, monkeypatch):
    seen = {}

    def run(command, env, **options):
        seen.update(command=command, env=env, **options)
        assert not any(map(probes.os.path.exists, (env[name] for name in caches)))
        return SimpleNamespace(returncode=0, stdout='noise\n{"before": 3.0, "first": 2.5, "second": 0.5}\n')

    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
    monkeypatch.setattr(probes.subprocess, "run", run)
    contest = probes.cold_start("convnext_tiny", 64, 2)
    row = contest.open(machine)("compile")
    assert seen["timeout"] == contest.limit - 10  # who has started it ends it, not who would leave it behind
    assert row.median_us == pytest.approx(2.5e6)
    assert "second step 0.50 s" in row.note
    assert seen["command"][-5:] == ["convnext_tiny", "64", "2", "compile", "cpu"]
    first = dict(seen["env"])
    probes.cold_start("convnext_tiny", 64, 2).open(machine)("compile")
    assert all(first[name] != seen["env"][name] for name in caches)
    monkeypatch.setattr(probes.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9, stdout=""))
    with pytest.raises(RuntimeError, match="exit status -9"):
        probes.cold_start("convnext_tiny", 64, 2).open(machine)("compile")


def test_first_step():
    """The process itself; the first step finds nothing prepared, so it takes longest."""
    command = [sys.executable, "-m", "benchmarks.first_step", "convnext_atto", "32", "2", "ours", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == {"before", "first", "second"}
    assert said["first"] > said["second"] > 0
