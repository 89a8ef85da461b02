"""Networks: a training step, inference; on a CPU also that ours takes no longer than timm's."""

SUITES = ("model_training", "model_inference")
CPU_BAR = 1.05


def test_network(measured, session, provider, visit):
    assert measured.ok, measured.status
    if provider == "timm" and session.results.is_cpu and " 224 " in visit.contest.case:
        assert measured.speedup * CPU_BAR >= 1, f"timm's time / ours: {measured.speedup} {measured.speedup_quartiles}"
