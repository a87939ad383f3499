"""Every option of the authors' command line does here what the table in docs/migrating.md says it does."""

import csv
import re

import pytest
import torch
from fastai.callback.core import CancelFitException

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.layers.gate_schedule import dgc_layers, gate_penalty
from dgc_fastai.training.schedules import schedules
from helpers import QUICKSTART, ROOT
from helpers.command_line import only
from helpers.datasets import write_cifar
from helpers.golden import make_state
from helpers.runs import StopAt, start

PAGE = (ROOT / "docs" / "migrating.md").read_text()
# As the authors' main.py lists them.
OPTIONS = [
    "--data",
    "--datadir",
    "--savedir",
    "--model",
    "-j",
    "--epochs",
    "-b",
    "--lr",
    "--lr-type",
    "--group-lasso-lambda",
    "--momentum",
    "--weight-decay",
    "--seed",
    "--gpu",
    "--stages",
    "--squeeze-rate",
    "--heads",
    "--group-3x3",
    "--gate-factor",
    "--growth",
    "--bottleneck",
    "--print-freq",
    "--save-freq",
    "--resume",
    "--evaluate",
]
TABLE = dict(re.findall(r"^\| `(-\S+)` \| (.*?) \|", PAGE, re.M))
SHORT = ["model.stages=[1,1]", "model.growth=[8,8]", "data.batch_size=300", "train.epochs=2", "train.optimizer=sgd"]
SHORT += ["log.report=false"]


def test_the_table_is_whole():
    assert list(TABLE) == OPTIONS
    tests = {name.removeprefix("test_option_") for name in globals() if name.startswith("test_option_")}
    assert tests == {option.lstrip("-").replace("-", "_") for option in OPTIONS}


def key(option):
    """The recipe key that the table gives for an option."""
    return re.search(r"`([\w.]+)", TABLE[option])[1]


def learner(*overrides):
    return build_learner(load_recipe(QUICKSTART, [*SHORT, *overrides]))


def test_option_data(tmp_path):
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        write_cifar(tmp_path, name)
        learn = learner(f"{key('--data')}={name}", f"{key('--datadir')}={tmp_path}")
        assert len(learn.dls.vocab) == classes == learn.model.num_classes


def test_option_datadir(tmp_path):
    write_cifar(tmp_path / "first", "cifar10", n=40)
    write_cifar(tmp_path / "second", "cifar10", n=80)
    sizes = [
        len(learner("data.name=cifar10", f"{key('--datadir')}={tmp_path / name}").dls.train_ds)
        for name in ("first", "second")
    ]
    assert sizes == [40, 80]


def test_option_savedir(app, tmp_path):
    app(QUICKSTART, *SHORT, f"{key('--savedir')}={tmp_path}/here")
    assert (only(tmp_path / "here") / "best.safetensors").exists()


def test_option_model():
    for name in ("dgc_densenet86", "dgc_condensenet74", "dgc_densenet86_dense"):
        learn = learner(f"{key('--model')}={name}")
        assert bool(dgc_layers(learn.model)) == (not name.endswith("dense"))
    learn = build_learner(load_recipe(QUICKSTART, [f"{key('--model')}=dgc_resnet18", "model.stages=null"]))
    assert len(dgc_layers(learn.model)) == 16 + 3  # and the three that a shortcut takes


def test_option_j(tmp_path):
    from helpers.datasets import write_imagenet

    write_imagenet(tmp_path)
    learn = learner("data.name=imagenet", f"data.path={tmp_path}", "data.size=32", f"{key('-j')}=2")
    assert learn.dls.train.fake_l.num_workers == 2


def test_option_epochs(tmp_path):
    folder, _ = start([*SHORT, f"{key('--epochs')}=3", f"output={tmp_path}"])
    assert len(list(csv.DictReader(open(folder / "history.csv")))) == 3


def test_option_b():
    learn = learner(f"{key('-b')}=17")
    assert len(learn.dls.one_batch()[0]) == 17


def test_option_lr():
    recipe = load_recipe(QUICKSTART, [f"{key('--lr')}=0.3", "train.schedule=cosine"])
    assert schedules(recipe)["lr"](0.0) == pytest.approx(0.3)


def test_option_lr_type():
    cosine, multistep = (
        schedules(load_recipe(QUICKSTART, [f"{key('--lr-type')}={name}", "train.lr=1"]))["lr"]
        for name in ("cosine", "multistep")
    )
    assert cosine(0.5) == pytest.approx(0.5) and multistep(0.5) == pytest.approx(0.1)


