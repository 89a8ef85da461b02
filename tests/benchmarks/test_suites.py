"""The plan: what the claims of the package need is in it, once, and what is most important comes first."""

import dataclasses
import shutil

import pytest
import torch
from torch._functorch import config

from benchmarks import suites
from benchmarks.contest import Entry
from benchmarks.machine import Machine
from benchmarks.operators import DTYPES, LATE, OPERATORS, Case, fallback
from benchmarks.results import OURS, STATUSES
from tests.benchmarks import toys


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_every_contest_is_there_once(cuda, quick):
    contests = suites.plan(cuda, quick)
    keys = [contest.key for contest in contests]
    assert len(set(keys)) == len(keys)
    for contest in contests:
        assert len(set(contest.providers)) == len(contest.providers)
        assert contest.providers[0] == ("torch" if contest.suite == "ceilings" else OURS)
        assert contest.costs or contest.suite in ("ceilings", "memory", "host", "cold_start", "variants")
        assert all(cost.bytes > 0 and cost.flops >= 0 for cost in contest.costs)


def keys(cuda, quick=False):
    return {contest.key: contest for contest in suites.plan(cuda, quick)}


def test_gpu_plan_has_what_is_asked_of_it():
    found = keys(cuda=True)
    for width in ((96, 192, 384, 768), (128, 256, 512, 1024), (192, 384, 768, 1536)):
        for c, size in zip(width, (56, 28, 14, 7), strict=True):
            for kernel in (3, 5, 7, 9, 11, 13, 21, 31):
                for suite in suites.DEPTHWISE:
                    assert (suite, f"C={c} {size}×{size} {kernel}×{kernel} N=128", "bf16") in found
            for suite in (*suites.NORM_LINEAR, *suites.BLOCK):
                kernel = " 7×7" if suite in suites.BLOCK else ""
                assert (suite, f"C={c} {size}×{size}{kernel} N=128", "bf16") in found
    for model in ("tiny", "small", "base", "large"):
        assert any(key[:2][0] == "model_training" and key[1].startswith(f"convnext_{model} ") for key in found)
        for n in (1, 32):
            assert ("model_inference", f"convnext_{model} 224 N={n}", "bf16") in found
    assert ("model_training", "convnextv2_tiny 224 N=256", "amp_bf16") in found
    tiny = found["model_training", "convnext_tiny 224 N=256", "amp_bf16"]
    assert {
        OURS,
        "eager",
        "channels_last",
        "compile",
        "max_autotune",
        "timm",
        "swin_tiny",
        "vit_small",
        "resnet50",
    } <= (set(tiny.providers))
    sizes = {key[1].split()[1] for key in found if key[0] == "model_inference"}
    assert len(sizes) >= 4
    assert {"host", "memory", "cold_start", "variants", "ceilings"} <= {key[0] for key in found}
    assert any("200 random sizes" in key[1] for key in found)


def test_order_of_importance():
    """What the package claims first: in a short run there is no time for the rest."""
    order = list(dict.fromkeys(contest.key for contest in suites.plan(cuda=True)))
    seven, thirteen, large, nine = (f"C=96 56×56 {k}×{k} N=128" for k in (7, 13, 31, 9))
    wanted = [
        ("depthwise_forward", seven, "bf16"),
        ("depthwise_weight_gradient", seven, "bf16"),
        ("model_training", "convnext_tiny 224 N=256", "amp_bf16"),
        ("model_inference", "convnext_tiny 224 N=256", "bf16"),
        ("block_forward", seven, "bf16"),
        *(("depthwise_forward", case, "bf16") for case in (thirteen, large, nine)),
        ("memory", "block C=96 56×56 7×7 N=32", "bf16"),
        ("memory", "convnext_tiny 224 N=64", "amp_bf16"),
        ("model_inference", "convnext_tiny 224 N=1", "bf16"),
        ("variants", "depthwise forward C=80 7×7, 200 random sizes", "bf16"),
        ("cold_start", "convnext_tiny 224 N=32", "amp_bf16"),
        ("host", "depthwise forward", "bf16"),
        ("layer_norm_linear_forward", "C=96 56×56 N=128", "bf16"),
        ("model_inference", "convnext_tiny 224 N=32", "bf16"),
        ("model_training", "convnext_large 224 N=64", "amp_bf16"),
        ("depthwise_forward", "C=96 56×56 3×3 N=128", "bf16"),
        ("depthwise_forward", seven, "fp32"),
        ("depthwise_forward", "C=192 56×56 31×31 N=128", "bf16"),
    ]
    places = [order.index(key) for key in wanted]
    assert order[0][0] == "ceilings"
    assert places == sorted(places)


