"""Whether the z of a coupling store are those of its teacher: some pairs are encoded again."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.models.tarflow import TarFlow
from nfm.stages.checkpoint import load_network, read_teacher_training, weights_sha256
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.support import check_network
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.pixels import to_float
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError

# Differences between stored z and those that the teacher gives now, in units of the root mean square of the latter: the
# largest one, and the root mean square over all. The first has the rounding of the dtype for |z| up to 8, and what
# another machine changes in float32. A store states its dtype and precision itself, so the second is what keeps a
# statement of less precision from hiding other images or noise.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 4e-2, "int8": 4e-2}
RMS_TOLERANCE = {"float32": 1e-4, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1.6e-2}
PRECISION_TOLERANCE = {"fp32": 0.0, "tf32": 2e-2, "bf16": 0.2}  # added to the first
PRECISION_RMS_TOLERANCE = {"fp32": 0.0, "tf32": 2e-3, "bf16": 2e-2}  # added to the second
MAX_CLIPPED = 1e-3  # share of the values of int8 z that may be the largest one, which stands for all beyond it
BATCH = 16  # pairs that pass through the teacher at once


class Reencoding(NamedTuple):
    """How many pairs were encoded again, and by how much they differ (see `verify_by_reencoding`)."""

    num_pairs: int
    largest_difference: float


@torch.no_grad()
def verify_by_reencoding(store: Store, teacher: str, count: int, seed: int) -> Reencoding:
    """Run the teacher again on `count` random pairs of an image and a draw, or on all if the store has fewer. Returns
    their number and the largest difference between their stored z and their new z, in units of the root mean square of
    the new z (of all, or of the dimension if that is larger): nothing that the store says about itself enters the
    measure. Writes nothing.

    Raises StageError for another teacher than the store's, StoreError if η is not the teacher's, if noise is not that
    of the law, or if a difference is too large.
    """
    coupling = store.spec.nfm
    with Progress(f"read {teacher}"):
        network, document = load_network(teacher, "TarFlow")
        assert isinstance(network, TarFlow)
        teacher_sha256 = weights_sha256(network.state_dict())
    if teacher_sha256 != coupling.teacher.sha256:
        raise StageError(f"{teacher}: got another teacher than the one that encoded {store.url}; give that one")
    check_network(network, document, teacher, store)
    eta = read_teacher_training(document, teacher).eta
    if coupling.eta != eta:
        raise StoreError(f"{store.url}: got η = {coupling.eta}, expected {eta}, with which {teacher} was trained")
    pairs = np.random.default_rng(seed).choice(
        store.spec.rows * store.spec.num_draws, min(count, store.spec.rows * store.spec.num_draws), replace=False
    )
    pairs.sort()
    stored, new = [], []
    with Progress("encode again", len(pairs), "pair") as progress:
        for start in range(0, len(pairs), BATCH):
            batch = [divmod(int(pair), store.spec.num_draws) for pair in pairs[start : start + BATCH]]
            noisy, y = zip(*(_teacher_input(store, image, draw) for image, draw in batch), strict=True)
            new.append(network(torch.stack(noisy), torch.tensor(y)).z.numpy())
            stored.append(np.stack([_stored_z(store, image, draw) for image, draw in batch]))
            progress.advance(len(batch))
    stored_z, new_z = np.concatenate(stored), np.concatenate(new)
    difference = np.abs(stored_z.astype(np.float64) - new_z)
    if coupling.z_dtype == "int8":
        difference = np.where(_is_clipped(store, stored_z, new_z), 0.0, difference)
    # int8 rounds in steps of each dimension's own size, so a large dimension is its own unit.
    mean_squares = np.square(new_z, dtype=np.float64).mean(axis=0)
    difference /= np.sqrt(np.maximum(mean_squares, mean_squares.mean()))
    by_pair = difference.reshape(len(pairs), -1).max(axis=1)
    worst = int(np.argmax(np.nan_to_num(by_pair, nan=np.inf)))
    tolerance = TOLERANCE[coupling.z_dtype] + PRECISION_TOLERANCE[coupling.precision]
    if not by_pair[worst] <= tolerance:
        image, draw = divmod(int(pairs[worst]), store.spec.num_draws)
        raise StoreError(
            f"{store.url}: z of image {image}, draw {draw}, is {by_pair[worst]:.2e} of the root mean square of z "
            f"away from what {teacher} gives, expected at most {tolerance}; the store is not what its spec says"
        )
    rms = float(np.sqrt(np.square(difference).mean()))
    rms_tolerance = RMS_TOLERANCE[coupling.z_dtype] + PRECISION_RMS_TOLERANCE[coupling.precision]
    if not rms <= rms_tolerance:
        raise StoreError(
            f"{store.url}: z of {len(pairs)} pairs are {rms:.2e} of the root mean square of z away from what {teacher} "
            f"gives, in the root mean square, expected at most {rms_tolerance}; the store is not what its spec says"
        )
    return Reencoding(len(pairs), float(by_pair[worst]))


def _locate(spec: Spec, image: int) -> tuple[int, int]:
    """The block of an image, and its row in the block."""
    return divmod(image, spec.block_rows)


def _teacher_input(store: Store, image: int, draw: int) -> tuple[torch.Tensor, int]:
    """x + η·ε′ of a pair, (C, H, W), and the label. Raises StoreError if the stored ε′ is not that of the noise law."""
    block, row = _locate(store.spec, image)
    noise_spec = store.spec.nfm.noise
    noise = store.column("noise", block, draw)[row]
    by_law = standard_normal(noise_spec.seed, np.array([image]), draw, store.spec.shape)[0].astype(noise.dtype)
    if noise.tobytes() != by_law.tobytes():
        raise StoreError(
            f"{store.url}: the noise of image {image}, draw {draw}, is not that of law {noise_spec.law} "
            f"with seed {noise_spec.seed}; the store is not what its spec says"
        )
    x = to_float(store.x_of(block, draw)[row], store.spec.x)
    noisy = x + store.spec.nfm.eta * torch.from_numpy(np.array(noise, dtype=np.float32))
    return noisy, int(store.column("label", block)[row])


def _stored_z(store: Store, image: int, draw: int) -> NDArray[np.float32]:
    """The z of a pair, float32 (C, H, W)."""
    block, row = _locate(store.spec, image)
    return np.asarray(store.z(block, draw)[row])


def _is_clipped(store: Store, stored_z: NDArray[np.float32], new_z: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where int8 z has its largest magnitude and the new z lies beyond it. Raises StoreError if that is so in more
    places than of a Gaussian, as the store itself chose the scale."""
    assert store.z_scale is not None
    largest = np.float32(127) * store.z_scale
    clipped: NDArray[np.bool_] = (np.abs(stored_z) >= largest) & (np.abs(new_z) >= largest)
    clipped &= np.sign(stored_z) == np.sign(new_z)
    share = float(clipped.mean())
    if share > MAX_CLIPPED:
        raise StoreError(
            f"{store.url}: {share:.1%} of z lie beyond what int8 holds with its scale, expected at most "
            f"{MAX_CLIPPED:.1%}; the store is not what its spec says"
        )
    return clipped
