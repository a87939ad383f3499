"""What the tests of the benchmark share."""

from dgc_fastai import load_recipe
from helpers import QUICKSTART

TINY = "model.stages=[1,1]", "model.growth=[4,4]", "data.batch_size=4", "device=cpu"
GATED = [f"{name} at {progress}" for name in ("reference", "ours") for progress in ("0", "0.5", "1")]
TRAINING = ["dense", "dense channels-last", "sgc", *GATED, "dense again"]
DEPLOYED = ["dense channels-last", "deployed", "dense compiled", "deployed compiled"]
INFERENCE = ["dense", "sgc", "reference at 1", "ours at 1", *DEPLOYED, "dense again"]


def tiny(*overrides):
    return load_recipe(QUICKSTART, [*TINY, *overrides])
