"""Data as they are named on the command line, for models by name and for runs; text for language models."""

from __future__ import annotations

import pytest
import torch
from pictures import cell, write
from PIL import Image
from tiny_runs import tiny

from resect.errors import FileError, InputError
from resect.lab import open as opening
from resect.lab.data import named, normalize
from resect.lab.open import open_model
from resect.lab.trainer import train

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = ["widths=[4,4,8]"]
LLAMA = ["hidden_size=16", "intermediate_size=16", "num_hidden_layers=1", "num_attention_heads=2",
         "num_key_value_heads=2", "vocab_size=300", "max_position_embeddings=64"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(epochs=1), folder)
    return folder


def pictures(folder, colours, classes=10, size=8, mode="L"):
    """A parquet file of ``classes`` single-coloured images of each split."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        images = [cell(Image.new(mode, (size, size), colour)) for colour in colours]
        write(folder, split, images, [place % classes for place in range(len(images))])


def test_a_path_is_opened_by_what_lies_there(tmp_path):
    pictures(tmp_path / "tables", range(20), 2)
    for path in ("tables", "tables/train.parquet"):
        opened = open_model("cifar-resnet-8", SMALL, str(tmp_path / path), ["channels=1"])
        assert opened.data.shape == (1, 8, 8)
        assert opened.model.fc.out_features == 2
    for kind in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        Image.new("RGB", (12, 10), 9).save(tmp_path / "photos" / kind / "1.png")
    opened = open_model("cifar-resnet-8", SMALL, str(tmp_path / "photos"), ["size=8"])
    assert opened.data.classes == ("cat", "dog")
    assert opened.batches()[0][0].shape == (2, 3, 8, 8)


def test_an_owner_and_a_name_are_of_the_hub_and_options_go_along(monkeypatch):
    seen = {}
    monkeypatch.setitem(named.LOADERS, "hub", lambda dataset, size=None: seen.update(d=dataset, s=size) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_model("cifar-resnet-8", (), "zalando-datasets/fashion_mnist", ["size=16"])
    assert seen == {"d": "zalando-datasets/fashion_mnist", "s": 16}


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("cifar11", [], "Did you mean 'cifar10'"),
        ("./none", [], "nothing at './none'"),
        ("a/b.parquet", [], "nothing at 'a/b.parquet'"),
        (__file__, [], "no parquet file"),
        ("digits", ["fodl=1"], "Did you mean 'fold'"),
        ("digits", ["fold"], "must look like key=value"),
        ("imagenet", ["path=/nowhere"], "-d path=… must name a folder"),
        (None, ["size=1"], "add --data"),
    ],
)
def test_typos_are_named(data, options, words):
    with pytest.raises((InputError, FileError), match=words):
        open_model("cifar-resnet-8", SMALL, data, options)


def test_a_run_takes_other_data_normalised_as_it_was_trained(run, tmp_path):
    pictures(tmp_path / "other", range(0, 240, 12))
    own, opened = open_model(str(run)), open_model(str(run), (), str(tmp_path / "other"), ["channels=1"])
    images, labels = opened.images()
    assert torch.equal(labels, torch.arange(20) % 10)
    torch.testing.assert_close(images, normalize(opened.data.test.images, *own.data.stats))
    assert not torch.allclose(images, normalize(opened.data.test.images, *opened.data.stats), atol=0.1)
    torch.testing.assert_close(open_model(str(run), (), "digits", ["folds=4"]).images()[0], own.images()[0])


def test_data_that_do_not_fit_a_run_are_refused(run, tmp_path):
    pictures(tmp_path / "other", [1, 2, 3], 3)
    with pytest.raises(InputError, match=r"2 problems(.|\n)*3 classes(.|\n)*3 channels"):
        open_model(str(run), (), str(tmp_path / "other"))


def test_text_is_cut_into_sequences_of_bytes(tmp_path):
    (tmp_path / "b.txt").write_text("äz" * 40)
    (tmp_path / "a.txt").write_text("0123456789")
    opened = open_model("hf:llama", LLAMA, f"text:{tmp_path}", ["length=16"])
    want = list(b"0123456789\n" + ("äz" * 40).encode())
    assert opened.data.sequences.flatten().tolist() == want[: len(want) // 16 * 16]
    batches = opened.batches(limit=5, size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert opened.model(**batches[0]).loss > 0
    assert open_model("hf:llama", LLAMA, f"text:{tmp_path / 'a.txt'}").data.sequences.shape == (1, 10)
    assert opened.example()["input_ids"].shape == (4, 16)


def test_text_is_read_by_the_models_own_tokenizer_where_there_is_one(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    opened = open_model("hf:llama", LLAMA)
    opened.model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "rose": 2, "is": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("a rose is a rose is gone")
    opened = open_model(str(tmp_path / "model"), (), f"text:{tmp_path / 'text'}")
    assert opened.data.sequences.tolist() == [[1, 2, 3, 1, 2, 3, 0]]
    assert "its own tokenizer" in opened.data.tokens


@pytest.mark.parametrize(
    ("model", "options", "place", "more", "words"),
    [
        ("hf:llama", LLAMA, "none", [], "no text at"),
        ("hf:llama", LLAMA, ".", [], "no .txt files"),
        ("hf:llama", LLAMA, "one", [], "too little text"),
        ("hf:llama", LLAMA, "bad", [], "UTF-8"),
        ("hf:llama", LLAMA, "two", ["lenght=3"], "Did you mean 'length'"),
        ("hf:llama", LLAMA, "two", ["length=65"], "from 2 to 64"),
        ("hf:llama", [*LLAMA[:-2], "vocab_size=99"], "two", [], "too few for bytes"),
        ("hf:bert", ["hidden_size=12", "num_hidden_layers=1"], "two", [], "no causal language model"),
        ("cifar-resnet-8", SMALL, "two", [], "no causal language model"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path, monkeypatch, model, options, place, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").write_text("xy" * 50)
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    with pytest.raises((InputError, FileError), match=words):
        open_model(model, options, f"text:{place}", more)


def test_images_are_not_read_from_text(tmp_path):
    (tmp_path / "t.txt").write_text("xy" * 50)
    with pytest.raises(InputError, match="was given text"):
        open_model("hf:llama", LLAMA, f"text:{tmp_path}").images()
    assert opening.TEXT == "text:"
