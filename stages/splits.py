"""The two sample stores that prepare writes, as the stages after it open them."""

from nfm.stages.errors import StageError
from nfm.storage_specs.format.names import DATASET_FILE
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import Root

SPLITS = ("train", "val")


def open_splits(samples: str) -> tuple[Store, Store]:
    """The stores `<samples>/train` and `<samples>/val`, where `samples` is the folder that prepare wrote.

    Raises StageError if `samples` is one of the two stores, or if images, views or classes of the two differ,
    StoreError if one of them is missing or broken.
    """
    samples = samples.rstrip("/") or samples
    if Root(samples).exists(DATASET_FILE):
        folder, _, name = samples.rpartition("/")
        suggestion = f"{folder or '.'}, " if name in SPLITS else ""
        raise StageError(
            f"{samples}: got a single store, expected {suggestion}the folder that prepare wrote, "
            "with the stores train and val in it"
        )
    train, val = (Store(f"{samples}/{split}", kind="samples") for split in SPLITS)
    for what in ("shape", "class_names", "x", "views"):
        if getattr(val.spec, what) != getattr(train.spec, what):
            raise StageError(
                f"{val.url}: got another {what} than that of {train.url}; expected the stores of one run of prepare"
            )
    return train, val
