"""Results files with known numbers, for the tests of what reads them."""

from benchmarks.results import OURS, Results, Row, file_name

GPU = {
    "gpu": "NVIDIA H100 80GB HBM3", "driver": "570.1", "torch": "2.13.0", "triton": "3.6.0", "cudnn": 91002,
    "commit": "0123abcd", "date": "2026-01-02", "time": "10:00:00", "device": "cuda", "quick": False, "threads": 8,
}  # fmt: skip
CPU = GPU | {"gpu": "CPU Some Processor", "driver": None, "cudnn": None, "device": "cpu"}
MAPS = ((96, 56), (192, 28), (384, 14), (768, 7))


def results(folder, rows=(), meta=GPU, name=None) -> Results:
    """A results file in ``folder``, as read from it."""
    path = folder / (name or file_name(meta))
    Results(meta, path).put(*rows)
    return Results.read(path)


def peer(row: Row, provider: str, speedup: float, **changes) -> Row:
    """A provider that took ``speedup`` times as long as ours in ``row``."""
    time = {"median_us": row.median_us * speedup, "spread": 0.02, "fraction_of_floor": None, "ran": None}
    quartiles = (round(speedup * 0.9, 4), round(speedup * 1.2, 4))
    values = vars(row) | time | {"provider": provider, "speedup": speedup, "speedup_quartiles": quartiles} | changes
    return Row(**values)


def depthwise(suite="depthwise_forward", n=128, dtype="bf16", scale=1.0) -> list[Row]:
    """ConvNeXt-T's maps: ours takes 100, 50, 25, 12.5 µs, eager 2, 3, 4, 5 times that, compile 1.5, 0.5 or none."""
    rows = []
    for at, (c, h) in enumerate(MAPS):
        case = f"C={c} {h}×{h} 7×7 N={n}"
        ours = Row(
            suite, case, OURS, dtype, median_us=scale * 100 / 2**at, spread=0.012, fraction_of_floor=0.5 + at / 10,
            bytes=10**8, flops=245 * 10**7, samples=20, method="graph", ran="triton", error=1e-3,
        )  # fmt: skip
        rows += [ours, peer(ours, "eager", 2.0 + at)]
        if at < 2:
            rows.append(peer(ours, "compile", (1.5, 0.5)[at]))
        else:
            reason = "failed: RuntimeError: <lambda> | no `memory`"
            rows.append(Row(suite, case, "compile", dtype, status=reason))
    return rows


def network(suite="model_training", ours_us=100_000.0, n=256) -> list[Row]:
    """100 ms for 256 images; timm takes 1.25 times as long."""
    case = f"convnext_tiny 224 N={n}"
    ours = Row(
        suite, case, OURS, "amp_bf16", median_us=ours_us, spread=0.004, fraction_of_floor=0.4, bytes=10**10,
        flops=4 * 10**12, method="events", ran="triton", images=n,
    )  # fmt: skip
    return [ours, peer(ours, "timm", 1.25), peer(ours, "ours_compile", 0.8)]


def memory() -> list[Row]:
    """A block whose forward pass keeps 30 MiB, eager's 75; a network whose peak is 1000 MiB, channels_last's 1500."""
    block, whole, mib = "block C=96 56×56 7×7 N=32", "convnext_tiny 224 N=64", 2**20
    return [
        Row("memory", block, OURS, "bf16", saved_bytes=30 * mib, peak_bytes=80 * mib),
        Row("memory", block, "ours_lean", "bf16", saved_bytes=15 * mib, peak_bytes=60 * mib),
        Row("memory", block, "eager", "bf16", saved_bytes=75 * mib, peak_bytes=100 * mib),
        Row("memory", whole, OURS, "amp_bf16", saved_bytes=600 * mib, peak_bytes=1000 * mib, images=64),
        Row("memory", whole, "channels_last", "amp_bf16", saved_bytes=900 * mib, peak_bytes=1500 * mib, images=64),
    ]


def others() -> list[Row]:
    """One row or more of each suite with a shape of its own, and of one that nobody knows."""
    return [
        Row("ceilings", "copy", "torch", "uint8", median_us=700.0, spread=0.01, rate=3000.0, unit="GB/s"),
        Row("ceilings", "matmul", "torch", "bf16", median_us=1500.0, spread=0.02, rate=700.0, unit="TFLOP/s"),
        Row("host", "depthwise forward", OURS, "bf16", median_us=12.34, spread=0.03),
        Row("host", "depthwise forward", "eager", "bf16", median_us=8.76, spread=0.04),
        Row("cold_start", "convnext_tiny 224 N=8", OURS, "amp_bf16", median_us=4.5e6, samples=1, note="second 0.2 s"),
        Row("cold_start", "convnext_tiny 224 N=8", "compile", "amp_bf16", median_us=40.5e6, samples=1),
        Row("variants", "forward, 200 sizes", OURS, "bf16", variants=6, median_us=5300.0),
        Row("variants", "forward, 200 sizes", "compile", "bf16", status="timeout: 240 s"),
        Row("of_tomorrow", "a case", "somebody", "int8", median_us=3.25, rate=17.5, unit="widgets/s", note="hm"),
        Row("of_tomorrow", "a case", "nobody", "int8", status="crashed: signal 11"),
    ]


def everything() -> list[Row]:
    suites = ("depthwise_forward", "depthwise_input_gradient", "depthwise_weight_gradient")
    passes = [row for suite in suites for row in depthwise(suite)]
    networks = network() + network("model_inference", 25_000.0)
    return [*passes, *depthwise(n=32), *depthwise(dtype="fp32"), *networks, *memory(), *others()]
