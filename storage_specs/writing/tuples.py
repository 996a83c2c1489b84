"""The export of a coupling store as classic WebDataset files, whose every sample holds x, z, noise and label."""

import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nfm.storage_specs.format.card import tuples_readme
from nfm.storage_specs.format.croissant import tuples_croissant
from nfm.storage_specs.format.names import CROISSANT_FILE, EXPORT_FILE, README_FILE, SIGMA_F_NAME
from nfm.storage_specs.format.sums import ZSums, sum_z
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import compare_sums
from nfm.storage_specs.reading.versions import check_no_version
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.claims import claim

MAX_WRITES = 3  # of one file; if it reads back as something else each time, the storage loses what is written


def export_tuples(store: Store, out: str, progress: Callable[[int], None], options: dict[str, Any] | None) -> int:
    """Write the pairs of a coupling store as k<draw>/<block>.tar, in which every sample has x.npy, z.npy, noise.npy
    and, with labels, cls. Returns the number of files.

    x is of the view of its draw. z that is stored as bfloat16 or int8 is written as the float32 it stands for. Every
    file is read back, also one that an earlier call wrote; if that was interrupted, the same call continues. `progress`
    gets rows. Raises StoreError for a store of samples, if its σ_f or sums are not those of its z, if `out` holds
    anything else, or if the storage returns other bytes than were written.
    """
    spec = store.spec
    if spec.coupling is None:
        raise StoreError(f"{store.url}: got a store of samples, expected one of couplings")
    check_no_version(out, options)
    root = Root(out, options)
    claim(root, EXPORT_FILE, store.dataset.id)
    existing_sizes = root.list_file_sizes()
    tars: dict[str, str] = {}  # sha256 by path
    sums = ZSums.zero(spec)
    for block in range(spec.num_blocks):
        for draw in range(spec.num_draws):
            path = f"k{draw:03d}/{block:06d}.tar"
            tars[path] = _write_checked(root, path, b"".join(_tuples_tar(store, block, draw)), existing_sizes)
            sums.add(sum_z(spec, store.z(block, draw), store.column("label", block)))
        progress(spec.rows_of(block))
    for fault in compare_sums(store, sums):
        raise StoreError(f"{fault.message}; the export was not completed")
    documents = {
        SIGMA_F_NAME: npy_bytes(store.sigma_f),
        CROISSANT_FILE: canonical_json(tuples_croissant(store.dataset, tars)),
        README_FILE: tuples_readme(store.dataset).encode(),
    }
    for path, data in documents.items():
        _write_checked(root, path, data, existing_sizes)
    return spec.num_blocks * spec.num_draws


def _write_checked(root: Root, path: str, data: bytes, existing_sizes: dict[str, int]) -> str:
    """Write a file unless it has these bytes, and read it back. Returns its sha256. Raises StoreError if it cannot be
    read back."""
    expected, is_written = sha256(data), existing_sizes.get(path) == len(data)
    for _ in range(MAX_WRITES):
        if not is_written:
            root.write(path, data)
            is_written = True
        if sha256(root.read(path, len(data))) == expected:
            return expected
        is_written = False
    raise StoreError(f"{root.url}/{path}: got other bytes than were written; the storage is not to be trusted")


def _tuples_tar(store: Store, block: int, draw: int) -> Iterator[bytes]:
    """The tar with the tuples of one block and draw, in pieces: one for each member, and the end."""
    spec = store.spec
    numpy_has_dtype = spec.nfm.z_dtype in ("float32", "float16")
    z = store.column("z", block, draw) if numpy_has_dtype else store.z(block, draw)
    x, noise, label = store.x_of(block, draw), store.column("noise", block, draw), store.column("label", block)
    store.column("index", block)  # not written; a damaged file of it is refused like all others
    for row, index in enumerate(spec.indices(block).tolist()):
        members = {
            "x.npy": npy_bytes(np.asarray(x[row])),
            "z.npy": npy_bytes(np.asarray(z[row])),
            "noise.npy": npy_bytes(np.asarray(noise[row])),
        }
        if spec.has_labels:
            members["cls"] = str(label[row]).encode()
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{index:012d}_k{draw:03d}.{suffix}")
            info.size = len(data)
            padding = bytes(-len(data) % tarfile.BLOCKSIZE)
            yield info.tobuf(tarfile.USTAR_FORMAT) + data + padding
    yield bytes(2 * tarfile.BLOCKSIZE)
