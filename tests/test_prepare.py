"""Images to sample stores, and what happens to images that are none."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from nfm.stages.attribution import AttributionConfig
from nfm.stages.errors import StageError
from nfm.stages.image_files import SourceImage
from nfm.stages.prepare import DataConfig, Images, hold_out, prepare, write_store
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import StoreError

DIGITS = DataConfig(source="digits", image_size=8, channels=1, holdout=0.165, block_rows=128)
FOLDER = DataConfig(source="folder", image_size=12, channels=3, holdout=0.34, block_rows=4)


def test_digits_are_all_there_once_in_equal_shares(tmp_path: Path) -> None:
    prepare(DIGITS, str(tmp_path))
    train, val = Store(f"{tmp_path}/train"), Store(f"{tmp_path}/val")
    assert (train.spec.rows, val.spec.rows) == (1500, 297)
    images = np.concatenate([store.images(np.arange(store.spec.rows)) for store in (train, val)])
    labels = np.concatenate([train.labels(), val.labels()])
    bundle = load_digits()
    expected = {
        (int(label), np.rint(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(bundle.images, bundle.target, strict=True)
    }
    assert {(int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)} == expected
    share = np.bincount(val.labels()) / np.bincount(labels)
    assert share.min() > 0.155
    assert share.max() < 0.175
    first = np.bincount(train.column("label", 0), minlength=10)
    assert first.min() > 0, "a block holds a mix of classes"


def test_samples_in_two_views_hold_the_same_files(tmp_path: Path) -> None:
    """The mirrored view of pixels takes no bytes: readers make it."""
    for views in (1, 2):
        prepare(DIGITS.model_copy(update={"views": views}), f"{tmp_path}/{views}")
    plain, both = (Store(f"{tmp_path}/{views}/train") for views in (1, 2))
    assert (plain.spec.views, both.spec.views) == (["plain"], ["plain", "mirrored"])
    assert {key: file.sha256 for key, file in plain.files.items()} == {
        key: file.sha256 for key, file in both.files.items()
    }
    with pytest.raises(StoreError, match=r"views: existing .*mirrored"):
        prepare(DIGITS, f"{tmp_path}/2")


def test_a_folder_is_resized_with_the_box_filter(images: Path, tmp_path: Path) -> None:
    prepare(FOLDER, f"{tmp_path}/out", images)
    train, val = Store(f"{tmp_path}/out/train"), Store(f"{tmp_path}/out/val")
    assert train.spec.class_names == ["cat", "dog"]
    assert (train.spec.rows, val.spec.rows) == (8, 4)
    stored = {image.tobytes() for store in (train, val) for image in store.images(np.arange(store.spec.rows))}
    for path in images.rglob("*.*"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((12, 12), Image.Resampling.BOX))
        assert pixels.transpose(2, 0, 1).tobytes() in stored


def test_how_images_become_square_is_said_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (images / "val" / name).mkdir(parents=True)
        Image.new("RGB", (9, 6), "red").save(images / "val" / name / "0.png")
    prepare(FOLDER, f"{tmp_path}/out", images)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "images that are not square are stretched to 12×12 as a whole, without a crop (PIL's box filter" in notes[0]


def test_nothing_is_said_of_square_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (20 + i, 20 + i)).save(tmp_path / "images" / "train" / name / f"{i}.png")
    prepare(FOLDER, f"{tmp_path}/out", tmp_path / "images")
    assert "note: " not in capsys.readouterr().err


def test_a_val_folder_is_used_when_there_is_one(images: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (images / "val" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), "red").save(images / "val" / name / "0.png")
    prepare(FOLDER, f"{tmp_path}/out", images)
    assert Store(f"{tmp_path}/out/train").spec.rows == 12
    assert Store(f"{tmp_path}/out/val").spec.rows == 2


def bad_images(images: Path) -> None:
    (images / "train" / "cat" / "text.jpg").write_text("no image")
    whole = (images / "train" / "dog" / "0.jpg").read_bytes()
    (images / "train" / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])


def test_images_that_do_not_decode_are_named_and_nothing_is_written(images: Path, tmp_path: Path) -> None:
    bad_images(images)
    with pytest.raises(
        StageError, match=r"of 1\d images do not decode.*Fix or remove them, or pass --skip-bad-images"
    ) as caught:
        prepare(FOLDER.model_copy(update={"holdout": 0.1}), f"{tmp_path}/out", images)
    assert "cat/text.jpg" in str(caught.value)
    assert "dog/cut.jpg" in str(caught.value)
    assert not (tmp_path / "out" / "train" / "dataset.json").exists()


def test_skipped_images_are_counted(images: Path, tmp_path: Path) -> None:
    bad_images(images)
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)
    train, val = (Store(f"{tmp_path}/out/{split}") for split in ("train", "val"))
    assert (train.spec.rows, val.spec.rows) == (8, 4), "the share held out is one of the good images"
    for store in (train, val):
        assert store.spec.preprocessing["source"]["files"] == 14
        assert store.spec.preprocessing["quarantined"] == 2
    assert set(json.loads((tmp_path / "out" / "quarantine.json").read_text())["images"]) == {
        "train/cat/text.jpg",
        "train/dog/cut.jpg",
    }
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)  # the same command again
    with pytest.raises(StageError, match="do not decode"):
        prepare(FOLDER, f"{tmp_path}/out", images)  # without the flag they are an error again


def test_the_digits_have_no_bad_images_to_skip(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="--skip-bad-images for the digits"):
        prepare(DIGITS, f"{tmp_path}/out", skip_bad_images=True)
    assert not (tmp_path / "out").exists()


def test_bad_images_of_both_folders_are_told_at_once(images: Path, tmp_path: Path) -> None:
    bad_images(images)
    for name in ("cat", "dog"):
        (images / "val" / name).mkdir(parents=True)
        (images / "val" / name / "0.png").write_text("no image")
    with pytest.raises(StageError, match="4 of 16 images do not decode") as caught:
        prepare(FOLDER, f"{tmp_path}/out", images)
    for name in ("train/cat/text.jpg", "train/dog/cut.jpg", "val/cat/0.png", "val/dog/0.png"):
        assert f"{name} (" in str(caught.value)
    assert not list((tmp_path / "out").rglob("dataset.json"))


def test_a_damaged_list_of_bad_images_is_made_again(images: Path, tmp_path: Path) -> None:
    bad_images(images)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quarantine.json").write_text('{"images": {"train/cat/1.jpg": 3}}')
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)
    assert Store(f"{tmp_path}/out/train").spec.preprocessing["quarantined"] == 2


def test_a_class_of_bad_images_alone_is_refused(images: Path, tmp_path: Path) -> None:
    (images / "train" / "emu").mkdir()
    (images / "train" / "emu" / "0.jpg").write_text("no image")
    with pytest.raises(StageError, match=r"got no images in 1 of 3 classes \(emu\)"):
        prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)
    assert not list((tmp_path / "out").rglob("dataset.json"))


def ignored(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What prepare says that it ignored in a folder with 12 images of two classes, all of which it takes."""
    prepare(FOLDER, f"{tmp_path}/out", images)
    train, val = (Store(f"{tmp_path}/out/{split}") for split in ("train", "val"))
    assert train.spec.class_names == ["cat", "dog"]
    assert train.spec.rows + val.spec.rows == 12
    assert train.spec.preprocessing["quarantined"] == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ignored in ")]
    return [note.replace(str(images), "DATA") for note in notes]


