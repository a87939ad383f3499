"""list, copy and check."""

from dgc_fastai import load_recipe
from helpers import QUICKSTART, ROOT


def test_list_is_one_table_with_quickstart_first(app, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    header, _line, *rows = app("list").split("\n\n")[0].splitlines()[1:]
    assert header.split() == ["recipe", "data", "GPU", "needed", "time", "(published)"]
    assert all(len(row) <= 80 for row in rows)
    assert rows[0].split() == ["quickstart", "digits", "no", "1", "min,", "2", "cores", "none"]
    names = [row.split()[0] for row in rows if not row.startswith(" ")]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert [name for name in names if name.startswith("imagenet")] == names[-2:]  # those that need a GPU come last
    assert any(row.split()[1:] == ["cifar10", "yes", "not", "measured", "95.23", "%", "top-1"] for row in rows)
    assert app("list").endswith("To train one: python app.py quickstart\nTo edit one:  python app.py copy quickstart\n")
    assert "To train" not in app("-q", "list")


def test_list_of_a_folder(app, tmp_path):
    assert "error: " in app("list", tmp_path, expect=2)
    app("copy", "quickstart", "mine.yaml", cwd=tmp_path)
    (tmp_path / "broken.yaml").write_text("name: [")
    text = app("list", ".", cwd=tmp_path)
    assert "broken  not a recipe " in text and "To train one: python app.py mine.yaml" in text


def test_a_copy_is_a_recipe_of_one_s_own(app, tmp_path):
    app("copy", QUICKSTART, cwd=tmp_path)
    copy = tmp_path / "my_quickstart.yaml"
    original, mine = load_recipe(QUICKSTART), load_recipe(copy)
    assert mine == original.model_copy(update={"name": "my_quickstart"})
    assert "python app.py my_quickstart.yaml" in copy.read_text() and "recipes/quickstart" not in copy.read_text()
    before = copy.read_text()
    assert "there is a file of that name already" in app("copy", QUICKSTART, cwd=tmp_path, expect=2)
    assert copy.read_text() == before
    for name in ("42.yaml", "true.yaml", "-x y.yaml"):
        app("copy", QUICKSTART, f"./{name}", cwd=tmp_path)
        load_recipe(tmp_path / name)
    for name, message in (("x.txt", "ends in .yaml"), ("nowhere/x.yaml", "cannot write nowhere/x.yaml: No such file")):
        assert message in app("copy", QUICKSTART, name, cwd=tmp_path, expect=2)
    assert "cannot read the recipe" in app("copy", "nothing.yaml", cwd=tmp_path, expect=2)
    (tmp_path / "link.yaml").symlink_to("nowhere.yaml")
    assert "there is a file of that name already" in app("copy", QUICKSTART, "link.yaml", cwd=tmp_path, expect=2)


def test_copy_takes_a_name(app, tmp_path):
    text = app("copy", "quickstart", cwd=tmp_path)
    assert text == "Wrote my_quickstart.yaml. Edit it, then train it: python app.py my_quickstart.yaml\n"
    assert "my_quickstart" in app("check", "my_quickstart.yaml", cwd=tmp_path)


def test_a_file_comes_before_the_recipe_of_that_name(app, tmp_path):
    app("copy", "quickstart", "quickstart.yaml", cwd=tmp_path)
    (tmp_path / "quickstart.yaml").write_text(
        (tmp_path / "quickstart.yaml").read_text().replace("epochs: 16", "epoch: 1")
    )
    assert "quickstart.yaml:14: train.epoch: unknown key" in app("check", "quickstart.yaml", cwd=tmp_path, expect=2)
    (tmp_path / "quickstart").mkdir()  # a folder does not
    app("check", "quickstart", cwd=tmp_path)


def test_check_begins_with_its_verdict_and_writes_nothing(app, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = app("check", "quickstart", cwd=tmp_path)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "recipe, data, device OK; 0.74 M MACs, 57 % of dense"
    assert lines[2:6] == [
        "MACs, target      738,400  multiply-accumulates after training, gates closed",
        "MACs, now       1,377,376  with the channels kept at present",
        "MACs, dense     1,305,952  with ordinary convolutions",
        "authors' count    800,998  MACs plus ReLU, pooling, gates and biases",
    ]
    assert "epochs: 16" in text and ".conv1" not in text
    quiet = app("-q", "check", "quickstart", cwd=tmp_path)
    assert [line.rstrip() for line in quiet.splitlines()] == lines[:7]
    assert not list(tmp_path.iterdir())


def test_check_prints_every_layer_if_asked(app, tmp_path):
    text = app("check", QUICKSTART, "model.stages=[14,14,14]", "--layers", cwd=tmp_path)
    assert text.count(".conv1 ") == 42 and " total " in text
