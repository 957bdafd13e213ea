import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resect.errors import InputError
from resect.lab.models import PoolPad, PreBlock, SubsamplePad, cifar_resnet
from resect.lab.registry import build, fit_options, input_size


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("preactivation", [False, True])
def test_depth_counts_the_weight_layers_and_the_net_learns_everywhere(preactivation, shortcut):
    net = cifar_resnet(20, preactivation=preactivation, shortcut=shortcut, widths=(4, 8, 16), num_classes=7)
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3)] == [3, 3, 3]
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[2:] != (1, 1)]
    assert len(layers) == 20
    x = torch.randn(3, 3, 9, 11)  # odd sizes: shortcut and branch must round alike
    stem = net.conv1(x)
    assert net.layer3(net.layer2(net.layer1(stem))).shape == (3, 16, 3, 3)
    out = net(x)
    assert out.shape == (3, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_parameters_of_the_published_net():
    # He 2016a, table 6: ResNet-110 has 1.7 M parameters, ResNet-20 0.27 M.
    assert round(sum(p.numel() for p in cifar_resnet(110).parameters()) / 1e6, 1) == 1.7
    assert round(sum(p.numel() for p in cifar_resnet(20).parameters()) / 1e6, 2) == 0.27


def test_shortcuts_without_parameters():
    x = torch.arange(2 * 16, dtype=torch.float32).reshape(1, 2, 4, 4)
    strided, pooled = SubsamplePad(5, 2)(x), PoolPad(5, 2)(x)
    assert strided.shape == pooled.shape == (1, 5, 2, 2)
    assert strided[0, 1].tolist() == [[0, 2], [8, 10]]  # one zero channel before, two behind
    assert pooled[0, 1].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert not strided[0, [0, 3, 4]].any()
    assert not pooled[0, [0, 3, 4]].any()


def test_preactivation_block_is_its_formula_and_only_the_first_lacks_the_leading_norm():
    net = cifar_resnet(14, preactivation=True, widths=(4, 4, 8)).eval()
    assert [block.bn1 is None for block in (*net.layer1, *net.layer2)] == [True, False, False, False]
    x, block = torch.randn(2, 4, 8, 8), net.layer1[1]
    branch = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
    torch.testing.assert_close(block(x), x + branch)


def test_option_a_pools_the_stream_and_option_b_projects_what_its_paper_projects():
    x = torch.randn(2, 4, 8, 8)
    pooling = cifar_resnet(8, preactivation=True, widths=(4, 4, 8)).eval().layer3[0]
    branch = pooling.conv2(F.relu(pooling.bn2(pooling.conv1(F.relu(pooling.bn1(x))))))
    torch.testing.assert_close(pooling(x), PoolPad(8, 2)(x) + branch)
    pre = cifar_resnet(8, preactivation=True, shortcut="B", widths=(4, 4, 8)).eval().layer3[0]
    active = F.relu(pre.bn1(x))
    branch = pre.conv2(F.relu(pre.bn2(pre.conv1(active))))
    torch.testing.assert_close(pre(x), pre.shortcut(active) + branch)
    post = cifar_resnet(8, shortcut="B", widths=(4, 4, 8)).eval().layer3[0]
    branch = post.bn2(post.conv2(F.relu(post.bn1(post.conv1(x)))))
    torch.testing.assert_close(post(x), F.relu(post.shortcut(x) + branch))
    assert [type(part) for part in post.shortcut] == [nn.Conv2d, nn.BatchNorm2d]


def test_without_shortcuts_a_block_is_its_branch():
    with_, without = (cifar_resnet(8, preactivation=True, widths=(4, 4, 8), shortcuts=s) for s in (True, False))
    assert without.load_state_dict(with_.state_dict()) is not None  # same layers
    block, same = with_.eval().layer1[0], without.eval().layer1[0]
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), x + same(x))


def test_convolutions_start_with_he_fan_out():
    torch.manual_seed(0)
    conv = cifar_resnet(8, widths=(16, 32, 64)).layer3[0].conv1  # 32 channels in, 64 out
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_a_cut_shape_is_buildable_and_all_wrong_values_are_named_at_once():
    net = cifar_resnet(110, preactivation=True, widths=(4, 4, 8), blocks_per_stage=[3, 2, 1])
    assert sum(isinstance(module, PreBlock) for module in net.modules()) == 6
    with pytest.raises(InputError) as caught:
        cifar_resnet(57, shortcut="C", widths=(4, 2, 8), blocks_per_stage=(1, 0, 1), num_classes=0)
    assert all(word in str(caught.value) for word in ("5 problems", "56 and 62", "'C'", "(4, 2, 8)", "(1, 0, 1)"))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cifar-resnet-57", {}, "56 and 62"),
        ("cifar-resnet-2", {}, "8 and 14"),
        ("cifar-rsnet-56", {}, "'cifar-resnet-56'"),
        ("cifar-resnet-8", {"width": [4, 4, 8], "num_clases": 3}, "2 problems"),
        ("cifar-resnet-8", {"num_clases": 3}, "'num_classes'"),
        ("timm:resnt18", {}, "'timm:resnet18'"),
        ("timm:resnet18", {"num_clases": 3}, "'num_classes'"),
        ("torchvision:resnet_18", {}, "'torchvision:resnet18'"),
        ("torchvision:resnet18", {"norm_layr": None}, "'norm_layer'"),
        ("resnet50", {}, "Unknown model"),
    ],
)
def test_unknown_names_get_the_nearest_valid_ones(name, options, said):
    with pytest.raises(InputError) as caught:
        build(name, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar-preresnet-8", (3, 32, 32)),
        ("timm:test_resnet", (3, 160, 160)),
        ("torchvision:squeezenet1_1", (3, 224, 224)),
    ],
)
def test_every_family_builds_and_names_its_input_size(name, shape):
    model = build(name, num_classes=4).eval()
    assert input_size(name, model) == shape
    assert model(torch.randn(1, *shape)).shape == (1, 4)
    assert set(fit_options(name, 1, 4)) >= {"num_classes"}


def test_a_number_for_the_widths_is_explained():
    with pytest.raises(InputError, match=r"widths must be three numbers, for instance \[8, 16, 32\], not 8"):
        cifar_resnet(8, widths=8)
