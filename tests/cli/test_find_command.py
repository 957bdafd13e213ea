"""``resect find``: a table that fits, filters, pictures, JSON for programs, models of transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from resect import __version__
from resect.blocks.block import Blocks

VIT = ["timm:vit_tiny_patch16_224", "-o", "depth=3", "-o", "embed_dim=32", "-o", "num_heads=2",
       "-o", "img_size=32"]  # fmt: skip
BERT = ["hf:bert", "-o", "hidden_size=32", "-o", "num_hidden_layers=3", "-o", "num_attention_heads=2",
        "-o", "intermediate_size=64", "-o", "vocab_size=99"]  # fmt: skip
RESNET = ["cifar-resnet-20", "-o", "widths=[4,4,8]"]


def rows(text: str) -> list[str]:
    """Return the table's rows: what begins with a number and two spaces."""
    return [line for line in text.splitlines() if line.strip()[:1].isdigit() and "  " in line.strip()]


def test_a_transformer_has_two_blocks_a_layer(resect):
    code, out, err = resect("find", *VIT, "--size", "32")
    assert code == 0, err
    assert "timm:vit_tiny_patch16_224: 6 residual blocks in 3 layers of VisionTransformer: attention, MLP" in out
    assert len(rows(out)) == 6
    assert "Every block can be closed, scaled and removed." in out


def test_a_convolutional_network_has_one_block_a_layer(resect):
    code, out, err = resect("find", "timm:convnext_tiny", "-o", "dims=[4,8,12,16]", "--size", "32")
    assert code == 0, err
    assert out.startswith("timm:convnext_tiny: 18 residual blocks in 18 layers of ConvNeXt\n")
    assert [row.split()[1] for row in rows(out)] == ["1"] * 3 + ["2"] * 3 + ["3"] * 9 + ["4"] * 3


@pytest.mark.parametrize("columns", ["60", "80", "100"])
def test_every_line_fits_a_terminal(resect, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = resect("find", *VIT, "--size", "32")
    assert code == 0
    assert len(rows(out)) == 6
    assert max(map(len, out.splitlines())) <= int(columns)


def test_a_pipe_gets_whole_names_without_colours(tmp_path):
    """Without a terminal nothing is cut: a program reads it, or a person searches in it."""
    command = [sys.executable, "-m", "resect", "find", *VIT, "--size", "32"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "norm1 attn ls1 drop_path1" in done.stdout
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("filters", "number"),
    [
        (["--kind", "reshape"], 2),
        (["--kind", "identity", "--stage", "1"], 3),
        (["--match", "layer2.*"], 3),
        (["--part", "CONV", "--match", "*.0"], 3),
        (["--stage", "2", "--match", "layer3.*"], 0),
    ],
)
def test_filters(resect, filters, number):
    code, out, err = resect("find", *RESNET, *filters)
    assert code == 0, err
    assert len(rows(out)) == number
    assert f"({number} of 9 shown)" in out if number else "none of its 9 residual blocks is meant" in out


def test_json_is_what_python_reads(resect):
    code, out, _ = resect("find", *RESNET, "--json", "--kind", "reshape")
    assert code == 0
    blocks = Blocks.from_json(json.loads(out))
    assert [block.owner for block in blocks] == ["layer2.0", "layer3.0"]


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_a_picture_of_the_chain(resect, tmp_path, suffix):
    code, out, err = resect("find", *RESNET, "--graph", f"chain.{suffix}")
    assert code == 0, err
    assert f"Picture: chain.{suffix}" in out
    data = (tmp_path / f"chain.{suffix}").read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
    else:
        text = data.decode()
        assert "9 residual blocks found, 7 of them" in text
        assert "layer3 " in text
        assert "https://cdn" not in text


def test_json_stays_json_beside_a_picture(resect):
    code, out, err = resect("find", *RESNET, "--json", "--graph", "chain.svg")
    assert code == 0
    assert len(json.loads(out)["blocks"]) == 9
    assert "Picture: chain.svg" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RESNET, "--kind", "identty"], "Did you mean 'identity'"),
        ([*RESNET, "--part", "attn"], "Unknown part 'attn'"),
        ([*RESNET, "--stage", "7"], "There is no stage 7 here. Stages: 1, 2, 3."),
        ([*RESNET, "--graph", "chain.gif"], "must end in .svg, .png or .html"),
        (["resnet18"], "Did you mean 'torchvision:resnet18'"),
        (["qqqq"], "'timm:NAME', 'torchvision:NAME', 'hf:NAME'"),
        (["hf:lama"], "Did you mean 'hf:llama'"),
        (["hf:bert", "-o", "hiden_size=32"], "Did you mean 'hidden_size'"),
        ([*BERT, "-o", "hidden_size=33"], "cannot be built with"),
        ([*BERT, "-o", "architecture=BertForEverything"], "Unknown architecture"),
        ([*BERT, "--size", "32"], "says itself how large"),
        (["hf:llama", "-o", "hidden_size=65536"], "too many for this machine"),
    ],
)
def test_mistakes(resect, tmp_path, arguments, message):
    code, _, err = resect("find", *arguments)
    assert code == 1, err
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_model(resect, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    code, _, err = resect("find", "model.pt")
    assert code == 1
    assert "is a file" in err
    assert "resect.find_blocks(model, example)" in err


def test_a_model_of_transformers_by_type(resect):
    code, out, err = resect("find", *BERT)
    assert code == 0, err
    assert "6 residual blocks" in out
    assert "BertForMaskedLM" in out
    code, out, _ = resect("find", *BERT, "-o", "architecture=BertModel")
    assert code == 0
    assert "BertModel" in out


def test_a_folder_that_transformers_saved(resect, tmp_path):
    import transformers

    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                                    image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    code, out, err = resect("find", "vit")
    assert code == 0, err
    assert "8 residual blocks in 4 layers of ViTModel" in out
    code, out, err = resect("find", "hf:vit", "-o", "num_hidden_layers=2")
    assert code == 0, err
    assert "hf:vit: 4 residual blocks" in out


@pytest.mark.parametrize(
    ("kind", "options", "inputs"),
    [
        ("t5", {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16, "vocab_size": 99},
         {"input_ids", "decoder_input_ids"}),
        ("vit", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                 "image_size": 32, "patch_size": 8}, {"pixel_values"}),
        ("whisper", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                     "decoder_attention_heads": 2, "max_source_positions": 20, "vocab_size": 99, "pad_token_id": 0,
                     "decoder_start_token_id": 1}, {"input_features", "decoder_input_ids"}),
        ("clip", {name: {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                         "image_size": 32, "patch_size": 8, "vocab_size": 99} for name in
                  ("text_config", "vision_config")}, {"input_ids", "pixel_values"}),
    ],
)  # fmt: skip
def test_examples_fit_the_model(kind, options, inputs):
    from resect.lab import registry

    model = registry.build(f"hf:{kind}", **options).eval()
    example = registry.example(f"hf:{kind}", model)
    assert set(example) == inputs
    model(**example)


def test_help_does_not_wait_for_torch(tmp_path):
    code = "import sys; from resect import cli; sys.exit('torch' in sys.modules or 'altair' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_version(resect):
    code, out, _ = resect("--version")
    assert code == 0
    assert out == f"resect {__version__}\n"
