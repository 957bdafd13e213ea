"""Language models go on generating when an attention is closed; whole layers cut load with transformers alone."""

from __future__ import annotations

import types

import pytest
import torch
from language_models import language_model, tokens

import resect
from resect.blocks.upkeep import Upkeep
from resect.errors import AttachError, InputError, ProofError

transformers = pytest.importorskip("transformers")
from resect.integrations import transformers as citizen  # noqa: E402

DECODERS = ["llama", "qwen3", "gpt2", "gemma3"]
ATTENTION = {"self_attn", "attn", "encoder_attn"}
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def setup(family, layers, **options):
    model, ids = language_model(family, layers, **options), tokens(10)
    if family in ("bart", "pegasus"):
        example = {"input_ids": ids, "decoder_input_ids": tokens(8, seed=1)}
    elif family == "vit":
        example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        example = {"input_ids": ids}
    return model, example, resect.find_blocks(model, example)


def attentions(blocks):
    return [block.name for block in blocks if block.name.rpartition("/")[2] in ATTENTION]


@torch.no_grad()
def uncached_minus_cached(model, ids, cache=None):
    """Return the largest difference between logits at once and logits by pieces through a cache."""
    whole = model(ids, use_cache=False).logits
    place, worst = 0, 0.0
    for length in (5, 1, 3, 1):
        output = model(ids[:, place : place + length], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        worst = max(worst, (output.logits - whole[:, place : place + length]).abs().max().item())
        place += length
    return worst


def check_generates(model, ids):
    assert uncached_minus_cached(model, ids) < 2e-5
    for cache in (transformers.DynamicCache(), transformers.StaticCache(config=model.config, max_cache_len=12)):
        assert uncached_minus_cached(model, ids, cache) < 2e-5
    static = {"cache_implementation": "static", "disable_compile": True}
    for options, extra in (({}, {}), ({"num_beams": 3}, {}), ({}, static)):
        alone = model.generate(ids, use_cache=False, **GENERATE, **options)
        assert torch.equal(model.generate(ids, use_cache=True, **GENERATE, **options, **extra), alone)


@pytest.mark.parametrize("family", DECODERS)
def test_every_attention_closed_or_removed_alone_keeps_the_cache(family):
    model, example, blocks = setup(family, 3)
    ids, before = example["input_ids"], model(**example).logits
    names = attentions(blocks)
    assert len(names) == 3
    for name in names:
        with resect.closed(model, name):
            assert (model(**example).logits - before).abs().max() > 0.1
            check_generates(model, ids)
        check_generates(resect.remove(model, blocks, name), ids)


@pytest.mark.parametrize("family", DECODERS)
def test_the_check_sees_a_first_attention_that_keeps_nothing_up(family, monkeypatch):
    model, example, blocks = setup(family, 3)
    monkeypatch.setattr(Upkeep, "keep", lambda *args: None)
    with resect.closed(model, attentions(blocks)[0]):
        assert uncached_minus_cached(model, example["input_ids"], transformers.DynamicCache()) > 0.1


def test_all_attentions_closed_at_once():
    model, example, blocks = setup("llama", 3)
    with resect.closed(model, attentions(blocks)):
        check_generates(model, example["input_ids"])


def test_self_and_cross_attentions_of_an_encoder_and_decoder():
    model, example, blocks = setup("bart", 2)
    ids, target = example["input_ids"], example["decoder_input_ids"]
    names = attentions(blocks)
    assert len(names) == 6
    for name in names:
        with resect.closed(model, name), torch.no_grad():
            encoded = model.get_encoder()(ids)
            whole = model(encoder_outputs=encoded, decoder_input_ids=target, use_cache=False).logits
            first = model(encoder_outputs=encoded, decoder_input_ids=target[:, :5])
            assert first.past_key_values.get_seq_length() == 5
            rest = model(
                encoder_outputs=encoded, decoder_input_ids=target[:, 5:], past_key_values=first.past_key_values
            )
            assert (rest.logits - whole[:, 5:]).abs().max() < 2e-5
            options = {**GENERATE, "num_beams": 2}
            alone = model.generate(ids, use_cache=False, **options)
            assert torch.equal(model.generate(ids, use_cache=True, **options), alone)


def test_recorded_attentions_and_hidden_states_keep_their_positions():
    model, example, blocks = setup("llama", 3, attn_implementation="eager")
    full = model(**example, output_attentions=True)
    first, last = attentions(blocks)[0], attentions(blocks)[2]
    with resect.closed(model, [first, last]):
        output = model(**example, output_attentions=True, output_hidden_states=True)
    assert [entry is None for entry in output.attentions] == [True, False, True]
    assert output.attentions[1].shape == full.attentions[1].shape
    assert len(output.hidden_states) == 4
    small = resect.remove(model, blocks, [first])
    output = small(**example, output_attentions=True, output_hidden_states=True)
    assert [entry is None for entry in output.attentions] == [True, False, False]
    assert len(output.hidden_states) == 4
    assert len(model(**example, output_attentions=True).attentions) == 3


def test_a_cache_that_cannot_grow_without_keys_is_refused_by_name():
    class HqqLayer:
        q_group_size = 64

        def get_seq_length(self):
            return 0

    cache = types.SimpleNamespace(layers=[HqqLayer()], update=None, get_seq_length=None)
    with pytest.raises(AttachError, match="cannot keep the length of a HqqLayer"):
        Upkeep((0,)).keep((torch.zeros(1, 2, 3),), {"past_key_values": cache})


WHOLE = [
    ("llama", 4, ["model.layers.0", "model.layers.2"]),
    ("qwen3", 3, ["model.layers.1"]),
    ("gemma3", 4, ["model.layers.0", "model.layers.2"]),
    ("mixtral", 3, ["model.layers.1"]),
    ("gpt2", 3, ["transformer.h.0"]),
    ("vit", 3, ["vit.layers.1"]),
    ("pegasus", 3, ["model.encoder.layers.0", "model.encoder.layers.1"]),
    ("pegasus", 3, ["model.decoder.layers.0"]),
]


@pytest.mark.parametrize(("family", "layers", "gone"), WHOLE)
def test_whole_layers_cut_load_with_the_standard_class(tmp_path, family, layers, gone):
    model, example, blocks = setup(family, layers)
    before = model.config.to_dict()
    small = resect.remove(model, blocks, [block for block in blocks if block.owner in gone], compact=True)
    assert model.config.to_dict() == before, "the uncut model's own config is left alone"
    small.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(**example).logits, small(**example).logits)
    if family != "vit":
        for options in ({}, {"num_beams": 2}):
            alone = small.generate(example["input_ids"], use_cache=False, **GENERATE, **options)
            for one in (small, again):
                assert torch.equal(one.generate(example["input_ids"], use_cache=True, **GENERATE, **options), alone)
    line = citizen.save(small, tmp_path / "proven", example)
    assert line == f"transformers.{type(model).__name__}.from_pretrained({str(tmp_path / 'proven')!r})"
    assert (tmp_path / "proven" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()


def test_a_config_keeps_the_entries_of_the_layers_that_stay():
    model, _, blocks = setup("gemma3", 4)
    gone = [block for block in blocks if block.owner == "model.layers.0"]
    small = resect.remove(model, blocks, gone, compact=True)
    kept = [model.config.layer_types[place] for place in (1, 2, 3)]
    assert kept != model.config.layer_types[:3], "truncating the list would give something else"
    assert small.config.layer_types == kept
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]


