"""Rows such as the demo makes: a 54-block net, ResNet-50 and ViT-Ti, with every awkward value that may occur."""

import math
import random
from typing import Any

Row = dict[str, Any]
HOSTILE = "<script>alert(1)</script>"  # a name that must stay text


def chain() -> list[Row]:
    rows = []
    widths = {"layer1": (3, 75e3), "layer2": (4, 280e3), "layer3": (6, 1.12e6), "layer4": (3, 4.46e6)}
    for stage, (number, size) in widths.items():
        for i in range(number):
            rows.append(
                {
                    "model": "resnet50",
                    "index": len(rows),
                    "name": f"{stage}.{i}/conv2",
                    "owner": f"{stage}.{i}",
                    "part": "conv",
                    "shortcut": "identity" if i else "projection",
                    "parameters": int(size * (1 if i else 1.1)),
                }
            )
    for i in range(24):
        part = ("attention", "MLP")[i % 2]
        rows.append(
            {
                "model": "vit_tiny_patch16_224",
                "index": i,
                "name": f"blocks.{i // 2}/{'attn' if part == 'attention' else 'mlp'}",
                "owner": f"blocks.{i // 2}",
                "part": part,
                "shortcut": "identity",
                "parameters": (148_608, 296_640)[i % 2],
            }
        )
    return rows + [row | {"model": "cifar-resnet-110"} for row in small_net()]


def small_net() -> list[Row]:
    rows = []
    for stage, width in enumerate((8, 16, 32), start=1):
        for i in range(18):
            reshape = stage > 1 and i == 0
            rows.append(
                {
                    "model": "net",
                    "index": len(rows),
                    "name": f"stage{stage}.{i}/conv1",
                    "owner": f"stage{stage}.{i}",
                    "part": "conv",
                    "shortcut": "reshape" if reshape else "identity",
                    "parameters": 18 * width * width + 4 * width,
                }
            )
    return rows


def _time(median: float) -> Row:
    return {"median_ms": median, "low_ms": median * 0.97, "high_ms": median * 1.06}


def speed() -> list[Row]:
    times = {("resnet50", 1): 62.0, ("resnet50", 8): 402.0, ("vit_tiny_patch16_224", 1): 18.4}
    times["vit_tiny_patch16_224", 8] = 121.0
    return [
        {"model": model, "variant": variant, "batch": batch} | _time(full * factor)
        for (model, batch), full in times.items()
        for variant, factor in {"full": 1.0, "half closed": 0.59, "half removed": 0.57}.items()
    ]


def training() -> list[Row]:
    draw, rows = random.Random(0), []
    for epoch in range(1, 31):
        for net, muted in {"plain": None, "gated": min(17, max(0, 2 * (epoch - 9)))}.items():
            error = 0.018 + 0.85 * math.exp(-epoch / 2.5) + abs(draw.gauss(0, 0.06 * math.exp(-epoch / 8)))
            rows.append({"net": net, "epoch": epoch, "train_loss": error * 2.3, "test_error": error, "muted": muted})
    return rows


def lesion_each() -> list[Row]:
    draw, rows = random.Random(1), []
    for net in ("with shortcuts", "without shortcuts"):
        for block in small_net():
            error = 0.02 + abs(draw.gauss(0, 0.006)) + (0.11 if block["shortcut"] == "reshape" else 0)
            if net != "with shortcuts":
                error = min(1.0, 0.9 + draw.gauss(0, 0.012))
            rows.append(
                {
                    "net": net,
                    "index": block["index"],
                    "name": block["name"],
                    "stage": block["owner"].split(".")[0],
                    "error": error,
                    "baseline": 0.0201 if net == "with shortcuts" else 0.0252,
                    "shortcut": block["shortcut"],
                    "chance": 0.9,
                }
            )
    return rows


def lesion_random() -> list[Row]:
    draw = random.Random(2)
    return [
        {"k": k, "draw": i, "error": min(0.9, max(0.0, 0.02 + 0.0019 * k**1.9 * draw.uniform(0.4, 1.7)))}
        for k in (0, 1, 2, 3, 5, 7, 10, 13, 16, 20)
        for i in range(30 if k else 1)
    ]


def lesion_parts() -> list[Row]:
    draw, rows = random.Random(6), []
    for i in range(24):
        part = ("attention", "mlp")[i % 2]
        rows.append(
            {"index": i, "name": f"blocks.{i // 2}/{part}", "part": part, "stage": 1 + i // 12,
             "shortcut": "reshape" if i == 12 else "identity", "metric": "top1", "value": 14 + draw.gauss(2, 3),
             "baseline": 14.0}
        )  # fmt: skip
    return rows


def _studies(*kinds: str, metric: str = "perplexity") -> list[Row]:
    draw = random.Random(7)
    return [
        {"study": kind, "k": k, "draw": i, "metric": metric, "value": 20 + k**2 * draw.uniform(0.5, 1.5),
         "baseline": 20.0}
        for kind in kinds
        for k in (1, 2, 4, 8)
        for i in range(1 if kind == "greedy" else 5)
    ]  # fmt: skip


