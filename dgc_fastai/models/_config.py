"""The part of timm's default configuration that the families share."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def imagenet_cfg(**kwargs) -> dict:
    """Input and preprocessing of the ImageNet networks: 224 px, cut from the centre of 256 px."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "mit",
        **kwargs,
    }