def add_system_files(train: Path) -> None:
    """Those of macOS, Windows, a NAS, Jupyter and a file system's check."""
    for name in (".DS_Store", "Thumbs.db", "cat/._0.jpg", "dog/desktop.ini"):
        (train / name).write_bytes(b"\0\5\x16\7")
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "lost+found"):
        (train / name).mkdir()
        (train / name / "0.jpg").write_bytes(b"\0\5\x16\7")


def add_other_files(train: Path) -> None:
    (train / "cat" / "notes.txt").write_text("text")
    (train / "cat" / "x.tiff").write_text("text")
    Image.new("RGB", (9, 9)).save(train / "stray.png")


def add_folders(train: Path) -> None:
    for name in ("cat/kittens", "dog/0.jpg.jpg"):
        (train / name).mkdir()
    Image.new("RGB", (9, 9)).save(train / "cat" / "kittens" / "0.png")


def add_special_files(train: Path) -> None:
    os.mkfifo(train / "cat" / "pipe.jpg")
    (train / "dog" / "nothing.jpg").symlink_to("nowhere.jpg")
    (train / "dog" / "itself.jpg").symlink_to("itself.jpg")
    (train / "emu").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("add", "note"),
    [
        (lambda train: None, None),
        (add_system_files, "hidden, or written by the system: 8 (.DS_Store, …)"),
        (
            add_other_files,
            "files outside class folders: 1 (stray.png); "
            "files not named .jpg, .jpeg, .png, .webp, .gif, .bmp: 2 (cat/notes.txt, …)",
        ),
        (add_folders, "folders inside class folders: 2 (cat/kittens, …)"),
        (add_special_files, "links to nothing, pipes, devices: 4 (emu, …)"),
    ],
)
def test_what_is_no_image_is_named_and_counted(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    add: Callable[[Path], None],
    note: str | None,
) -> None:
    add(images / "train")
    assert ignored(images, tmp_path, capsys) == ([] if note is None else [f"note: ignored in DATA/train: {note}"])


