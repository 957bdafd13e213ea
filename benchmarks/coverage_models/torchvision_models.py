"""torchvision: classification, segmentation, detection, video, optical flow and the quantisable variants.

``weight`` is a judgement, not a measurement: "high" are the models that its own tutorials and most guides use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Weight, lively

NEEDS_TARGETS = "in training it takes targets and returns losses"
_SLOW = {"wide_resnet", "fcn_resnet", "deeplabv3_resnet", "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "raft_large",
         "raft_small", "vgg11_bn", "lraspp_mobilenet_v3_large"}  # fmt: skip


def _row(
    name: str,
    build: Callable[[], nn.Module] | None,
    published: int | None,
    where: str,
    *,
    size: int | tuple[int, ...] = 64,
    weight: Weight = "low",
    trains: str = "",
    residual: bool | None = None,
    example: Callable[[], Any] | None = None,
    batch: Callable[[Any], Any] | None = None,
) -> Family:
    def made() -> tuple[nn.Module, Any]:
        import torchvision

        torch.manual_seed(0)
        model = build() if build else torchvision.models.get_model(name, weights=None)
        shape = (size, size) if isinstance(size, int) else size
        return lively(model), example() if example else torch.randn(2, 3, *shape)

    residual = bool(published) if residual is None else residual
    slow = name in _SLOW or trains == NEEDS_TARGETS
    return Family("torchvision", name, made, published, where, residual, weight, trains, batch, slow)


def _googlenet(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=False)


def _resnet() -> nn.Module:
    """A dilated backbone as the segmentation models use it, with 5 blocks instead of 16."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 2, 1], replace_stride_with_dilation=[False, True, True])


def _wide() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 2, 1], width_per_group=128)


def _fcn() -> nn.Module:
    from torchvision.models.segmentation import fcn

    return fcn._fcn_resnet(_resnet(), 5, None)


def _deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3

    return deeplabv3._deeplabv3_resnet(_resnet(), 5, None)


def _lraspp() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def _detector(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
        few = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
        if kind in ("RetinaNet", "FCOS"):
            few = {"topk_candidates": 40, "detections_per_img": 10}
        return getattr(detection, kind)(backbone, num_classes=3, min_size=64, max_size=64, **few)

    return build


def _ssd(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection

        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3)

    return build


def _two_pictures() -> tuple[list[Tensor]]:
    return ([torch.rand(3, 64, 64), torch.rand(3, 48, 64)],)


def _four_pictures(example: tuple[list[Tensor]]) -> tuple[list[Tensor]]:
    return ([*example[0], *(picture.flip(-1) for picture in example[0])],)


def _two_frames() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)


def _raft(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import optical_flow

        return getattr(optical_flow, name)(weights=None)

    return build


def _two_refinements(example: tuple[Tensor, Tensor]) -> dict[str, Any]:
    return {"image1": example[0], "image2": example[1], "num_flow_updates": 2}


def _swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    parts: dict[str, Any] = {}
    if version == 2:
        parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.1, **parts)


def _swin3d() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], stochastic_depth_prob=0.1)


def _mvit(version: int) -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    widths = [(16, 32), (32, 32), (32, 32)] if version == 2 else [(16, 16), (16, 32), (32, 32)]
    stages = [([], [3, 3, 3], [1, 4, 4]), ([1, 2, 2], [3, 3, 3], [1, 2, 2]), ([], [3, 3, 3], [1, 2, 2])]
    setting = [
        MSBlockConfig(1 if narrow == 16 else 2, narrow, wide, kernel, kernel if stride else [], kv, stride)
        if version == 1
        else MSBlockConfig(2, narrow, wide, kernel, kernel, kv, stride or [1, 1, 1])
        for (narrow, wide), (stride, kernel, kv) in zip(widths, stages, strict=True)
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False} if version == 2 else {
        "residual_pool": False, "residual_with_cls_embed": True
    }  # fmt: skip
    options |= {"rel_pos_embed": version == 2, "proj_after_attn": version == 2}
    return MViT((32, 32), 4, setting, num_classes=5, stochastic_depth_prob=0.1, **options)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 2], 8, 0.1, num_classes=5)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 2), CNBlockConfig(48, None, 1)], 0.1, num_classes=5
    )


def _stages(config: Any) -> list[Any]:
    return [config(16, 32, 1), config(32, 48, 2), config(48, None, 1)]