def lesion_many() -> list[Row]:
    return _studies("greedy", "random", "runs")


def lesion_order() -> list[Row]:
    draw = random.Random(8)
    rows = _studies("swaps", metric="top1")
    return [row | {"tau": 1 - 0.02 * row["k"] * draw.uniform(0.5, 1), "order": "a=b b=a"} for row in rows]


def lesion_pairs() -> list[Row]:
    draw = random.Random(9)
    return [
        {"one": i, "other": j, "one_name": f"b.{i}", "other_name": HOSTILE, "metric": "top1",
         "both": 2 + draw.gauss(0, 1), "apart": 2.0, "interaction": draw.gauss(0, 1)}
        for i in range(12)
        for j in range(i + 1, 12)
    ]  # fmt: skip


def lesion_paths() -> list[Row]:
    return [row | {"members": m, "value": row["value"] / m} for m in (1, 2, 8) for row in _studies("paths")]


def removal() -> list[Row]:
    draw = random.Random(5)
    return [
        {"net": net, "removed": k, "draw": i, "error": min(0.9, 0.02 + fall * k**2 * draw.uniform(0.5, 1.5))}
        for net, fall in {"plain": 0.0012, "stochastic depth": 0.0002}.items()
        for k in (0, 4, 8, 16, 24)
        for i in range(10 if k else 1)
    ]


def path_lengths(n: int = 54) -> list[Row]:
    return [{"length": k, "share": math.comb(n, k) / 2**n} for k in range(n + 1)]


def gradients(n: int = 54) -> list[Row]:
    draw, rows = random.Random(3), []
    for k in range(n + 1):
        share = math.comb(n, k) * 0.22**k * math.exp(-(k**2) / 90)
        total = 2e-4 * share * math.exp(draw.gauss(0, 0.15))
        rows.append(
            {
                "length": k,
                "norm_of_sum": 0.0 if k > 50 else 3e-2 * share**0.8 / (1 + 0.1 * k),
                "sum_of_norms": 0.0 if k > 48 else total,
                "low": -0.1 * total if k % 9 == 0 else 0.8 * total,  # an interval may reach below zero
                "high": 1.25 * total,
            }
        )
    return rows


def gradients_by_moment(n: int = 20) -> list[Row]:
    return [
        {
            "when": when,
            "length": k,
            "norm_of_sum": math.comb(n, k) * size**k,
            "sum_of_norms": 2 * math.comb(n, k) * (1.5 * size) ** k,
            "longer": False,
        }
        for when, size in {"initialisation": 0.6, "epoch 10": 0.3, "trained": 0.15}.items()
        for k in range(n + 1)
    ]


def block_gradients() -> list[Row]:
    draw = random.Random(5)
    return [
        {
            "index": block["index"],
            "name": block["name"],
            "through": 0.02 * draw.uniform(0.1, 1.2),
            "past": 0.02 * draw.uniform(0.4, 1.1),
            "full": 0.02,
        }
        for block in small_net()
    ]


def response() -> list[Row]:
    draw, rows = random.Random(4), []
    for block in small_net():
        muted = block["index"] > 36
        size = draw.uniform(3.4, 9) if not muted else 10 ** draw.uniform(-9, -2)
        rows.append(
            {
                "index": block["index"],
                "name": block["name"],
                "shortcut": block["shortcut"],
                "response": 0.0 if block["index"] == 53 else size,
                "epsilon": 3.0,
                "muted": muted,
            }
        )
    return rows


def table_latency() -> list[Row]:
    nets = {"plain": 1.0, "gated": 1.04, "cut": 0.68, "cut shape from scratch": 0.681}
    return [
        {"net": net, "batch": batch} | _time(full * factor)
        for batch, full in {1: 11.4, 256: 96.0}.items()
        for net, factor in nets.items()
    ]


def unit_maps() -> list[Row]:
    def tone(net: int, block: int, unit: int, x: int, y: int) -> float:
        return math.tanh(3 * math.sin(0.1 * (unit + 1) * x + 0.04 * block * y + net))

    return [
        {"net": name, "block": block, "unit": unit, "line": y,
         "responses": " ".join(f"{tone(net, block, unit, x, y):.2f}" for x in range(12))}
        for net, name in enumerate(("plain", "stochastic depth", HOSTILE))
        for block in (4, 8, 12, 16, 20, 24, 28, 32)
        for unit in range(1, 9)
        for y in range(12)
    ]  # fmt: skip


def unit_similarity() -> list[Row]:
    return [
        {"net": net, "block": i, "other": j, "similarity": 0.4 + 0.6 * math.exp(-fall * abs(i - j))}
        for net, fall in {"untrained": 0.01, "plain": 0.1, "stochastic depth": 0.2, "ResidualDroppath": 0.4}.items()
        for i in range(1, 33)
        for j in range(1, 33)
    ]


