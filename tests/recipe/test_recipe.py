"""Recipes: what may be said, and how mistakes are answered."""

import re
import subprocess
import sys

import pytest
import timm

import dgc_fastai  # noqa: F401
from dgc_fastai.recipe.loading import differences, load_recipe, parse_recipe
from dgc_fastai.recipe.machine import check_machine
from dgc_fastai.recipe.schema import ARCHITECTURES, GATES
from dgc_fastai.utils.errors import RecipeError
from helpers import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD = """\
name: good
model: {arch: dgc_densenet86, stages: [1, 1], growth: [8, 8]}
data: {name: digits}
train:
  epochs: 1
  lr: 1e-2
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def refusal(path, *overrides):
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_good_and_says_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    header = path.read_text().split("\nname:")[0]
    for part in ("Target", "GPU", "Time", "Needs"):
        assert part in header
    call = rf"python app\.py (?:compress )?recipes/{path.name}"
    assert re.search(call, header)
    # The commands in the header hold, too.
    for overrides in re.findall(rf"^# (?:Override|Baseline) +{call} (.*)$", header, re.M):
        load_recipe(path, overrides.split())


PUBLISHED = {
    "imagenet_condensenet": ("dgc_condensenet74", 0.25, 120, 256, "imagenet", "74.6 %", "92.2 %"),
    "imagenet_r18": ("dgc_resnet18", 0.45, 120, 256, "imagenet", "68.78 %", "88.62 %"),
    "cifar10_densenet86": ("dgc_densenet86", 0.25, 300, 64, "cifar10", "95.23 %", ""),
    "cifar100_densenet86": ("dgc_densenet86", 0.25, 300, 64, "cifar100", "76.59 %", ""),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_experiments(name):
    arch, gate_factor, epochs, batch, data, *accuracies = PUBLISHED[name]
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path)
    assert (recipe.model.arch, recipe.model.gate_factor, recipe.model.heads) == (arch, gate_factor, 4)
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.data.name) == (epochs, batch, data)
    train = recipe.train.model_dump(exclude={"epochs", "seed", "precision", "nonfinite", "channels_last", "compile"})
    assert train == dict(
        optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, decay_norms=True, schedule="cosine", warmup=0,
        lasso_weight=1e-5, label_smoothing=0, mixup=0, cutmix=0, teacher=None,
        teacher_weight=0.5, teacher_temperature=4, clip=None, accumulate=1, ema=None,
    )  # fmt: skip
    assert recipe.data.augment == ["crop_flip"]
    assert recipe.data.image_size == (224 if data == "imagenet" else 32)
    assert all(accuracy in path.read_text() for accuracy in accuracies)


def test_the_networks_and_their_keywords_are_timm_s():
    assert sorted(ARCHITECTURES) == sorted(timm.list_models("dgc_*"))
    import inspect

    from dgc_fastai.models.dgc_densenet import DGCDenseNet
    from dgc_fastai.models.dgc_resnet import DGCResNet

    for name, keywords in ARCHITECTURES.items():
        network = DGCDenseNet if "densenet" in name or "condensenet" in name else DGCResNet
        assert keywords <= inspect.signature(network).parameters.keys()
        assert keywords >= GATES


def test_the_resolved_recipe_is_whole_and_loads_as_the_same(recipe, tmp_path):
    first = load_recipe(recipe, ["train.seed=7", "model.gate_factor=0.5"])
    (tmp_path / "again.yaml").write_text(first.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == first
    for key in ("weight_decay", "lasso_weight", "schedule", "batch_size", "device", "output"):
        assert key in first.to_yaml()


def test_a_key_s_old_name_is_accepted(recipe):
    """Weights of earlier versions carry `train.lasso`."""
    old = GOOD + "  lasso: 0.5\n"
    assert parse_recipe(old, "old").train.lasso_weight == 0.5
    assert parse_recipe(old, "old", ["train.lasso=0.25"]).train.lasso_weight == 0.25
    assert parse_recipe(old, "old", ["train.lasso_weight=0.25"]).train.lasso_weight == 0.25
    assert load_recipe(recipe, ["train.lasso=0.25"]).train.lasso_weight == 0.25
    assert "lasso:" not in parse_recipe(old, "old").to_yaml()
    assert refusal(recipe, "train.lasso=-1").startswith("train.lasso=-1: train.lasso_weight: ")
    with pytest.raises(RecipeError, match=r"^old:7: train.lasso is the old name of train.lasso_weight; remove one"):
        parse_recipe(old + "  lasso_weight: 0.5\n", "old")


def test_warm_up_and_one_cycle_exclude_each_other(recipe):
    assert "leave warmup out" in refusal(recipe, "train.schedule=one_cycle", "train.warmup=0.5")


def test_differences_name_keys(recipe):
    first = load_recipe(recipe)
    second = load_recipe(recipe, ["train.lr=1", "model.heads=2", "output=elsewhere", "log.keep_every=3", "name=other"])
    assert differences(first, first) == []
    assert differences(first, second) == ["log.keep_every", "model.heads", "name", "output", "train.lr"]
    assert differences(first, second, ignore=("log", "name", "output")) == ["model.heads", "train.lr"]


def test_overrides_take_yaml_values(recipe):
    changed = load_recipe(recipe, ["model.growth=[4, 4]", "train.lr=2e-3", "model.stages=null", "output=a=b"])
    assert (changed.model.growth, changed.train.lr, changed.output) == ([4, 4], 2e-3, "a=b")
    assert changed.model.stages is None and "stages" not in changed.model.keywords()
    assert load_recipe(recipe, ["train.lr=1", "train.lr=0.5"]).train.lr == 0.5


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.epoch=3", "train.epoch=3: unknown key; did you mean 'train.epochs'?"),
        ("modle.heads=4", "modle.heads=4: modle: unknown key; did you mean 'model'?"),
        ("heads=4", "heads=4: unknown key; did you mean 'model.heads'?"),
        ("path=x", "path=x: unknown key; did you mean 'data.path'?"),
        ("epoch=4", "epoch=4: unknown key; did you mean 'train.epochs'?"),
        ("zzz=4", "zzz=4: unknown key; known are name, model,"),
        ("model.gatefactor=0.3", "model.gatefactor=0.3: unknown key; did you mean 'model.gate_factor'?"),
        ("model.zzz=4", "model.zzz=4: unknown key; known are arch, heads,"),
        ("train.epochs=many", 'train.epochs=many: input should be a valid integer, not "many"'),
        ("train.epochs=1.5", "train.epochs=1.5: input should be a valid integer, not 1.5"),
        ("train.epochs=true", "train.epochs=true: input should be a valid integer, not true"),
        ("train.epochs='3'", "train.epochs='3': input should be a valid integer"),
        ("train.epochs=0", "train.epochs=0: input should be greater than or equal to 1, not 0"),
        ("train.epochs=null", "train.epochs=null: input should be a valid integer, not null"),
        ("train.lr=.nan", "train.lr=.nan: input should be a finite number"),
        ("train.lr=-1", "train.lr=-1: input should be greater than 0, not -1"),
        ("train.seed=99999999999999999999", "train.seed=99999999999999999999: input should be less than 4294967296"),
        ("model.gate_factor=0", "model.gate_factor=0: input should be greater than 0, not 0"),
        ("model.gate_factor=1.5", "model.gate_factor=1.5: input should be less than or equal to 1, not 1.5"),
        ("model.heads=0", "model.heads=0: input should be greater than or equal to 1"),
        (
            "model.arch=dgc_densenet68",
            "model.arch=dgc_densenet68: no network 'dgc_densenet68'; did you mean 'dgc_densenet86'?",
        ),
        ("model.arch=dgc_resnet18", "model.arch=dgc_resnet18: model: dgc_resnet18 has no keyword growth, stages"),
        ("model.growth=8", "model.growth=8: input should be a list, not 8"),
        ("data.name=mnist", "'cifar100', 'imagenet' or 'folder', not \"mnist\""),
        ("data.name=imagenet", "imagenet needs path"),
        ("data.path=/tmp", "leave path out"),
        ("data.name=folder", "folder needs path"),
        ("data.valid_share=0.5", "leave valid_share out"),
        ("data.augment=[crop]", "data.augment.0: input should be 'crop_flip', 'rand_augment'"),
        ("data.augment=[crop_flip, crop_flip]", "augment names something twice"),
        ("train.warmup=1", "warmup takes 1 of 1 epochs"),
        ("train.LR=1", "train.LR=1: unknown key; did you mean 'train.lr'?"),
        ("train.optimizer=a b", "train.optimizer=a b: use letters, digits"),
        ("log.loggers=[tensorbord]", "log.loggers.0: input should be 'tensorboard', 'wandb' or 'trackio'"),
        ("log.keep=2", "log.keep=2: unknown key; did you mean 'log.keep_every'?"),
        ("name=a/b", "name=a/b: use letters, digits"),
        ("device=tpu", "device=tpu: no such device: 'tpu'"),
        ("train=3", "train=3: input should be a section of keys and values"),
        ("train.epochs.x=3", "epochs is not a section"),
        ("train.epochs", "an override reads section.key=value"),
        ("=3", "an override reads section.key=value"),
        ("train.lr=[", "not valid YAML"),
    ],
)
def test_a_mistake_in_an_override_names_it(recipe, override, message):
    answer = refusal(recipe, override)
    assert message in answer
    assert override in answer or str(recipe) in answer


def test_a_mistake_in_a_file_names_its_line(recipe):
    recipe.write_text(GOOD.replace("  lr: 1e-2", "  lrr: 1e-2"))
    assert refusal(recipe) == f"{recipe}:6: train.lrr: unknown key; did you mean 'train.lr'?"
    recipe.write_text(GOOD.replace("epochs: 1", "epochs: one"))
    assert refusal(recipe).startswith(f"{recipe}:5: train.epochs: ")
    recipe.write_text(GOOD.replace("  epochs: 1\n", ""))
    assert refusal(recipe) == f"{recipe}:4: train.epochs: is missing"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a recipe is a mapping"),
        ("- a\n- b", "a recipe is a mapping"),
        ("name: x", "model: is missing"),
        ("name: x\nname: y", ":2: not valid YAML: 'name' appears twice"),
        ("name: [x", "not valid YAML"),
        ("\tname: x", "not valid YAML"),
        ("name: \x00", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']", ":1: not valid YAML: could not determine a constructor"),
        ("name: &a [*a]", "not a recipe: Circular"),
        ("? [a, b]\n: 3", "not valid YAML"),
        ("[1, 2]: 3", "not valid YAML"),
        ("name: 2020-99-99", "not valid YAML: month must be"),
        ("1: 2\nname: x", "unknown key"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    assert message in refusal(tmp_path / "x.yaml")


def test_unreadable_files(tmp_path, recipe):
    assert "cannot read the recipe: No such file" in refusal(tmp_path / "other")
    assert f"did you mean '{recipe}'" in refusal(tmp_path / "god.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(tmp_path / "binary.yaml")
    assert "Is a directory" in refusal(tmp_path)


def machine_refusal(recipe, *overrides):
    with pytest.raises(RecipeError) as error:
        check_machine(load_recipe(recipe, overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_check_of_the_machine_finds_what_is_missing_and_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_machine(load_recipe(recipe))
    assert "there is no folder nowhere" in machine_refusal(recipe, "data.name=cifar10", "data.path=nowhere")
    assert "cifar-10-batches-py" in machine_refusal(recipe, "data.name=cifar10", "data.path=.")
    assert "below train/ and val/" in machine_refusal(recipe, "data.name=imagenet", "data.path=.")
    for folder in ("i/train/a", "i/train/b", "i/val/a"):
        (tmp_path / folder).mkdir(parents=True)
    imagenet = "data.name=imagenet", "data.path=i"
    assert (
        "i/val has 1 class folder; put the pictures into one folder for each class, such as i/val/cat/1.jpg"
        in machine_refusal(recipe, *imagenet)
    )
    (tmp_path / "i/val/c").mkdir()
    assert "differ in their classes: b, c" in machine_refusal(recipe, *imagenet)
    assert "good.yaml is not a folder" in machine_refusal(recipe, "output=good.yaml/runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.yaml", "i"]


@pytest.mark.parametrize("classes", [0, 1])
def test_pictures_outside_of_class_folders_are_mentioned(recipe, tmp_path, monkeypatch, classes):
    monkeypatch.chdir(tmp_path)
    for name in ["pets/b.png", "pets/a.JPG", "pets/notes.txt", "pets/.hidden.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for number in range(classes):
        (tmp_path / f"pets/class{number}").mkdir()
    assert machine_refusal(recipe, "data.name=folder", "data.path=pets") == (
        f"data.path: pets has {classes} class folder{'' if classes else 's'} and 2 pictures outside of them; put the "
        "pictures into one folder for each class, such as pets/cat/a.JPG and pets/dog/2.jpg"
    )


def test_the_check_of_the_machine_asks_the_driver_for_devices(recipe, monkeypatch):
    from dgc_fastai.recipe import machine as module

    monkeypatch.setattr(module, "cuda_devices", lambda: 0)
    assert "no CUDA driver or GPU; use device=cpu" in machine_refusal(recipe, "device=cuda")
    assert "needs a CUDA device" in machine_refusal(recipe, "train.precision=fp16")
    check_machine(load_recipe(recipe, ["train.precision=bf16"]))
    monkeypatch.setattr(module, "cuda_devices", lambda: 2)
    assert "there are 2 GPUs" in machine_refusal(recipe, "device=cuda:2")
    check_machine(load_recipe(recipe, ["device=cuda:1", "train.precision=bf16"]))
    assert "needs a CUDA device" in machine_refusal(recipe, "device=cpu", "train.precision=fp16")


class Driver:
    """The CUDA driver of a machine with one GPU of compute capability 7.0."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device, index):
        return 0 if index == 0 else 101

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 7, 76: 0}[attribute]
        return 0


