"""Every kind of data goes through the stages: teacher, encode, student, sample, evaluate."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.models.couplings import CouplingName
from nfm.models.sit import SiT
from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.pipeline.evaluation import evaluate_and_report
from nfm.stages.checkpoint import Checkpoint, load, load_network, save
from nfm.stages.encode import output_spec
from nfm.stages.errors import StageError
from nfm.stages.evaluate import evaluate
from nfm.stages.frechet import all_images, read_images
from nfm.stages.progress import Progress
from nfm.stages.reencode import verify_by_reencoding
from nfm.stages.sample import SampleRequest, sample
from nfm.stages.splits import open_splits
from nfm.stages.support import check_network
from nfm.stages.train_student import train_student
from nfm.stages.train_teacher import held_out_nll
from nfm.storage_specs.format.codecs import int8_scale
from nfm.storage_specs.format.schema import LatentSpec, LayoutName
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, Source
from nfm.storage_specs.reading.verify import find_faults
from tests.tools.kind_runs import KindRun
from tests.tools.kinds import BOTH, KINDS, PLAIN, Kind, scaled_x, stored_x
from tests.tools.small_run import encode_in_process
from tests.tools.stores import LAYOUT_NAMES, tree

PIXELS = Kind(z="float32", views=BOTH, shape=(3, 2, 4), stored=True)
LATENTS = Kind(z="float32", x="bfloat16", views=BOTH, shape=(4, 2, 3), classes=0)
LATENT_X = LATENTS.spec("zarr").x.model_dump(mode="json")
FACES = Kind(z="float16", classes=0, shape=(3, 4, 2), names=True)
EVEN = "got encode.draws = {draws} for images in 2 views .plain, mirrored., .* expected an even number, as {more}, "


def make_run(folder: Path, kind: Kind, layout: LayoutName = "webdataset", *settings: str) -> KindRun:
    return KindRun(kind, layout, str(folder), settings)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> KindRun:
    """A run that nobody changes, of PIXELS with four draws."""
    return make_run(tmp_path_factory.mktemp("pixels"), replace(PIXELS, draws=4))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> KindRun:
    """A run that nobody changes, of LATENTS with four draws."""
    return make_run(tmp_path_factory.mktemp("latents"), replace(LATENTS, draws=4))


@pytest.fixture(params=["pixels", "latents"])
def run(request: pytest.FixtureRequest, pixels: KindRun, latents: KindRun) -> KindRun:
    """Either of them."""
    return {"pixels": pixels, "latents": latents}[request.param]


QUICK = (("pairs-latents-views", "webdataset"), ("pairs-unlabelled", "zarr"), ("pairs-views-int8", "zarr"))
EVERY = [
    pytest.param(name, layout, marks=[] if (name, layout) in QUICK else pytest.mark.long)
    for name, layout in product(KINDS, LAYOUT_NAMES)
]


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_every_kind_goes_from_samples_to_the_report(tmp_path: Path, name: str, layout: LayoutName) -> None:
    run = KindRun(KINDS[name], layout, str(tmp_path))
    spec = run.couplings.spec
    assert not list(find_faults(run.couplings))
    if run.kind.z != "int8":  # whose scale comes from the four images of the first block, too few for the others
        verify_by_reencoding(run.couplings, run.teacher, count=8, seed=0)
    for number, model in enumerate((run.teacher, run.student)):
        out = f"{tmp_path}/images-{number}"
        sample(model, f"{out}.npz", SampleRequest(4))
        arrays = np.load(f"{out}.npz", allow_pickle=False)
        is_latent = isinstance(spec.x, LatentSpec)
        assert (arrays["x"].shape, arrays["x"].dtype) == ((4, *spec.shape), np.float32 if is_latent else np.uint8)
        classes = [i % spec.num_classes for i in range(4)] if spec.has_labels else [-1] * 4
        assert arrays["label"].tolist() == classes
        if spec.shape[0] in (1, 3) and not is_latent:
            sample(model, f"{out}.png", SampleRequest(4))
        else:
            with pytest.raises(StageError, match=r"for a grid, .*expected (pixels|1 or 3 channels); give --out with"):
                sample(model, f"{out}.png", SampleRequest(4))
    students = {"nfm": run.student, "independent": run.student}
    url = run.couplings.url
    summary = evaluate_and_report(run.config, run.samples, url, run.teacher, students, f"{tmp_path}/report")
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["fd"]["features"] == ("latents" if isinstance(spec.x, LatentSpec) else "pixels")
    assert metrics["fd"]["reference"] == spec.rows * len(spec.views)
    assert any("(plain and mirrored)" in line for line in summary) == (len(spec.views) == 2)
    has_grids = "Samples from the same seeds" in (tmp_path / "report/report.html").read_text()
    assert has_grids == (spec.shape[0] in (1, 3) and not isinstance(spec.x, LatentSpec))


def test_a_draw_is_encoded_from_its_view(run: KindRun) -> None:
    """Computed from the definition, one image at a time: z = f(x + η·ε′, label), with x mirrored in odd draws."""
    spec, values = run.couplings.spec, run.kind.values()
    network, _ = load_network(run.teacher, "TarFlow")
    assert spec.views == ["plain", "mirrored"]
    for draw in range(4):
        x = torch.from_numpy(scaled_x(spec, stored_x(values, ("plain", "mirrored")[draw % 2])))
        for index in range(spec.rows):
            block, row = divmod(index, spec.block_rows)
            noise = torch.from_numpy(run.couplings.column("noise", block, draw)[row].astype(np.float32))
            y = torch.tensor([values.label[index]])
            with torch.no_grad():
                z = network((x[index] + spec.nfm.eta * noise)[None], y).z[0]
            stored = torch.from_numpy(run.couplings.z(block, draw)[row].copy())
            torch.testing.assert_close(stored, z, atol=1e-5, rtol=1e-5)


def test_added_draws_go_on_with_the_views(run: KindRun, tmp_path: Path) -> None:
    """Two draws and then two more give the store that four at once give."""
    url, two = f"{tmp_path}/couplings", replace(run, kind=replace(run.kind, draws=2))
    encode_in_process(two.config, f"{run.samples}/train", run.teacher, url, run.layout)
    before = tree(url)
    encode_in_process(run.config, f"{run.samples}/train", run.teacher, url, run.layout)
    store = Store(url)
    assert (store.dataset.id, store.spec.num_draws, store.dataset.version) == (run.couplings.dataset.id, 4, 2)
    after = tree(url)
    assert all(after[path] == data for path, data in before.items() if path.endswith(".tar"))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("z_dtype", ["float16", "int8"])
def test_draws_that_do_not_show_both_views_equally_often_are_refused(
    run: KindRun, tmp_path: Path, draws: int, z_dtype: str
) -> None:
    config = run.config.encode.model_copy(update={"draws": draws, "z_dtype": z_dtype})
    with pytest.raises(StageError, match=EVEN.format(draws=draws, more=draws + 1)):
        output_spec(config, Store(f"{run.samples}/train"), run.teacher, f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_the_scale_of_int8_is_that_of_both_views(run: KindRun, tmp_path: Path) -> None:
    """Of the first block, whose z is there in float32 too."""
    config = run.config.encode.model_copy(update={"z_dtype": "int8"})
    _, scale = output_spec(config, Store(f"{run.samples}/train"), run.teacher, f"{tmp_path}/out")
    z = np.concatenate([run.couplings.z(0, draw) for draw in (0, 1)])
    assert scale is not None
    np.testing.assert_allclose(scale, int8_scale(z), rtol=1e-4)


def record_batches(run: KindRun, coupling: CouplingName, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that a student with a coupling is trained on."""
    batches: list[Batch] = []
    read = CouplingStream.__next__

    def record(stream: CouplingStream) -> Batch:
        batches.append(read(stream))
        return batches[-1]

    with monkeypatch.context() as patch:
        patch.setattr(CouplingStream, "__next__", record)
        student = run.config.student.model_copy(update={"coupling": coupling})
        train_student(student, run.couplings.url, f"{run.folder}/{coupling}")
    return batches


