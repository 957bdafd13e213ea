"""A small language model trained here, without a quarter of its layers: perplexity by choice, before and after healing.

GPT-2's architecture, 12 layers of width 128, on the bytes of Python's own reference (`pydoc_data.topics`, 0.47 MB),
of which the last tenth is held out. Layers are chosen on 256 sequences of the training text; `replace` fits one linear
map per run of gone layers on them; healing is further training of all weights at a tenth of the rate. Rows that are
there already are kept.

    python benchmarks/shrink_language.py --out OUT
    python benchmarks/shrink_language.py --quick         # a model of a few seconds' training
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import resect
from resect.files import write_text

LENGTH, BATCH, RATE = 64, 16, 2e-3
SHARE = 0.25


def text() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes, int64."""
    data = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    return data[: 9 * len(data) // 10], data[9 * len(data) // 10 :]


def batches(data: Tensor, count: int, size: int = 32) -> list[dict[str, Tensor]]:
    """``count`` sequences, evenly spread over the text, in batches; the model shifts the labels by itself."""
    starts = torch.linspace(0, len(data) - LENGTH, count).long()
    rows = data[starts[:, None] + torch.arange(LENGTH)]
    return [{"input_ids": part, "labels": part} for part in rows.split(size)]


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=12, n_head=4, use_cache=False,
                                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


def fit(model: nn.Module, data: Tensor, steps: int, rate: float, seed: int) -> nn.Module:
    """AdamW, the rate rising over a tenth of the steps and falling to zero; every weight learns."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        done = step / steps
        optimizer.param_groups[0]["lr"] = rate * min(10 * done + 1 / steps, (1 - done) / 0.9)
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=draw)
        rows = data[starts + torch.arange(LENGTH)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step} of {steps}: {loss.item():.3f}", flush=True)
    return model.eval()


def perplexity(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """Of a byte, on the average sequence."""
    with torch.inference_mode():
        return math.exp(statistics.mean(float(model(**batch).loss) for batch in data))


def trained(data: Tensor, steps: int, seed: int, out: Path) -> nn.Module:
    """The uncut model, from ``out`` where it is."""
    file, model = out / f"model-{steps}-{seed}.safetensors", build(seed)
    if file.exists():
        safetensors.torch.load_model(model, file)
        return model.eval()
    fit(model, data, steps, RATE, seed)
    out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(model, str(file))
    return model


def plans(model: nn.Module, blocks: resect.Blocks, data: list[dict[str, Tensor]], draws: int) -> dict[str, resect.Plan]:
    """Three layers of twelve, by every choice."""
    gone = round(SHARE * len(model.transformer.h))

    def by(score: str, **options: Any) -> resect.Plan:
        given = {"metric": "cross_entropy"} if score == "lesion" else {}
        return resect.rank(model, blocks, data, by=score, unit="layer", **given, **options).choose(n=gone)

    return {
        "lesion, once": by("lesion"),
        "lesion, greedy": by("lesion", search="greedy", depth=gone),
        "influence": by("influence"),
        "last": by("last"),
        **{f"random {seed}": by("random", seed=seed) for seed in range(draws)},
    }


def measured(name: str, small: nn.Module, training: Tensor, test: list[dict[str, Tensor]], heal: int) -> dict[str, Any]:
    """Perplexity of a cut model before and after healing."""
    before = perplexity(small, test)
    fit(small, training, heal, RATE / 10, seed=1)
    return {"row": name, "before": before, "healed": perplexity(small, test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/shrink-language"))
    parser.add_argument("--steps", type=int, default=600, help="of training, 1,024 bytes each")
    parser.add_argument("--heal", type=int, default=50, help="steps of healing")
    parser.add_argument("--draws", type=int, default=5, help="of random choice")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.out, options.steps, options.heal, options.draws = options.out / "quick", 5, 2, 1
    torch.set_num_threads(1)
    training, held_out = text()
    seen, test = batches(training, 64 if options.quick else 256), batches(held_out, 32 if options.quick else 256)
    model = trained(training, options.steps, options.seed, options.out)
    blocks = resect.find_blocks(model, {"input_ids": seen[0]["input_ids"][:4]})
    file = options.out / f"rows-{options.steps}-{options.heal}-{options.seed}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    makers: dict[str, Callable[[], nn.Module]] = {"uncut": lambda: copy.deepcopy(model)}
    for name, plan in plans(model, blocks, seen, options.draws).items():
        print(f"{name}: {', '.join(dict.fromkeys(block.owner for block in plan.blocks))}", flush=True)
        makers[name] = functools.partial(resect.remove, model, blocks, plan, compact=True)
        makers[f"{name}, replaced"] = functools.partial(
            resect.replace, model, blocks, plan, seen, samples=256, compact=True
        )
    for name, make in makers.items():
        if name not in [row["row"] for row in rows]:
            rows.append(measured(name, make(), training, test, options.heal))
            write_text(file, json.dumps(rows, indent=1))
    tell(rows)


def tell(rows: list[dict[str, Any]]) -> None:
    """The table: random draws as their mean and standard deviation."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = row["row"]
        if name.startswith("random"):
            name = f"random, {'replaced' if name.endswith('replaced') else 'removed'}"
        shown.setdefault(name, []).append(row)
    print("| 3 of 12 layers gone by | perplexity of a byte | after healing |\n|---|---:|---:|")
    for name, several in shown.items():
        cells = []
        for column in ("before", "healed"):
            values = [row[column] for row in several]
            spread = f" ± {statistics.stdev(values):.2f} (n = {len(values)})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
