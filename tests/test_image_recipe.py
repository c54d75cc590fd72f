"""The recipe of image classification: in one and two processes, its data, and what it refuses."""

import sys
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_ewc.report import read_outcomes
from tests.processes import ROOT
from tests.recipe import run_recipe

sys.path.insert(0, str(ROOT / "recipes"))
import sequential_image_classification as recipe
from image_tasks import ImageTask, _loaded, _of_folder, permuted, pixels_for, with_pixels
from labelled_data import load, split_up

NAME = "sequential_image_classification"
VIT = dict(
    image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16,
)  # fmt: skip


def picture(value, size=(8, 8)):
    return Image.fromarray(np.full((*size, 3), value, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of images for two tasks, arrays of six classes, and a pretrained model."""
    folder = tmp_path_factory.mktemp("images")
    for task, classes in (("a", ("cat", "dog")), ("b", ("train", "test"))):
        for part, number in (("train", 4), ("eval", 2)):
            for k, name in enumerate(classes):
                place = folder / task / part / name
                place.mkdir(parents=True)
                for i in range(number):
                    picture(100 * k + i).save(place / f"{i}.png")
    labels = np.arange(24) % 6
    images = (40 * labels[:, None, None] + np.arange(16).reshape(4, 4)).astype(np.uint8)
    arrays = {f"{n}_{s}": v for s in ("train", "test") for n, v in (("x", images), ("y", labels))}
    np.savez(folder / "all.npz", **arrays)
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(folder / "model")
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size).save_pretrained(folder / "model")
    lines = [
        f"  - {{name: {t}, train_folder: {folder}/{t}/train, eval_folder: {folder}/{t}/eval}}"
        for t in "ab"
    ]
    (folder / "folders.yaml").write_text(
        "\n".join([f"model_name_or_path: {folder}/model", "max_steps: 2", "tasks:", *lines, ""])
    )
    (folder / "arrays.yaml").write_text(f"""
model_config: {{model_type: vit, num_channels: 1, {str(VIT)[1:-1].replace("'", "")}}}
train_file: {folder}/all.npz
eval_file: {folder}/all.npz
image: x
label: y
max_steps: 2
num_seeds: 1
methods: {{plain: {{}}, EWC: {{fisher_samples: 4}}, replay: {{replay_per_class: 2}}}}
""")
    return folder


def test_folders_with_lora_in_two_processes(folder, tmp_path):
    options = ["--use_peft", "--lora_r", "2", "--ewc_space", "weight", "--output_dir", tmp_path]
    code, output = run_recipe(NAME, folder / "folders.yaml", *options, processes=2)
    assert code == 0, output[-6000:]
    runs, content = read_outcomes(tmp_path / "results.json")
    assert runs["EWC"][42].matrix.num_learnt == 2
    assert [task["examples"] for task in content["settings"]["tasks"]] == [[8, 4], [8, 4]]
    assert [task["classes"] for task in content["settings"]["tasks"]] == [[0, 1], [2, 3]]
    assert output.count("Written to") == 1


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        (["--classes_per_task", 2, "--shared_labels", "--grow_head"], ["0-1", "2-3", "4-5"]),
        (["--permute_pixels", "--num_tasks", 2, "--shared_labels"], ["order 1", "order 2"]),
    ],
)
def test_one_data_set_as_several_tasks(folder, tmp_path, options, tasks):
    code, output = run_recipe(NAME, folder / "arrays.yaml", *options, "--output_dir", tmp_path)
    assert code == 0, output[-6000:]
    runs, _ = read_outcomes(tmp_path / "results.json")
    assert [*runs] == ["plain", "EWC", "replay"]
    for repeats in runs.values():
        assert [*repeats[42].matrix.tasks] == tasks
        assert repeats[42].matrix.num_learnt == len(tasks)


# ---- Data ----


def of_folder(folder):
    return ImageTask.from_entry(
        {"name": "b", "train_folder": f"{folder}/b/train", "eval_folder": f"{folder}/b/eval"}, 1
    )


def test_a_folder_for_each_class_whatever_its_name(folder):
    examples = load(of_folder(folder), None, None)
    assert examples.labels == ["test", "train"]
    assert examples.train.labels == ["test"] * 4 + ["train"] * 4


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path):
    for place in ("cat", "dog", ".ipynb_checkpoints", "cat/.thumbnails"):
        (tmp_path / place).mkdir()
        picture(1).save(tmp_path / place / "1.png")
        (tmp_path / place / "._1.png").write_bytes(b"left behind by a system")
    entry = {"name": "t", "train_folder": str(tmp_path), "eval_folder": str(tmp_path)}
    examples = load(ImageTask.from_entry(entry, 1), None, None)
    assert (examples.labels, len(examples.train.rows)) == (["cat", "dog"], 2)


def test_arrays_and_the_tasks_that_they_make(folder):
    file = str(folder / "all.npz")
    given = {"train_file": file, "eval_file": file, "image": "x", "label": "y"}
    task = ImageTask.from_entry({"name": "all", **given}, 1)
    tasks = split_up(task, 3)
    assert [each.name for each in tasks] == ["0-2", "3-5"]
    examples = load(tasks[1], None, None)
    assert examples.labels == ["3", "4", "5"]
    config = ViTConfig(**{**VIT, "image_size": 4, "num_channels": 1})
    ready = with_pixels(
        examples.train, tasks[1], {"3": 0, "4": 1, "5": 2}, pixels_for(config, None)
    )
    assert len(ready) == 12
    assert ready.with_format(None)["labels"][:3] == [0, 1, 2]
    expected = (120 + torch.arange(16.0).reshape(1, 4, 4)) / 255
    assert torch.equal(ready[0]["pixel_values"], expected)


def test_files_with_images_in_a_column(tmp_path):
    picture(7).save(tmp_path / "one.png")
    content = {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}
    Dataset.from_dict({"image": [content], "label": ["a"]}).to_parquet(tmp_path / "one.parquet")
    (tmp_path / "one.csv").write_text("image,label\none.png,a\n")
    for name in ("one.parquet", "one.csv"):
        file = str(tmp_path / name)
        task = ImageTask.from_entry({"name": "t", "train_file": file, "eval_file": file}, 1)
        part = load(task, None, None).train
        pixels = with_pixels(part, task, {"a": 0}, pixels_for(ViTConfig(**VIT), None))
        assert torch.equal(pixels[0]["pixel_values"], torch.full((3, 8, 8), 7 / 255))


def test_pixels_of_models_with_and_without_a_processor(folder):
    grey = picture(128, (4, 6)).convert("L")
    scaled = pixels_for(ViTConfig(**VIT), None)([grey])
    assert torch.equal(scaled, torch.full((1, 3, 8, 8), 128 / 255))
    own = pixels_for(ViTConfig(**VIT), str(folder / "model"))([grey])
    torch.testing.assert_close(own, (scaled - 0.5) / 0.5)


def test_the_order_of_pixels_is_the_tasks_own():
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    plain = pixels_for(ViTConfig(**VIT), None)
    first, again, other = (permuted(plain, seed)([image])[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.flatten().sort().values, plain([image]).flatten().sort().values)
    assert torch.equal(first[0] + 1 / 255, first[1])  # all channels alike


def test_photos_that_lie_on_their_side_are_put_upright(tmp_path):
    """As `datasets` puts them; a camera notes how it was held, and keeps the pixels as they are."""
    bright_above = np.zeros((4, 8, 3), np.uint8)
    bright_above[:2] = 200
    image = Image.fromarray(bright_above)
    (tmp_path / "cat").mkdir()
    for orientation in (1, 3, 6, 8):
        image.getexif()[0x0112] = orientation
        image.save(tmp_path / "cat" / f"{orientation}.png", exif=image.getexif())
    data = _of_folder(str(tmp_path))
    decoded = data.cast_column("image", datasets.Image())
    for row, expected in zip(data, decoded, strict=True):
        found = _loaded(row["image"], "there")
        assert np.array_equal(np.asarray(found), np.asarray(expected["image"]))
    assert np.asarray(_loaded(data[1]["image"], "there"))[:2].max() == 0  # upside down


@pytest.mark.parametrize("damage", [b"\xff", b"\x00"])
def test_photos_whose_exif_cannot_be_read_stay_as_they_lie(damage, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "on its side"
    picture(3, (4, 6)).save(tmp_path / "1.webp", exif=exif)
    content = (tmp_path / "1.webp").read_bytes()
    place = content.find(b"MM\0*")
    (tmp_path / "1.webp").write_bytes(content[:place] + damage + content[place + 1 :])
    with pytest.raises((SyntaxError, TypeError, ValueError)):  # Pillow's own
        ImageOps.exif_transpose(Image.open(tmp_path / "1.webp"))
    found = _loaded({"path": str(tmp_path / "1.webp")}, "here")
    assert found.size == (6, 4)


def test_files_that_are_left_out_of_a_folder_are_told(tmp_path, caplog):
    (tmp_path / "cat" / "more").mkdir(parents=True)
    picture(1).save(tmp_path / "cat" / "1.png")
    for name in ("2.heic", "more/3.HEIC", "notes.txt", ".DS_Store"):
        (tmp_path / "cat" / name).write_text("something")
    assert len(_of_folder(str(tmp_path))) == 1
    (told,) = caplog.messages
    assert "Left out 3 files" in told
    assert "(.heic, .txt)" in told
    caplog.clear()
    picture(1).save(tmp_path / "beside.jpg")
    (tmp_path / "labels.txt").write_text("cat")
    assert len(_of_folder(str(tmp_path))) == 1
    _, told = caplog.messages
    assert f"Left out 1 files of {tmp_path} in no class's folder (.jpg), such as" in told


@pytest.mark.parametrize(("brightest", "is_refused"), [(255, True), (4095, True), (60_000, False)])
def test_grey_of_sixteen_bits_that_would_be_black(brightest, is_refused, tmp_path):
    (tmp_path / "cat").mkdir()
    for k in range(2):
        grey = np.linspace(0, brightest / (2 - k), 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(grey).save(tmp_path / "cat" / f"{k}.png")
    entry = {"name": "t", "train_folder": str(tmp_path), "eval_folder": str(tmp_path)}
    task = ImageTask.from_entry(entry, 1)
    part = load(task, None, None).train
    refused = pytest.raises(ValueError, match=f"none has a pixel above {brightest}")
    with refused if is_refused else nullcontext():
        with_pixels(part, task, {"cat": 0}, pixels_for(ViTConfig(**VIT), None))


# ---- What is refused, in one line ----


def damaged(folder):
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_text("no image")


def cut_off(folder):
    (folder / "cat").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cat" / "1.png")
    whole = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])


def of_floats(folder):
    (folder / "cat").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(folder / "cat" / "1.tiff")


def too_large(folder):
    (folder / "cat").mkdir(parents=True)
    Image.new("1", (15_000, 15_000)).save(folder / "cat" / "1.png")


def with_a_reader_that_fails(folder):
    """By an error of its own kind, as that of .avif."""
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"unreadable")
    Image.register_open("UNREADABLE", failing, lambda start: start == b"unreadable")


def failing(*_):
    raise RuntimeError("no such codec")


def with_an_empty_class(folder):
    (folder / "dog").mkdir(parents=True)
    (folder / "cat").mkdir()
    picture(1).save(folder / "cat" / "1.png")


def not_in_classes(folder):
    folder.mkdir()
    picture(1).save(folder / "1.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged, "1.png of {} cannot be read as an image"),
        (cut_off, "1.png of {} cannot be read as an image"),
        (of_floats, "1.tiff of {} cannot be read as an image: its pixels are float32"),
        (not_in_classes, "{} has no images in folders; needed is one folder for each class"),
        (lambda folder: None, "{} is no folder"),
        (with_an_empty_class, "{}/dog has no images; each folder of"),
        (
            too_large,
            "1.png of {} cannot be read as an image: Image size (225000000 pixels) exceeds",
        ),
        (with_a_reader_that_fails, "1.png of {} cannot be read as an image: no such codec"),
    ],
)
def test_folders_that_cannot_be_learnt_from(make, message, tmp_path):
    folder = tmp_path / "images"
    make(folder)
    entry = {"name": "t", "train_folder": str(folder), "eval_folder": str(folder)}
    task = ImageTask.from_entry(entry, 1)
    with pytest.raises(ValueError) as refused:
        read(task)
    assert message.format(folder) in str(refused.value)


def read(task):
    """The examples as a model takes them; nothing is asked for of them yet."""
    found = load(task, None, None)
    rows = {name: k for k, name in enumerate(found.labels)}
    return with_pixels(found.train, task, rows, pixels_for(ViTConfig(**VIT), None))


def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path):
    (tmp_path / "cat").mkdir()
    shades = np.linspace(0, 0xFFFF, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "cat" / "1.png")
    entry = {"name": "t", "train_folder": str(tmp_path), "eval_folder": str(tmp_path)}
    pixels = read(ImageTask.from_entry(entry, 1))[0]["pixel_values"]
    image = Image.fromarray((shades // 256).astype(np.uint8))
    assert torch.equal(pixels, pixels_for(ViTConfig(**VIT), None)([image])[0])
    assert len(pixels.unique()) > 32


GREY = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(image=GREY), "x.npz has no array 'label'; it has image."),
        (dict(image=GREY / 2, label=[0, 1]), "x.npz has images of float64"),
        (dict(image=GREY, label=[0]), "x.npz has labels of int64 in the shape (1,) for 2 images"),
        (dict(image=GREY[:0], label=np.zeros(0, int)), "x.npz has labels of int64 in the shape"),
    ],
)
def test_arrays_that_cannot_be_learnt_from(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    file = str(tmp_path / "x.npz")
    with pytest.raises(ValueError) as refused:
        read(ImageTask.from_entry({"name": "t", "train_file": file, "eval_file": file}, 1))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("picture,label\na.png,a\n", "x.csv has no column 'image'; it has picture, label."),
        ("image,label\na.png,a\n", "a.png of"),
        ("image,label\n,a\nb.png,a\n", "has an example without an image"),
        ("image,label\n5,a\n", "x.csv has no images in column 'image'"),
    ],
)
def test_columns_that_hold_no_images(content, message, tmp_path):
    (tmp_path / "x.csv").write_text(content)
    file = str(tmp_path / "x.csv")
    with pytest.raises(ValueError) as refused:
        read(ImageTask.from_entry({"name": "t", "train_file": file, "eval_file": file}, 1))
    assert message in str(refused.value)


def prepare(config, *options):
    found = recipe.parsed([str(config), "--output_dir", "x", *options])
    with recipe.one_line_errors():
        recipe.prepared(found[0], found[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes_per_task", "4"], "classes_per_task is 4, which does not divide the 6 classes"),
        (["--classes_per_task", "0"], "classes_per_task is 0"),
        (["--num_tasks", "2"], "num_tasks is 2; it makes tasks of one data set by permute_pixels"),
        (
            ["--grow_head", "--classes_per_task", "2"],
            "grow_head is for one head over all classes; set shared_labels",
        ),
        ([], "tasks are missing"),
        (["--classes_per_task", "2", "--label", "z"], "all.npz has no array 'z'"),
    ],
)
def test_settings_that_cannot_be(options, message, folder, capsys):
    with pytest.raises(SystemExit) as left:
        prepare(folder / "arrays.yaml", *options)
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_model_that_is_not_there(folder, capsys):
    with pytest.raises(SystemExit):
        prepare(folder / "arrays.yaml", "--classes_per_task=2", "--model_name_or_path=./no/model")
    assert "error: ./no/model cannot be loaded as a model: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{hidden_size: 3}", "the model_type among them"),
        ("{model_type: vit, hiden_size: 3}", "model_config has the unknown key 'hiden_size'; did"),
        ("{model_type: vitt}", "Unrecognized model identifier"),
        ("{model_type: vit, hidden_size: big}", "model_config makes no model: "),
        ("{model_type: vit, patch_size: 0}", "model_config makes no model: "),
        (
            "{model_type: vit, num_channels: 2}",
            "num_channels of the model is 2; images have 1 (grey)",
        ),
    ],
)
def test_models_that_cannot_be_made(given, message, folder, tmp_path, capsys):
    lines = (folder / "arrays.yaml").read_text().splitlines()
    changed = [f"model_config: {given}" if "model_config" in line else line for line in lines]
    (tmp_path / "x.yaml").write_text("\n".join([*changed, "classes_per_task: 2"]))
    with pytest.raises(SystemExit):
        prepare(tmp_path / "x.yaml")
    assert message in capsys.readouterr().err
