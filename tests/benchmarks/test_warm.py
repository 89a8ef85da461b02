"""What warms the caches of torch.compile: it gets providers ready, and is gone when it is no longer wanted."""

import time

from benchmarks import suites
from benchmarks.warm import Warmer, compiled
from tests.benchmarks import toys

CONTESTS = {contest.case: contest for contest in toys.contests()}


def pairs(*work):
    return [(CONTESTS[case], provider) for case, provider in work]


def test_everybody_is_got_ready_whatever_the_others_do():
    work = pairs(("one dies", "dies"), ("a case", "raises"), ("a case", "ours"), ("one is late", "slowest"))
    with Warmer(toys.contests, "cpu", None, work) as warmer:
        end = time.monotonic() + 60
        while len(warmer.done) < 2 and time.monotonic() < end:
            time.sleep(0.1)
    assert sorted(provider for _, provider in warmer.done) == ["ours", "slowest"]


def test_leaving_does_not_wait():
    with Warmer(toys.contests, "cpu", None, pairs(("a case", "ours"), ("one hangs", "hangs")) * 20) as warmer:
        while not warmer.done:
            time.sleep(0.05)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert not any(thread.is_alive() for thread in warmer._threads)
    assert all(runner._process is None for runner in warmer._runners)


def test_leaving_at_once():
    start = time.monotonic()
    with Warmer(toys.contests, "cpu", None, pairs(("one hangs", "hangs"))) as warmer:
        pass
    assert time.monotonic() - start < 20
    assert warmer.done == []


def test_order_is_that_of_the_visits_and_the_first_networks_come_first():
    found = compiled(suites.visits(suites.plan(cuda=True)))
    assert {provider for _, provider in found} == {"compile", "ours_compile", "timm_compile", "reduce_overhead"}
    cases = list(dict.fromkeys((contest.suite, contest.case) for contest, _ in found))
    assert cases[:2] == [("model_training", "convnext_tiny 224 N=256"), ("model_inference", "convnext_tiny 224 N=256")]
    assert cases[2] == ("depthwise_forward", "C=96 56×56 7×7 N=128")
    large = cases.index(("model_training", "convnext_large 224 N=64"))
    assert cases.index(("block_training", "C=768 7×7 7×7 N=128")) < large
    assert cases.index(("model_inference", "convnext_tiny 224 N=1")) < large