def test_who_takes_part_in_what():
    found = keys(cuda=True)
    for key, contest in found.items():
        if key[0] in suites.DEPTHWISE:
            assert ("compile" in contest.providers) == key[1].endswith(" 7×7 N=128")
            large = any(f" {k}×{k} " in key[1] for k in (21, 31))
            assert (contest.limit, contest.rounds) == ((30.0, (3, 50)) if large else (60.0, (5, 50)))
        if key[0] == "model_inference":
            waited_for = key[1].endswith((" N=1", " N=32"))
            assert {"ours_graph", "reduce_overhead"} <= set(contest.providers) or not waited_for
            assert waited_for or contest.providers[1:4] == ("ours_compile", "timm_compile", "compile")
        if key[0] in ("model_training", "model_inference"):
            assert contest.limit == 240
            assert "reduce_overhead" not in contest.late
    for key in (
        ("model_training", "convnext_base 224 N=128", "amp_bf16"),
        ("model_inference", "convnext_base 224 N=256", "bf16"),
    ):
        assert "max_autotune" in found[key].providers
        assert "max_autotune" in found[key].late


def test_quick_is_a_part():
    for cuda in (False, True):
        assert set(keys(cuda, quick=True)) < set(keys(cuda))


def test_visits_are_all_of_the_plan_with_late_providers_last():
    contests = suites.plan(cuda=True)
    visits = suites.visits(contests)
    seen = {}
    for visit in visits:
        late = visit.contest.late
        seen.setdefault(visit.contest.key, []).extend(p for p in visit.providers if not visit.again or p in late)
    assert {contest.key: set(contest.providers) for contest in contests} == {key: set(p) for key, p in seen.items()}
    assert all(len(providers) == len(set(providers)) for providers in seen.values())
    again = [visit.again for visit in visits]
    assert again == sorted(again)
    assert all(visit.providers[0] == OURS for visit in visits if visit.again)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_provider_of_every_operator_is_right(operator, dtype):
    """Each against PyTorch in a wider dtype; and a wrong one is seen."""
    torch.manual_seed(0)
    kernel = None if operator == "norm_linear" else (5, 7)
    case = Case(2, 8, 6, 9, dtype, kernel)
    row = OPERATORS[operator]
    for suite in row.passes:
        contest = row.contest(suite, case, tuple(p for p in row.providers if p not in ("compile", *LATE)))
        prepare = contest.open(Machine("cpu"))
        for provider in contest.providers:
            entry = prepare(provider)
            assert isinstance(entry, Entry)
            assert entry.facts["error"] <= 0.75 * row.tolerance[dtype]
        assert prepare(OURS).facts["ran"] == "torch"


def test_who_does_not_run_on_tensor_cores_says_so(monkeypatch):
    """Where kernels are there, but Triton has not compiled those that a case was to run on."""
    launch = pytest.importorskip("dwconv_kernels.depthwise.launch")
    row = OPERATORS["depthwise"]
    seven, three = (Case(1, 96, 7, 7, kernel=(k, k)) for k in (7, 3))
    monkeypatch.setattr(launch.tensor, "_refusals", {})
    assert fallback(seven) is fallback() is None
    assert launch.config.on_tensor_cores("bf16", 7, 7, (1, 1), (1, 1), 96, False)
    launch.tensor._refusals[launch.tensor._STREAM] = "Triton 0 does not compile it"
    said = "not on tensor cores: Triton 0 does not compile it"
    assert fallback(seven) == fallback() == said
    assert fallback(three) is fallback(seven._replace(kernel=None)) is None
    assert fallback(seven._replace(dtype="fp32")) is None
    monkeypatch.setitem(OPERATORS, "depthwise", dataclasses.replace(row, supports=lambda case, **_: (True, "")))
    facts = OPERATORS["depthwise"].contest("depthwise_forward", seven, (OURS,)).begin(Machine("cpu"))(OURS).facts
    assert (facts["ran"], facts["note"]) == ("triton", said)
    monkeypatch.setattr(launch, "tensor", None)
    monkeypatch.setattr(launch, "_NO_GLUON", "there is no Gluon", raising=False)
    assert fallback(seven) == fallback() == "not on tensor cores: there is no Gluon"


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_provider_has_no_speed(operator, monkeypatch):
    row = OPERATORS[operator]
    right = row.providers["eager"]

    def almost(case):
        # One pixel in a hundred is off by its own size.
        def function(**operands):
            y = right(case)(**operands)
            return y * (1 + (torch.arange(y.numel()) % 100 == 7).reshape(y.shape).to(y.dtype))

        return function

    monkeypatch.setitem(row.providers, "almost", almost)
    case = Case(2, 8, 6, 9, "bf16", None if operator == "norm_linear" else (3, 3))
    for suite in row.passes:
        prepare = row.contest(suite, case, (OURS, "almost")).open(Machine("cpu"))
        with pytest.raises(Exception, match=r"of the right result's norm away from it; .* is allowed"):
            prepare("almost")
    assert "wrong" in STATUSES