def _quantizable(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import quantization

        options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return getattr(quantization, name)(weights=None, quantize=False, **options)

    return build


HE = "He et al. 2016, Table 1"
FPN = "the resnet18 backbone: 8; the pyramid's sums are long connections"
CLIP = (4, 32, 32)

FAMILIES: tuple[Family, ...] = (
    _row("alexnet", None, 0, "plain chain"),
    _row("vgg11_bn", None, 0, "plain chain", size=32, weight="middle"),
    _row("squeezenet1_1", None, 0, "SqueezeNet without bypass: concatenation"),
    _row("densenet121", None, 0, "concatenation", size=32, weight="middle"),
    _row("googlenet", lambda: _googlenet("googlenet"), 0, "concatenation"),
    _row("inception_v3", lambda: _googlenet("inception_v3"), 0, "concatenation", size=96),
    _row("shufflenet_v2_x0_5", None, 0, "concatenation of the two halves"),
    _row("resnet18", None, 8, f"{HE}: 2+2+2+2", weight="high"),
    _row("resnet50", None, 16, f"{HE}: 3+4+6+3", weight="high"),
    _row("resnext50_32x4d", None, 16, "Xie et al. 2017, Table 1: 3+4+6+3", size=32, weight="middle"),
    _row("wide_resnet", _wide, 5, "1+1+2+1 of double width", size=32),
    _row("mnasnet0_5", None, 10, "Tan et al. 2019, Figure 7: stacks of 3,3,3,2,4,1, first of each without"),
    _row("mobilenet_v2", None, 10, "Sandler et al. 2018, Table 2: repeats 1,2,3,4,3,3,1, first of each without: 17-7",
         weight="high"),
    _row("mobilenet_v3_small", None, 6, "Howard et al. 2019, Table 2: 6 of 11 bneck keep stride and width",
         weight="high"),
    _row("mobilenet_v3_large", None, 10, "Howard et al. 2019, Table 1: 10 of 15 bneck keep stride and width",
         weight="high"),
    _row("efficientnet_b0", None, 9, "Tan & Le 2019, Table 1: repeats 1,2,2,3,3,4,1, first of each without: 16-7",
         weight="high"),
    _row("efficientnet_v2_s", None, 35, "Tan & Le 2021, Table 4: repeats 2,4,4,6,9,15, first of all but one without",
         weight="middle"),
    _row("regnet_y_400mf", None, 16, "Radosavovic et al. 2020: depths 1+3+6+6", weight="middle"),
    _row("regnet_x_400mf", None, 22, "Radosavovic et al. 2020: depths 1+2+7+12"),
    _row("convnext", _convnext, 4, "depths 1+2+1", weight="high"),
    _row("vit", _vit, 6, "3 layers x 2", size=32, weight="high"),
    _row("swin", lambda: _swin(1), 8, "4 layers x 2", weight="high"),
    _row("swin_v2", lambda: _swin(2), 8, "4 layers x 2", weight="middle"),
    _row("maxvit", _maxvit, 15, "Tu et al. 2022: per layer 1 MBConv + 2 attentions x 2: 3 x 5"),
    _row("fcn_resnet", _fcn, 5, "the backbone's 1+1+2+1", size=32, weight="middle"),
    _row("deeplabv3_resnet", _deeplab, 5, "the backbone's 1+1+2+1", size=32, weight="middle"),
    _row("lraspp_mobilenet_v3_large", _lraspp, 10,
         "the backbone's 10; the sum of its two heads is a long connection"),
    _row("fasterrcnn_resnet18_fpn", _detector("FasterRCNN"), 8, FPN, weight="high", trains=NEEDS_TARGETS,
         example=_two_pictures, batch=_four_pictures),
    _row("maskrcnn_resnet18_fpn", _detector("MaskRCNN"), 8, FPN, weight="high", trains=NEEDS_TARGETS,
         example=_two_pictures, batch=_four_pictures),
    _row("keypointrcnn_resnet18_fpn", _detector("KeypointRCNN"), 8, FPN, trains=NEEDS_TARGETS,
         example=_two_pictures, batch=_four_pictures),
    _row("retinanet_resnet18_fpn", _detector("RetinaNet"), 8, FPN, weight="middle", trains=NEEDS_TARGETS,
         example=_two_pictures, batch=_four_pictures),
    _row("fcos_resnet18_fpn", _detector("FCOS"), 8, FPN, trains=NEEDS_TARGETS,
         example=_two_pictures, batch=_four_pictures),
    _row("ssdlite320_mobilenet_v3_large", _ssd("ssdlite320_mobilenet_v3_large"), 10, "the backbone's 10",
         trains=NEEDS_TARGETS, example=_two_pictures, batch=_four_pictures),
    _row("ssd300_vgg16", _ssd("ssd300_vgg16"), 0, "plain chain", trains=NEEDS_TARGETS, example=_two_pictures,
         batch=_four_pictures),
    _row("r3d_18", None, 8, "Tran et al. 2018, Table 1: 2+2+2+2", size=CLIP, weight="middle"),
    _row("mc3_18", None, 8, "Tran et al. 2018, Table 1: 2+2+2+2", size=CLIP),
    _row("r2plus1d_18", None, 8, "Tran et al. 2018, Table 1: 2+2+2+2", size=CLIP, weight="middle"),
    _row("s3d", None, 0, "concatenation", size=(16, 224, 224)),
    _row("swin3d", _swin3d, 8, "4 layers x 2", size=CLIP),
    _row("mvit_v1", lambda: _mvit(1), 6, "3 layers x 2", size=CLIP),
    _row("mvit_v2", lambda: _mvit(2), 6, "3 layers x 2; the pooled query is added inside the attention", size=CLIP),
    _row("raft_large", _raft("raft_large"), None,
         "12 in the two encoders (Teed & Deng 2020, Figure 8) and, per refinement, the flow's and the GRU's own sums",
         residual=True, example=lambda: _two_refinements(_two_frames())),
    _row("raft_small", _raft("raft_small"), None,
         "12 in the two encoders (Teed & Deng 2020, Figure 8) and, per refinement, the flow's and the GRU's own sums",
         residual=True, example=lambda: _two_refinements(_two_frames())),
    _row("quantizable resnet18", _quantizable("resnet18"), 8, f"{HE}: 2+2+2+2"),
    _row("quantizable resnet50", _quantizable("resnet50"), 16, f"{HE}: 3+4+6+3", size=32),
    _row("quantizable mobilenet_v2", _quantizable("mobilenet_v2"), 10, "as mobilenet_v2"),
    _row("quantizable mobilenet_v3_large", _quantizable("mobilenet_v3_large"), 10, "as mobilenet_v3_large"),
    _row("quantizable shufflenet_v2_x0_5", _quantizable("shufflenet_v2_x0_5"), 0, "concatenation"),
    _row("quantizable googlenet", _quantizable("googlenet"), 0, "concatenation"),
    _row("quantizable inception_v3", _quantizable("inception_v3"), 0, "concatenation", size=96),
)  # fmt: skip
