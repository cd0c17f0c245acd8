"""Detectors for the zoo: YOLOv5, YOLOv8 and YOLOX written out small, and the backbones and heads of torchvision's detectors.

The three are the architectures of their papers and repositories (CSP blocks, C2f, SPPF, Focus stem, PAN neck, anchor head,
decoupled head with distribution focal loss, decoupled head with objectness), in code of our own and with random weights. The
outputs are decoded boxes, as at inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], tuple[nn.Module, Any]]


class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, a: int, b: int, k: int = 1, s: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(a, b, k, s, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(b)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, a, H, W] -> [B, b, H / s, W / s]``."""
        return self.act(self.bn(self.conv(x)))


def separable(a: int, b: int, k: int = 1, s: int = 1) -> nn.Module:
    """A depthwise and a pointwise convolution, as YOLOX-Nano has them."""
    return nn.Sequential(Conv(a, a, k, s, groups=a), Conv(a, b))


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut where the width stays."""

    def __init__(self, a: int, b: int, shortcut: bool, k: tuple[int, int], hidden: int, conv: Callable[..., nn.Module] = Conv):
        super().__init__()
        self.cv1, self.cv2 = Conv(a, hidden, k[0]), conv(hidden, b, k[1])
        self.add = shortcut and a == b

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    """CSP block with three convolutions (YOLOv5, and YOLOX's CSPLayer)."""

    def __init__(self, a: int, b: int, n: int = 1, shortcut: bool = True, conv: Callable[..., nn.Module] = Conv):
        super().__init__()
        hidden = b // 2
        self.cv1, self.cv2, self.cv3 = Conv(a, hidden), Conv(a, hidden), Conv(2 * hidden, b)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, (1, 3), hidden, conv) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        """One half through the bottlenecks, the other past them."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """CSP block that concatenates what every bottleneck gives (YOLOv8)."""

    def __init__(self, a: int, b: int, n: int = 1, shortcut: bool = False):
        super().__init__()
        self.c = b // 2
        self.cv1, self.cv2 = Conv(a, 2 * self.c), Conv((2 + n) * self.c, b)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut, (3, 3), self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """Both halves and every step from the second on."""
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Pooling at growing ranges, by pooling again and again."""

    def __init__(self, a: int, b: int, k: int = 5):
        super().__init__()
        self.cv1, self.cv2 = Conv(a, a // 2), Conv(a // 2 * 4, b)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        y = [self.cv1(x)]
        for _ in range(3):
            y.append(self.m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class SPP(nn.Module):
    """Pooling at three ranges side by side (YOLOX)."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv1, self.conv2 = Conv(a, a // 2), Conv(a // 2 * 4, b)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13))

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(m(x) for m in self.m)], 1))


class Focus(nn.Module):
    """Every second pixel to channels, by slicing."""

    def __init__(self, a: int, b: int, k: int = 3):
        super().__init__()
        self.conv = Conv(4 * a, b, k)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, a, H, W] -> [B, b, H / 2, W / 2]``."""
        parts = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """Backbone of four stages and a path aggregation neck: three maps at strides 8, 16 and 32."""

    def __init__(self, stem: nn.Module, w: int, n: int, block: Callable[..., nn.Module], pool: nn.Module, conv: Any = Conv):
        super().__init__()
        c = [w, 2 * w, 4 * w, 8 * w, 16 * w]
        self.stem = stem
        self.down = nn.ModuleList(conv(c[i], c[i + 1], 3, 2) for i in range(4))
        self.stages = nn.ModuleList(block(c[i + 1], c[i + 1], k * n, True) for i, k in enumerate((1, 2, 2, 1)))
        self.pool = pool
        self.lateral = nn.ModuleList((Conv(c[4], c[3]), Conv(c[3], c[2])))
        self.up = nn.ModuleList((block(2 * c[3], c[3], n, False), block(2 * c[2], c[2], n, False)))
        self.narrow = nn.ModuleList((conv(c[2], c[2], 3, 2), conv(c[3], c[3], 3, 2)))
        self.out = nn.ModuleList((block(2 * c[2], c[3], n, False), block(2 * c[3], c[4], n, False)))
        self.upsample = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of ``4w, 8w, 16w`` channels."""
        maps = []
        x = self.stem(x)
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        top = self.lateral[0](self.pool(x))
        middle = self.lateral[1](self.up[0](torch.cat((self.upsample(top), maps[2]), 1)))
        fine = self.up[1](torch.cat((self.upsample(middle), maps[1]), 1))
        second = self.out[0](torch.cat((self.narrow[0](fine), middle), 1))
        third = self.out[1](torch.cat((self.narrow[1](second), top), 1))
        return [fine, second, third]


class AnchorHead(nn.Module):
    """One convolution for each map: box, objectness and classes for three anchors (YOLOv5)."""

    def __init__(self, channels: tuple[int, ...], nc: int = 80):
        super().__init__()
        self.nc, self.no, self.na = nc, nc + 5, 3
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in channels)
        self.register_buffer("anchors", torch.rand(3, 3, 2) + 0.5)
        self.stride = (8.0, 16.0, 32.0)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Decoded boxes ``[B, boxes, 5 + classes]``."""
        z = []
        for i, conv in enumerate(self.m):
            x = conv(maps[i])
            bs, _, ny, nx = x.shape
            x = x.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            yv, xv = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
            grid = torch.stack((xv, yv), 2).expand((1, self.na, ny, nx, 2)) - 0.5
            size = (self.anchors[i] * self.stride[i]).view((1, self.na, 1, 1, 2)).expand((1, self.na, ny, nx, 2))
            xy, wh, conf = x.sigmoid().split((2, 2, self.nc + 1), 4)
            y = torch.cat(((xy * 2 + grid) * self.stride[i], (wh * 2) ** 2 * size, conf), 4)
            z.append(y.view(bs, self.na * nx * ny, self.no))
        return torch.cat(z, 1)


class DFL(nn.Module):
    """The expectation of a distribution over distances, as a fixed convolution."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(c, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c, dtype=torch.float).view(1, c, 1, 1)
        self.c1 = c

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 4 c, A] -> [B, 4, A]``."""
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class DistributionHead(nn.Module):
    """Decoupled and without anchors: distances to the four sides as distributions, and classes (YOLOv8)."""

    def __init__(self, channels: tuple[int, ...], nc: int = 80, bins: int = 16):
        super().__init__()
        self.nc, self.bins, self.no = nc, bins, nc + 4 * bins
        a, b = max(16, channels[0] // 4, 4 * bins), max(channels[0], min(nc, 100))
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(c, a, 3), Conv(a, a, 3), nn.Conv2d(a, 4 * bins, 1)) for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(c, b, 3), Conv(b, b, 3), nn.Conv2d(b, nc, 1)) for c in channels)
        self.dfl = DFL(bins)
        self.stride = (8.0, 16.0, 32.0)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Decoded boxes ``[B, 4 + classes, boxes]``."""
        maps = [torch.cat((self.cv2[i](x), self.cv3[i](x)), 1) for i, x in enumerate(maps)]
        points, strides = [], []
        for x, stride in zip(maps, self.stride, strict=True):
            _, _, h, w = x.shape
            sy, sx = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points.append(torch.stack((sx, sy), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), stride))
        anchors, scale = torch.cat(points).transpose(0, 1).unsqueeze(0), torch.cat(strides).transpose(0, 1)
        both = torch.cat([x.view(x.shape[0], self.no, -1) for x in maps], 2)
        box, classes = both.split((self.bins * 4, self.nc), 1)
        near, far = self.dfl(box).chunk(2, 1)
        a, b = anchors - near, anchors + far
        return torch.cat((torch.cat(((a + b) / 2, b - a), 1) * scale, classes.sigmoid()), 1)


class DecoupledHead(nn.Module):
    """A stem, two towers and three predictions for each map (YOLOX)."""

    def __init__(self, channels: tuple[int, ...], w: int, nc: int = 80, conv: Callable[..., nn.Module] = Conv):
        super().__init__()
        self.stems = nn.ModuleList(Conv(c, w) for c in channels)
        self.cls_convs = nn.ModuleList(nn.Sequential(conv(w, w, 3), conv(w, w, 3)) for _ in channels)
        self.reg_convs = nn.ModuleList(nn.Sequential(conv(w, w, 3), conv(w, w, 3)) for _ in channels)
        self.cls_preds = nn.ModuleList(nn.Conv2d(w, nc, 1) for _ in channels)
        self.reg_preds = nn.ModuleList(nn.Conv2d(w, 4, 1) for _ in channels)
        self.obj_preds = nn.ModuleList(nn.Conv2d(w, 1, 1) for _ in channels)
        self.strides = (8, 16, 32)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Decoded boxes ``[B, boxes, 5 + classes]``."""
        outputs, grids, strides = [], [], []
        for i, x in enumerate(maps):
            x = self.stems[i](x)
            reg = self.reg_convs[i](x)
            parts = (
                self.reg_preds[i](reg),
                self.obj_preds[i](reg).sigmoid(),
                self.cls_preds[i](self.cls_convs[i](x)).sigmoid(),
            )
            outputs.append(torch.cat(parts, 1).flatten(start_dim=2))
            h, w = x.shape[-2:]
            yv, xv = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grids.append(torch.stack((xv, yv), 2).view(1, -1, 2))
            strides.append(torch.full((1, h * w, 1), self.strides[i]))
        out, grid, stride = torch.cat(outputs, 2).permute(0, 2, 1), torch.cat(grids, 1), torch.cat(strides, 1)
        return torch.cat(((out[..., :2] + grid) * stride, out[..., 2:4].exp() * stride, out[..., 4:]), -1)