@pytest.mark.parametrize(("suite", "repeated"), [("depthwise_input_gradient", True), ("block_training", False)])
def test_saved_tensors_are_kept_only_where_backward_is_repeated(suite, repeated):
    """Compiled code otherwise reuses their memory, as it does for users."""
    row = next(row for row in OPERATORS.values() if suite in row.passes)
    config.donated_buffer = not repeated
    row.contest(suite, Case(1, 4, 4, 4, "fp32", (3, 3))).begin(Machine("cpu"))
    assert config.donated_buffer is not repeated
    toys.contest("ours").begin(Machine("cpu"))
    assert config.donated_buffer


def test_every_call_of_a_lap_has_inputs_of_its_own_in_the_right_layout(monkeypatch):
    row, seen = OPERATORS["depthwise"], []
    right = row.providers["eager"]

    def spy(case):
        def function(x, weight, bias):
            seen.append((x.data_ptr(), x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)))
            return right(case)(x, weight, bias)

        return function

    case = Case(2, 8, 6, 9, "fp32", (3, 3))
    machine = Machine("cpu")
    for provider in ("eager", "channels_last", OURS):
        monkeypatch.setitem(row.providers, provider, spy)
        entry = row.contest("depthwise_forward", case, (provider,)).begin(machine)(provider)
        assert entry.timed.calls == 8
        seen.clear()
        entry.timed.run()
        assert len({address for address, _, _ in seen}) == len(seen) == 8
        assert {found[1:] for found in seen} == {(provider == "eager", provider != "eager")}
        monkeypatch.setitem(row.providers, "eager", right)


def test_blocks_and_norms_stand_on_what_they_are_made_of():
    needs = {
        name: row.contest(suite, Case(1, 8, 7, 7, kernel=(3, 3))).needs
        for name, row in OPERATORS.items()
        for suite in row.passes
    }
    assert needs == {
        "depthwise": ("depthwise",),
        "norm_linear": ("norm_linear",),
        "block": ("depthwise", "norm_linear", "block"),
    }


def test_inputs_take_turns_and_fill_more_than_the_cache():
    machine = Machine("cpu")
    cache = machine.cache_bytes
    assert machine.sets_of_inputs(cache) == 3
    assert machine.sets_of_inputs(10 * cache) == 1
    assert machine.sets_of_inputs(1) == 8  # enough on a CPU, where nothing depends on it


def test_a_lap_makes_every_call_on_other_inputs():
    machine, seen = Machine("cpu"), []
    run, method = machine.lap([lambda i=i: seen.append(i) for i in range(3)], graph=True)
    assert method == "clock"
    seen.clear()
    run()
    assert seen == [0, 1, 2]


def test_devices_that_are_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device is 'cuda'; there is no NVIDIA GPU"):
            Machine("cuda")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_nothing_is_compiled_while_it_is_timed():
    """Providers of one contest do not make each other forget what they have compiled."""
    case = Case(1, 8, 6, 6, "fp32", (3, 3))
    contest = OPERATORS["block"].contest("block_forward", case, (OURS, "compile"), seconds=0.0)
    prepare = contest.begin(Machine("cpu"))
    counters = torch._dynamo.utils.counters
    entries = [prepare("compile"), prepare(OURS), prepare("compile")]
    before = counters["stats"]["unique_graphs"]
    assert before >= 1
    for entry in entries:
        entry.timed.run()
    assert counters["stats"]["unique_graphs"] == before
    contest.begin(Machine("cpu"))("compile").timed.run()
    assert counters["stats"]["unique_graphs"] > before  # a new contest begins anew
