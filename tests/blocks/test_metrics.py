"""The named metrics against torch's and transformers' own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from resect.blocks.metrics import cross_entropy, mean_of, metric_named, perplexity, top1_error, top5_error
from resect.errors import InputError


@pytest.mark.core
def test_classifiers_of_every_form_of_output():
    torch.manual_seed(0)
    scores, y = torch.randn(6, 7), torch.randint(0, 7, (6,))
    expected = nn.functional.cross_entropy(scores, y, reduction="none").double()
    right = torch.tensor([int(row.argsort()[-1]) == int(t) for row, t in zip(scores, y, strict=True)])
    five = torch.tensor([int(t) in row.argsort()[-5:].tolist() for row, t in zip(scores, y, strict=True)])
    for output in (scores, SimpleNamespace(logits=scores), {"logits": scores}, (scores, "more"), scores.double()):
        for batch in ((scores, y), [scores, y], {"x": scores, "labels": y}):
            assert torch.allclose(cross_entropy(output, batch), expected)
            assert torch.equal(top1_error(output, batch), 100 * (~right).double())
            assert torch.equal(top5_error(output, batch), 100 * (~five).double())


@pytest.mark.core
def test_tokens_are_shifted_and_those_that_do_not_count_left_out():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    labels[0, 3:] = -100
    wanted = [
        -scores[b, t].log_softmax(0)[labels[b, t + 1]] for b in range(2) for t in range(4) if labels[b, t + 1] >= 0
    ]
    values = cross_entropy(scores, {"labels": labels})
    assert torch.allclose(values, torch.stack(wanted).double())
    mean = float(torch.stack(wanted).mean())
    assert mean_of(perplexity, float(values.sum()), len(values)) == pytest.approx(math.exp(mean), rel=1e-6)
    assert mean_of(cross_entropy, float(values.sum()), len(values)) == pytest.approx(mean, rel=1e-6)
    assert mean_of(perplexity, 1e6, 1) == math.inf


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_the_loss_of_transformers_is_the_mean(kind):
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = (
        transformers.BertConfig(**small, intermediate_size=16)
        if kind.startswith("Bert")
        else transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    model = getattr(transformers, kind)(config).eval()
    ids = torch.randint(0, 50, (3, 6))
    labels = ids.clone()
    labels[1, 2:] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    assert float(cross_entropy(output, {"labels": labels}).mean()) == pytest.approx(float(output.loss), rel=1e-5)


@pytest.mark.core
@pytest.mark.parametrize(
    ("output", "batch", "message"),
    [
        (torch.zeros(2, 3, 4, 4), (0, torch.zeros(2, 4, 4).long()), r"scores have the shape \(2, 3, 4, 4\)"),
        (torch.zeros(2, 3), (0, torch.zeros(3).long()), r"targets \(3,\)"),
        ({"out": torch.zeros(2, 3)}, (0, torch.zeros(2).long()), r"a dict with 'out', in which"),
        (torch.zeros(2, 3), {"input_ids": 1}, "a copy of input_ids, with -100"),
        (torch.zeros(2, 3), torch.zeros(2), r"pass \[\(inputs, target\)\]"),
        (torch.zeros(2, 3), (0, torch.tensor([0, 3])), "targets go from 0 to 3, and the model tells 3 classes apart"),
        (torch.zeros(2, 3), (0, torch.tensor([-1, 2])), "targets go from -1 to 2"),
    ],
)
def test_what_does_not_fit_is_said(output, batch, message):
    with pytest.raises(InputError, match=message):
        metric_named("cross_entropy")(output, batch)


@pytest.mark.core
def test_a_metric_that_takes_the_target_is_told_that_it_gets_the_batch():
    with pytest.raises(InputError, match=r"cross_entropy' failed: .*called as metric\(output, batch\)"):
        metric_named(torch.nn.functional.cross_entropy)(torch.zeros(2, 3), (0, torch.zeros(2).long()))