def test_option_group_lasso_lambda():
    learn = learner(f"{key('--group-lasso-lambda')}=0.25")
    found = []

    class Look(StopAt):
        order = 9  # after AnnealGates (5)

        def after_loss(self):
            found.append((self.learn.loss_grad - self.learn.loss, 0.25 * gate_penalty(self.model)))
            raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Look(9, 9))
    torch.testing.assert_close(*map(float, found[0]), rtol=1e-4, atol=0)


def test_option_momentum():
    (group,) = learner(f"{key('--momentum')}=0.7").opt.opt.param_groups
    assert group["momentum"] == 0.7 and group["nesterov"]


def test_option_weight_decay():
    (group,) = learner(f"{key('--weight-decay')}=0.003").opt.opt.param_groups
    assert group["weight_decay"] == 0.003


def test_option_seed():
    weights = [learner(f"{key('--seed')}={seed}").model.stem.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_option_gpu(app):
    assert str(learner(f"{key('--gpu')}=cpu").dls.device) == "cpu"
    if not torch.cuda.is_available():
        assert "device: cuda:0, but this machine has no CUDA" in app(QUICKSTART, f"{key('--gpu')}=cuda:0", expect=2)


def test_option_stages():
    learn = learner(f"{key('--stages')}=[2,3]")
    assert [len(stage.layers) for stage in learn.model.stages] == [2, 3]


def test_option_squeeze_rate():
    # Fewer than 80 channels: half the rate.
    layer = dgc_layers(learner(f"{key('--squeeze-rate')}=4").model)[0]
    assert layer.squeeze_rate == 4 and layer.gates.squeeze.shape[1] == 8 == layer.in_channels // 2


def test_option_heads():
    assert {layer.heads for layer in dgc_layers(learner(f"{key('--heads')}=2").model)} == {2}


def test_option_group_3x3():
    assert learner(f"{key('--group-3x3')}=8").model.stages[0].layers[0].conv2.conv.groups == 8


def test_option_gate_factor(tmp_path):
    folder, _ = start([*SHORT, f"{key('--gate-factor')}=0.5", f"output={tmp_path}"])
    assert float(list(csv.DictReader(open(folder / "history.csv")))[-1]["inactive"]) == 0.5


def test_option_growth():
    learn = learner(f"{key('--growth')}=[4,12]")
    assert [stage.layers[0].conv2.conv.out_channels for stage in learn.model.stages] == [4, 12]


def test_option_bottleneck():
    assert learner(f"{key('--bottleneck')}=3", "model.heads=2").model.stages[0].layers[0].conv1.out_channels == 24


def test_option_print_freq(app, tmp_path):
    text = app(QUICKSTART, *SHORT, f"{key('--print-freq')}=2", f"output={tmp_path}")
    assert re.findall(r"epoch 1 of 2: (\d) of 5 batches, loss \d\.\d{4}", text) == ["2", "4"]
    assert "batches" not in app(QUICKSTART, *SHORT, f"output={tmp_path}")


def test_option_save_freq(tmp_path):
    folder, _ = start([*SHORT, f"{key('--save-freq')}=2", "train.epochs=4", f"output={tmp_path}"])
    assert [path.stem for path in sorted(folder.glob("epoch*"))] == ["epoch_0002", "epoch_0004"]


def test_option_resume(app, tmp_path):
    assert "`--resume`" in TABLE["--resume"]
    start([*SHORT, f"output={tmp_path}"], callback=StopAt(0, 1))
    folder = only(tmp_path)
    text = app(folder / "recipe.yaml", "--resume")
    assert f"Going on with {folder}." in text and not (folder / "state.pt").exists()


def test_option_evaluate(app, tmp_path):
    assert "`evaluate RECIPE --weights FILE`" in TABLE["--evaluate"]
    write_cifar(tmp_path / "data", "cifar10")
    published = tmp_path / "model.pth.tar"
    torch.save({"state_dict": make_state("cifar10_dydensenet86_h4"), "epoch": 299}, published)
    recipe = QUICKSTART.with_name("cifar10_densenet86.yaml")
    assert "top-1 " in app("evaluate", recipe, f"data.path={tmp_path}/data", "device=cpu", "--weights", published)
