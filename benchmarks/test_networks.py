"""Networks: a training step, inference; on a CPU also that ours takes no longer than timm's."""

SUITES = ("model_training", "model_inference")
CPU_BAR = 1.05


def test_network(measured, session, provider, visit):
    assert measured.ok, measured.status
    if provider == "timm" and session.results.is_cpu and " 224 " in visit.contest.case:
        # Both are the same operators of PyTorch. The quartile of the rounds: the median is within noise of the bar.
        assert measured.speedup_quartiles[1] * CPU_BAR >= 1, (
            f"timm's time / ours: {measured.speedup} {measured.speedup_quartiles}"
        )