def test_the_independent_coupling_sees_the_same_views(run: KindRun, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, values = run.couplings.spec, run.kind.values()
    both: list[list[Batch]] = [record_batches(run, name, monkeypatch) for name in ("nfm", "independent")]
    assert [len(batches) for batches in both] == [3, 3]
    draws = set[int]()
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.draw, theirs.draw)
        for x, index, draw in zip(theirs.x, theirs.index.tolist(), theirs.draw.tolist(), strict=True):
            draws.add(draw)
            np.testing.assert_array_equal(x, scaled_x(spec, stored_x(values, spec.view_of(draw)))[index])
    assert {spec.view_of(draw) for draw in draws} == set(BOTH)


def test_a_resumed_student_and_a_resumed_teacher_are_the_same_bit_for_bit(
    run: KindRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views go on where they were: a run is ended at its checkpoint after 16 of 24 images, and continued."""
    parts = make_run(tmp_path, run.kind)
    read, left = CouplingStream.__next__, 2

    def end_early(stream: CouplingStream) -> Batch:
        nonlocal left
        if stream.batch_size == 8:  # of a training
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        return read(stream)

    for artifact in ("teacher", "student"):
        expected = load(getattr(run, artifact))
        left = 2
        with monkeypatch.context() as patch:
            patch.setattr(CouplingStream, "__next__", end_early)
            with pytest.raises(KeyboardInterrupt):
                getattr(parts, artifact)
        resumed = load(getattr(parts, artifact))
        assert resumed.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_teacher_is_validated_on_both_views(run: KindRun) -> None:
    """With as many images of each, and the same in each call."""
    val = Store(f"{run.samples}/val")
    network, _ = load_network(run.teacher, "TarFlow")
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            seen.append(x)
            return network(x, y)

    with Progress("validate") as progress:
        value = held_out_nll(Spy(), val, 0.0, torch.device("cpu"), progress)
    assert value == held_out_nll(network, val, 0.0, torch.device("cpu"), Progress("again"))
    shown = sorted(x.numpy().tobytes() for batch in seen for x in batch)
    expected = read_images(val, all_images(val))
    assert shown == sorted(2 * [x.numpy().tobytes() for x in expected])


def test_a_student_learns_from_a_mixture_of_views(run: KindRun, tmp_path: Path) -> None:
    """Of a store with views and one without, of the same images."""
    replace(run.kind, views=PLAIN, draws=3).write(f"{tmp_path}/plain", "zarr")
    sources = [Source(run.couplings.url, 2), Source(f"{tmp_path}/plain", 1)]
    document = train_student(run.config.student, sources, f"{tmp_path}/student")
    assert [entry["weight"] for entry in document["run"]["couplings"]] == [2, 1]


def test_images_are_numbered_view_by_view(tmp_path: Path) -> None:
    for kind in (PIXELS, LATENTS):
        store = Store(replace(kind, z=None).write(f"{tmp_path}/{kind.x}", "zarr").root.url)
        x = read_images(store, all_images(store)).numpy()
        views = [scaled_x(store.spec, stored_x(kind.values(), view)) for view in BOTH]
        np.testing.assert_array_equal(x, np.concatenate(views))
        some = np.array([12, 3, 21, 3])
        np.testing.assert_array_equal(read_images(store, some).numpy(), x[some])


def test_networks_without_classes(tmp_path: Path) -> None:
    """They have no table of labels, and are not guided."""
    run = make_run(tmp_path, FACES)
    for url, network_class in ((run.teacher, TarFlow), (run.student, SiT)):
        network, _ = load_network(url)
        assert isinstance(network, network_class) and network.config.num_classes == 0
        assert not [name for name in network.state_dict() if "class_embed" in name or "y_embedder" in name]
        with pytest.raises(StageError, match=r"got --guidance 2 for a network without classes, .*expected no --guid"):
            sample(url, f"{tmp_path}/x.png", SampleRequest(2, guidance=2.0))
        with pytest.raises(StageError, match="got class 0, expected no --class: the network has none"):
            sample(url, f"{tmp_path}/x.png", SampleRequest(2, classes=(0,)))
        sample(url, f"{tmp_path}/x.png", SampleRequest(2, classes=(-1,)))
    guided = run.config.evaluate.model_copy(update={"guidance": 2.0})
    with pytest.raises(StageError, match="evaluate.guidance 2 for a student without classes; expected evaluate.gui"):
        evaluate(guided, run.samples, run.couplings.url, run.teacher, {"a": run.student})


def test_samples_of_latents_are_what_the_decoder_takes(latents: KindRun, tmp_path: Path) -> None:
    """A teacher that is the identity gives back its noise, scaled and moved."""
    checkpoint = load(latents.teacher)
    tensors = {name: tensor * ("proj_out" not in name) for name, tensor in checkpoint.tensors.items()}
    document = json.loads(json.dumps(checkpoint.document))
    document["run"]["teacher"]["eta"] = 0.0
    save(f"{tmp_path}/identity.safetensors", Checkpoint(tensors, document))
    sample(f"{tmp_path}/identity.safetensors", f"{tmp_path}/x.npz", SampleRequest(5, seed=3))
    noise = torch.randn((5, 4, 2, 3), generator=torch.Generator().manual_seed(3)).numpy()
    x_spec = latents.couplings.spec.x
    assert isinstance(x_spec, LatentSpec) and (x_spec.scale, x_spec.shift) == (0.3611, 0.1159)
    x = np.load(f"{tmp_path}/x.npz", allow_pickle=False)["x"]
    np.testing.assert_allclose(x, noise / 0.3611 + 0.1159, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"dtype": "uint8"}, r"got a teacher of pixels, expected latents of AutoencoderKL efefefef \(scale 0.3611, "),
        (LATENT_X | {"scale": 0.5}, r"a teacher of latents of AutoencoderKL efefefef \(scale 0.5, shift 0.1159\), exp"),
        (LATENT_X | {"scale": 0.0}, "its images are neither pixels nor latents: Input should be greater than"),
        ("pixels", "its images are neither pixels nor latents"),
    ],
)
def test_a_network_of_another_x_is_refused(tmp_path: Path, x: Any, message: str) -> None:
    store = Store(replace(LATENTS, z=None).write(f"{tmp_path}/samples", "zarr").root.url)
    network = TarFlow(TarFlowConfig(4, (2, 3), 1, 8, (1,), head_dim=8))
    with pytest.raises(StageError, match=f"^teacher: .*{message}"):
        check_network(network, {"x": x}, "teacher", store)


def test_a_network_takes_its_latents_in_any_dtype(latents: KindRun) -> None:
    network, document = load_network(latents.teacher)
    assert document["x"] == LATENT_X
    check_network(network, document | {"x": LATENT_X | {"dtype": "float32"}}, latents.teacher, latents.couplings)


def test_a_network_that_says_nothing_of_its_x_takes_pixels(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    network = TarFlow(TarFlowConfig(3, (2, 4), 1, 8, (1,), num_classes=3, head_dim=8))
    check_network(network, {}, "teacher", Store(replace(PIXELS, z=None).write(f"{tmp_path}/x", "zarr").root.url))


SAMPLES = replace(LATENTS, z=None)


@pytest.mark.parametrize(
    ("what", "val"), [("x", replace(SAMPLES, x="float32")), ("views", replace(SAMPLES, views=PLAIN))]
)
def test_train_and_val_are_of_one_kind(tmp_path: Path, what: str, val: Kind) -> None:
    SAMPLES.write(f"{tmp_path}/train", "zarr")
    val.write(f"{tmp_path}/val", "zarr")
    with pytest.raises(StageError, match=f"val: got another {what} than that of .*train; expected the stores of one"):
        open_splits(str(tmp_path))


def test_inception_takes_pictures_alone(latents: KindRun) -> None:
    config = latents.config.evaluate.model_copy(update={"features": "inception"})
    with pytest.raises(StageError, match=r"got latents of AutoencoderKL .* of 4 channels, expected pixels of 1 or 3"):
        evaluate(config, latents.samples, latents.couplings.url, latents.teacher, {})
