import json

import pytest
from tiny_runs import TINY, tiny

from resect.errors import FileError, InputError
from resect.lab import recipe
from resect.lab.config.method import METHODS, EpsilonGateConfig
from resect.lab.registry import build


def test_shipped_recipes_build_and_survive_json():
    assert {"digits-plain", "digits-epsilon", "cifar10-plain"} <= set(recipe.names())
    for name in recipe.names():
        loaded = recipe.read(name)
        build(loaded.model.name, **loaded.model.options)
        assert recipe.parse(json.loads(json.dumps(loaded.dump()))) == loaded
    assert recipe.read("digits-epsilon").method == EpsilonGateConfig(
        name="epsilon-gate", epsilon=3.0, skip_muted_after=11, settle_after=198
    )
    assert recipe.read("digits-plain").method is None


def test_overrides_are_toml_values_or_bare_words():
    changed = recipe.read(
        "digits-plain",
        [
            "train.epochs=3",
            "train.lr = 1",
            "train.flip=true",
            "model.name=cifar-resnet-8",
            "model.options.widths=[4, 4, 8]",
            "method.name=epsilon-gate",
            "method.epsilon=2.5",
            'data.name="cifar10"',
        ],
    )
    assert (changed.train.epochs, changed.train.lr, changed.train.flip) == (3, 1.0, True)
    assert changed.model == recipe.ModelConfig(name="cifar-resnet-8", options={"widths": [4, 4, 8]})
    assert (changed.method.epsilon, changed.data.name) == (2.5, "cifar10")


def test_every_problem_is_named_at_once_with_the_nearest_key():
    overrides = ["train.epocs=3", "train.epochs=0", "train.schedule=one-cycl", "train.lr=nan", "modle.name=x"]
    with pytest.raises(InputError) as caught:
        recipe.read(
            "digits-epsilon", [*overrides, "method.epsilon=-1", "method.epsilom=1", "train.seed=1.5", 'train.shift="1"']
        )
    said = str(caught.value)
    assert "9 problems" in said
    for words in ("'epochs'", "'model'", "'epsilon'", "train.epochs: ", "not 0", "'one-cycle'", "not -1", "not 1.5"):
        assert words in said


def test_a_methods_seed_is_the_trainings_unless_it_is_given():
    def seed(*changes):
        return recipe.read("digits-epsilon", ["train.seed=7", *changes]).settled().method.seed

    assert seed() == 7
    assert seed("method.seed=0") == 0
    assert seed(f"method.seed={2**64 - 1}") == 2**64 - 1
    assert recipe.read("digits-epsilon", ["train.seed=7"]).method.seed is None, "it follows another train.seed"
    assert recipe.read("digits-plain").settled() == recipe.read("digits-plain")


def test_a_seed_is_one_that_torch_takes():
    with pytest.raises(InputError) as caught:
        recipe.read("digits-epsilon", [f"train.seed={2**64}", "method.seed=-1"])
    assert "train.seed: input should be less than 18446744073709551616, not" in str(caught.value)
    assert "method.seed: input should be greater than or equal to 0, not -1" in str(caught.value)
    with pytest.raises(InputError, match=r"method\.seed: .*, not True"):
        recipe.read("digits-epsilon", ["method.seed=true"])


@pytest.mark.parametrize("override", ["train.epochs", "=3", "model.name.x=3"])
def test_an_override_that_is_none(override):
    with pytest.raises(InputError, match="Override"):
        recipe.read("digits-plain", [override])


def test_names_and_files(tmp_path):
    with pytest.raises(InputError, match="'digits-plain'"):
        recipe.read("digit-plain")
    with pytest.raises(FileError, match="No such file"):
        recipe.read(tmp_path / "missing.toml")
    file = tmp_path / "own.toml"
    file.write_text('[model]\nname = "cifar-resnet-8"\n')
    assert recipe.read(str(file)).train == recipe.TrainConfig()
    file.write_text("[model\n")
    with pytest.raises(FileError, match="is not TOML"):
        recipe.read(file)
    file.write_text("[train]\nepochs = 1\n")
    with pytest.raises(InputError, match="model: field required"):
        recipe.read(file)


def test_nesterov_needs_momentum():
    with pytest.raises(InputError, match="nesterov needs momentum"):
        tiny(nesterov=True, momentum=0.0)


def test_differences_name_the_keys():
    method = {"name": "epsilon-gate", "epsilon": 1.0}
    other = recipe.parse({**TINY, "train": {**TINY["train"], "lr": 0.2}, "method": method})
    found = list(recipe.differences(tiny(), other))
    assert found[0] == "train.lr: 0.1, now 0.2"
    assert found[1].startswith("method: None, now {")
    assert "'name': 'epsilon-gate'" in found[1]
    assert len(found) == 2


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_recipe_is_one_of_the_library(name):
    from inspect import signature

    from resect.lab.methods import CLASSES

    keep = {"keep": 2} if "keep" in METHODS[name].model_fields else {}
    config = METHODS[name](name=name, **keep)
    assert set(config.options()) <= set(signature(CLASSES[name]).parameters)
    found = recipe.parse({"model": {"name": "x"}, "method": config.model_dump()})
    assert found.method == config


def test_wrong_methods_are_named_with_the_nearest_valid_ones():
    def problems(**method):
        with pytest.raises(InputError) as caught:
            recipe.parse({"model": {"name": "x"}, "method": method, "train": {"epochs": "many"}})
        assert "train.epochs" in str(caught.value), "everything wrong is reported at once"
        return str(caught.value)

    assert "method.name: Unknown method 'stochastic-dept'. Did you mean 'stochastic-depth'?" in problems(
        name="stochastic-dept"
    )
    assert "method.name: missing; one of stochastic-depth, " in problems(epsilon=2.5)
    message = problems(name="stochastic-depth", drop_prb=0.5, rule="liner", drop_prob=1.5)
    assert "method.drop_prb: Unknown key 'drop_prb'. Did you mean" in message
    assert "method.rule" in message
    assert "method.drop_prob: input should be less than or equal to 1, not 1.5" in message
    with pytest.raises(InputError, match=r"^Recipe: train.schedule = \"adaptive\" follows muted blocks"):
        recipe.parse({**TINY, "train": {"schedule": "adaptive"}})


def test_a_method_can_be_left_out_and_tables_are_tables():
    assert recipe.read("digits-epsilon", ["method=none"]).method is None
    with pytest.raises(InputError, match="train: must be a table of keys and values, not 3"):
        recipe.read("digits-plain", ["train=3"])
    with pytest.raises(InputError, match=r"All that ship: .*digits-residual-droppath"):
        recipe.read("digits")
