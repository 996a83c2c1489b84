"""One case of the fuzzer: the commands that read or continue a changed folder, whose every end is judged."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nfm.stages.checkpoint import load
from tests.tools.fuzz_cases import MODEL_ROLES, Case, change_case
from tests.tools.fuzz_content import (
    Content,
    Delivery,
    Finding,
    check_soundness,
    compare,
    compare_with_id,
    links_in,
    read_content,
    stream_content,
    tuples_content,
    with_views,
    x_or_z_float,
)
from tests.tools.fuzz_files import change_files, read_files
from tests.tools.fuzz_subjects import CONFIG, SETTINGS
from tests.tools.fuzz_workplace import Workplace
from tests.tools.small_run import encode_in_process

COMMANDS_OF_A_STORE = 4  # of a trial, beside reading and verifying


class Trial(Workplace):
    """Runs the commands that are for the folder of a case. Raises Finding for what must not be."""

    def run(self) -> None:
        """All of it."""
        os.environ["NFM_CACHE"] = str(self.folder / "cache")
        role = self.subject.role
        if role == "store":
            self.run_store()
        elif role in ("unfinished", "target", "tuples", "prepared"):
            self.run_unfinished()
        elif role in MODEL_ROLES:
            self.run_model()
        elif role == "state":
            self.run_state()
        else:
            self.run_cache()

    def read(self, url: str, what: str) -> Delivery | None:
        """What `Store` gives, which must be what its id stands for."""
        delivery: Delivery | None = self.call(what, lambda: read_content(url))
        if delivery is not None:
            compare_with_id(delivery, self.subject.contents, what)
            if not delivery.refusals and (links := links_in(delivery.store, ("manifest", "sigma_f", "names"))):
                raise Finding(f"{what} followed links: {links[:3]}")
        return delivery

    def run_store(self) -> None:
        """A complete store: all that reads it, and some that write into it."""
        url = str(self.store)
        delivery = self.read(url, "Store")
        is_sound, _ = self.command("store", "verify", url, unchanged=(url,))
        if is_sound:
            if delivery is None:
                raise Finding("verify called a store sound that Store refuses")
            check_soundness(delivery)
            if links := links_in(delivery.store, tuple(delivery.store.dataset.documents.by_name())):
                raise Finding(f"verify followed links: {links[:3]}")
        commands: list[Callable[[str, Delivery | None, bool], None]] = [
            *(self.stream, self.info, self.convert, self.tuples, self.copy, self.versions, self.repair, self.annotate),
            *(self.tag, self.train, self.encode_more, self.complete_again),
        ]
        for command in self.rng.sample(commands, COMMANDS_OF_A_STORE):
            command(url, delivery, is_sound)

    def stream(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        seed, window = self.rng.randrange(9), self.rng.choice([None, 1, 2])
        streamed = self.call("a stream", lambda: stream_content(url, seed, window), url)
        if streamed is not None:
            compare_with_id(streamed, self.subject.contents, "a stream")
            if delivery is not None:
                compare(streamed, delivery.content, "a stream")
        elif is_sound:
            raise Finding("a store that verify calls sound cannot be streamed")

    def info(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        plot = ("--plot", self.out("plot.png")) if self.rng.random() < 0.1 else ()
        succeeded, text = self.command("store", "info", url, *plot, unchanged=(url,))
        if is_sound and not succeeded:
            raise Finding(f"a store that verify calls sound has no info: {text[-200:]}")

    def convert(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        layouts = ["webdataset", "zarr"]
        if delivery is not None and self.rng.random() < 0.8:
            layouts.remove(delivery.store.spec.layout)
        out, layout = self.out("converted"), self.rng.choice(layouts)
        succeeded, text = self.command("store", "convert", url, out, "--layout", layout, unchanged=(url,))
        if succeeded:
            self.check_moved(delivery, out, "convert", is_sound)
        elif is_sound and "already has layout" not in text:
            raise Finding(f"a store that verify calls sound cannot be converted: {text[-200:]}")

    def check_moved(self, delivery: Delivery | None, out: str, what: str, is_sound: bool) -> None:
        """What convert or copy wrote without an error holds what its source does. A conversion computes again what is
        computed, whatever the source says."""
        if delivery is None:
            raise Finding(f"{what} succeeded with a store that Store refuses")
        moved = read_content(out)
        expected = {name: values for name, values in delivery.content.items() if name != "sigma_f"}
        differing = (set(moved.content) ^ set(delivery.content)) - {"sigma_f"}
        if differing or (moved.refusals and what == "convert"):
            raise Finding(f"{what} wrote a store that is read otherwise: {moved.refusals[:1]} {differing}")
        compare(moved, expected, what, () if is_sound else ("label_counts",))
        succeeded, text = self.command("store", "verify", out)
        if is_sound and not succeeded:
            raise Finding(f"{what} wrote a store that is not sound: {text[-300:]}")

    def tuples(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        out = self.out("tuples")
        succeeded, text = self.command("store", "convert", url, out, "--layout", "tuples", unchanged=(url,))
        if succeeded:
            self.check_tuples(delivery, out)
        elif is_sound and "got a store of samples" not in text:
            raise Finding(f"a store that verify calls sound cannot be exported: {text[-200:]}")

    def check_tuples(self, delivery: Delivery | None, out: str) -> None:
        """An export holds what its source does."""
        if delivery is None:
            raise Finding("an export succeeded with a store that Store refuses")
        content: Content = dict(delivery.content)
        for name in [name for name in content if re.fullmatch("z[0-9]+", name)]:
            content[name] = x_or_z_float(delivery.store, content[name])
        exported = tuples_content(delivery.store.spec, Path(out))
        for name in [name for name in exported if re.fullmatch("z[0-9]+", name)]:
            exported[name] = exported[name].astype(np.float32)
        if unread := exported.keys() - with_views(delivery.store.spec, content).keys():
            raise Finding(f"an export gave {sorted(unread)}, which Store refuses")
        compare(Delivery(delivery.store, exported, []), content, "an export")

    def copy(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        out = self.out("copy")
        succeeded, text = self.command("store", "copy", url, out, unchanged=(url,))
        if succeeded:
            self.check_moved(delivery, out, "copy", is_sound)
        elif is_sound and not re.search(r"/(commits|sums)\b", text):  # of which verify reads nothing
            raise Finding(f"a store that verify calls sound cannot be copied: {text[-200:]}")

    def versions(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        for reference in ("v1", "v2", "v3", "first"):
            version = self.read(f"{url}@{reference}", f"Store at @{reference}")
            succeeded, _ = self.command("store", "verify", f"{url}@{reference}", unchanged=(url,))
            if succeeded:
                if version is None:
                    raise Finding(f"verify called a version sound that Store refuses: {reference}")
                check_soundness(version)

    def repair(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        """After a repair, the command that wrote the store completes it."""
        url = self._write("repaired")
        succeeded, text = self.command("store", "repair", url)
        if not succeeded:
            return
        if "nothing to repair" in text:
            if not is_sound:
                raise Finding("repair finds nothing in a store that verify does not call sound")
            return
        if is_sound:
            raise Finding(f"repair finds something in a store that verify calls sound: {text[:300]}")
        is_forged = self.case.sealed  # maybe with the commit records, by which a repair goes
        if (
            "no block was damaged" in text
            and not is_forged
            and not (verified := self.command("store", "verify", url))[0]
        ):
            raise Finding(f"repair calls a store whole that verify does not call sound: {verified[1][-300:]}")
        self.complete(url, "a repair and its completion")

    def complete(self, url: str, what: str) -> None:
        """What wrote the folder writes it again: it refuses, or the store is right."""
        complete = self.subject.complete
        if complete is None:
            return
        store = f"{url}/train" if self.subject.role == "prepared" else url
        if not self.succeeds(what, lambda: complete(url)):
            return
        delivery = self.read(store, what)
        if delivery is None:
            raise Finding(f"{what}: it succeeded, and the store cannot be opened")
        if not self.case.sealed and delivery.store.dataset.id != self.subject.final_id:
            raise Finding(f"{what}: it succeeded, and the store has another id")
        is_sound, text = self.command("store", "verify", store)
        if is_sound:
            check_soundness(delivery)
        elif "repair" in what and not self.case.sealed and not re.search(r"README\.md|croissant\.json", text):
            # The cards of the frozen stores are worded otherwise today: a lost one of an older version stays lost.
            raise Finding(f"{what}: the store is not sound: {text[-300:]}")

    def complete_again(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        self.complete(self._write("again"), "writing a complete store again")

    def annotate(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        url = self._write("annotated")
        if self.command("store", "annotate", url, "--notes", "fuzz")[0]:
            newest = self.read(url, "Store after annotate")
            if newest is None or delivery is None:
                raise Finding("annotate succeeded with a store that is refused")
            if newest.store.dataset.id != delivery.store.dataset.id or newest.store.dataset.attribution.notes != "fuzz":
                raise Finding("annotate changed more than the attribution, or did not change that")
            compare(newest, delivery.content, "Store after annotate")
        elif is_sound and "1.0" not in self.case.name and not self.case.changes:
            raise Finding("a sound store cannot be annotated")

    def tag(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        url = self._write("tagged")
        if self.command("store", "tag", url, "fuzz")[0]:
            tagged = self.read(f"{url}@fuzz", "Store at @fuzz")
            if is_sound and delivery is not None and (tagged is None or tagged.store.dataset != delivery.store.dataset):
                raise Finding("a tag does not open what was tagged")

    def train(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        out, settings = self.out("student"), [word for setting in SETTINGS for word in ("--set", setting)]
        succeeded, _ = self.command("train-student", *settings, "--couplings", url, "--out", out, unchanged=(url,))
        if succeeded:
            if delivery is None:
                raise Finding("a student was trained with a store that Store refuses")
            load(f"{out}/model.safetensors")

    def encode_more(self, url: str, delivery: Delivery | None, is_sound: bool) -> None:
        """Encode changed samples."""
        teacher = self.subject.teacher
        if teacher is None or not self.case.name.startswith("samples"):
            return
        out = self.out("encoded")
        if self.succeeds("encode", lambda: encode_in_process(CONFIG, url, teacher, out, "webdataset"), url):
            encoded = read_content(out)
            if delivery is None or encoded.refusals or encoded.store.spec.nfm.source != delivery.store.dataset.id:
                raise Finding("encode took samples that are refused, or wrote couplings that are")
            shared = ("x", "label", "index", "names", "label_counts")
            compare(encoded, {name: delivery.content[name] for name in shared if name in delivery.content}, "encode")

    def run_unfinished(self) -> None:
        """What is read must be refused, and what continues it must complete it, or refuse."""
        url, role = str(self.store), self.subject.role
        if role in ("unfinished", "target"):
            self.read(url, "Store")
            self.command("store", "repair", self._write("repaired"))
        complete = self.subject.complete
        assert complete is not None
        if role != "tuples":
            self.complete(url, "a completion")
            if role == "target" and Path(url, "dataset.json").is_file() and self.subject.source is not None:
                moved = self.call("Store", lambda: read_content(url))
                if moved is not None and moved.store.dataset.id == self.subject.final_id and moved.refusals:
                    raise Finding(f"a conversion or copy was continued to damaged files: {moved.refusals[0]}")
        elif self.succeeds("a continued export", lambda: complete(url)):
            assert self.subject.source is not None
            self.check_tuples(read_content(self.subject.source), url)

    def run_model(self) -> None:
        """A checkpoint: what is not one of finite weights is refused; the same weights give the same images."""
        role, original = self.subject.role, self.outside
        path, out = f"{self.store}/{role}.safetensors", self.out("images.npz")
        if self.command("sample", path, "--count", "2", "--out", out, unchanged=(str(self.store),))[0]:
            tensors = load(path).tensors
            for name, tensor in tensors.items():
                if name.startswith("model.") and not (tensor.is_floating_point() and tensor.isfinite().all()):
                    raise Finding(f"images were sampled from {name}, which has no finite numbers")
            sound = load(f"{original}/{role}.safetensors")
            same = tensors.keys() == sound.tensors.keys()
            same = same and all(torch.equal(tensors[name], tensor) for name, tensor in sound.tensors.items())
            fields = [load(url).document["architecture"] for url in (path, f"{original}/{role}.safetensors")]
            self.command("sample", f"{original}/{role}.safetensors", "--count", "2", "--out", self.out("sound.npz"))
            with np.load(out) as images, np.load(self.folder / "sound.npz") as others:
                if (
                    same
                    and fields[0] == fields[1]
                    and role == "student"
                    and not np.array_equal(images["x"], others["x"])
                ):
                    raise Finding("equal weights gave other images")
        if role == "teacher":
            couplings = self.subject.source
            assert couplings is not None
            self.command("store", "verify", couplings, "--reencode", "2", "--teacher", path, unchanged=(couplings,))

    def run_state(self) -> None:
        """A training goes on, or refuses."""
        complete = self.subject.complete
        assert complete is not None
        if self.succeeds("a continued training", lambda: complete(str(self.store))):
            load(f"{self.store}/model.safetensors")

    def run_cache(self) -> None:
        """A stream that finds its cache changed gives the right rows, or refuses."""
        source = self.subject.source
        assert source is not None
        self.made.add("cache")
        cache = self.folder / "cache"
        stream_content(source, 0, None)
        before = read_files(cache)
        self.case.files = dict(before)
        change_case(self.rng, self.case)
        change_files(cache, before, self.case.files, self.outside)
        streamed = self.call("a stream", lambda: stream_content(source, self.rng.randrange(9), None))
        if streamed is not None:
            compare_with_id(streamed, self.subject.contents, "a stream")


def run_trial(case: Case, folder: Path) -> str:
    """Run a case in a new folder, which is deleted. Returns what was found, or ""."""
    try:
        trial = Trial(case, folder)
        trial.run()
        trial.search_for_secret()
    except Finding as finding:
        return str(finding)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ""