def block_response() -> list[Row]:
    draw = random.Random(6)
    return [
        {"net": net, "index": block["index"], "name": block["name"], "shortcut": block["shortcut"],
         "ratio": 0.0 if block["index"] == 7 else size * draw.uniform(0.1, 0.6), "angle": draw.uniform(70, 120),
         "descent": None if block["index"] == 9 else draw.gauss(0.02, 0.03)}
        for net, size in {"plain": 1.0, HOSTILE: 0.4}.items()
        for block in small_net()
    ]  # fmt: skip


def angular_distance() -> list[Row]:
    return [
        {"net": net, "depth": i, "other": j,
         "distance": None if i // 7 != j // 7 else 1 - math.exp(-turn * abs(i - j))}
        for net, turn in {"plain": 0.1, HOSTILE: 0.02}.items()
        for i in range(20)
        for j in range(20)
    ]  # fmt: skip


def cka() -> list[Row]:
    return [
        {"net": net, "depth": i, "other": j,
         "cka": None if i == 3 else 1.02 * math.exp(-fall * abs(i - j)) - 0.02}
        for net, fall in {"plain": 0.1, "stochastic depth": 0.05, HOSTILE: 0.02, "ResidualDroppath": 0.3}.items()
        for i in range(20)
        for j in range(20)
    ]  # fmt: skip


def probes() -> list[Row]:
    return [
        {"net": net, "depth": depth, "after": f"layer{depth}" if depth else None, "guessing": 0.11,
         "accuracy": end * (1 - 0.7 * math.exp(-depth / 6))}
        for net, end in {"plain": 0.98, HOSTILE: 0.9}.items()
        for depth in range(20)
    ]  # fmt: skip


def strict_identity() -> list[Row]:
    draw = random.Random(7)
    return [
        {"net": net, "index": block["index"], "name": block["name"], "quantile": quantile, "epsilon": 2.5,
         "response": 0.0 if block["index"] == 50 else size * (1 + quantile**3)}
        for net, most in {"plain": 6.0, HOSTILE: 2.0}.items()
        for block in small_net()
        for size in [most * draw.uniform(0.2, 1)]
        for quantile in (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    ]  # fmt: skip


def gate_closed() -> list[Row]:
    draw = random.Random(8)
    return [
        {"net": net, "index": block["index"], "name": block["name"], "epsilon": 2.5, "batch": size,
         "closed": share**size}
        for net in ("plain", HOSTILE)
        for block in small_net()
        for share in [draw.uniform(0.5, 1)]
        for size in (1, 16, 64)
    ]  # fmt: skip


def cut_trade() -> list[Row]:
    draw = random.Random(10)
    choices = {"lesion, greedy": 0.002, "last": 0.006, "random": 0.005}
    curves = [
        {"choice": choice, "removed": k, "draw": i, "error": min(0.9, 0.06 + fall * k**2 * draw.uniform(0.7, 1.3)),
         "ms": 12 - k, "flops": 81.0 - 8.7 * k}
        for choice, fall in choices.items()
        for k in range(7)
        for i in range(3 if choice == "random" and k else 1)
    ]  # fmt: skip
    points = {"recovered": (5, 0.07, 7.2, 38.0), HOSTILE: (5, 0.08, None, 38.0)}
    return curves + [
        {"choice": name, "removed": k, "draw": 0, "error": error, "ms": ms, "flops": flops}
        for name, (k, error, ms, flops) in points.items()
    ]


def cut_classes() -> list[Row]:
    draw = random.Random(11)
    return [
        {"label": label, "net": net, "error": draw.uniform(0.02, 0.12) + more}
        for net, more in {"uncut": 0.0, "cut": 0.05, "recovered": 0.01}.items()
        for label in ("plane", "car", "bird", "cat", HOSTILE)
    ]


def cut_latency() -> list[Row]:
    return [
        {"net": net, "way": way, "batch": batch} | _time(full * share * speed)
        for way, speed in {"eager": 1.0, "onnxruntime": 0.6}.items()
        for batch, full in {1: 12.0, 32: 190.0}.items()
        for net, share in {"uncut": 1.0, "cut": 0.62}.items()
    ]


ALL = {
    "chain": chain,
    "speed": speed,
    "training": training,
    "lesion_each": lesion_each,
    "lesion_random": lesion_random,
    "lesion_parts": lesion_parts,
    "lesion_many": lesion_many,
    "lesion_order": lesion_order,
    "lesion_pairs": lesion_pairs,
    "lesion_paths": lesion_paths,
    "removal": removal,
    "path_lengths": path_lengths,
    "gradients": gradients,
    "gradients_by_moment": gradients_by_moment,
    "block_gradients": block_gradients,
    "response": response,
    "table_latency": table_latency,
    "unit_maps": unit_maps,
    "unit_similarity": unit_similarity,
    "block_response": block_response,
    "angular_distance": angular_distance,
    "cka": cka,
    "probes": probes,
    "strict_identity": strict_identity,
    "gate_closed": gate_closed,
    "cut_trade": cut_trade,
    "cut_classes": cut_classes,
    "cut_latency": cut_latency,
}