def test_a_gpu_that_only_emulates_bf16_is_told_apart_without_torch(recipe, monkeypatch):
    from dgc_fastai.recipe import machine as module

    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: Driver())
    assert (module.cuda_devices(), module.cuda_capability(0), module.cuda_capability(1)) == (1, (7, 0), None)
    assert "no bf16 units (compute capability 7.0; 8.0 has them)" in machine_refusal(recipe, "train.precision=bf16")
    for precision in ("auto", "fp16", "float32"):
        check_machine(load_recipe(recipe, [f"train.precision={precision}"]))
    check_machine(load_recipe(recipe, ["train.precision=bf16", "device=cpu"]))


def test_the_check_of_the_machine_needs_a_compiler_for_torch_compile(recipe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler" in machine_refusal(recipe, "train.compile=true")
    check_machine(load_recipe(recipe))


def test_the_check_of_the_machine_asks_for_loggers_without_importing_them(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    check_machine(load_recipe(recipe, ["log.loggers=[trackio, tensorboard]"]))
    answer = machine_refusal(recipe, "log.loggers=[trackio, wandb]")
    assert answer == "log.loggers: wandb is not installed; try pip install wandb"


def test_the_recipe_of_a_run_folder_is_suggested(tmp_path):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert refusal(tmp_path).endswith(f"; did you mean the recipe of this run, '{tmp_path / 'recipe.yaml'}'?")


def test_a_recipe_that_comes_with_the_package_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart") == load_recipe("quickstart.yaml") == load_recipe(ROOT / "recipes/quickstart.yaml")
    assert "did you mean 'quickstart'?" in refusal("quikstart")
    assert "cannot read the recipe: No such file" in refusal("nowhere/quickstart")


def test_recipes_are_read_without_torch():
    code = (
        "import sys\n"
        "from dgc_fastai.recipe.machine import check_machine\n"
        "from dgc_fastai.recipe.loading import load_recipe\n"
        "check_machine(load_recipe('recipes/quickstart.yaml'))\n"
        "assert not {'torch', 'fastai', 'timm', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