def test_what_lies_beside_train_is_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "validation").mkdir()
    assert ignored(images, tmp_path, capsys) == ["note: ignored in DATA: beside train: 1 (validation)"]


def test_a_home_folder_is_found_behind_an_equals_sign(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves --data=~/images as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare(FOLDER, "~/out", Path("~/images"))
    assert (tmp_path / "out" / "train" / "dataset.json").exists()


def test_links_to_images_and_to_classes_are_followed(images: Path, tmp_path: Path) -> None:
    (images / "train").rename(tmp_path / "elsewhere")
    for name in ("cat", "dog"):
        (images / "train" / name).mkdir(parents=True)
        for file in (tmp_path / "elsewhere" / name).iterdir():
            (images / "train" / name / file.name).symlink_to(file)
    (images / "train" / "tom").symlink_to(tmp_path / "elsewhere" / "cat")
    prepare(FOLDER, f"{tmp_path}/out", images)
    assert Store(f"{tmp_path}/out/train").spec.class_names == ["cat", "dog", "tom"]


FILES = {"0.webp": "WEBP", "0.GIF": "GIF", "0.bmp": "BMP", "0.JPEG": "WEBP", "1.png": "JPEG"}  # and their formats


def test_every_suffix_is_read(tmp_path: Path) -> None:
    """Also in capitals, and whatever the format is."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for suffix, file_format in (
            ("webp", "WEBP"),
            ("GIF", "GIF"),
            ("bmp", "BMP"),
            ("JPEG", "WEBP"),
            ("png", "JPEG"),
        ):
            Image.new("RGB", (9, 9)).save(tmp_path / "images" / "train" / name / f"0.{suffix}", file_format)
    prepare(FOLDER, f"{tmp_path}/out", tmp_path / "images")
    assert sum(Store(f"{tmp_path}/out/{split}").spec.rows for split in ("train", "val")) == 10


def test_a_class_without_images_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "train" / "emu" / "chicks").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(images / "train" / "emu" / "chicks" / "0.png")
    with pytest.raises(StageError, match=r"got no images in 1 of 3 classes \(emu\); expected .*: remove the folder"):
        prepare(FOLDER, f"{tmp_path}/out", images)
    assert "folders inside class folders: 1 (emu/chicks)" in capsys.readouterr().err


def stored_names(out: Path) -> dict[str, str]:
    """The sha256 of the source of each image, by name."""
    tables = [Store(f"{out}/{split}").image_names for split in ("train", "val")]
    return {row["name"]: row["sha256"] for table in tables if table is not None for row in table.to_pylist()}


def test_names_that_are_not_utf8_are_stored_escaped(images: Path, tmp_path: Path) -> None:
    train = os.fsencode(images / "train")
    os.rename(train + b"/cat/0.png", train + b"/cat/\xe9t\xe9.png")
    os.rename(train + b"/dog", train + b"/caf\xe9")
    prepare(FOLDER, f"{tmp_path}/out", images)
    assert Store(f"{tmp_path}/out/train").spec.class_names == ["caf\\xe9", "cat"]
    names = stored_names(tmp_path / "out")
    assert "cat/\\xe9t\\xe9.png" in names
    assert sum(name.startswith("caf\\xe9/") for name in names) == 6


def test_two_names_that_are_stored_as_one_are_refused(images: Path, tmp_path: Path) -> None:
    folder = os.fsencode(images / "train" / "cat")
    os.rename(folder + b"/0.png", folder + b"/\xe9.png")
    os.rename(folder + b"/1.jpg", folder + b"/\\xe9.png")
    with pytest.raises(StageError, match="got 2 names that read"):
        prepare(FOLDER, f"{tmp_path}/out", images)


def test_a_bad_image_with_such_a_name_is_told(images: Path, tmp_path: Path) -> None:
    with open(os.fsencode(images / "train" / "cat") + b"/\xe9.jpg", "wb") as file:
        file.write(b"no image")
    with pytest.raises(StageError, match=r"train/cat/\\xe9\.jpg \(no readable"):
        prepare(FOLDER, f"{tmp_path}/out", images)
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)


def test_the_sha256_in_the_names_is_that_of_the_file(images: Path, tmp_path: Path) -> None:
    prepare(FOLDER, f"{tmp_path}/out", images)
    for name, digest in stored_names(tmp_path / "out").items():
        assert digest == hashlib.sha256((images / "train" / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("images_of_classes", "holdout", "val"),
    [
        ([10, 10], 0.2, [2, 2]),
        ([10, 1], 0.2, [2, 0]),
        ([2, 2], 0.9, [1, 1]),  # one of each class stays in train
        ([1, 1, 6], 0.5, [0, 0, 3]),
    ],
)
def test_each_class_keeps_images_in_train(images_of_classes: list[int], holdout: float, val: list[int]) -> None:
    held_out = hold_out(FOLDER.model_copy(update={"holdout": holdout}), grey_images(images_of_classes))
    assert np.bincount(held_out["val"].labels, minlength=len(val)).tolist() == val
    train = np.bincount(held_out["train"].labels, minlength=len(val))
    assert (train + val).tolist() == images_of_classes
    assert train.min() >= 1


@pytest.mark.parametrize(
    ("images_of_classes", "holdout", "advice"),
    [
        ([1] * 200, 0.5, "no share does, as each class keeps one in train: add images, or a folder val/"),
        ([20] * 5, 0.02, "data.holdout = 0.03 does"),
        ([3], 0.3, "no share does"),
        ([4], 0.9, "data.holdout = 0.62 does"),
    ],
)
def test_a_share_that_leaves_too_few_images_says_which_would_do(
    images_of_classes: list[int], holdout: float, advice: str
) -> None:
    with pytest.raises(StageError, match="expected at least 2 images in each of train and val; ") as caught:
        hold_out(FOLDER.model_copy(update={"holdout": holdout}), grey_images(images_of_classes))
    assert f"; {advice}" in str(caught.value)


def grey_images(images_of_classes: list[int]) -> Images:
    """Black images, so many of each class."""
    labels = np.repeat(np.arange(len(images_of_classes)), images_of_classes)
    return Images(
        load=lambda i: SourceImage(np.zeros((3, 12, 12), np.uint8), "0" * 64),
        names=[str(i) for i in range(len(labels))],
        labels=labels,
        class_names=[str(label) for label in range(len(images_of_classes))],
        identity={},
    )


def test_warnings_of_pillow_do_not_reach_the_user(images: Path, tmp_path: Path) -> None:
    sound = (images / "train" / "dog" / "0.jpg").read_bytes()
    segment = b"Exif\0\0II*\0" + b"\xf0\xff\xff\xff" + bytes(40)
    damaged = sound[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + sound[2:]
    (images / "train" / "dog" / "0.jpg").write_bytes(damaged)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(FOLDER, f"{tmp_path}/out", images)
    assert [str(warning.message) for warning in caught if "PIL" in warning.filename] == []


def test_blocks_that_make_too_many_files_are_refused(tmp_path: Path) -> None:
    single = FOLDER.model_copy(update={"block_rows": 1})
    with pytest.raises(
        StoreError, match=rf"^{tmp_path}/out: .*1000000 rows in blocks of 1 .* larger blocks make fewer"
    ):
        write_store(single, f"{tmp_path}/out", "train", grey_images([1_000_000]), AttributionConfig())
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_else_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path
) -> None:
    prepare(DIGITS, f"{tmp_path}/digits")
    (tmp_path / "other" / "val").mkdir(parents=True)
    (tmp_path / "other" / "val" / "notes.txt").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    for out, message in (("digits/train", "lies inside .*digits/train"), ("other", "other/val: holds notes.txt")):
        with pytest.raises(StoreError, match=message):
            prepare(FOLDER, f"{tmp_path}/{out}", images)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["file", "file/samples"])
def test_a_file_at_the_output_is_said_in_one_line(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match=rf"{tmp_path}/file"):
        prepare(DIGITS, f"{tmp_path}/{out}")
    assert (tmp_path / "file").read_text() == "text"


def test_changed_images_are_refused(images: Path, tmp_path: Path) -> None:
    prepare(FOLDER, f"{tmp_path}/out", images)
    Image.new("RGB", (9, 9)).save(images / "train" / "cat" / "new.png")
    with pytest.raises(StoreError, match="holds another store"):
        prepare(FOLDER, f"{tmp_path}/out", images)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no such folder"):
        prepare(FOLDER, f"{tmp_path}/out", tmp_path / "nothing")
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(StageError, match="got no images in 1 of 1 classes"):
        prepare(FOLDER, f"{tmp_path}/out", tmp_path / "data")
    (tmp_path / "data" / "train" / "cat").rmdir()
    with pytest.raises(StageError, match="got no class folders"):
        prepare(FOLDER, f"{tmp_path}/out", tmp_path / "data")
    with pytest.raises(StageError, match="no folder was given"):
        prepare(FOLDER, f"{tmp_path}/out")


def test_real_photographs_when_they_are_at_hand(tmp_path: Path) -> None:
    """ImageNet images, some greyscale, if a copy lies beside the checkout."""
    import tarfile

    archive = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample.tar"
    if not archive.exists():
        pytest.skip("no ImageNet sample here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "raw", filter="data")
    folders = sorted({path.parent for path in (tmp_path / "raw").rglob("*.*") if path.is_file()})
    (tmp_path / "images" / "train").mkdir(parents=True)
    for folder in folders[:40]:
        folder.rename(tmp_path / "images" / "train" / folder.name)
    config = DataConfig(source="folder", image_size=64, channels=3, holdout=0.5, block_rows=64)
    (tmp_path / "images" / "val").symlink_to(tmp_path / "images" / "train")
    prepare(config, f"{tmp_path}/out", tmp_path / "images")
    assert Store(f"{tmp_path}/out/train").spec.rows == 40
    assert list(find_faults(Store(f"{tmp_path}/out/train"))) == []