def test_attention_and_whole_layers_cut_together_generate_and_load(tmp_path):
    model, example, blocks = setup("llama", 4)
    gone = [block.name for block in blocks if block.owner == "model.layers.0"]
    small = resect.remove(model, blocks, [*gone, *attentions(blocks)[1:3]], compact=True)
    assert len(small.model.layers) == 3
    check_generates(small, example["input_ids"])
    with pytest.raises(InputError, match=r"layers that lack a branch, and here .*model\.layers\.0\.self_attn"):
        citizen.save(small, tmp_path / "standard", example)
    resect.save(small, tmp_path / "cut")
    check_generates(resect.load(tmp_path / "cut", language_model("llama", 4)), example["input_ids"])


@pytest.mark.parametrize(
    ("family", "options", "owner", "reason"),
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "transformer.h.1",
            r"repaired config would differ.*scaling",
        ),
        ("bert", {}, "encoder.layer.1", r"it still has weights: attention\.output\.LayerNorm\.weight"),
        ("bart", {}, "model.encoder.layers.1", "it still has weights: self_attn_layer_norm"),
    ],
)
def test_layers_that_the_standard_class_cannot_do_without_stay(family, options, owner, reason):
    model, _, blocks = setup(family, 3, **options)
    gone = [block for block in blocks if block.owner == owner or block.owner.startswith(owner + ".")]
    with pytest.raises(InputError, match=reason):
        resect.remove(model, blocks, gone, compact=True, in_place=True)
    assert model.config.num_hidden_layers == 3
    assert [block.name for block in resect.find_blocks(model, blocks.example)] == blocks.names


def test_what_was_not_saved_right_is_not_left(tmp_path, monkeypatch):
    model, example, blocks = setup("llama", 3)
    small = resect.remove(model, blocks, [b for b in blocks if b.owner == "model.layers.1"], compact=True)
    monkeypatch.setattr(citizen, "unequal", lambda *args: "output 0 differs by up to 1")
    with pytest.raises(ProofError, match=r"LlamaForCausalLM\.from_pretrained does not give the model that was saved"):
        citizen.save(small, tmp_path / "cut", example)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is not a transformers model"):
        citizen.save(torch.nn.Linear(2, 2), tmp_path / "cut", torch.zeros(1, 2))


def test_a_removed_attention_is_asked_for_the_shape_of_its_input_once_per_form(monkeypatch):
    """Running its norm without data took four times as long as the attention itself."""
    from resect.blocks.twin import Output

    model, example, blocks = setup("llama", 2)
    small = resect.remove(model, blocks, [attentions(blocks)[0]])
    runs, run = [], Output._run
    monkeypatch.setattr(Output, "_run", lambda *args: runs.append(1) or run(*args))
    ids = example["input_ids"]
    with torch.no_grad():
        for given in (ids, ids, ids[:, :7], ids[:1], ids):
            cache = small(given, use_cache=True).past_key_values
            assert cache.get_seq_length() == given.shape[1]
            assert cache.layers[0].keys.shape[0] == given.shape[0]
    assert len(runs) <= 2  # three forms, one of them known from the proof