class Maps(nn.Module):
    """A detector of torchvision up to its heads' outputs; what it selects from them is no network."""

    def __init__(self, detector: Any):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        """What the heads say for every anchor."""
        maps = self.backbone(x)
        return self.head(list(maps.values()) if isinstance(maps, dict) else [maps])


def _yolo(kind: str, w: int, n: int) -> tuple[nn.Module, Any]:
    channels = (4 * w, 8 * w, 16 * w)
    if kind == "v5":
        body = Pyramid(Conv(3, w, 6, 2), w, n, C3, SPPF(16 * w, 16 * w))
        body.stem.conv.padding = (2, 2)
        return nn.Sequential(body, AnchorHead(channels)), torch.randn(1, 3, 160, 160)
    if kind == "v5focus":
        return nn.Sequential(Pyramid(Focus(3, w), w, n, C3, SPPF(16 * w, 16 * w)), AnchorHead(channels)), torch.randn(
            1, 3, 160, 160
        )
    if kind == "v8":
        body = Pyramid(Conv(3, w, 3, 2), w, n, C2f, SPPF(16 * w, 16 * w))
        return nn.Sequential(body, DistributionHead(channels)), torch.randn(1, 3, 160, 160)
    conv = separable if kind == "xnano" else Conv

    def block(a: int, b: int, n: int, shortcut: bool) -> nn.Module:
        return C3(a, b, n, shortcut, conv)

    body = Pyramid(Focus(3, w), w, n, block, SPP(16 * w, 16 * w), conv)
    return nn.Sequential(body, DecoupledHead(channels, 4 * w, conv=conv)), torch.randn(1, 3, 160, 160)


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    from torchvision.models import get_model

    size = 320 if "ssd" in name else 224
    return Maps(get_model(name, weights=None, weights_backbone=None)), torch.randn(1, 3, size, size)


YOLOS: dict[str, tuple[str, int, int]] = {
    "yolov5n": ("v5", 16, 1), "yolov5s": ("v5", 32, 1), "yolov5m": ("v5", 48, 2), "yolov5s_focus": ("v5focus", 32, 1),
    "yolov8n": ("v8", 16, 1), "yolov8s": ("v8", 32, 1), "yolov8m": ("v8", 48, 2),
    "yolox_nano": ("xnano", 16, 1), "yolox_tiny": ("x", 24, 1), "yolox_s": ("x", 32, 1), "yolox_m": ("x", 48, 2),
}  # fmt: skip

DETECTORS: dict[str, Make] = {name: lambda how=how: _yolo(*how) for name, how in YOLOS.items()}
DETECTORS |= {
    name: lambda n=name: _torchvision(n)
    for name in (
        "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
        "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
    )
}  # fmt: skip
